"""LoRA files read for the base that they fit, without its weights: what only asks for the names and shapes of layers needs no model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import nn

from composition.backbones.loading import open as loading
from composition.backbones.loading import single_file, skeleton
from composition.bundled import BUNDLES
from composition.loras import library, reader
from composition.loras.reader import LoraFile
from composition.loras.safetensors import SafeFile, load_safely
from composition.refusal import Refused


class Base(NamedTuple):
    """family: as reader.read has it. components: the modules, without weights."""

    family: str
    components: Mapping[str, nn.Module]


def base_of(files: Sequence[Path], model: str = "", raws: Sequence[SafeFile] = ()) -> Base:
    """The layers that all these files name: those of `model`, else of the public model that they fit. Raises Refused, with what is missing."""
    if model:
        location = loading.find(model)
        family = loading.family(location)
        if location.kind == "file" and location.path is not None:
            return Base(family, skeleton.of_folder(single_file.CONFIGS / single_file.kind(single_file.header(location.path)[0])))
        return Base(family, skeleton.of_folder(location.path) if location.path else skeleton.of_family(family))
    raws = raws or [load_safely(path) for path in files]
    bundles = {name for name in BUNDLES if all(path in library.files(name) for path in files)}
    if bundles:
        return base_of(files, min(bundles))
    families = dict.fromkeys(reader.inspect(path, raw).family for path, raw in zip(files, raws, strict=True))
    known = [family for family in families if family != "unknown"]
    if len(known) > 1:
        raise Refused(f"these LoRAs are for different bases ({', '.join(known)}): they cannot be compared or added up")
    if known and known[0] not in skeleton.PUBLIC:
        raise Refused(f"the layers of {known[0]} differ from model to model: name the one that this is for (CLI: --model FOLDER)")
    refusal: Refused | None = None
    for family in known or skeleton.PUBLIC:
        base = Base("sd" if family == "sd2" else family, skeleton.of_family(family))
        try:
            for path, raw in zip(files, raws, strict=True):
                reader.read(path, base.components, base.family, allow_partial=True, raw=raw)
        except Refused as error:
            refusal = refusal or error
            continue
        return base
    raise Refused(f"{refusal}; where it is for another model, name that (CLI: --model)")


def opened(files: Sequence[Path], model: str = "") -> list[LoraFile]:
    """The files with all that fits the base that they share; where no base is known, with the layers by their names in the file, under the component "".

    Raises Refused for a file that cannot be read, and for files that are certainly for different bases.
    """
    raws = [load_safely(path) for path in files]
    try:
        base = base_of(files, model, raws)
    except Refused:
        receipts = [reader.inspect(path, raw) for path, raw in zip(files, raws, strict=True)]
        if model or len({receipt.family for receipt in receipts} - {"unknown"}) > 1:
            raise
        return [LoraFile({"": reader.unplaced(path, raw)}, receipt) for path, raw, receipt in zip(files, raws, receipts, strict=True)]
    read = [reader.read(path, base.components, base.family, allow_partial=True, raw=raw) for path, raw in zip(files, raws, strict=True)]
    return [replace(file, receipt=replace(file.receipt, family=base.family if file.receipt.family == "unknown" else file.receipt.family)) for file in read]
