"""LoRA-LEGO: the rank-ones of all LoRAs, clustered, make one LoRA of ordinary rank (arXiv 2409.16167, ICLR 2025).

In each layer that two or more LoRAs touch, every LoRA is split into rank-ones b a with a = sqrt(s) v and b = sqrt(s) u of its singular value
decomposition (weight and alpha in them). The paper splits the file's own factors, which a rotation or a rescaling of the same update
changes; these it does not. k-means: a rank-one goes to the centre with the highest <u, u'> <v, v'>, which does not see the sign that (u, v) and
(-u, -v) share. A centre is the mean of its members, their signs as the medoid's, lengthened to their mean length (the paper's parameter
reweighting); all are multiplied by sqrt(r / k), r the mean rank (output reweighting). Nothing is drawn at random: the first centre is the
largest rank-one, each further one the rank-one with the most that no centre has.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from composition.adapters.stack import Product, Rewrite, Stack
from composition.loop import Predict, Step
from composition.methods import method
from composition.methods.shared.canonical import Singular, singular
from composition.methods.shared.factors import adapters_of
from composition.methods.shared.static import added_up
from composition.run import Run

ROUNDS = 10  # of k-means at most
SMALL = 1e-6  # singular values under this share of the largest are rounding; likenesses under it have no sign


@dataclass(frozen=True)
class Options:
    ranks: float = field(default=1.0, metadata={"ge": 0.05, "le": 64.0, "help":
        "Rank of the merged LoRA in each layer, in mean ranks of the LoRAs: as many as there are LoRAs keeps every rank-one."})


@method(title="LoRA-LEGO", about="Clusters the rank-ones of all LoRAs into one LoRA of ordinary rank.", paper="2409.16167", static=True, ranks="some")
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    layers: dict[str, dict[str, float]] = {}

    def rewriting(step: Step, live: tuple[str, ...]) -> dict[str, Rewrite]:
        weights = dict(zip(adapters_of(run, live), run.live(step).values(), strict=True))
        layers.clear()
        return {path: _merging(layer, weights, options.ranks, layers) for path, layer in run.adapters.stacks().items()
                if sum(layer.touches(k) for k in weights) > 1}

    with added_up(run, rewriting) as predict:
        yield predict
    if layers:
        means = {name: round(sum(layer[name] for layer in layers.values()) / len(layers), 4) for name in ("ranks", "of", "shared", "likeness")}
        run.notes["lego"] = {"layers": len(layers), **means}


def _merging(layer: Stack, weights: Mapping[int, float], ranks: float, notes: dict[str, dict[str, float]]) -> Rewrite:
    """The layer's factors as one LoRA's, with the weights of these adapters in it."""
    factors = layer.gates.factors[layer.block].tolist()

    def rewrite(product: Product) -> Product:
        flat, touching = product.down.flatten(1), [k for k in weights if layer.touches(k)]
        spans = [slice(*layer.spans[k]) for k in touching]
        parts = [_weighted(singular(flat[span], product.up[:, span]), weights[k] * factors[k]) for k, span in zip(touching, spans, strict=True)]
        mean = sum(span.stop - span.start for span in spans) / len(spans)
        down, up, notes[layer.path] = merged(parts, max(1, round(ranks * mean)), mean)
        return Product(down.to(flat).view(-1, *product.down.shape[1:]), up.to(product.up), None)

    return rewrite


def _weighted(part: Singular, weight: float) -> Singular:
    return Singular(part.u * (1 if weight >= 0 else -1), part.s * abs(weight), part.v)


def merged(
    parts: list[Singular], count: int, mean: float,
) -> tuple[Float[Tensor, "k in"], Float[Tensor, "out k"], dict[str, float]]:
    """Both factors of the clusters' centres, at most `count`, and what to note of them. mean: the LoRAs' mean rank."""
    u, s, v = torch.cat([part.u for part in parts], 1), torch.cat([part.s for part in parts]), torch.cat([part.v for part in parts])
    owner = torch.cat([torch.full((len(part.s),), k) for k, part in enumerate(parts)])
    real = s > SMALL * s.max().clamp_min(torch.finfo(s.dtype).tiny)
    u, s, v, owner = u[:, real], s[real], v[real], owner[real]
    if len(s) == 0:
        return v.new_zeros(1, v.shape[1]), u.new_zeros(u.shape[0], 1), {"ranks": 0, "of": 0, "shared": 0.0, "likeness": 0.0}
    clusters, signs, likeness = cluster(u.T @ u, v @ v.T, s, min(count, len(s)))
    share = torch.nn.functional.one_hot(clusters).T.to(s) * signs
    share = share / share.abs().sum(1, keepdim=True)
    a, b = (share * s.sqrt()) @ v, (share * s.sqrt()) @ u.T
    length = share.abs() @ (2 * s).sqrt()
    grown = length / (a.square().sum(1) + b.square().sum(1)).sqrt() * (mean / len(a)) ** 0.25  # on both sides: the product has sqrt(r / k)
    shared = sum(len(owner[clusters == j].unique()) > 1 for j in range(len(a))) / len(a)
    return a * grown[:, None], (b * grown[:, None]).T, {"ranks": len(a), "of": len(s), "shared": shared, "likeness": float(likeness.mean())}


def cluster(
    inner: Float[Tensor, "P P"], outer: Float[Tensor, "P P"], s: Float[Tensor, "P"], count: int,
) -> tuple[Int[Tensor, "P"], Float[Tensor, "P"], Float[Tensor, "P"]]:
    """k-means of rank-ones from their inner products <u, u'> and <v, v'>: each one's cluster (numbers without gaps), its sign in it, and how
    like its centre it is."""
    alike, root = inner * outer, s.sqrt()
    centres = [int(s.argmax())]
    while len(centres) < count:
        centres.append(int((s * (1 - alike[:, centres].max(1).values)).index_fill(0, torch.tensor(centres), -torch.inf).argmax()))
    members = torch.nn.functional.one_hot(torch.tensor(centres), len(s)).to(s)
    clusters, signs, likeness = torch.full((len(s),), -1), torch.ones_like(s), torch.ones_like(s)
    for _ in range(ROUNDS):
        both = _cosine(inner, members * root) * _cosine(outer, members * root)
        # Ranks of one LoRA are orthogonal: what they have in common is rounding, and the first centre of those that are equal is taken.
        likeness, nearest = (torch.where(both.abs() < SMALL, 0.0, both) - torch.arange(count) * 1e-9).max(1)
        if torch.equal(nearest, clusters):
            break
        clusters = nearest
        for j in clusters.unique():
            mine = (clusters == j).nonzero()[:, 0]
            medoid = mine[alike[mine][:, mine].sum(1).argmax()]
            toward = inner[mine, medoid] + outer[mine, medoid]
            signs[mine] = torch.where(toward.abs() < SMALL, 1.0, toward.sign())
        members = torch.nn.functional.one_hot(clusters, count).T.to(s) * signs
    return clusters.unique(return_inverse=True)[1], signs, likeness


def _cosine(gram: Float[Tensor, "P P"], centres: Float[Tensor, "k P"]) -> Float[Tensor, "P k"]:
    """Of unit vectors with these inner products to the centres, sums of them with these coefficients."""
    across = gram @ centres.T
    return across / (centres * across.T).sum(1).clamp_min(1e-30).sqrt()
