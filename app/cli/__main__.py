"""`python -m app.cli` is the `medley` command."""

from app.cli import main

main()
