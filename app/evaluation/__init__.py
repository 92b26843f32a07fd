"""Evaluation: pictures generated or supplied, scored, compared with their uncertainty, and reported."""
