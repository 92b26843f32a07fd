"""NP-LoRA's projection: what content LoRAs read is taken off the directions that style LoRAs read (arXiv 2511.11051)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from composition.adapters.stack import Product, Rewrite
from composition.methods.shared.factors import adapters_of, ranks_of
from composition.methods.shared.roles import parted
from composition.run import Run

NOISE = 1e-6  # of the largest singular value: under it a direction is rounding, and no style's


def projected(run: Run, live: Sequence[str], mu: float, energy: float = 1.0, protect: str = "style") -> dict[str, Rewrite]:
    """The A of the LoRAs that are not protected rewritten, by path; noted is what each shares with the others: the share of its energy in their
    directions. protect: "style" or "content"."""
    content, style = parted(run, live)
    if not content or not style:
        run.notes["np-lora"] = f"nothing is projected, so it is the same as merge: it takes a style LoRA and one of another category, and here are {_counted(content, style)}"
        return {}
    projected_names, guarded = (content, style) if protect == "style" else (style, content)
    projecting, guarding = adapters_of(run, projected_names), adapters_of(run, guarded)
    rewrites: dict[str, Rewrite] = {}
    taken, whole = dict.fromkeys(projected_names, 0.0), dict.fromkeys(projected_names, 0.0)
    for path, layer in run.adapters.stacks().items():
        mine, protected = ranks_of(layer, projecting), ranks_of(layer, guarding)
        factors = layer.stored()
        factors = factors._replace(down=factors.down.double().flatten(1), up=factors.up.double())
        for name, k in zip(projected_names, projecting, strict=True):
            whole[name] += _energy(factors, layer.spans[k])
        if not len(mine) or not len(protected):
            continue
        basis = directions(factors.down[protected], factors.up[:, protected], energy)
        for name, k in zip(projected_names, projecting, strict=True):
            taken[name] += _energy(factors._replace(down=factors.down @ basis), layer.spans[k])
        rewrites[path] = without(basis, mine, mu / (1 + mu))
    run.notes["np-lora"] = {
        "protected": list(guarded), "shared energy": {name: round(taken[name] / max(whole[name], 1e-30), 4) for name in projected_names}}
    return rewrites


def directions(down: Float[Tensor, "p in"], up: Float[Tensor, "out p"], energy: float = 1.0) -> Float[Tensor, "in q"]:
    """Right singular vectors of up @ down, of the strongest values that make up this share of its energy; float64, orthonormal."""
    basis, triangle = torch.linalg.qr(down.double().T)  # down = triangle^T basis^T
    _, values, vectors = torch.linalg.svd(torch.linalg.qr(up.double()).R @ triangle.T, full_matrices=False)
    share = values.square().cumsum(0) / values.square().sum().clamp(min=1e-300)
    count = int((share < energy - 1e-12).sum()) + 1 if energy > 0 else 0
    kept = (values > NOISE * values[0]) & (torch.arange(len(values)) < count)
    return basis @ vectors[kept].T


def without(basis: Float[Tensor, "in q"], ranks: Int[Tensor, "p"], share: float) -> Rewrite:
    """The factors with this share of what these ranks' A reads in the basis taken away."""

    def rewrite(product: Product) -> Product:
        index, flat = ranks.to(product.down.device), product.down.flatten(1)
        vectors, rows = basis.to(flat), flat.index_select(0, index)
        rows = rows - share * (rows @ vectors) @ vectors.T
        return product._replace(down=flat.index_copy(0, index, rows).view_as(product.down))

    return rewrite


def _energy(factors: Product, span: tuple[int, int]) -> float:
    """|B_k A_k|^2 of an adapter's ranks."""
    down, up = factors.down[slice(*span)], factors.up[:, slice(*span)]
    return float(((up.T @ up) * (down @ down.T)).sum())


def _counted(content: Sequence[str], style: Sequence[str]) -> str:
    return f"{len(style)} of the one and {len(content)} of the others"
