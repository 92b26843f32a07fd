"""What people touch: the command line, the page, evaluations, drawings, jobs.

What belongs here: words, pictures about pictures, flags, pages. What does not: making pictures (composition) or scoring them (retrieval). May import
both.
"""
