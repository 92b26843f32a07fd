"""LoRAs in the model: factors stacked in rank space, gates, the fold, and adapters in training.

What belongs here: what a layer computes with its adapters, and who is live. What does not: files (composition.loras), when a
method opens which gate (composition.methods). May import composition.loras and composition.request.
"""

from composition.adapters.adapters import Adapters

__all__ = ["Adapters"]
