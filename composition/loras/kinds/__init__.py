"""KINDS OF UPDATE: one file for each way in which a LoRA file states the change of a layer's weight.

What belongs here: what a kind keeps of a layer, how its tensors are checked against the layer, and how the change is computed from
them. What does not: the spelling of keys (`keys`), where alphas come from (`scale`), running it. May import loras.layers, loras.fused and loras.safetensors.
"""
