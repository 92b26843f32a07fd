"""The page in the browser: components, cards, forms, and the server.

What belongs here: what people see and touch. What does not: making pictures. May import app.drawing, app.jobs and the engine.
"""
