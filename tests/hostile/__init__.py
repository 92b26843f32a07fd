"""Bad input: generators of files and texts that nobody should trust, and a fuzzer of everything that reads them.

    python -m tests.hostile --minutes 30 [--seed N]     fuzzes the readers and prints a table
    python -m tests.hostile --replay FILE               reads one kept input again, with its traceback

The law, for every input: it is accepted or refused in plain words (Refused, one sentence), within a bound on time and memory.
Nothing large is committed: inputs are made when they are wanted.
"""
