"""From a name, a folder, a file or a hub id to an open, placed pipeline.

What belongs here: finding, reading, quantizing and placing the weights of a base. What does not: running it. May import composition.bundled and composition.request.
"""
