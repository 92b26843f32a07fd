"""LoRAs trained on a backbone: concepts from pictures with prompts, conditions from pairs of pictures.

What belongs here: rows of a step, its state, its files. What does not: flags and progress bars. May import annotators, conditions, hooks, adapters, backbones and what lies below.
"""
