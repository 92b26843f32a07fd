"""LoRA FILE to FACTORS: safe reading, the spellings of keys, the layers of a base, receipts, names in folders, writing.

What belongs here: everything between bytes of a LoRA file and factors by layer. What does not: running them. May import composition.bundled and composition.request.
"""
