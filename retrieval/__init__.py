"""Finding and judging: the catalogue of LoRA files, the index of LoRAs, what a prompt calls for, and scores of pictures against texts.

What belongs here: what looks at pictures, texts and files of LoRAs without making a picture. What does not: the engine. May import
composition.loras and composition.request.
"""
