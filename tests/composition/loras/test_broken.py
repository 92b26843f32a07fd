"""Files that are broken, hostile or no LoRA at all: refused in plain words, never read wrong, never executed."""

import json
import os
import pickle
import struct

import pytest
import torch

from composition.loras import reader, safetensors
from composition.refusal import Refused
from tests import toys
from tests.composition.loras import lora_writers as writers


@pytest.fixture(scope="module")
def parts():
    pipe = toys.sd()
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


KEY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight"


def pair(**extra) -> dict[str, torch.Tensor]:
    return {DOWN: torch.ones(2, 16), UP: torch.ones(16, 2), f"{KEY}.alpha": torch.tensor(1.0)} | extra


def raw(header: object, numbers: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers


def entry(first: int = 0, last: int = 4, dtype: str = "F32", shape: object = (1,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


FOUR = b"\0\0\0\0"
GOOD = raw({"a": entry()}, FOUR)
TEXT = json.dumps({"a": entry()}).encode()
BROKEN = {
    "empty": b"",
    "short": b"\0" * 9,
    "zeros": b"\0" * 64,
    "pickle": pickle.dumps({"a": 1}, protocol=4),
    "zip": b"PK\x03\x04" + b"\0" * 64,
    "page": b"<!DOCTYPE html><html>Log in</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "json": b'{"lora": 1, "alpha": 2}',
    "noise": bytes(range(256)) * 8,
    "header past the end": raw({"a": entry()}, FOUR, length=10_000),
    "header length 0": raw({"a": entry()}, FOUR, length=0),
    "header length u64 max": raw({"a": entry()}, FOUR, length=2**64 - 1),
    "header over the cap": raw({"a": entry()}, FOUR, length=safetensors.MAX_HEADER_BYTES + 1),
    "header 100 MB": raw({"a": entry()}, FOUR, length=100_000_001),
    "header cut": GOOD[:20],
    "numbers cut": GOOD[:-1],
    "numbers left over": GOOD + b"\0",
    "no tensors": raw({"__metadata__": {"a": "b"}}),
    "no header": raw({}),
    "name twice": raw(TEXT[:-1] + b", " + TEXT[1:], FOUR),
    "field twice": raw(b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}', FOUR),
    "overlap": raw({"a": entry(), "b": entry()}, FOUR),
    "hole": raw({"a": entry(), "b": entry(8, 12)}, FOUR * 3),
    "offsets backwards": raw({"a": entry(4, 0)}, FOUR),
    "offsets beyond": raw({"a": entry(0, 400)}, FOUR),
    "negative offset": raw({"a": entry(-4, 0)}, FOUR),
    "wrong size": raw({"a": entry(shape=(3,))}, FOUR),
    "huge shape": raw({"a": entry(shape=(2**62, 2**62))}, FOUR),
    "negative shape": raw({"a": entry(shape=(-1,))}, FOUR),
    "shape of words": raw({"a": entry(shape="one")}, FOUR),
    "unknown dtype": raw({"a": entry(dtype="F31")}, FOUR),
    "four bits": raw({"a": entry(0, 1, "F4", (2,))}, b"\0"),
    "deep": raw(b'{"a":' + b"[" * 500_000, FOUR),
    "deep and closed": raw(b'{"a":' + b"[" * 5_000 + b"]" * 5_000 + b"}", FOUR),
    "huge number": raw(b'{"a":' + b"9" * 10_000 + b"}", FOUR),
    "not utf-8": raw(b'{"\xff\xfe":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "metadata words alone": raw({"__metadata__": "words", "a": entry()}, FOUR),
    "half a letter in a name": raw(b'{"\\ud83d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', FOUR),
    "many dimensions": raw({"a": entry(shape=(1,) * 100)}, FOUR),
    "empty and huge": raw({"a": entry(0, 0, shape=(0, 2**62, 2**62))}),
    "shape of truths": raw({"a": entry(shape=(True,))}, FOUR),
    "metadata a list": raw({"__metadata__": [1], "a": entry()}, FOUR),
    "entry a number": raw({"a": 1}, FOUR),
    "list": raw([1, 2]),
    "not a lora": GOOD,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(case, parts, tmp_path):
    path = tmp_path / "owl.safetensors"
    path.write_bytes(BROKEN[case])
    for allow_partial in (False, True):
        with pytest.raises(Refused, match=r"^owl\.safetensors") as refused:
            reader.read(path, parts, "sd", allow_partial=allow_partial)
    assert len(str(refused.value)) < 600 and str(tmp_path) not in str(refused.value)
    if case != "not a lora":
        with pytest.raises(Refused):
            reader.inspect(path)


def test_every_prefix_of_a_good_file_is_refused(parts, tmp_path):
    """Cut anywhere, a file is never read as a smaller one."""
    whole = writers.save(tmp_path / "a.safetensors", (pair(), {})).read_bytes()
    path = tmp_path / "b.safetensors"
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(Refused):
            reader.inspect(path)


def test_flipped_bytes_never_surprise(parts, tmp_path):
    """A flipped bit in the header: refused, or a receipt that still accounts for every tensor."""
    whole = writers.save(tmp_path / "a.safetensors", (pair(), {"title": "t"})).read_bytes()
    path = tmp_path / "b.safetensors"
    for place in range(0, 8 + int.from_bytes(whole[:8], "little"), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            receipt = reader.read(path, parts, "sd", allow_partial=True).receipt
        except Refused:
            continue
        assert receipt.applied + sum(len(keys) for keys in receipt.ignored.values()) == receipt.tensors


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.pth", "a.PT", "a.pkl"])
def test_pickles_are_not_opened(name, parts, tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(ran),))

    for path in (tmp_path / name, tmp_path / "b.safetensors"):
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(Refused, match="pickle"):
            reader.read(path, parts, "sd")
    assert not ran.exists()


def test_what_is_no_file(parts, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with open(tmp_path / "big.safetensors", "wb") as big:
        big.truncate(safetensors.MAX_BYTES + 1)  # sparse: it takes no room
    words = {
        "none.safetensors": "no file", "folder.safetensors": "folder", "pipe.safetensors": "pipe or a device",
        "loop.safetensors": "loop.safetensors", "notes.txt": "only kind", "big.safetensors": "at most",
        "a" * 300 + ".safetensors": "a", "a\0b.safetensors": "safetensors",
    }  # fmt: skip
    for name, said in words.items():
        with pytest.raises(Refused, match=said):
            reader.read(tmp_path / name, parts, "sd")


def test_too_many_tensors(tmp_path):
    header = {f"t{index}": entry(index, index + 1, "U8") for index in range(safetensors.MAX_TENSORS + 1)}
    (tmp_path / "a.safetensors").write_bytes(raw(header, b"\0" * len(header)))
    with pytest.raises(Refused, match="20001 tensors"):
        reader.inspect(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("key", [DOWN, UP, f"{KEY}.alpha", "other"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(key, value, dtype, parts, tmp_path):
    if dtype == torch.float8_e4m3fn:
        value = float("nan")  # the only one it has
    tensors = pair(other=torch.ones(1))
    spoilt = tensors[key].clone().flatten()
    spoilt[-1] = value
    tensors[key] = spoilt.reshape(tensors[key].shape).to(dtype)
    path = writers.save(tmp_path / "a.safetensors", (tensors, {}))
    for use in (lambda: reader.read(path, parts, "sd", allow_partial=True), lambda: reader.inspect(path)):
        with pytest.raises(Refused, match=f"'{key}' holds NaN or infinity"):
            use()


ODD = {
    "rank 0": {DOWN: torch.ones(0, 16), UP: torch.ones(16, 0)},
    "no inputs": {DOWN: torch.ones(2, 0)},
    "a vector": {DOWN: torch.ones(16)},
    "a number": {UP: torch.tensor(1.0)},
    "ranks differ": {UP: torch.ones(16, 3)},
    "turned round": {DOWN: torch.ones(16, 2), UP: torch.ones(2, 16)},
    "a 3x3 for a linear": {DOWN: torch.ones(2, 16, 3, 3)},
    "five dimensions": {DOWN: torch.ones(2, 16, 1, 1, 1)},
    "alpha of three": {f"{KEY}.alpha": torch.ones(3)},
    "alpha of none": {f"{KEY}.alpha": torch.ones(0)},
    "complex alpha": {f"{KEY}.alpha": torch.tensor(1j)},
    "overflow": {UP: torch.full((16, 2), 1e38), f"{KEY}.alpha": torch.tensor(1e6)},
}


@pytest.mark.parametrize("case", ODD)
def test_factors_that_are_none(case, parts, tmp_path):
    path = writers.save(tmp_path / "a.safetensors", (pair(**ODD[case]), {}))
    with pytest.raises(Refused, match=r"^a\.safetensors"):
        reader.read(path, parts, "sd", allow_partial=True)


def test_strange_but_lawful(parts, tmp_path):
    """Rank above the layer's width, enormous finite numbers, a negative alpha, any name: read as written."""
    tensors = {DOWN: torch.full((40, 16), 1e30), UP: torch.ones(16, 40), f"{KEY}.alpha": torch.tensor(-40.0)}
    name = "сова 🦉 " + "x" * 200
    lora = reader.read(writers.save(tmp_path / f"{name}.safetensors", (tensors, {"title": "<script>"})), parts, "sd")
    (made,) = lora.factors["unet"].values()
    assert (made.rank, made.alpha) == (40, -40.0) and torch.equal(made.up, -tensors[UP])
    assert lora.receipt.name == name and lora.receipt.coverage == 1.0


def test_a_kept_file_may_be_replaced(parts, tmp_path):
    """Read once: what was read does not change with the file, and its hash is of what was read."""
    path = writers.save(tmp_path / "a.safetensors", (pair(), {}))
    lora = reader.read(path, parts, "sd")
    before = {key: one.up.clone() for key, one in lora.factors["unet"].items()}
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\xff" * 100)
    assert all(torch.equal(one.up, before[key]) for key, one in lora.factors["unet"].items())
    writers.save(path, (pair(**{UP: torch.zeros(16, 2)}), {}))
    assert reader.read(path, parts, "sd").receipt.sha256 != lora.receipt.sha256


def test_nothing_of_a_file_is_kept_open(parts, tmp_path):
    path = writers.save(tmp_path / "a.safetensors", (pair(), {}))
    lora = reader.read(path, parts, "sd")
    for one in lora.factors["unet"].values():
        assert one.down.untyped_storage().nbytes() == one.down.numel() * 4
        assert one.up.untyped_storage().nbytes() == one.up.numel() * 4
    path.unlink()
    assert lora.factors["unet"]
