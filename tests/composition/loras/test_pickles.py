"""A pickle is read where the user says so alone: its tensors come out the same, whatever asks for more is stopped, and nothing is left."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

from composition.loras import pickles, reader, unpickle
from composition.refusal import Refused
from tests.composition.loras.test_broken import pair


class Runs:
    """Makes a file when it is loaded by a pickle module that does what it is told."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_its_tensors_come_out_the_same(tmp_path):
    shared = torch.arange(32.0).reshape(2, 16)
    torch.save({"state_dict": pair() | {"a": shared, "b": shared.T, "half": shared.half()}, "epoch": 3}, tmp_path / "a.pt")
    out = tmp_path / "out.safetensors"
    out.write_bytes(pickles.read(tmp_path / "a.pt"))
    from safetensors.torch import load_file

    read = load_file(out)
    assert torch.equal(read["b"], shared.T) and read["half"].dtype == torch.float16 and set(read) == {*pair(), "a", "b", "half"}
    assert all(torch.equal(read[name], tensor) for name, tensor in pair().items())


def test_what_asks_for_more_is_stopped(tmp_path):
    for name, content in {"evil.pt": {"a": torch.ones(2), "b": Runs(tmp_path / "ran")}, "nan.pt": {"a": torch.tensor(float("nan"))}}.items():
        torch.save(content, tmp_path / name)
    for name, words in {"evil.pt": "asks for posix.system, which is no tensor and could run code", "nan.pt": "^nan.pt: tensor 'a' holds NaN"}.items():
        with pytest.raises(Refused, match=words) as refused:
            pickles.read(tmp_path / name)
        assert "weights_only" not in str(refused.value), "advice to read it without a guard"
    assert not (tmp_path / "ran").exists()


def test_memory_is_limited(tmp_path, monkeypatch):
    """A tensor of one number that says it is 32 GB large."""
    torch.save({"a": torch.ones(1).expand(8 * 10**9)}, tmp_path / "a.pt")
    monkeypatch.setattr(pickles, "ROOM", 2**30)
    with pytest.raises(Refused, match=r"^a\.pt is no pickle of tensors alone"):
        pickles.read(tmp_path / "a.pt")


def test_time_is_limited(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    monkeypatch.setattr(pickles, "SECONDS", 0.001)
    with pytest.raises(Refused, match=r"is no pickle|was not read as a pickle within"):
        pickles.read(tmp_path / "a.pt")


@pytest.mark.parametrize("document", [[1], "text", [torch.ones(2)], 7, {"a": 1}])
def test_other_documents(document):
    with pytest.raises(ValueError) if not isinstance(document, dict) else pytest.MonkeyPatch.context():
        assert list(unpickle.named(document)) == []


def test_a_list_of_factors_is_a_first_generation_file():
    up, down = torch.ones(16, 2), torch.ones(2, 16)
    assert [name for name, _ in unpickle.named([up, down, up, down])] == ["unet:0:up", "unet:0:down", "unet:1:up", "unet:1:down"]


@pytest.mark.parametrize("code", ["import socket; socket.socket().connect(('127.0.0.1', 9))", "import os; os.system('true')", "import subprocess; subprocess.run(['true'])",
                                  "import os; os.remove('/no such file')"])
def test_the_process_may_do_nothing_else(code):
    line = f"import sys; sys.path.insert(0, {os.path.dirname(unpickle.__file__)!r}); import unpickle; sys.addaudithook(unpickle._barred); {code}"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode and "PermissionError: it asked for" in done.stderr


def test_without_the_flag_the_refusal_names_it(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(Refused, match="a.pt is a pickle file.* medley convert a.pt OUT.safetensors --unsafe-pickle$"):
        reader.inspect(tmp_path / "a.pt")
