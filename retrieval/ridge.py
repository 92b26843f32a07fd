"""A weight encoder in closed form: ridge regression from what LoRAs change in each layer to the directions in which they move pictures.

Updates of LoRAs that were trained apart are nearly orthogonal, so a few hundred of them say little of one another, and a deep encoder learns them
by heart. A linear map has a solution without training steps, and the error that it would have on each LoRA, had it not been there, is known exactly
(leave-one-out, Allen 1974). Which layers to heed is learned from that error, as the weights of a sum of kernels (multiple kernel learning,
Lanckriet 2004). An update dW counts through its inner products alone: what its factors, their rank and their dtype are does not matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from composition.loras.kinds.lora import Factors
from composition.refusal import Refused
from retrieval.sketch import Sketch
from retrieval.training import Lessons

DIRECTIONS = 32  # principal ones of the targets that are predicted; the rest is noise of their measurement
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of a kernel whose diagonal is 1
HEAVY, LIGHT = (48, 32), (8, 8)  # principal directions of outputs and inputs that a layer is read by: one that tells much, and another
TELLING = 4.0  # the weight from which a layer tells much; 1 is what all begin with
MOST_HEAVY = 8
SPARE = 8  # columns more than are wanted, for the accuracy of principal directions (Halko et al. 2011)
STEPS, RATE, PULL = 60, 0.1, 0.002  # of the weights of layers: Adam's steps and rate, and what holds their logs near 0
SHARP = 20.0  # factor of cosines in the loss
TEXTS = 6  # of each group, that weights are learned from
SOME = 400  # LoRAs that they are learned from

Lora = Mapping[str, Factors] | Sketch
Layers = Mapping[str, Factors | Float[Tensor, " kk"]]  # factors, or the entries of a sketch


class Reading(NamedTuple):
    """How a layer is read: outputs and inputs are projected onto these orthonormal columns. None: as sketches have it."""

    outputs: Float[Tensor, "out a"] | None
    inputs: Float[Tensor, "in b"] | None


@dataclass(frozen=True, eq=False)
class Fit:
    """What `fit` learned. weights: of layers. readings, maps: by layer, how its update is read and what that adds to the LoRA's coordinates.
    axes: of these coordinates in the judge's space. loss: leave-one-out."""

    weights: Mapping[str, float]
    readings: Mapping[str, Reading]
    maps: Mapping[str, Float[Tensor, "ab q"]]
    axes: Float[Tensor, "q D"]
    ridge: float
    loss: float


def shapes(*loras: Lora) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer that one of them changes, by name."""
    return {name: shape for lora in loras for name, shape in (
        zip(lora.layers, map(tuple, lora.shapes.tolist()), strict=True) if isinstance(lora, Sketch)
        else ((name, (part.stored_up.shape[0], part.stored_down[0].numel())) for name, part in lora.items()))}  # fmt: skip


def opened(lora: Lora) -> Layers:
    """By layer what is read of it."""
    if not isinstance(lora, Sketch):
        return lora
    return dict(zip(lora.layers, lora.matrices(lora.layers).flatten(1), strict=True))


def products(loras: Sequence[Layers], layer: str) -> Float[Tensor, "n n"]:
    """<dW, dW'> of a layer for all pairs, 0 where one lacks it: exact of factors, estimates of sketches."""
    result = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    having = [(index, lora[layer]) for index, lora in enumerate(loras) if layer in lora]
    factors = [(index, part) for index, part in having if isinstance(part, Factors)]
    if not factors:
        rows = [part for _, part in having if isinstance(part, Tensor)]
        if rows:
            places, own = torch.tensor([index for index, _ in having]), torch.stack(rows)
            result[places[:, None], places] = own @ own.T
        return result
    downs = torch.cat([part.down.flatten(1).double() for _, part in factors])  # factors may be large where their product is small
    ups = torch.cat([part.up.flatten(1).double() for _, part in factors], 1)
    owner = torch.repeat_interleave(torch.tensor([index for index, _ in factors]), torch.tensor([part.rank for _, part in factors]))
    for index, _ in factors:
        rows = owner == index
        both = (downs[rows] @ downs.T) * (ups[:, rows].T @ ups)
        result[index].index_add_(0, owner, both.sum(0))
    return result


def read(part: Factors | Float[Tensor, " ab"] | None, reading: Reading) -> Float[Tensor, " ab"] | None:
    """A layer's update in the coordinates of a reading; None where it has none, or one of another shape."""
    if part is None or isinstance(part, Tensor):
        return part
    up, down = part.up.flatten(1).double(), part.down.flatten(1).double()
    if reading.outputs is None or reading.inputs is None or (up.shape[0], down.shape[1]) != (reading.outputs.shape[0], reading.inputs.shape[0]):
        return None
    return ((reading.outputs.double().T @ up) @ (down @ reading.inputs.double())).flatten()


def targets(lessons: Lessons, centre: Float[Tensor, " T"]) -> Float[Tensor, "n D"]:
    """Where each LoRA should lie: its direction less the mean direction, or the mean of its texts less the centre of all texts; length 1, 0 for neither."""
    texts = F.normalize(lessons.captions.double(), dim=-1) - centre.double()
    sums = torch.zeros(int(lessons.groups.max()) + 1, centre.shape[0], dtype=torch.float64)
    kept = lessons.of < len(sums)
    spoken = F.normalize(sums.index_add_(0, lessons.of[kept], texts[kept]), dim=-1)[lessons.groups]
    if lessons.directions is None or not (measured := lessons.directions.any(1)).any():
        return spoken
    moved = lessons.directions.double()
    return torch.where(measured[:, None], F.normalize(moved - moved[measured].mean(0), dim=-1), spoken)


def left_out(kernel: Float[Tensor, "n n"], wanted: Float[Tensor, "n q"], ridge: Tensor | float) -> Float[Tensor, "n q"]:
    """What ridge regression predicts for each row of the rest: (H y - diag(H) y) / (1 - diag(H)), H = K (K + ridge I)^-1."""
    eye = torch.eye(len(kernel), dtype=kernel.dtype)
    hat = torch.linalg.solve(kernel + ridge * eye, kernel).mT
    own = hat.diagonal()[:, None]
    return (hat @ wanted - own * wanted) / (1 - own).clamp_min(1e-9)


def fit(loras: Sequence[Lora], lessons: Lessons, layers: Sequence[str], centre: Float[Tensor, " T"], seed: int = 0) -> Fit:
    """The encoder's map, the same on every run. layers: those it may read. centre: the mean of the judge's vectors of texts of all kinds.

    Raises Refused when there is nothing to learn from.
    """
    wanted = targets(lessons, centre)
    usable = [index for index in range(len(loras)) if wanted[index].any()]
    if len(usable) < 2:
        raise Refused(f"{len(usable)} LoRAs have words or a behaviour: training needs at least 2")
    parts, wanted, groups = [opened(loras[index]) for index in usable], wanted[usable], lessons.groups[usable]
    axes = torch.linalg.svd(wanted, full_matrices=False).Vh[:DIRECTIONS]
    wanted = wanted @ axes.T
    queries, owners = _queries(lessons, groups, centre, wanted, axes, seed)
    some = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed))[:SOME].sort().values
    kernels = torch.stack([products([parts[index] for index in some.tolist()], layer).float() for layer in layers])
    logs = _weights(kernels, wanted[some], queries, owners, groups[some])
    weights = logs.exp()
    kernel = _cosines(weights, kernels)
    losses = {ridge: _loss(left_out(kernel, wanted[some], ridge), queries, owners, groups[some]).item() for ridge in RIDGES}
    ridge = min(losses, key=losses.__getitem__)
    heavy = [index for index in weights.argsort(descending=True).tolist()[:MOST_HEAVY] if weights[index] >= TELLING]
    readings = {layer: _reading(parts, layer, HEAVY if index in heavy else LIGHT) for index, layer in enumerate(layers)}
    return _solved(parts, dict(zip(layers, weights.tolist(), strict=True)), readings, wanted, axes, ridge, losses[ridge])


def _solved(loras: Sequence[Layers], weights: Mapping[str, float], readings: Mapping[str, Reading], wanted: Float[Tensor, "n q"], axes: Float[Tensor, "q D"],
            ridge: float, loss: float) -> Fit:  # fmt: skip
    """The map of projected updates: X^T (X X^T + ridge I)^-1 Y, by layer."""
    parts = {layer: features(loras, layer, reading) * weights[layer] ** 0.5 for layer, reading in readings.items()}
    norms = torch.stack([part.square().sum(1) for part in parts.values()]).sum(0).sqrt().clamp_min(1e-30)[:, None]
    kernel = torch.stack([part @ part.T for part in parts.values()]).sum(0) / norms / norms.T
    dual = torch.linalg.solve(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype), wanted)
    maps = {layer: (part / norms).T @ dual for layer, part in parts.items()}
    return Fit(weights, readings, maps, axes, ridge, loss)


def features(loras: Sequence[Layers], layer: str, reading: Reading) -> Float[Tensor, "n ab"]:
    """A layer of many LoRAs in the coordinates of a reading; rows of zeros where there is none."""
    rows = [read(lora.get(layer), reading) for lora in loras]
    width = next((len(row) for row in rows if row is not None), 1)
    return torch.stack([torch.zeros(width, dtype=torch.float64) if row is None else row for row in rows])


def _queries(lessons: Lessons, groups: Int[Tensor, " n"], centre: Float[Tensor, " T"], wanted: Float[Tensor, "n q"], axes: Float[Tensor, "q D"],
             seed: int) -> tuple[Float[Tensor, "c q"], Int[Tensor, " c"]]:  # fmt: skip
    """Texts that should find LoRAs, in coordinates, and the group of each: some of every group; without texts, the targets themselves."""
    known, rng = set(groups.tolist()), torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lessons.of), generator=rng).tolist()
    count: dict[int, int] = {}
    chosen = []
    for index in order:
        group = int(lessons.of[index])
        count[group] = count.get(group, 0) + 1
        if group in known and count[group] <= TEXTS:
            chosen.append(index)
    if not chosen:
        return F.normalize(wanted, dim=-1), groups
    texts = F.normalize(F.normalize(lessons.captions[chosen].double(), dim=-1) - centre.double(), dim=-1)
    return texts @ axes.T, lessons.of[chosen]


def _loss(predicted: Float[Tensor, "n q"], queries: Float[Tensor, "c q"], owners: Int[Tensor, " c"], groups: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """How badly each query finds any LoRA of its group among all: the negative log of its share of a softmax."""
    right = owners[:, None] == groups
    there = right.any(1)
    logits = SHARP * queries[there] @ F.normalize(predicted, dim=-1).T
    return (logits.logsumexp(1) - logits.masked_fill(~right[there], -torch.inf).logsumexp(1)).mean()


def _weights(kernels: Float[Tensor, "l n n"], wanted: Float[Tensor, "n q"], queries: Float[Tensor, "c q"], owners: Int[Tensor, " c"],
             groups: Int[Tensor, " n"]) -> Float[Tensor, " l"]:  # fmt: skip
    """The logs of the layers' weights that make the leave-one-out loss small."""
    with torch.enable_grad():
        logs = torch.zeros(len(kernels), dtype=torch.float64, requires_grad=True)
        ridge = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.Adam([logs, ridge], RATE)
        for _ in range(STEPS):
            predicted = left_out(_cosines(logs.exp(), kernels), wanted, ridge.exp())
            loss = _loss(predicted, queries, owners, groups) + PULL * logs.square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return logs.detach()


def _cosines(weights: Float[Tensor, " l"], kernels: Float[Tensor, "l n n"]) -> Float[Tensor, "n n"]:
    total = torch.einsum("l,lnm->nm", weights.float(), kernels).double()
    norms = total.diagonal().clamp_min(1e-30).sqrt()
    return total / norms[:, None] / norms


def _reading(loras: Sequence[Layers], layer: str, sizes: tuple[int, int]) -> Reading:
    """Onto the principal directions of a layer's updates, each LoRA's scaled to length 1: of sum dW dW^T and of sum dW^T dW."""
    ups, downs = [], []
    for lora in loras:
        if isinstance(part := lora.get(layer), Factors):
            left, right = torch.linalg.qr(part.up.flatten(1).double()), torch.linalg.qr(part.down.flatten(1).double().T)
            u, s, vh = torch.linalg.svd(left.R @ right.R.T)
            if s[0] > 0:
                ups.append(left.Q @ u * (s / s.norm()))
                downs.append(right.Q @ vh.T * (s / s.norm()))
    if not ups:
        return Reading(None, None)
    bases = []
    for parts, size in ((ups, sizes[0]), (downs, sizes[1])):
        stack = torch.cat(parts, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, *_ = torch.svd_lowrank(stack, min(size + SPARE, *stack.shape), niter=4)
        bases.append(left[:, :size].float())
    return Reading(*bases)
