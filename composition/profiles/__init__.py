"""What was measured of a LoRA or of a set of LoRAs, kept: data and lookup only.

What belongs here: frozen measurements and the store they are found in. What does not: measuring, which needs an Engine (composition.profiling). May import composition.bundled and composition.request.
"""
