"""A request without the paths of one machine, for a record that travels; and a travelled request made again on another.

A path says nothing to anybody else and something about its owner, so a record has names and hashes, and masks and pictures of conditions
as small pictures of its own. Recalled, a name is looked up, and the file it means is compared with the hash.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from composition import pictures, prompt_syntax
from composition.record import infotext
from composition.refusal import Refused
from composition.request import EMBEDDINGS_NOTE, VAE_NOTE, Receipt, Request

FEWEST_DIGITS = 8  # of a hash that is compared


@dataclass(frozen=True)
class Record:
    """What a picture file says about itself.

    receipts: name of each LoRA to what was applied of it; condition_receipts the same of what conditions were read with. model: its name as the writer knew it. remarks: what could
    not be read. ours: False when another tool wrote it (then the model's name and the LoRAs' are that tool's). hashes: of such a
    tool's LoRAs, by name.
    """

    request: Request
    receipts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    model: str = ""
    remarks: tuple[str, ...] = ()
    ours: bool = True
    hashes: Mapping[str, str] = field(default_factory=dict)
    condition_receipts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def model_name(model: str) -> str:
    """A model's or a VAE's name in a record: of a path the last part, a folder's with a slash behind it, so that it is no bundled name."""
    if not is_path(model):
        return model
    return last_part(model) + ("" if model.lower().endswith(".safetensors") else "/")


def is_path(model: str) -> bool:
    """Whether a model is named by where it lies: not a bundled or short name, and no hub id (owner/name)."""
    if "/" not in model and "\\" not in model and not model.lower().endswith(".safetensors"):
        return False
    return not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) or model.lower().endswith(".safetensors") or Path(model).exists()


def without_paths(request: Request) -> Request:
    """The request with names in place of paths, its masks and the pictures of its conditions in it. Raises Refused for one that cannot be
    read any more."""
    loras = [replace(lora, source=lora.name, region=pictures.without_name(pictures.mask_as_text(lora.region, lora.name))
                     if isinstance(lora.region, str) else lora.region) for lora in request.loras]
    conditions = [replace(condition, source=condition.name, image=pictures.condition_as_text(condition.image, condition.name))
                  for condition in request.conditions]
    embeddings = [replace(each, source=each.name) for each in request.embeddings]
    picture = request.picture and replace(
        request.picture, image=request.picture.image if request.picture.image.startswith("data:")
        else pictures.lossless(pictures.start(request.picture.image), pictures.origin(request.picture.image)),
        mask=request.picture.mask if not request.picture.mask or request.picture.mask.startswith("data:")
        else pictures.mask_text(pictures.repainted(request.picture.mask), request.picture.mask))
    return replace(request, loras=loras, conditions=conditions, embeddings=embeddings, picture=picture, model=model_name(request.model), vae=model_name(request.vae))


def by_name(request: Request) -> Request:
    """A stranger's request with the last part of each path as a name to look up. Raises Refused for a region or a condition's picture that
    is a path: a stranger's picture must not choose which file of this machine is read."""
    for lora in request.loras:
        if isinstance(lora.region, str) and not lora.region.startswith("data:"):
            raise Refused(f"the record names {lora.region!r:.200}, a file of this machine, as the region of LoRA {lora.name}: if that is yours, "
                          "give --allow-paths")
    for condition in request.conditions:
        if not condition.image.startswith("data:"):
            raise Refused(f"the record names {condition.image!r:.200}, a file of this machine, as the picture of condition {condition.name}: if that "
                          "is yours, give --allow-paths")
    for what, image in (("picture", request.picture.image), ("mask", request.picture.mask or "data:")) if request.picture else ():
        if not image.startswith("data:"):
            raise Refused(f"the record names {image!r:.200}, a file of this machine, as the {what} that it starts from: if that is yours, give "
                          "--allow-paths")
    prompt, tags = prompt_syntax.untagged(request.prompt)  # a settled request has no tags; a stranger's may name files by them
    loras = [replace(lora, source=lora.name) for lora in (*request.loras, *(tag.lora for tag in tags))]
    conditions = [replace(condition, source=condition.name) for condition in request.conditions]
    embeddings = [replace(each, source=each.name) for each in request.embeddings]
    return replace(request, prompt=prompt, loras=loras, conditions=conditions, embeddings=embeddings, model=model_name(request.model),
                   vae=model_name(request.vae))


def located(request: Request, record: Record, files: Sequence[Path], find: Callable[[str], Path]) -> Request:
    """The request with every LoRA of the record found: of several files of its name, the one with its hash is meant.

    files: those that can be named. find: a source to its file, raising Refused; what is refused is said with the hash to look for.
    """
    loras = []
    for name, lora in zip(request.names, request.loras, strict=True):
        wanted = str(record.receipts.get(name, {}).get("sha256") or record.hashes.get(name, ""))
        same = [path for path in files if path.stem == lora.source]
        if len(same) > 1 and wanted:
            same = [path for path in same if fits(wanted, _receipt(path))] or same
            lora = replace(lora, source=str(same[0])) if len(same) == 1 else lora
        try:
            find(lora.source)
        except Refused as error:
            raise Refused(f"{error}" + (f"; the picture's LoRA has the hash {wanted[:infotext.HASH_DIGITS]}" if wanted else "")) from None
        loras.append(lora)
    return replace(request, loras=loras)


def _hashes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the notes of both know by hash: what it is, and both hashes."""
    were, are = (notes.get(EMBEDDINGS_NOTE) for notes in (before, now))
    if isinstance(were, Mapping) and isinstance(are, Mapping):
        for word in were.keys() & are.keys():
            if isinstance(were[word], Mapping):
                yield f"textual inversion {word}", str(were[word].get("sha256")), str(are[word]["sha256"])
    if VAE_NOTE in before and VAE_NOTE in now:
        yield "the VAE", str(before[VAE_NOTE]), str(now[VAE_NOTE])


def _receipt(path: Path) -> Receipt | None:
    from composition.loras import reader

    try:
        return reader.inspect(path)
    except Refused:
        return None


def fits(digits: str, receipt: Receipt | None) -> bool:
    """Whether a hash as tools write it, whole or its beginning, is of this file: of the whole file (Forge, Civitai's AutoV2) or of
    what follows its header (A1111, AutoV3); or the one that its trainer wrote into its header."""
    if receipt is None:
        return False
    known = (receipt.data_sha256, receipt.sha256, receipt.metadata.get("sshs_model_hash", ""), receipt.metadata.get("sshs_legacy_hash", ""))
    return any(value.lower().startswith(digits.lower()) for value in known if value)


def differences(
    record: Record, receipts: Mapping[str, Receipt], versions: Mapping[str, str], condition_receipts: Mapping[str, Receipt] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> list[str]:
    """How a run differs from the recorded one, in sentences: files of LoRAs, conditions, textual inversions and of the VAE that are others, other
    versions of the libraries. notes: the run's."""
    lines = [f"{what} is not the file it was made with (sha256 {before[:12]}, now {now[:12]}); the picture will differ"
             for what, before, now in _hashes(record.notes, notes or {}) if before != now]
    for name, digits in record.hashes.items():
        if name in receipts and re.fullmatch(rf"[0-9a-fA-F]{{{FEWEST_DIGITS},64}}", digits) and not fits(digits, receipts[name]):
            lines.append(f"LoRA {name} is not the file it was made with (hash {digits}, here "
                         f"{receipts[name].data_sha256[:infotext.HASH_DIGITS]}); the picture will differ")
    for kind, recorded, now in (("LoRA", record.receipts, receipts), ("condition", record.condition_receipts, condition_receipts or {})):
        for name, before in recorded.items():
            if name in now and before.get("sha256") != now[name].sha256:
                same = before.get("tensor_sha256") == now[name].tensor_sha256
                lines.append(f"{kind} {name} is not the file it was made with (sha256 {str(before.get('sha256'))[:12]}, now "
                             f"{now[name].sha256[:12]})" + ("; its tensors are the same" if same else "; the picture will differ"))
    return lines + [f"made with {name} {before}, this is {versions[name]}" for name, before in record.versions.items()
                    if versions.get(name, before) != before]
