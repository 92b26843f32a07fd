"""What only a GPU can show: accuracy, offloading, speed and memory on a real card, by one command, `python -m tests.gpu`.

No test lies here but the one that runs the command in small on a processor. Imports of composition, tests.toys and tests.bench only:
the machine need not have what the page, the command line or the suite are made of.
"""
