"""Evaluation: pictures generated or supplied, scored, compared with their uncertainty, and reported.

What belongs here: testbeds, variants, scores, statistics, the report. What does not: flags (app.cli). May import app.drawing, retrieval and
composition.
"""
