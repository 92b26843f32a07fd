"""The corpus: for every reader its good inputs with one thing spoilt at a time, and inputs that were bad from the beginning."""

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.hostile import kinds, seeds
from tests.hostile.values import BAD, ODD, ODDLY_TYPED, TEXTS

Content = bytes | Callable[[Path], object]  # a function makes what is no regular file


class Case(NamedTuple):
    """name: unique for the reader. refused: it must be; else it may be accepted as well."""

    reader: str
    name: str
    content: Content
    refused: bool = False


@cache
def cases() -> tuple[Case, ...]:
    """Every case, always in the same order."""
    return tuple(case for part in (documents, lora_headers, lora_factors, lora_kinds, lora_disguises, infotexts, png_chunks, damaged, not_files) for case in part())


# JSON ------------------------------------------------------------------------------------------------------------------


def documents() -> Iterator[Case]:
    """Every JSON document with each of its values replaced by each bad one."""
    line = {"prompt": "an owl", "seed": 1, "text": "an owl"}
    for reader, document, wrap, most in (
        ("request", seeds.REQUEST, bytes, None), ("record", seeds.DOCUMENT, seeds.picture, 6), ("manifest", line, bytes, None),
        ("manifest", seeds.PICTURE_LINE, bytes, 6), ("config", seeds.ADAPTER, bytes, None), ("sidecar", seeds.SIDECAR, bytes, 8), ("profile", seeds.PROFILE, bytes, None),
        ("behaviour", seeds.BEHAVIOUR, bytes, None),
        ("testbed", seeds.TESTBED, bytes, None), ("thresholds", seeds.THRESHOLDS, bytes, None), ("captions", seeds.CAPTION, bytes, None),
    ):  # fmt: skip
        for number, path in enumerate(_places(document)):
            where = f"{'/'.join(map(str, path))} of {document.get('file_name', 'it')}"
            values = BAD | ODD | ODDLY_TYPED | {f"text {name}": json.dumps(text).encode() for name, text in TEXTS.items()}
            for index, (name, value) in enumerate(values.items()):
                if name == "million lists" and number or most and number and (index + number) % most:  # a part of all is enough
                    continue
                bad = name in BAD or name in ODD
                if name == "empty" and path and isinstance(path[-1], int):
                    continue  # a list without it
                yield Case(reader, f"{where}: {name}", wrap(_with(document, path, value)), refused=bad and reader not in ("config", "sidecar"))
        yield Case(reader, f"extra field beside {len(document)}", wrap(_with(document, ("no such field",), b"1")))


def _places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield at
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in rows:
        yield from _places(inside, (*at, key))


def _with(document: Any, path: tuple[str | int, ...], value: bytes) -> bytes:
    """The JSON of a document with the raw `value` in one place of it."""
    if not path:
        return value
    mark = "mark of the place"
    copy = json.loads(json.dumps(document))
    inside = copy
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = mark
    return json.dumps(copy).encode().replace(json.dumps(mark).encode(), value)


# LoRA files ------------------------------------------------------------------------------------------------------------


def lora_headers() -> Iterator[Case]:
    whole = seeds.lora()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    first = next(name for name in header if name != "__metadata__")
    places = [(first,), (first, "dtype"), (first, "shape"), (first, "shape", 0), (first, "data_offsets"), (first, "data_offsets", 0),
              (first, "data_offsets", 1), ("__metadata__",), ("__metadata__", "title")]  # fmt: skip
    texts = {f"text {name}": json.dumps(text).encode() for name, text in TEXTS.items()}
    for path in places:
        for name, value in (BAD | ODD | ODDLY_TYPED | texts).items():
            bad = name in BAD or path[0] == first and not (name == "zero" and path[-1] == 0) and name != "numbers"
            yield Case("lora", f"{'/'.join(map(str, path[1:] or path))}: {name}", seeds.framed(_with(header, path, value), data), refused=bad)
    for key in (*seeds.METADATA, "lora_alpha", "network_alpha", "alpha", "unet.lora_alpha", "lora_adapter_metadata", "adapter_config",
                "peft_config", "lora_config", "ss_tag_frequency", "modelspec.trigger_phrase"):  # fmt: skip
        for name, text in TEXTS.items():
            yield Case("lora", f"metadata {key}: {name}", seeds.lora(metadata={key: text}))
    for path in _places(seeds.ADAPTER):
        for name, value in (BAD | ODD | ODDLY_TYPED).items():
            text = _with(seeds.ADAPTER, path, value).decode("utf-8", "replace")
            yield Case("lora", f"settings {'/'.join(map(str, path))}: {name}", seeds.lora(metadata={"lora_adapter_metadata": text}))
    for name in TEXTS:
        tensors = seeds.pair()
        tensors[f"{TEXTS[name]}.lora_down.weight"] = torch.ones(2, 8)
        yield Case("lora", f"name of a tensor: {name}", seeds.lora(tensors), refused=name == "long")
    for dimensions in (8, 9, 64, 65, 10_000):
        shaped = {"a": {"dtype": "F32", "shape": [1] * dimensions, "data_offsets": [0, 4]}}
        yield Case("lora", f"{dimensions} dimensions", seeds.framed(json.dumps(shaped).encode(), bytes(4)), refused=dimensions > 8)
    for key in seeds.CONDITION:
        values = TEXTS | {name: value.decode("utf-8", "replace") for name, value in (BAD | ODD | ODDLY_TYPED).items() if name != "million lists"}
        for name, text in values.items():
            yield Case("condition", f"metadata {key}: {name}", seeds.condition(seeds.CONDITION | {key: text}))
    many = {f"t{index}": {"dtype": "U8", "shape": [1], "data_offsets": [index, index + 1]} for index in range(20_001)}
    yield Case("lora", "20,001 tensors", seeds.framed(json.dumps(many).encode(), bytes(len(many))), refused=True)
    yield Case("lora", "alpha_pattern of 20,000", seeds.lora(metadata={"lora_adapter_metadata": json.dumps(
        seeds.ADAPTER | {"alpha_pattern": {f"layer.{index}": 1 for index in range(20_000)}})}))  # fmt: skip


def lora_factors() -> Iterator[Case]:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        for value in (0.0, 65504.0, 1e38, 1e-40, -1e30, float("nan"), float("inf"), float("-inf")):
            for role in ("lora_down.weight", "lora_up.weight", "alpha"):
                shape = {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "alpha": ()}[role]
                numbers = torch.full(shape, value, dtype=torch.float64).to(dtype)
                yield Case("lora", f"{role} of {value} in {dtype}", seeds.lora(seeds.pair(**{role: numbers})),
                           refused=not bool(numbers.double().isfinite().all()))  # fmt: skip
    for shape in ((), (0,), (8,), (0, 8), (2, 0), (8, 2), (2, 8, 1, 1), (5000, 8), (1, 1, 1, 1, 1, 1, 1, 1)):
        for end in ("down.weight", "up.weight", "alpha", "down.bias"):
            yield Case("condition", f"{end} of shape {shape}", seeds.condition(**{end: torch.ones(shape)}), refused=end[-6:] != "weight")
    for value in (float("nan"), float("inf"), 1e38, -1e30):
        yield Case("condition", f"up of {value}", seeds.condition(**{"up.weight": torch.full((8, 2), value)}), refused=value in (float("inf"),) or value != value)
    for shape in ((), (0,), (16,), (0, 16), (2, 0), (2, 16, 3, 3), (2, 16, 1, 1), (2, 16, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1), (16, 2), (500, 16)):
        for role in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "lora_mid.weight", "hada_w1_a", "lokr_w1", "diff", "oft_blocks"):
            yield Case("lora", f"{role} of shape {shape}", seeds.lora(seeds.pair(**{role: torch.ones(shape)})))


def lora_kinds() -> Iterator[Case]:
    """Each tensor of each kind of update with each shape and number that it cannot have, and without each of its parts."""
    for name, ends in seeds.KINDS.items():
        for end, size in ends.items():
            for shape in ((0,), (3,), (0, 16), (16, 0), (5, 7), (2, 3, 5), (1, 1, 1, 1, 1, 1)):
                one = not size and torch.Size(shape).numel() == 1  # a number in whatever shape
                yield Case("lora", f"{end} of a {name} of shape {shape}", seeds.kind(name, **{end: torch.ones(shape)}), refused=not one)
            for value in (float("nan"), float("inf"), -1e38):
                yield Case("lora", f"{end} of a {name} of {value}", seeds.kind(name, **{end: torch.full(size, value)}), refused=value != -1e38)
            rest = {f"{seeds.Q}.{other}": torch.ones(shape) / 4 for other, shape in ends.items() if other != end}
            if rest:
                yield Case("lora", f"a {name} without {end}", seeds.lora(rest, {}))


def lora_disguises() -> Iterator[Case]:
    """Broken files of every kind of update, settings of PEFT, and other files under a LoRA's name."""
    for name, content in (*kinds.bad(), *kinds.disguised()):
        yield Case("kinds", name, content, refused=True)
    for name, text in kinds.settings():
        yield Case("config", name, text.encode())
        yield Case("kinds", f"settings {name}", seeds.lora(metadata={"lora_adapter_metadata": text}))


# texts of other tools --------------------------------------------------------------------------------------------------


def infotexts() -> Iterator[Case]:
    keys = ("Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model", "Lora hashes", "Hashes", "Version",
            "Civitai resources", "TI hashes", "Method", "Clip skip", "<lora:owl", "Negative prompt")  # fmt: skip
    values = {name: text.replace("\n", " ") for name, text in TEXTS.items()} | {
        f"json {name}": value.decode("utf-8", "replace") for name, value in (BAD | ODD | ODDLY_TYPED).items() if name != "million lists"}  # fmt: skip
    before, _, line = seeds.PARAMETERS.partition("Steps")
    for key in keys:
        for name, value in values.items():
            yield Case("infotext", f"{key}: {name}", f"{before}{key}: {value}, Steps{line}".encode("utf-8", "replace"))
    for digits in (20, 300, 4_000, 5_000):
        yield Case("infotext", f"Size of {digits} digits", f"{before}Size: 64x{'9' * digits}, Steps{line}".encode())
    for name, text in TEXTS.items():
        yield Case("infotext", f"prompt: {name}", f"{text}\nSteps: 5, Seed: 1, CFG scale: 2".encode())
        yield Case("infotext", f"alone: {name}", text.encode(), refused=True)
        yield Case("mask", f"text {name}", text.encode(), refused=True)
        yield Case("mask", f"data of {name}", f"data:image/png;base64,{text}".encode(), refused=True)
    for piece in ('Steps: "', "Steps: {", "Steps: [", "a: {,", 'a: "\\', "Negative prompt: ", "Steps: 1, Seed: 1, Size: 1\n", "(((", "<lora:", "a:b,", ", : ,",
                  '{"a": "', "\r\n", "Steps: , "):  # fmt: skip
        yield Case("infotext", f"{piece!r} many times", piece.encode() * (600_000 // len(piece)))


# pictures --------------------------------------------------------------------------------------------------------------


def png_chunks() -> Iterator[Case]:
    junk = {"nothing": b"", "a byte": b"\1", "zeros": bytes(64), "ones": b"\xff" * 64, "long": b"\1" * 100_000, "text": b"a\0b\0c\0d", "NULs": b"key\0\0" + bytes(40),
            "bomb": b"medley\0\1\0\0\0" + zlib.compress(bytes(70_000_000), 1)}  # fmt: skip
    for kind in (b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"tRNS", b"PLTE", b"pHYs", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT",
                 b"IHDR", b"IEND", b"bKGD", b"tIME", b"abcd", b"\0\0\0\0"):  # fmt: skip
        for name, data in junk.items():
            if name != "bomb" or kind in (b"iTXt", b"zTXt", b"iCCP", b"IDAT"):
                yield Case("picture", f"{kind!r} of {name}", seeds.png(seeds.chunk(kind, data)))
                yield Case("record", f"{kind!r} of {name}", seeds.png(seeds.chunk(kind, data)), refused=True)
    for size in ((0, 8), (8, 0), (2**31 - 1, 1), (60_000, 60_000), (12_000, 9_000), (2**32 - 1, 2**32 - 1), (1, 100_000_001)):
        yield Case("picture", f"{size[0]}x{size[1]}", seeds.png(size=size), refused=True)
    for colour in range(8):
        for bits in (0, 1, 2, 4, 8, 16, 32, 255):
            yield Case("picture", f"colour {colour} of {bits} bits", seeds.png(colour=colour, bits=bits))
    for name, rows in {"no data": b"", "no rows": zlib.compress(b""), "filter": zlib.compress(b"\xff" * 72), "endless": zlib.compress(bytes(50_000_000), 1),
                       "cut": zlib.compress(bytes(72))[:6]}.items():  # fmt: skip
        yield Case("picture", f"rows: {name}", seeds.png(rows=rows))
    for name, data in {"postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "svg": b"<svg/>", "gif": b"GIF89a\1\0\1\0\0\0\0;", "empty": b"",
                       "tiff": b"II*\0\x08\0\0\0\0\0", "jpeg": b"\xff\xd8\xff\xe1\0\x08Exif\0\0", "webp": b"RIFF\x10\0\0\0WEBPVP8 ", "bmp": b"BM" + bytes(20),
                       "pickle": b"\x80\4.", "zip": b"PK\3\4", "html": b"<html>"}.items():  # fmt: skip
        yield Case("picture", name, data, refused=True)
        yield Case("record", name, data, refused=True)


# every reader ----------------------------------------------------------------------------------------------------------


def damaged() -> Iterator[Case]:
    """Every good input cut short, with bits turned over, and with bytes put in."""
    for reader in ("lora", "kinds", "infotext", "manifest", "record", "request", "config", "picture", "mask", "captions", "profile", "behaviour", "testbed", "thresholds", "log", "sidecar"):
        for number, whole in enumerate(seeds.of(reader)):
            for index in range(24):
                place = len(whole) * index // 24
                yield Case(reader, f"good input {number} cut at {place}", whole[:place], refused=reader in ("lora", "kinds", "request", "profile", "behaviour", "thresholds", "testbed"))
                yield Case(reader, f"good input {number}, bit turned at {place}", whole[:place] + bytes([whole[place] ^ 1 << index % 8]) + whole[place + 1 :])
                yield Case(reader, f"good input {number}, bytes put in at {place}", whole[:place] + b"\0\xff\xfe\x80" + whole[place:])
        for name, content in {"empty": b"", "zeros": bytes(1000), "noise": bytes(range(256)) * 8, "a megabyte of brackets": b"[" * 2**20,
                              "a megabyte of quotes": b'"' * 2**20, "a megabyte of commas": b"," * 2**20, "a megabyte of lines": b"\n" * 2**20,
                              "byte order mark": b"\xef\xbb\xbf", "UTF-16": "{}".encode("utf-16")}.items():  # fmt: skip
            yield Case(reader, name, content, refused=reader not in ("log", "captions", "config", "sidecar"))


def not_files() -> Iterator[Case]:
    """What has a file's name and is none: it must not be waited for."""
    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo, "folder": Path.mkdir, "link to itself": lambda path: path.symlink_to(path),
        "link to nothing": lambda path: path.symlink_to("nowhere"), "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "link to the terminal": lambda path: path.symlink_to("/dev/tty"), "socket": _socket, "link to a pipe": _linked_pipe,
    }
    for reader in ("lora", "record", "picture", "manifest", "thresholds", "testbed"):
        for name, make in makers.items():
            yield Case(reader, f"a {name}", make, refused=True)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # the whole path may be longer than a socket's may
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def _linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("a pipe"))
    path.symlink_to(path.with_name("a pipe"))
