"""The record of a picture: the whole request inside its PNG, and a line in the folder's manifest.

Two text chunks: `medley` is JSON (request of this one picture, receipts, notes, versions), `parameters` is what
A1111-like tools read. No clock is in them, and no path unless it is asked for: LoRAs and the model are named, a mask is in it as
a small picture. The same request gives the same bytes. The manifest stays on its machine and has the paths.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from composition import pictures
from composition.prompt_syntax import TAGGED
from composition.record import infotext, recall
from composition.record.recall import Record
from composition.request import DISTILLED_NOTE, SAMPLER_NOTE, SCHEMA_VERSION, Receipt, Refused, Request, Result
from composition.version import __version__

MANIFEST = "metadata.jsonl"
UNRECORDED = ("order", TAGGED)  # what was said while the request was settled: the settled request is recorded itself
_PACKAGES = ("diffusers", "torch", "transformers")


# writing ---------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The versions that a picture depends on."""
    found = {"medley": __version__}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


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
    _append(folder / MANIFEST, _row(request, path, image.size))
    return path


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
    if not stem:
        return _publish_numbered(image, folder, info)
    part = _written(image, folder, info)
    try:
        return _link(part, folder / f"{stem}.png")
    except FileExistsError:
        raise Refused(f"{folder / f'{stem}.png'} is there already; choose another --out or move it") from None
    finally:
        part.unlink(missing_ok=True)


def _publish_numbered(image: Image.Image, folder: Path, info: PngImagePlugin.PngInfo | None) -> Path:
    part = _written(image, folder, info)
    try:
        while True:
            with suppress(FileExistsError):  # another writer took the number: take the next
                return _link(part, folder / f"{free(folder):04d}.png")
    finally:
        part.unlink(missing_ok=True)


def free(folder: Path, prefix: str = "") -> int:
    """The number after the highest that the folder's pictures `<prefix>0000...png` or its manifest have."""
    pattern = re.compile(re.escape(prefix) + r"(\d{4,})(?!\d).*\.png")
    names = [path.name for path in folder.glob("*.png")] if folder.is_dir() else []
    with suppress(OSError, ValueError, TypeError, KeyError):
        names += [json.loads(line)["file_name"] for line in (folder / MANIFEST).read_text("utf-8").splitlines()]
    return 1 + max((int(match[1]) for name in names if (match := pattern.fullmatch(name))), default=-1)


def _written(image: Image.Image, folder: Path, info: PngImagePlugin.PngInfo | None) -> Path:
    """The picture in a file of another name beside its target, on the disk."""
    part = folder / f".{secrets.token_hex(8)}.png.tmp"
    try:
        with part.open("xb") as file:
            image.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return part


def _link(part: Path, target: Path) -> Path:
    """Give a finished file its name in one stroke. Raises FileExistsError when the name is taken."""
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(part, target)
    return target


def _document(request: Request, result: Result) -> dict[str, Any]:
    receipts = {name: _short(receipt) for name, receipt in zip(request.names, result.receipts, strict=True)}
    return {"schema_version": SCHEMA_VERSION, "request": json.loads(request.json()), "receipts": receipts,
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


def _append(manifest: Path, row: Mapping[str, Any]) -> None:
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    handle = os.open(manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(handle, line)  # one write, so that two programs never mix their lines
    finally:
        os.close(handle)


# reading ---------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Request:
    """The request in a picture file, ours or, as far as it can be read, another tool's. Raises Refused when there is none."""
    return details(path).request


def details(path: Path) -> Record:
    """All that a PNG, JPEG or WebP says of how it was made. Raises Refused when it says nothing that can be read."""
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
        document = json.loads(text)
        request = document["request"]
        receipts, notes, made = (document.get(key, {}) for key in ("receipts", "notes", "versions"))
        if not all(isinstance(part, dict) for part in (request, receipts, notes, made, *receipts.values())):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Refused(f"{path} has a medley record that is damaged") from None
    read_back = Request.read(json.dumps(request))
    return Record(read_back, receipts=receipts, notes=notes, versions=made, model=read_back.model)
