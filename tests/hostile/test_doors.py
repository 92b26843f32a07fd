"""Files of others come in by their doors alone: a new reader that opens one by itself is seen here."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.hostile.run import ROOT

OURS = {  # what Medley wrote itself a moment before, or is the door
    "json.loads": {"composition/untrusted.py", "composition/log.py", "composition/loras/writer.py", "composition/batch.py", "composition/record/png.py",
                   "app/evaluation/run.py", "app/evaluation/wording.py", "app/cli/tables.py", "retrieval/cards.py", "retrieval/headers.py"},
    "Image.open": {"composition/pictures.py"}, "torch.load": {"composition/loras/unpickle.py", "composition/training/state.py", "composition/training/gates.py", "retrieval/training.py"},  # with weights_only
    "json.load": set(), "pickle.load": set(), "pickle.loads": set(), "yaml.load": set(), "safetensors.torch.load_file": set(), "np.load": {"app/lora_library.py"},
}  # fmt: skip


def calls(file: Path) -> Iterator[str]:
    """Every call in a file as it is written: "json.loads"."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def test_nothing_of_others_is_opened_beside_the_doors():
    seen: dict[str, set[str]] = {name: set() for name in OURS}
    for room in ("composition", "retrieval", "app"):
        for file in (ROOT / room).rglob("*.py"):
            for call in calls(file):
                if call in seen:
                    seen[call].add(file.relative_to(ROOT).as_posix())
    assert {name: files - OURS[name] for name, files in seen.items() if files - OURS[name]} == {}
    assert seen["Image.open"] == OURS["Image.open"]  # the test sees calls at all
