"""Pocket, the small bundled model, and the recipe that made it."""
