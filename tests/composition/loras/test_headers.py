"""Headers that other writers make differently are read; a list costs headers, and survives whatever lies in a folder."""

import json
import os
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch as library_of_the_format
import torch
from safetensors.torch import save

from composition.loras import library, reader
from composition.loras import safetensors as safe
from composition.refusal import Refused
from tests import toys
from tests.composition.loras import lora_writers as writers

TENSORS = {"b": torch.ones(2, 3), "a": torch.zeros(4, dtype=torch.float16), "empty": torch.empty(0, 5), "number": torch.tensor(3, dtype=torch.int8)}


def file(path: Path, header: object, numbers: bytes, spaces: tuple[bytes, bytes] = (b"", b"")) -> Path:
    text = spaces[0] + (header if isinstance(header, bytes) else json.dumps(header).encode()) + spaces[1]
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return path


def good() -> tuple[dict, bytes]:
    data = save(TENSORS, metadata={"title": "t"})
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


UNUSUAL = {
    "null": lambda header: header | {"__metadata__": None},
    "no metadata": lambda header: {name: entry for name, entry in header.items() if name != "__metadata__"},
    "empty metadata": lambda header: header | {"__metadata__": {}},
    "numbers": lambda header: header | {"__metadata__": {"title": 7, "category": None, "trigger_words": ["a"], "ss_x": {"y": True}}},
    "half letters": lambda header: header | {"__metadata__": {"title": "\ud83d", "\ud83d": "x"}},
    "backwards": lambda header: dict(reversed(header.items())),
    "metadata last": lambda header: {name: header[name] for name in sorted(header, reverse=True)},
    "more fields": lambda header: {name: entry if name == "__metadata__" else entry | {"stride": [1]} for name, entry in header.items()},
}


@pytest.mark.parametrize("spaces", [(b"", b""), (b" \n", b""), (b"", b" \t\r\n" * 5)], ids=["none", "before", "behind"])
@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_headers_are_read(case, spaces, tmp_path):
    header, numbers = good()
    path = file(tmp_path / "a.safetensors", UNUSUAL[case](header), numbers, spaces)
    read = safe.load_safely(path)
    assert all(torch.equal(read.tensors[name], tensor) and read.tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert read.tensor_sha256 == safe.load_safely(file(tmp_path / "b.safetensors", *good())).tensor_sha256
    assert all(isinstance(word, str) for pair in read.metadata.items() for word in pair)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in safe.load_header(path).tensors.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}
    for receipt in (reader.inspect(path), reader.describe(path)):
        assert receipt.tensors == len(TENSORS)


def test_the_library_of_the_format_agrees(tmp_path):
    """Thousands of small changes of a good header: nothing is read that the library refuses, and what both read is the same.

    Its own are other words in the metadata (read here as text) and fields given twice (refused here)."""
    header, numbers = good()
    text, rng, both = json.dumps(header).encode(), random.Random(0), 0
    path = tmp_path / "a.safetensors"
    for _ in range(3000):
        changed = bytearray(text)
        for _ in range(rng.choice((1, 1, 2))):
            place = rng.randrange(len(changed))
            changed[place : place + rng.choice((0, 1))] = bytes([rng.choice(b'0123456789,:[]{}" FIUB')])
        file(path, bytes(changed), numbers)
        try:
            mine = safe.load_safely(path)
        except Refused:
            continue
        theirs = library_of_the_format.load(path.read_bytes())
        assert set(theirs) == set(mine.tensors) and all(torch.equal(theirs[name], mine.tensors[name]) for name in theirs)
        both += 1
    assert both > 50


def read_bytes() -> int:
    """Bytes that this process has read, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not count the bytes a process reads")
def test_a_list_reads_headers_not_files(tmp_path):
    """Four names of one file of 400 MB (sparse: it takes no room): a list reads thousands of bytes, with what the header tells."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    rows, wide = 2**18, 768
    header = {"__metadata__": {"trigger_words": "owl"},
              f"{name}.lora_down.weight": {"dtype": "F16", "shape": [4, wide], "data_offsets": [0, 8 * wide]},
              f"{name}.lora_up.weight": {"dtype": "F16", "shape": [rows * 192, 4], "data_offsets": [8 * wide, 8 * wide + 8 * rows * 192]}}
    text = json.dumps(header).encode()
    with open(tmp_path / "a.safetensors", "wb") as big:
        big.write(struct.pack("<Q", len(text)) + text)
        big.truncate(8 + len(text) + 8 * wide + 8 * rows * 192)
    for other in "bcd":
        (tmp_path / f"{other}.safetensors").symlink_to(tmp_path / "a.safetensors")
    before = read_bytes()
    listed = list(library.listing("none", [tmp_path]))
    assert read_bytes() - before < 200_000
    assert [row.path.stem for row in listed] == list("abcd") and {row.size for row in listed} == {os.stat(tmp_path / "a.safetensors").st_size}
    for row in listed:
        assert row.receipt is not None and row.receipt.triggers == ("owl",) and row.receipt.ranks == {4: 1}
        assert (row.receipt.family, row.receipt.layout, row.receipt.sha256) == ("sd", "kohya", "")


def test_a_description_is_what_an_inspection_tells(tmp_path):
    """As far as a header tells it: the same words, ranks, family, layout and tensors, without alphas and hashes."""
    pipe = toys.sd()
    path = writers.save(tmp_path / "a.safetensors", writers.WRITERS["kohya"](pipe, writers.updates(pipe)))
    whole, header = reader.inspect(path), reader.describe(path)
    same = ("name", "path", "family", "layout", "tensors", "applied", "ignored", "ranks", "title", "category", "triggers", "metadata")
    assert all(getattr(whole, field) == getattr(header, field) for field in same)
    assert whole.alphas and not header.alphas and (header.sha256, header.tensor_sha256) == ("", "")
    (listed,) = library.listing("none", [tmp_path], hashes=True)
    assert listed.receipt == whole


def test_a_list_survives_whatever_lies_there(tmp_path, monkeypatch):
    header, numbers = good()
    file(tmp_path / "good.safetensors", header, numbers)
    file(tmp_path / "null.safetensors", header | {"__metadata__": None}, numbers)
    (tmp_path / "short.safetensors").write_bytes(b"\0")
    (tmp_path / "nowhere.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "itself.safetensors").symlink_to(tmp_path / "itself.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    file(tmp_path / "folder.safetensors" / "inside.safetensors", header, numbers)
    file(tmp_path / "words.safetensors", b'{"\\ud83d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', b"")
    file(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")), header, numbers)
    listed = {row.path.stem: row for row in library.listing("none", [tmp_path, tmp_path / "good.safetensors", tmp_path / "gone"])}
    assert set(listed) == {"good", "null", "short", "nowhere", "itself", "pipe", "inside", "words", "\udcff"}
    assert {name for name, row in listed.items() if row.receipt} == {"good", "null", "inside", "\udcff"}
    assert all(bool(row.trouble) != bool(row.receipt) and "\n" not in row.trouble for row in listed.values())

    def broken(path):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(reader, "load_header", broken)
    assert {row.trouble for row in library.listing("none", [tmp_path / "folder.safetensors"])} == {"cannot be read: ZeroDivisionError: a bug"}
