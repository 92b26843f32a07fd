"""The record of a picture: the whole request inside its PNG, and a line in the folder's manifest.

Two text chunks: `medley` is JSON (request of this one picture, receipts, notes, versions), `parameters` is what
A1111-like tools read. No clock is in them, and no path unless it is asked for: LoRAs and the model are named, masks and
the pictures of conditions are in it as small pictures. The same request gives the same bytes. The manifest stays on its machine and has the paths.
"""

import json
import os
import re
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from composition import atomic, pictures, untrusted
from composition.log import Log
from composition.prompt_syntax import TAGGED
from composition.record import infotext, recall, request_file
from composition.record.recall import Record
from composition.refusal import Refused
from composition.request import DISTILLED_NOTE, FITTED_NOTE, SAMPLER_NOTE, SCHEMA_VERSION, Receipt, Request, Result
from composition.version import __version__

MANIFEST = "metadata.jsonl"
UNRECORDED = ("order", TAGGED, FITTED_NOTE)  # notes on how the request was settled: the settled request itself is recorded
MENDED, SECONDS = 16, 10.0  # of pictures without a line: how many are looked at, and how old they must be
_PACKAGES = ("diffusers", "torch", "transformers")


# writing ---------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions that a picture depends on."""
    packages = {"medley": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    return packages


def save(result: Result, folder: Path, stem: str = "", index: int = 0, *, keep_paths: bool = False) -> Path:
    """Write picture `index` of the result as the next free `0000.png` of the folder, or as `<stem>.png`, with its
    record, and add its line to the manifest. keep_paths: the record says where LoRAs, masks and the model lay. Never overwrites: raises
    Refused when `<stem>.png` is there."""
    request, image = result.request.alone(index), result.images[index]
    shown = request if keep_paths else recall.without_paths(request)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("medley", json.dumps(_document(shown, result), ensure_ascii=False, sort_keys=True))
    distilled = DISTILLED_NOTE in result.notes if SAMPLER_NOTE in result.notes else None  # notes that no Engine wrote do not say
    info.add_text("parameters", infotext.write(shown, result.receipts, image.size, result.notes.get(SAMPLER_NOTE, ""), distilled=distilled))
    path = publish(image, folder, stem, info)
    Log(folder / MANIFEST).append(_row(request, path, image.size))
    return path


def relist(path: Path, request: Request) -> None:
    """Add the line of a picture of ours, of this request, that its folder's manifest lacks: a kill may fall between the two."""
    Log(path.parent / MANIFEST).append(_row(request, path, pictures.load(path).size))


def mend(folder: Path) -> list[Path]:
    """List the numbered pictures of ours that a kill left without their line; which they are. Those of the last seconds may be in another
    program's hands, and of very many without a line the last alone are looked at."""
    manifest = folder / MANIFEST
    if not folder.is_dir() or manifest.is_file() and manifest.stat().st_mtime_ns >= folder.stat().st_mtime_ns:
        return []
    listed, mended = {row.get("file_name") for row in Log(manifest).rows()}, []
    for name in sorted(name for name in os.listdir(folder) if re.fullmatch(r"\d{4,}\.png", name) and name not in listed)[-MENDED:]:
        with suppress(Refused, OSError):
            record = details(folder / name)
            if record.ours and time.time() - (folder / name).stat().st_mtime > SECONDS:
                relist(folder / name, record.request)
                mended.append(folder / name)
    return mended


def ready(folder: Path) -> Path:
    """The folder, when pictures can be written there. Raises Refused before any work is done for nothing."""
    if folder.suffix.lower() == ".png" and not folder.is_dir():
        raise Refused(f"--out {folder}: name a folder; the pictures in it are numbered")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise Refused(f"--out {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Refused(f"--out {folder}: {there} cannot be written to")
    return folder


def publish(image: Image.Image, folder: Path, stem: str = "", info: PngImagePlugin.PngInfo | None = None) -> Path:
    """Write a PNG whole or not at all, under the next free number or the given stem; never over another file."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [folder / f"{stem}.png"] if stem else (folder / f"{number:04d}.png" for number in count(free(folder)))
    try:
        return atomic.write_new(targets, lambda file: image.save(file, format="PNG", pnginfo=info))
    except FileExistsError:
        raise Refused(f"{folder / f'{stem}.png'} is there already; choose another --out or move it") from None


def free(folder: Path, prefix: str = "") -> int:
    """The number after the highest that the folder's pictures `<prefix>0000...png` or its manifest have.

    Numbers rise with the lines, so that the newest line with one has the highest. The folder is looked through only where it has changed
    since that line was written, or there is none: a thousand pictures are not looked through for each that comes.
    """
    if not folder.is_dir():
        return 0
    pattern, manifest = re.compile(re.escape(prefix) + r"(\d{4,})(?!\d).*\.png"), folder / MANIFEST
    listed = (pattern.fullmatch(str(row.get("file_name"))) for row in Log(manifest).newest())
    newest = next(filter(None, listed), None)
    if newest and manifest.stat().st_mtime_ns >= folder.stat().st_mtime_ns:
        return 1 + int(newest[1])
    matches = [newest, *map(pattern.fullmatch, os.listdir(folder))]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _document(request: Request, result: Result) -> dict[str, Any]:
    receipts = {name: _short(receipt) for name, receipt in zip(request.names, result.receipts, strict=True)}
    read_with = {name: _short(receipt) for name, receipt in result.condition_receipts.items()}
    return {"schema_version": SCHEMA_VERSION, "request": json.loads(request.json()), "receipts": receipts,
            **({"condition_receipts": read_with} if read_with else {}),
            "notes": {name: value for name, value in result.notes.items() if name not in UNRECORDED}, "versions": versions()}


def _short(receipt: Receipt) -> dict[str, Any]:
    """A receipt without its path and the file's own metadata, keys left out counted by reason."""
    return {"sha256": receipt.sha256, "tensor_sha256": receipt.tensor_sha256, "data_sha256": receipt.data_sha256,
            "family": receipt.family,
            "layout": receipt.layout, "tensors": receipt.tensors, "applied": receipt.applied,
            "components": {name: dict(count) for name, count in receipt.components.items()},
            "ignored": {reason: len(keys) for reason, keys in receipt.ignored.items()},
            "no_effect": len(receipt.no_effect), "ranks": dict(receipt.ranks), "alphas": dict(receipt.alphas),
            "category": receipt.category, "triggers": list(receipt.triggers)}


def _row(request: Request, path: Path, size: tuple[int, int]) -> dict[str, Any]:
    """A line for `load_dataset("imagefolder")`: plain columns, and the request whole as a string."""
    return {"file_name": path.name, "text": request.prompt, "negative": request.negative, "model": request.model,
            "loras": list(request.names), "weights": list(request.weights.values()), "method": request.method,
            "sampler": request.sampler, "steps": request.steps, "guidance": request.guidance, "seed": request.seed,
            "width": size[0], "height": size[1], "request": request.json()}


# reading ---------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Request:
    """The request in a picture file, ours or, as far as it can be read, another tool's. Raises Refused when there is none."""
    return details(path).request


def details(path: Path) -> Record:
    """All that a PNG, JPEG or WebP says of how it was made; of a .json file the request that it is. Raises Refused when it says nothing that can
    be read."""
    if path.suffix.lower() == ".json":
        return request_file.details(path)
    _, text = pictures.load_with_texts(path)
    if "medley" in text:
        return _ours(text["medley"], path)
    if "parameters" in text and not text["parameters"].lstrip().startswith("{"):
        reading = infotext.read(text["parameters"])
        return Record(reading.request, model=reading.model, remarks=reading.remarks, ours=False, hashes=reading.hashes)
    others = {"parameters": "SwarmUI", "workflow": "ComfyUI", "invokeai_metadata": "InvokeAI", "prompt": "ComfyUI"}
    tool = next((name for key, name in others.items() if key in text), None)
    if tool:
        raise Refused(f"{path} was made by {tool}, whose record Medley does not read; it reads its own and A1111's")
    raise Refused(f"{path} has no request in it: it was not made by Medley or an A1111-like tool, its metadata was "
                  "stripped, or it is a strip of several pictures")


def _ours(text: str, path: Path) -> Record:
    try:
        document = untrusted.parse(text)
        request = document["request"]
        receipts, notes, packages, read_with = (document.get(key, {}) for key in ("receipts", "notes", "versions", "condition_receipts"))
        if not all(isinstance(part, dict) for part in (request, receipts, notes, packages, read_with, *receipts.values(), *read_with.values())):
            raise TypeError
    except untrusted.Unreadable as error:
        raise Refused(f"{path} has a medley record that is damaged: its text {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise Refused(f"{path} has a medley record that is damaged") from None
    read_back = Request.read(json.dumps(request))
    return Record(read_back, receipts=receipts, notes=notes, versions=packages, model=read_back.model, condition_receipts=read_with)
