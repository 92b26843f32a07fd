"""Pictures and charts about pictures: strips, overlays, plots, and one palette.

What belongs here: drawing from plain values. What does not: files, engines, words of a report. May import composition.request and profiles.
"""
