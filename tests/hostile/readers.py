"""The readers of strangers' files, each as a function of one file, which returns or raises Refused."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from torch import nn

from app.evaluation import manifest as evaluation_manifest
from app.evaluation import testbed
from composition import manifest, pictures, prompt_syntax, record
from composition.annotators import annotate
from composition.log import Log
from composition.loras import condition, library, reader
from composition.loras.kinds.lora import Factors
from composition.profiles.behaviour import Behaviour
from composition.profiles.frequency import Profile
from composition.record import infotext
from composition.refusal import Refused
from composition.request import Request
from composition.training import captions
from retrieval import judge, sidecars
from retrieval.catalogue import Catalogue
from tests.hostile import seeds


class Reader(NamedTuple):
    """suffix: of the file that it reads. read: what is called with it."""

    name: str
    suffix: str
    read: Callable[[Path], object]


def base() -> dict[str, nn.Module]:
    """A base of a few layers with the names that the seeds' LoRA has."""
    unet, text = nn.Module(), nn.Module()
    for path, layer in seeds.LAYERS.items():
        component, _, inside = path.partition(".")
        _put(unet if component == "unet" else text, inside.split("."), layer())
    return {"unet": unet, "text_encoder": text}


def _put(module: nn.Module, parts: list[str], layer: nn.Module) -> None:
    for part, following in zip(parts, parts[1:], strict=False):
        if not hasattr(module, part):
            module.add_module(part, nn.ModuleList() if following.isdecimal() else nn.Module())
        module = getattr(module, part)
    module.add_module(parts[-1], layer)


BASE = base()
TRANSFORMER = nn.Module()
for layer_path in ("to_q", "to_k", "to_v", "to_out.0"):
    _put(TRANSFORMER, ["transformer_blocks", "0", "attn", *layer_path.split(".")], nn.Linear(8, 8))


def _lora(path: Path) -> None:
    """Every way of reading one: for lists, alone, by name, onto a base whole and in part; each may refuse what another takes."""
    refusals = []
    tries: list[Callable[[], object]] = [
        lambda: reader.describe(path), lambda: reader.inspect(path), lambda: _checked(path, False), lambda: _checked(path, True),
        lambda: list(library.listing("none", [path.parent])), lambda: library.find("no such name", "none", [path.parent])]
    for number, attempt in enumerate(tries):
        try:
            attempt()
        except Refused as error:
            refusals += [error] if number in (1, 3) else []
    if refusals:
        raise refusals[-1]


def _checked(path: Path, allow_partial: bool) -> None:
    lora = reader.read(path, BASE, "sd", allow_partial=allow_partial)
    receipt = lora.receipt
    assert receipt.applied + sum(map(len, receipt.ignored.values())) == receipt.tensors, "not every tensor is accounted for"
    for layers in lora.factors.values():
        for update in layers.values():
            assert all(tensor.isfinite().all() for tensor in update.tensors), "numbers that are not finite were accepted"
            if isinstance(update, Factors):
                assert update.up.isfinite().all() and update.down.isfinite().all(), "factors that are not finite were accepted"
    receipt.line()


def _condition_lora(path: Path) -> None:
    """By its header, in a list, and read for a transformer."""
    with suppress(Refused):
        condition.describe(path)
    library.condition_loras("none", [path.parent])
    lora = condition.read(path, TRANSFORMER)
    receipt = lora.receipt
    assert receipt.applied + sum(map(len, receipt.ignored.values())) == receipt.tensors, "not every tensor is accounted for"
    assert lora.settings.colour and 8 <= lora.settings.size <= 4096 and lora.settings.factor > 0
    assert all(layer.up.isfinite().all() for adapter in lora.adapters for layer in adapter.values()), "numbers that are not finite were accepted"
    receipt.line()


def _config(path: Path) -> None:
    """adapter_config.json beside a good file."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "adapter_model.safetensors"
        model.write_bytes(seeds.lora())
        path.rename(Path(folder) / "adapter_config.json")
        _lora(model)


def _sidecar(path: Path) -> None:
    """Under each of the names that other managers use, beside a good file."""
    with tempfile.TemporaryDirectory() as folder:
        lora = Path(folder) / "owl.safetensors"
        lora.write_bytes(seeds.lora())
        for ending in sidecars.TEXTS:
            (Path(folder) / f"owl{ending}").write_bytes(path.read_bytes())
        catalogue = Catalogue(Path(folder) / "catalogue.sqlite")
        assert catalogue.scan([Path(folder)]).files == 1 and catalogue.scan([Path(folder)]).changed == 0
        (card,) = catalogue.cards()
        assert card.usable and card.tensors == 5 and len(card.text()) < 200_000
        card.words.encode()
    if card.remarks:
        raise Refused(card.remarks[0])


def _manifest(path: Path) -> None:
    lines = manifest.read(path)
    assert all((line.request is None) == bool(line.error) for line in lines)
    errors = [line.error for line in lines if line.error]
    asked = evaluation_manifest.read(path, lambda source: None)
    errors += [problem.why for problem in asked.problems]
    if errors:
        raise Refused(max(errors, key=len))


def _record(path: Path) -> None:
    details = record.details(path)
    request = record.by_name(details.request)
    record.differences(details, {}, record.versions())
    record.located(request, details, [], lambda source: path)
    assert Request.read(request.json()) == request, "what was read is not what is written"


def _infotext(path: Path) -> None:
    reading = infotext.read(path.read_bytes().decode("utf-8", "replace"))
    Request.read(reading.request.json())
    infotext.write(reading.request, (), (64, 64)) if not reading.request.loras else None


def _request(path: Path) -> None:
    request = Request.read(path.read_bytes())
    assert Request.read(request.json()) == request, "what was read is not what is written"
    request.active, request.names  # noqa: B018
    prompt_syntax.unread(request)
    prompt_syntax.today(request)
    with suppress(Refused):  # a weight out of range
        prompt_syntax.prompts_of(request)
    prompt_syntax.settled(request, lambda source: Path(source.replace("\0", "")))


def _picture(path: Path) -> None:
    pictures.load_with_texts(path)
    pictures.mask_as_text(str(path), "owl")
    _condition(str(path))


def _condition(image: str) -> None:
    """A picture that can be read may still be too small for a condition, or have no edges."""
    with suppress(Refused):
        text = pictures.condition_as_text(image, "canny")
        assert pictures.condition_as_text(text, "canny") == text, "the text of a picture changes when it is read again"
        annotate("canny", pictures.condition(text, "canny"))


def _mask(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    _condition(text)
    pictures.mask(text, "owl")


def _captions(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path.rename(Path(folder) / captions.TABLE)
        captions.beside(Path(folder), [Path(folder) / "0.png"])


def _log(path: Path) -> None:
    log = Log(path)
    rows = [row for row in log.rows() if row]  # an empty one says nothing
    assert repr(list(log.newest())) == repr(rows[::-1]), "read from the end, a log has other rows"


READERS = {reader.name: reader for reader in (
    Reader("lora", ".safetensors", _lora), Reader("kinds", ".safetensors", _lora), Reader("condition", ".safetensors", _condition_lora), Reader("infotext", ".txt", _infotext),
    Reader("manifest", ".jsonl", _manifest), Reader("record", ".png", _record),
    Reader("request", ".json", _request), Reader("config", ".json", _config), Reader("sidecar", ".json", _sidecar),
    Reader("picture", ".png", _picture), Reader("mask", ".txt", _mask), Reader("captions", ".jsonl", _captions),
    Reader("profile", ".json", lambda path: Profile.read(path.read_bytes())),
    Reader("behaviour", ".json", lambda path: Behaviour.read(path.read_bytes())), Reader("testbed", ".json", lambda path: testbed.read(str(path))),
    Reader("thresholds", ".json", judge.read_thresholds), Reader("log", ".jsonl", _log),
)}  # fmt: skip
