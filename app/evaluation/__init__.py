"""Evaluation: pictures made or given, scored, compared with their uncertainty, and reported."""
