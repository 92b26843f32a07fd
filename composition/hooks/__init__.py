"""What is changed inside a denoiser while it runs: attention seen and overridden, masks, regions, caches, banks of conditions, costs.

What belongs here: context managers that leave the denoiser as they found it. What does not: when a method uses them. May import adapters and backbones and what lies below them.
"""
