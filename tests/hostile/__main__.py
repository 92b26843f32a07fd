"""python -m tests.hostile: fuzz the readers, or read one kept input again."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description="Fuzz the readers of strangers' files.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", action="append", default=[], help="of these readers alone (as kinds); repeat for more")
    parser.add_argument("--out", type=Path, default=Path("out/hostile"), help="where inputs that were not treated as they must be are kept")
    parser.add_argument("--replay", type=Path, help="a kept input: its reader is in its name")
    arguments = parser.parse_args()
    if arguments.replay:
        _replay(arguments.replay)
        return
    from tests.hostile import mutate, run
    from tests.hostile.readers import READERS

    tally = run.fuzz(arguments.seed, 60 * arguments.minutes, readers=arguments.reader)
    print(tally.table())
    for trouble in tally.troubles[:100]:
        content = mutate.case(arguments.seed, trouble.index, arguments.reader or mutate.FUZZED).content
        assert isinstance(content, bytes)
        path = run.kept(trouble, content, READERS[trouble.reader].suffix, arguments.out)
        print(f"\n{trouble.outcome}: {trouble.why}\nread it again: python -m tests.hostile --replay {path}")
    sys.exit(1 if tally.troubles else 0)


def _replay(path: Path) -> None:
    from tempfile import TemporaryDirectory

    from tests.hostile import worker
    from tests.hostile.corpus import Case

    with TemporaryDirectory() as folder, worker.alarmed():
        result = worker.outcome(Case(path.name.partition("-")[0], path.name, path.read_bytes()), Path(folder) / "0")
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
