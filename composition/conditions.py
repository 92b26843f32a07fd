"""Conditions: pictures that control, by the banks of their condition LoRAs (EasyControl, arXiv 2503.07027, and its kin).

A condition's tokens see neither the noise nor the time, so what they say in every layer is computed once: a bank per condition, kept across
steps, seeds and batches, keyed by all that it depends on.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from composition.adapters import Adapters
from composition.backbones import vae
from composition.hooks.banks import Appended, Bank, Banks, easycontrol
from composition.hooks.regional import Segments
from composition.loop import Conditioning, Step
from composition.loras.condition import ConditionLora, Settings
from composition.refusal import Refused
from composition.request import Condition, Receipt

Grid = tuple[int, int]  # (rows, columns) of tokens


# where its tokens stand, and what is encoded ---------------------------------------------------------------------------


def ids(settings: Settings, over: Grid, grid: Grid) -> Float[Tensor, "N 3"]:
    """The position ids of a condition's tokens, float32, row after row. over: the picture's tokens; grid: the condition's own."""
    if settings.kind == "subject":
        return subject_ids(grid, max(settings.offset, over[0]) if settings.clear else settings.offset, rounded=settings.rounded)
    return spatial_ids(grid, over, rounded=settings.rounded)


def spatial_ids(grid: Grid, over: Grid, *, rounded: bool = False) -> Float[Tensor, "N 3"]:
    """Stretched over the whole picture, from its upper left corner: token (i, j) at (0, i * rows ratio, j * columns ratio).

    rounded: to bfloat16, as in the published code, which shifts some by up to an eighth of a place.
    """
    return _ids(torch.arange(grid[0]) * (over[0] / grid[0]), torch.arange(grid[1]) * (over[1] / grid[1]), rounded)


def subject_ids(grid: Grid, offset: int, *, rounded: bool = False) -> Float[Tensor, "N 3"]:
    """A grid of its own, `offset` rows below the picture's first."""
    return _ids(torch.arange(grid[0]) + offset, torch.arange(grid[1]), rounded)


def _ids(rows: Tensor, columns: Tensor, rounded: bool) -> Float[Tensor, "N 3"]:
    places = torch.zeros(len(rows), len(columns), 3)
    places[..., 1] += rows[:, None]
    places[..., 2] += columns
    return (places.bfloat16().float() if rounded else places).flatten(0, 1)


def pixels(picture: Image.Image, settings: Settings, unit: int) -> Float[Tensor, "1 3 side side"]:
    """The picture of a condition as it is encoded, -1 to 1: a square of its LoRA's size, in whole tokens of `unit` pixels.

    A spatial one is stretched to it; a subject keeps its shape, in the middle, on the LoRA's ground, which also shows through what is
    transparent.
    """
    side = max(unit, settings.size // unit * unit)
    picture = flattened(picture, settings.colour)
    if settings.kind == "spatial":
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    else:
        scale = side / max(picture.size)
        wide, high = (max(unit, round(length * scale / unit) * unit) for length in picture.size)
        ground = Image.new("RGB", (side, side), settings.colour)
        ground.paste(picture.resize((wide, high), Image.Resampling.BILINEAR), ((side - wide) // 2, (side - high) // 2))
        picture = ground
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def flattened(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Without transparency: what is clear shows this colour."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, (*colour, 255)), clear).convert("RGB")
    return picture.convert("RGB")


# what a request's conditions are at every step -------------------------------------------------------------------------


class Call(NamedTuple):
    """One evaluation of the denoiser.

    passes: how many predictions its rows hold, one after the other. segments: of a joined prompt, None for a plain one.
    skips: says of a layer, by its path, that this evaluation leaves it out. negative: its rows are negative ones alone.
    """

    step: Step
    latents: Float[Tensor, "B *S"]
    cond: Conditioning
    passes: int = 1
    segments: Segments | None = None
    skips: Callable[[str], bool] = lambda path: False
    negative: bool = False


@dataclass(frozen=True, eq=False)
class Read:
    """A condition with its file read and its picture encoded. adapter: which of the file's it uses."""

    condition: Condition
    lora: ConditionLora
    adapter: int
    tokens: Float[Tensor, "1 N c"]
    ids: Float[Tensor, "N 3"]


@runtime_checkable
class Acting(Protocol):
    """Conditions of one request, whatever reads them, as a run uses them.

    isolated: what is read ahead is read without the request's LoRAs. receipts: of what they are read with, by name.
    """

    isolated: bool

    @property
    def receipts(self) -> Mapping[str, Receipt]: ...

    @property
    def notes(self) -> Mapping[str, Any]:
        """For the picture's notes: "conditions", by name what each is."""
        ...

    def live(self, step: Step) -> tuple[str, ...]:
        """The names of those that act at this step."""
        ...

    def fill(
        self, cond: Callable[[], Conditioning], adapters: Adapters, use: Mapping[str, float], before: Callable[[], None],
    ) -> None:
        """Compute whatever is the same at every step, once, before the first, with these LoRAs on. cond: encodes the request's prompt."""
        ...

    def acting(self, call: Call) -> AbstractContextManager[None]:
        """While it lasts, one evaluation of the denoiser has those that act at its step."""
        ...


Shelf = dict[Any, Any]  # of what the last request needed and the next may need again, by all that it depends on


class Conditions:
    """The conditions of one request on one backbone, and their banks.

    isolated: they are read by the bare base, its prompt encoded without LoRAs, because the method varies its LoRAs; otherwise by the base with
    the request's LoRAs on, as everything else is. shelf: banks of requests before, of the same LoRAs; it gets those of this one instead.
    """

    def __init__(self, backbone: Any, reads: Mapping[str, Read], *, isolated: bool, shelf: Shelf | None = None) -> None:
        self.backbone, self.reads, self.isolated = backbone, dict(reads), isolated
        self._banks = Banks(backbone.denoiser, tuple(backbone.prompt_attention()))
        self._shelf = {} if shelf is None else shelf
        self._filled: dict[str, Bank] = {}

    @property
    def receipts(self) -> dict[str, Receipt]:
        """What each was read with, by name."""
        return {name: read.lora.receipt for name, read in self.reads.items()}

    @property
    def notes(self) -> dict[str, Any]:
        """What each is, and where a subject stands lower than it was trained to."""
        kinds = {}
        for name, read in self.reads.items():
            settings, row = read.lora.settings, int(read.ids[0, 1])
            lower = f", {row - settings.offset} rows below where it was trained" if settings.kind == "subject" and row > settings.offset else ""
            kinds[name] = f"{settings.kind}, {len(read.ids)} tokens{lower}"
        return {"conditions": kinds}

    def live(self, step: Step) -> tuple[str, ...]:
        """The names of those that act at this step."""
        return tuple(name for name, read in self.reads.items() if read.condition.on(step.index, step.count))

    @torch.no_grad()
    def fill(
        self, cond: Callable[[], Conditioning], adapters: Adapters, use: Mapping[str, float], before: Callable[[], None],
    ) -> None:
        """Compute every bank that is not on the shelf, with these LoRAs on. before: called before each."""
        kept: Shelf = {}
        encoded = cond()
        modulation = [_digest(value) for name, value in sorted(encoded.values.items()) if name != "text"]
        for name, read in self.reads.items():
            weight = read.condition.weight
            key = (read.lora.receipt.tensor_sha256, read.lora.settings, read.adapter, weight, _digest(read.tokens), _digest(read.ids),
                   *modulation, tuple(sorted(use.items())))
            if key not in self._shelf:
                before()
                with adapters.kept():
                    adapters.use(use)
                    with self._banks.extracting(easycontrol(read.lora.adapters[read.adapter], weight)) as bank:
                        self.backbone.read_alone(read.tokens, read.ids, read.tokens.new_zeros(()), encoded)
                self._shelf[key] = bank
            kept[key] = self._filled[name] = self._shelf[key]
        self._shelf.clear()
        self._shelf.update(kept)

    @contextmanager
    def acting(self, call: Call) -> Iterator[None]:
        """While it lasts, the denoiser reads the banks of those that act at this step. Raises RuntimeError before they are filled."""
        live = self.live(call.step)
        if missing := [name for name in live if name not in self._filled]:
            raise RuntimeError(f"the bank of condition {missing[0]} was not filled")
        rows, pictures = call.cond.rows // call.passes, call.latents.shape[0]
        banks = []
        for name in live:
            bank = self._filled[name]
            count = bank.rows
            picked = range(count) if rows == count else [0 if call.negative else count - 1] * rows  # the one row, or the other
            each = tuple(row for _ in range(call.passes) for row in picked for _ in range(pictures))
            strength = self.reads[name].condition.strength * self.reads[name].lora.settings.factor
            banks.append(Appended(bank, strength, None if count == 1 or each == tuple(range(count)) else each))
        with self._banks.appended(banks, skips=call.skips):
            yield


def read(
    backbone: Any, controls: Mapping[str, Condition], files: Mapping[str, ConditionLora], drawn: Mapping[str, Image.Image],
    size: tuple[int, int],
) -> dict[str, Read]:
    """Every condition's picture encoded and placed, for a picture of this (width, height). drawn: the pictures, annotated.

    Raises Refused where more conditions name one file than it has adapters, if it has several.
    """
    unit, uses, reads = backbone.pixels_per_token, Counter[str](), {}
    over = (size[1] // unit, size[0] // unit)
    for name, condition in controls.items():
        lora = files[name]
        adapter, count = uses[lora.receipt.sha256], len(lora.adapters)
        uses[lora.receipt.sha256] += 1
        if adapter >= count > 1:
            raise Refused(f"{lora.receipt.name} holds {count} condition LoRAs, one for each of {count} conditions: {adapter + 1} name it")
        settings = replace(lora.settings, kind=condition.kind) if condition.kind else lora.settings
        picture = pixels(drawn[name], settings, unit)
        grid = (picture.shape[-2] // unit, picture.shape[-1] // unit)
        tokens = backbone.tokens(vae.encode(backbone.pipeline, picture).to(backbone.device, backbone.dtype))
        reads[name] = Read(condition, replace(lora, settings=settings), adapter if count > 1 else 0, tokens,
                           ids(settings, over, grid).to(backbone.device))
    return reads


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
