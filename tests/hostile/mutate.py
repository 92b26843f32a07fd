"""Random mutations of good inputs: what number `index` of a seed is follows from the two alone."""

import json
import math
import random
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from tests.hostile import kinds, seeds
from tests.hostile.corpus import Case
from tests.hostile.values import BAD, ODD, ODDLY_TYPED, TEXTS

FUZZED = ("lora", "kinds", "condition", "infotext", "manifest", "record", "request", "config", "picture", "mask", "captions", "profile", "behaviour", "testbed", "thresholds", "log")
MAX_BYTES = 2_000_000
_VALUES = [value for value in (BAD | ODD | ODDLY_TYPED).values() if len(value) < 200_000] + [json.dumps(text).encode() for text in TEXTS.values()]
_NUMBERS = (0, 1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def case(seed: int, index: int, readers: Sequence[str] = FUZZED) -> Case:
    """One spoilt input, of these readers in turn."""
    rng = random.Random(f"{seed}/{index}")
    reader = readers[index % len(readers)]
    whole = rng.choice(good(reader))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        whole = rng.choice(_inside(reader))(rng, whole)[:MAX_BYTES]
    return Case(reader, f"seed {seed}, number {index}", whole)


@cache
def good(reader: str) -> list[bytes]:
    return seeds.of(reader)


def _inside(reader: str) -> list[Callable[[random.Random, bytes], bytes]]:
    anywhere = [_bytes, _token, _cut, _again, _grown, _number]
    lora = [*anywhere, _header, _header, _header, _header]
    return {"lora": lora, "kinds": [*lora, _spoilt, _spoilt, _spoilt, _spoilt], "condition": [*anywhere, _header, _header, _header, _header], "record": [*anywhere, _chunks, _chunks, _texts, _texts, _texts],
            "picture": [*anywhere, _chunks, _chunks, _chunks]}.get(reader, [*anywhere, _value, _value, _value])  # fmt: skip


def _place(rng: random.Random, whole: bytes) -> int:
    return rng.randrange(len(whole) + 1)


def _bytes(rng: random.Random, whole: bytes) -> bytes:
    spoilt = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if spoilt:
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
    return bytes(spoilt)


def _token(rng: random.Random, whole: bytes) -> bytes:
    at, token = _place(rng, whole), rng.choice(_VALUES)
    return whole[:at] + token + whole[at + rng.choice((0, 0, 1, len(token))) :]


def _cut(rng: random.Random, whole: bytes) -> bytes:
    first, last = sorted((_place(rng, whole), _place(rng, whole)))
    return whole[:first] if rng.random() < 0.3 else whole[:first] + whole[last:]


def _again(rng: random.Random, whole: bytes) -> bytes:
    first, last = sorted((_place(rng, whole), _place(rng, whole)))
    at = _place(rng, whole)
    return whole[:at] + whole[first:last] + whole[at:]


def _grown(rng: random.Random, whole: bytes) -> bytes:
    """A short piece many times: what takes quadratic time shows."""
    first = _place(rng, whole)
    piece = whole[first : first + rng.randrange(1, 12)] or b"("
    at = _place(rng, whole)
    return whole[:at] + piece * (rng.choice((10, 1000, 30_000, 400_000)) // len(piece)) + whole[at:]


def _number(rng: random.Random, whole: bytes) -> bytes:
    numbers = list(re.finditer(rb"\d{1,20}", whole[:100_000]))
    if not numbers:
        return _bytes(rng, whole)
    match = rng.choice(numbers)
    return whole[: match.start()] + str(rng.choice((*_NUMBERS, -1, "1e400", 0.5))).encode() + whole[match.end() :]


def _value(rng: random.Random, whole: bytes) -> bytes:
    """One value of a JSON text in the place of another."""
    values = list(re.finditer(rb'"(?:[^"\\]|\\.){0,200}"|-?\d+(?:\.\d+)?|true|false|null|\{[^{}]{0,300}\}|\[[^\[\]]{0,300}\]', whole[:100_000]))
    if not values:
        return _token(rng, whole)
    match, other = rng.choice(values), rng.choice(values)
    return whole[: match.start()] + (other[0] if rng.random() < 0.4 else rng.choice(_VALUES)) + whole[match.end() :]


def _header(rng: random.Random, whole: bytes) -> bytes:
    """A LoRA file with another header of the length that it says."""
    length = struct.unpack("<Q", whole[:8].ljust(8, b"\0"))[0] if len(whole) > 8 else 0
    header, data = whole[8 : 8 + length], whole[8 + length :]
    try:
        document: Any = json.loads(header)
        names = [name for name in document if name != "__metadata__"]
        name = rng.choice(names)
        kind = rng.randrange(6)
        if kind == 0:  # other metadata
            document.setdefault("__metadata__", {})[rng.choice(list(seeds.METADATA))] = rng.choice(list(TEXTS.values()))
        elif kind == 1:  # a module by another name
            document = {(re.sub("lora_(down|up)|alpha", rng.choice(("lora_A", "hada_w1_a", "dora_scale", "lora_mid", "lokr_w1", "bias", "oft_blocks", "oft_R", "a1", "diff", "w_norm", "on_input")), key)
                         if key == name else key): value for key, value in document.items()}  # fmt: skip
        elif kind == 2:  # another shape of as many numbers
            shape = document[name]["shape"]
            document[name]["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], [*shape, 1, 1], [len(data) or 1], []))
        elif kind == 3:
            document[name]["dtype"] = rng.choice(("F16", "BF16", "I32", "U8", "F8_E5M2", "BOOL", "C64", "F64", "F4", ""))
        elif kind == 4:
            document[name]["data_offsets"][rng.randrange(2)] = rng.choice(_NUMBERS)
        else:
            settings = _value(rng, json.dumps(seeds.ADAPTER).encode()).decode("utf-8", "replace")
            document.setdefault("__metadata__", {})["lora_adapter_metadata"] = settings
        header = json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        header = rng.choice((_value, _token, _bytes))(rng, header)
    return seeds.framed(header, data)


def _spoilt(rng: random.Random, whole: bytes) -> bytes:
    """A good file of some kind, of which some tensors have another shape, other numbers, or are another kind's."""
    kind = rng.choice(list(kinds.KINDS.values()))
    tensors = kinds.tensors(kind)
    for key in rng.sample(list(tensors), rng.randint(1, len(tensors))):
        tensor = tensors.pop(key)
        shape = list(tensor.shape)
        change = rng.randrange(6)
        if change == 0 and shape:
            shape[rng.randrange(len(shape))] = rng.choice((0, 1, 2, 3, 8, 17, 500))
        elif change == 1:
            shape = rng.choice((shape[::-1], [*shape, 1, 1], shape[1:], [1, *shape]))
        elif change == 2:
            key = rng.choice(list(kinds.tensors(rng.choice(list(kinds.KINDS.values())))))
        elif change == 3:
            continue  # it is missing
        if len(shape) <= 8 and math.prod(shape) <= 1_000_000:
            tensors[key] = torch.full(shape, rng.choice((0.25, 0.25, 0.0, -1e30, 6e4, 1e-40, math.nan, math.inf))).to(rng.choice((torch.float32, torch.float16, torch.bfloat16)))
    return seeds.safetensors(tensors | rng.choice(({}, seeds.pair())), seeds.METADATA | rng.choice(({}, kinds.DYLORA)))


def _chunks(rng: random.Random, whole: bytes) -> bytes:
    """A PNG with a chunk spoilt and its sum put right."""
    chunks, at = [], 8
    while at + 8 <= len(whole) and len(chunks) < 100:
        size = struct.unpack(">I", whole[at : at + 4])[0]
        chunks.append((whole[at + 4 : at + 8], whole[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks:
        return _bytes(rng, whole)
    which = rng.randrange(len(chunks))
    kind, data = chunks[which]
    if kind == b"IDAT" and rng.random() < 0.5:
        data = zlib.compress(rng.choice((_bytes, _cut, _grown))(rng, bytes(72)))
    else:
        data = rng.choice((_bytes, _cut, _again, _grown, _number))(rng, data)
    kinds = (kind, kind, kind, b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"tRNS", b"PLTE", b"iCCP", b"gAMA", b"cHRM", b"acTL", b"fcTL", b"fdAT")
    chunks.insert(which, (rng.choice(kinds), data)) if rng.random() < 0.3 else chunks.__setitem__(which, (rng.choice(kinds), data))
    return whole[:8] + b"".join(seeds.chunk(*chunk) for chunk in chunks)


def _texts(rng: random.Random, whole: bytes) -> bytes:
    """A picture with another record in it."""
    if rng.random() < 0.6:
        text = rng.choice((_value, _value, _token, _bytes, _again))(rng, json.dumps(seeds.DOCUMENT).encode())
        return seeds.picture(text)
    return seeds.picture(parameters=rng.choice((_token, _bytes, _again, _grown, _number))(rng, seeds.PARAMETERS.encode()))
