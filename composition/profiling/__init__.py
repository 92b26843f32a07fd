"""Measures LoRAs with an Engine: frequency profiles, behaviours, LoraHub weights.

What belongs here: measurements that make pictures. What does not: their lookup (composition.profiles). May import the engine and everything below it.
"""
