"""python -m tests.hostile: fuzz the readers, or read one kept input again."""

import argparse
import sys
from pathlib import Path


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m tests.hostile", description="Fuzz the readers of strangers' files.")
    arguments.add_argument("--minutes", type=float, default=30)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--out", type=Path, default=Path("out/hostile"), help="where inputs that were not treated as they must be are kept")
    arguments.add_argument("--replay", type=Path, help="a kept input: its reader is in its name")
    given = arguments.parse_args()
    if given.replay:
        _replay(given.replay)
        return
    from tests.hostile import mutate, run
    from tests.hostile.readers import READERS

    tally = run.fuzz(given.seed, 60 * given.minutes)
    print(tally.table())
    for trouble in tally.troubles[:100]:
        content = mutate.case(given.seed, trouble.index).content
        assert isinstance(content, bytes)
        path = run.kept(trouble, content, READERS[trouble.reader].suffix, given.out)
        print(f"\n{trouble.outcome}: {trouble.why}\nread it again: python -m tests.hostile --replay {path}")
    sys.exit(1 if tally.troubles else 0)


def _replay(path: Path) -> None:
    from tempfile import TemporaryDirectory

    from composition.request import Refused
    from tests.hostile.corpus import Case
    from tests.hostile.readers import READERS
    from tests.hostile.worker import outcome

    reader = READERS[path.name.partition("-")[0]]
    with TemporaryDirectory() as folder:
        print({name: value for name, value in outcome(Case(reader.name, path.name, path.read_bytes()), Path(folder) / "0").items()})
        copy = Path(folder) / f"0{reader.suffix}"
        copy.write_bytes(path.read_bytes())
        try:
            reader.read(copy)
        except Refused as error:
            print(f"refused: {error}")


if __name__ == "__main__":
    main()
