"""What a file or folder that controls a picture is, by its names alone: a ControlNet, a control LoRA, or one of their kin.

Only the first two are applied; for every other kind there is a sentence that says what it is. ControlNets are found by name as LoRAs are:
"canny" is a folder or file of that name, or of the name "controlnet-canny".
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from composition import untrusted
from composition.loras.safetensors import ENDING, load_header
from composition.refusal import Refused
from composition.request import Receipt

Kind = Literal["", "controlnet", "control-lora"]
CONFIG = "config.json"
PREFIX = "controlnet-"
ANNOTATOR = "condition.annotator"  # in the header of a file: what makes the pictures that it reads
DEPTH = 2  # folders below a place that are searched


class Sort(NamedTuple):
    """kind: "" for none of these. trouble: why one of their kin cannot be used, the end of a sentence that begins with its name."""

    kind: Kind = ""
    trouble: str = ""


_FLUX = "is a ControlNet for FLUX or SD 3; ControlNets are read on Stable Diffusion and SDXL, on FLUX condition LoRAs and control LoRAs"
_UNION = "is a ControlNet of several kinds in one (union), which are not supported: give one for the kind of picture at hand"
_CLASSES = {
    "ControlNetModel": Sort("controlnet"),
    "ControlNetUnionModel": Sort(trouble=_UNION),
    "FluxControlNetModel": Sort(trouble=_FLUX), "SD3ControlNetModel": Sort(trouble=_FLUX),
    "ControlNetXSAdapter": Sort(trouble="is a ControlNet-XS, which is not supported: give a plain ControlNet"),
    "UNetControlNetXSModel": Sort(trouble="is a UNet with a ControlNet-XS in it, which is not supported: give a plain ControlNet"),
    "T2IAdapter": Sort(trouble="is a T2I-Adapter, which is not supported: give a ControlNet"),
}
# Parts of tensors' names: a file is the first of these all of whose parts are in it.
_FILES = (
    (("lllite_",), Sort(trouble="is a ControlNet-LLLite, which changes layers of SDXL in a way of its own and is not supported: give a ControlNet")),
    (("lora_controlnet",), Sort(trouble="is a Control-LoRA by Stability AI: most of its weights are to be taken from SDXL's UNet, which is not "
                                         "supported: give a whole ControlNet")),
    (("controlnet_x_embedder",), Sort(trouble=_FLUX)), (("controlnet_blocks.",), Sort(trouble=_FLUX)),
    (("input_hint_block.", "double_blocks."), Sort(trouble=_FLUX)), (("pos_embed_input.",), Sort(trouble=_FLUX)),
    (("task_embedding", "controlnet_cond_embedding."), Sort(trouble=_UNION)), (("control_add_embedding.",), Sort(trouble=_UNION)),
    (("ip_adapter.",), Sort(trouble="is an IP-Adapter, which is not supported")),
    (("image_proj.",), Sort(trouble="is an IP-Adapter, which is not supported")),
    (("ctrl_xs", ), _CLASSES["ControlNetXSAdapter"]), (("base_to_ctrl.",), _CLASSES["ControlNetXSAdapter"]),
    (("adapter.body.",), _CLASSES["T2IAdapter"]), (("body.", ".in_conv."), _CLASSES["T2IAdapter"]), (("body.", ".block1."), _CLASSES["T2IAdapter"]),
    (("controlnet_cond_embedding.",), Sort("controlnet")), (("input_hint_block.",), Sort("controlnet")),
    (("img_in.lora_A.", ".norm.query_norm.scale"), Sort("control-lora")),
)  # fmt: skip
WIDENED = ("img_in.lora_A.weight", "x_embedder.lora_A.weight")  # of a control LoRA, with more inputs than a packed latent has
LATENT = 64  # numbers of a token of FLUX's latents


def recognise(path: Path, inputs: int = LATENT) -> Sort:
    """What a safetensors file or a folder is. inputs: of FLUX's input projection. Raises Refused for a file that is broken."""
    return _of_folder(path) if path.is_dir() else _of_file(path, stamp(path), inputs)


def usable(path: Path, inputs: int = LATENT) -> Kind:
    """The kind, "" for none of these. Raises Refused for their kin that are not supported."""
    sort = recognise(path, inputs)
    if sort.trouble:
        raise Refused(f"{path.name} {sort.trouble}")
    return sort.kind


def of_names(names: Collection[str]) -> Sort:
    """What a file with tensors of these names is."""
    for parts, sort in _FILES:
        if all(any(part in name for name in names) for part in parts):
            return sort
    return Sort()


@lru_cache(maxsize=4096)  # whole folders of LoRAs are looked through
def _of_file(path: Path, stamp: tuple[object, ...], inputs: int) -> Sort:
    """In the state that `stamp` stands for."""
    if path.suffix.lower() != ENDING:
        return Sort()
    tensors = load_header(path).tensors
    sort = of_names(tensors.keys())
    if sort == Sort():
        widths = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(WIDENED) and tensor.ndim == 2]
        return Sort("control-lora") if widths and widths[0] > inputs else sort
    return sort


def _of_folder(folder: Path) -> Sort:
    try:
        config = untrusted.parse_file(folder / CONFIG)
    except untrusted.Unreadable:
        inner = sorted(child.name for child in folder.glob(f"controlnet*/{CONFIG}") for child in [child.parent])
        return Sort(trouble=f"is not a ControlNet itself but holds one: give {inner[0]} in it") if inner else Sort()
    name = config.get("_class_name") if isinstance(config, dict) else None
    return _CLASSES.get(name, Sort()) if isinstance(name, str) else Sort()


# by name ---------------------------------------------------------------------------------------------------------------


def find(source: str, places: Sequence[Path]) -> Path:
    """A ControlNet by its path, or by its name in one of these folders. Raises Refused, with the nearest names."""
    path = Path(source).expanduser()
    if os.path.exists(path) and (path.is_dir() or path.suffix.lower() == ENDING):
        return path
    for wanted in (source, f"{PREFIX}{source}"):
        several = nets(places, wanted)
        if len(several) > 1:
            raise Refused(f"{len(several)} ControlNets are named {source!r}: give the path of one of " + ", ".join(map(str, several)))
        if several:
            return several[0]
    names = sorted({name_of(path) for path in nets(places)})
    near = get_close_matches(source, names, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(names) or 'none'}"
    raise Refused(f"no ControlNet is named {source[:200]!r} and none is there; {hint} (give the path of its folder or .safetensors file)")


def nets(places: Sequence[Path], name: str = "") -> list[Path]:
    """Every ControlNet in these folders, or those of this name, folders and files, in order; what cannot be read is passed over."""
    paths: dict[str, Path] = {}
    for place in places:
        for path in _below(place, DEPTH):
            if name and name not in (path.name, _stem(path)):
                continue
            try:
                if recognise(path).kind == "controlnet":
                    paths.setdefault(os.path.realpath(path), path)
            except (Refused, OSError):
                continue
    return list(paths.values())


def name_of(path: Path) -> str:
    """What it is called for short: "controlnet-canny" is "canny"."""
    return _stem(path).removeprefix(PREFIX)


def weights(path: Path) -> list[Path]:
    """The safetensors files of a ControlNet."""
    return sorted(path.glob(f"*{ENDING}")) if path.is_dir() else [path]


def annotator(path: Path) -> str:
    """What makes the pictures that it reads, as its file says; "" where it does not."""
    try:
        return next((word for file in weights(path) if (word := load_header(file).metadata.get(ANNOTATOR))), "")
    except Refused:
        return ""


def stamp(path: Path) -> tuple[object, ...]:
    """What changes when its files do."""
    stats = [(str(file), file.stat()) for file in ([path / CONFIG] if path.is_dir() else []) + weights(path) if file.is_file()]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def receipt(path: Path, family: str = "unknown", kind: Kind = "controlnet") -> Receipt:
    """What was read: all of its tensors. sha256: of its one file, or of several's, one after the other."""
    whole, data, count = hashlib.sha256(), hashlib.sha256(), 0
    for file in weights(path):
        count += len(load_header(file).tensors)
        with file.open("rb") as opened:
            start = opened.read(8)
            head = start + opened.read(int.from_bytes(start, "little"))
            whole.update(head)
            while part := opened.read(2**22):
                whole.update(part)
                data.update(part)
    return Receipt(
        name=name_of(path), path=str(path), sha256=whole.hexdigest(), tensor_sha256=data.hexdigest(), family=family, layout=kind,
        tensors=count, applied=count, components={kind: {"tensors": count, "modules": 0}}, data_sha256=data.hexdigest())


def _stem(path: Path) -> str:
    return path.name[: -len(ENDING)] if path.name.lower().endswith(ENDING) else path.name


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that hold a config and safetensors files, down to this depth."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for path in entries:
        if path.is_dir():
            if (path / CONFIG).is_file():
                yield path
            elif depth > 1:
                yield from _below(path, depth - 1)
        elif path.suffix.lower() == ENDING:
            yield path
