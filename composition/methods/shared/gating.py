"""Learned gates for LoRAs that are added up: one set of gates for a base, for any LoRAs and any number of them (after AutoLoRA, arXiv 2508.02107).

Three kinds, of which a file holds one:

layer    g_k = exp(c_k - max_j c_j), c learned for each layer and each category of LoRA. Constant, so that it can be folded.
rank     the same with c the answer of a small network to how each LoRA acts at a place: how much more than elsewhere, its share of all
         updates, its cosine to their sum, its loudness in the layer; with `film` the time of the step, too. It is computed from A x and
         the products of the columns of B, so that outputs are never apart, and whatever the factorisation, it is the same.
element  the published form without the base's own term: g = sigmoid(w_l LN(h_k) + w_c LN(h_0) LN(h_k) + beta), y = h_0 + sum_k w_o g h_k,
         element by element. `shared` adds the best rank-2 approximation of the sum of the updates as one more LoRA (its "global LoRA").

In the first two one LoRA is whole everywhere, and the others at most: gates that are free to fall learn to shut all LoRAs, since what
their company does to a picture costs more of the loss than a concept that is missing (measured: a mean gate of 0.2). So a single LoRA
stays whole, too. The third attenuates it by w_o g. All begin as Merge. Shapes: K
LoRAs, P ranks, L layers, T places, D width of a layer's output.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from composition import atomic
from composition.adapters.gates import Combine
from composition.adapters.stack import Route, Stack
from composition.loop import Step
from composition.loras.safetensors import load_safely
from composition.refusal import Refused, explain

Kind = Literal["layer", "rank", "element"]
CATEGORIES = ("place", "style", "")  # "": any other, as characters, objects and clothing: what stands at a place of its own
HIDDEN, FEATURES, TIMES = 16, 5, 2
SMALL = 1e-12  # energy under which an update is none
EPS = 1e-5  # of the layer norms
GLOBAL = 2  # rank of the global LoRA
FORMAT = "medley-gates"
Seen = Callable[[str, Step, Float[Tensor, "K"]], None]  # (a layer's path, the step, each live LoRA's mean gate), as they are computed


@dataclass(frozen=True)
class Design:
    """What gates are of. base: the model's name, which they were trained on; layers: the width of each layer's output by its path."""

    kind: Kind
    base: str
    layers: Mapping[str, int]
    film: bool = False
    shared: bool = False


class Gating(nn.Module):
    """The gates' parameters. Everything is computed in float32, or in float64 where the activations are."""

    def __init__(self, design: Design) -> None:
        super().__init__()
        self.design, self.places = design, {path: number for number, path in enumerate(design.layers)}
        self._held: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}  # the parameters where activations are
        count, names = len(design.layers), len(CATEGORIES)
        if design.kind == "element":
            self.widths = list(design.layers.values())
            self.table = nn.Parameter(torch.zeros(8, sum(self.widths)))
            with torch.no_grad():
                self.table[2:3] = 2.0  # w_o: with gates of one half the sum of the LoRAs
                self.table[5:8:2] = 1.0  # weights of the layer norms
            return
        self.table = nn.Parameter(torch.zeros(count, names))
        if design.kind == "rank":
            generator = torch.Generator().manual_seed(0)
            self.first = nn.Parameter(torch.randn(FEATURES, HIDDEN, generator=generator) / FEATURES**0.5)
            self.bias = nn.Parameter(torch.zeros(count, HIDDEN))
            self.kinds = nn.Parameter(torch.zeros(names, HIDDEN))
            self.times = nn.Parameter(torch.zeros(2 * TIMES, HIDDEN))
            self.last = nn.Parameter(torch.zeros(HIDDEN))

    def on(self, like: Tensor) -> dict[str, Tensor]:
        """The parameters in the device and dtype of `like`; moved once, and at every call while they are in training."""
        values = dict(self.named_parameters())
        if any(value.requires_grad for value in values.values()):
            return {name: value.to(like) for name, value in values.items()}
        key = like.device, like.dtype
        if key not in self._held:
            self._held[key] = {name: value.detach().to(like) for name, value in values.items()}
        return self._held[key]

    # layer and rank --------------------------------------------------------------------------------------------------

    def route(self, categories: Sequence[str], seen: Seen | None = None) -> Route:
        """The gates of ranks, for `Adapters.routed`. categories: of every adapter, in order."""
        known = torch.tensor([number(name) for name in categories])

        def gates(layer: Stack, step: Step, ranks: Float[Tensor, "rows T P"], gate: Float[Tensor, "P"]) -> Tensor:
            if layer.path not in self.places:
                return gate
            live = [k for k, (begin, end) in enumerate(layer.spans) if begin < end and bool(gate[begin:end].any())]
            if len(live) < 2:
                return gate
            with exact(ranks.device):
                factor = self.constant(layer.path, known[live], ranks) if self.design.kind == "layer" else self._answer(layer, step, ranks * gate, live, known)
            if seen is not None:
                seen(layer.path, step, factor.detach().flatten(0, -2).mean(0) if factor.ndim > 1 else factor.detach())
            whole = factor.new_ones(*factor.shape[:-1], len(layer.spans)).index_copy(factor.ndim - 1, torch.tensor(live, device=factor.device), factor)
            owner = layer.product(ranks).owner
            assert owner is not None
            return gate * whole.index_select(-1, owner).to(ranks)

        return gates

    def constant(self, path: str, categories: Int[Tensor, "K"], like: Tensor | None = None) -> Float[Tensor, "K"]:
        """The gate of each of K live LoRAs of these categories (numbers) in a layer, of the kind "layer". like: on whose device it is wanted."""
        wide = self.table if like is None else torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        table = self.on(wide)["table"]
        return relative(table[self.places[path]].index_select(0, categories.to(table.device)))

    def _answer(self, layer: Stack, step: Step, h: Float[Tensor, "rows T P"], live: Sequence[int], known: Int[Tensor, "all"]) -> Float[Tensor, "rows T K"]:
        """The gate of each live LoRA at each place of each row; h: A x times the weights."""
        wide = torch.promote_types(h.dtype, torch.float32)
        features = self.features(layer, h.to(wide), live)
        held, place, kinds = self.on(features), self.places[layer.path], known[list(live)].to(features.device)
        hidden = features @ held["first"] + (held["bias"][place] + held["kinds"][kinds])
        if self.design.film:
            s = step.t.to(features).view(-1, 1, 1) / 1000.0  # of all rows, or of each
            time = torch.stack([s, (math.pi * s).sin()], -1)
            scale, shift = (time @ part for part in held["times"].split(TIMES))
            hidden = hidden * (1 + scale) + shift
        answer = F.silu(hidden) @ held["last"] + held["table"][place].index_select(0, kinds)
        return relative(answer)

    @staticmethod
    def features(layer: Stack, h: Float[Tensor, "rows T P"], live: Sequence[int]) -> Float[Tensor, "rows T K F"]:
        """How each live LoRA acts at each place; given, to the gradient, and the same for every factorisation of an update."""
        with torch.no_grad():
            product = layer.product(h)
            up, owner = product.up.to(h), product.owner
            assert owner is not None
            inner = up.T @ up
            member = (owner[:, None] == torch.tensor(live, device=h.device)).to(h)
            own = ((h * (h @ (inner * (owner[:, None] == owner)))) @ member).clamp(min=0) + SMALL  # |h_k|^2
            cross = (h * (h @ inner)) @ member  # <h_k, sum h>
            total = cross.sum(-1, keepdim=True).clamp(min=0) + SMALL
            loud = own.mean(1, keepdim=True)
            parts = ((own / loud).log() / 4, own / own.sum(-1, keepdim=True) * len(live) - 1, cross / (own * total).sqrt(),
                     ((loud / loud.mean(-1, keepdim=True)).log() / 4).expand_as(own), torch.full_like(own, math.log(len(live)) / 2))
            return torch.stack(parts, -1).clamp(-4, 4)

    # element ---------------------------------------------------------------------------------------------------------

    def combine(self, bases: Callable[[str], Float[Tensor, "D q"]] | None = None, seen: Seen | None = None) -> Combine:
        """The gates of outputs, for `Adapters.combined`. bases: of a layer's path the directions of the global LoRA's output."""

        def summed(path: str, step: Step, base: Tensor, each: Tensor) -> Tensor:
            if path not in self.places:
                return base + each.sum(0)
            grid = base.ndim == 4
            h_0, h = (base.movedim(1, -1), each.movedim(2, -1)) if grid else (base, each)
            wide = torch.promote_types(h.dtype, torch.float32)
            if self.design.shared and bases is not None and h.shape[0] > 1:
                directions = bases(path).to(h)
                h = torch.cat([h, ((h.sum(0) @ directions) @ directions.T)[None]])
            w_l, w_c, w_o, beta, *norms = self._rows(path, h.to(wide))
            with exact(h.device):
                n_0 = F.layer_norm(h_0.to(wide), h_0.shape[-1:], norms[1], norms[0], EPS)
                n = F.layer_norm(h.to(wide), h.shape[-1:], norms[3], norms[2], EPS)
                gate = torch.sigmoid(n * (w_l + w_c * n_0) + beta) * w_o
            if seen is not None:
                seen(path, step, gate.detach().flatten(1).mean(1)[: len(each)])
            out = h_0 + (gate * h.to(wide)).sum(0).to(h_0)
            return out.movedim(-1, 1) if grid else out

        return summed

    def _rows(self, path: str, like: Tensor) -> tuple[Tensor, ...]:
        """w_l, w_c, w_o, beta, then bias and weight of the norms of the base's output and of the LoRAs', (D,) each."""
        begin = sum(self.widths[: self.places[path]])
        return self.on(like)["table"][:, begin : begin + self.design.layers[path]].unbind(0)


def exact(device: torch.device) -> AbstractContextManager[object]:
    """Without the autocast that trainings run in."""
    return torch.autocast(device.type, enabled=False) if torch.is_grad_enabled() else nullcontext()


def relative(answer: Float[Tensor, "*places K"]) -> Float[Tensor, "*places K"]:
    """Gates of which the largest is 1."""
    return (answer - answer.amax(-1, keepdim=True)).exp()


def number(category: str) -> int:
    """Which of CATEGORIES a LoRA's is."""
    return CATEGORIES.index(category) if category in CATEGORIES else len(CATEGORIES) - 1


def directions(layer: Stack, weights: Float[Tensor, "P"], count: int = GLOBAL) -> Float[Tensor, "D q"]:
    """The strongest left singular vectors of sum_k w_k B_k A_k: projected on them the sum is its best approximation of that rank."""
    factors = layer.stored()
    up, down = (factors.up * weights.to(factors.up)).double(), factors.down.flatten(1).double()
    basis, triangle = torch.linalg.qr(up)
    left, _, _ = torch.linalg.svd(triangle @ torch.linalg.qr(down.T).R.T, full_matrices=False)
    return basis @ left[:, :count]


# files ---------------------------------------------------------------------------------------------------------------

_DESIGN = TypeAdapter(Design)


def write(gating: Gating, file: Path, **lines: str) -> Path:
    """One safetensors file, whole or not at all. lines: further ones of its header, as how it was trained."""
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in gating.state_dict().items()}
    header = {"format": "pt", "kind": FORMAT, "design": json.dumps(asdict(gating.design), sort_keys=True), **lines}
    return atomic.write(file, save(tensors, metadata=header))


def read(file: Path) -> Gating:
    """Raises Refused for what is no file of gates."""
    held = load_safely(file)
    if held.metadata.get("kind") != FORMAT:
        raise Refused(f"{file} is no file of gates: `medley train gates` writes one")
    try:
        design = _DESIGN.validate_json(held.metadata.get("design", ""))
    except ValidationError as error:
        raise Refused(f"{file} is no usable file of gates: {explain(error)}") from None
    if not all(0 < width <= 2**20 for width in design.layers.values()):
        raise Refused(f"{file} is no usable file of gates: its layers have no width")
    gating = Gating(design)
    wanted = {name: tuple(value.shape) for name, value in gating.state_dict().items()}
    if {name: tuple(value.shape) for name, value in held.tensors.items()} != wanted:
        raise Refused(f"{file} is damaged: its tensors are not those of its kind of gates, {design.kind}")
    gating.load_state_dict({name: value.float() for name, value in held.tensors.items()})
    return gating.requires_grad_(False)
