"""How Pocket was made: one file per stage, run by ``python -m assets.recipe``. Nothing imports it."""
