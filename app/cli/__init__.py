"""The command line: one file for each larger command, flags into requests, tables of what came of it.

What belongs here: the words of the terminal. What does not: anything that the page or an evaluation needs as well. May import all of
app but the page, and the engine.
"""


def main() -> None:
    """The console script `medley`."""
    from app.cli import program

    program.main()
