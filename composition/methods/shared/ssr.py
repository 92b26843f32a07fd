"""SSR-Merge's matrices: R of each layer so that B R A does, on what each LoRA sees when it is asked for, what that LoRA does alone.

Measured once for a set of LoRAs: each in turn is asked for by a prompt of its own, alone and at weight 1, in one evaluation of the same noise
at the run's first time. Over all rows z = A x of all LoRAs' ranks, G is the sum of z z^T and Q that of the asked LoRA's ranks times z; then
R = Q (G + ridge)^-1, the least squares optimum (arXiv 2606.10617; float64). The ridge is a share of G's mean diagonal. Shapes: P ranks.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Generator, Tensor

from composition import atomic, prompts
from composition.adapters.stack import Product, Rewrite, Stack
from composition.loop import Step
from composition.loras.safetensors import load_safely
from composition.profiles.mixing import Measured, Mixing
from composition.refusal import Refused
from composition.run import Run

SEED = 42  # of the noise, as the reference has it
Prompts = Literal["trigger", "own", "request"]


class Sums(NamedTuple):
    """A layer's: G over all evaluations, and the rows of each LoRA's ranks in the evaluation that asked for it, Q."""

    gram: Float[Tensor, "P P"]
    cross: Float[Tensor, "P P"]

    @staticmethod
    def empty(ranks: int) -> "Sums":
        return Sums(torch.zeros(ranks, ranks, dtype=torch.float64), torch.zeros(ranks, ranks, dtype=torch.float64))

    def add(self, z: Float[Tensor, "rows P"], span: tuple[int, int]) -> None:
        """Rows of A x from the evaluation of the LoRA whose ranks these are."""
        product = (z.T @ z).to("cpu", torch.float64)
        self.gram.add_(product)
        self.cross[slice(*span)] += product[slice(*span)]

    def solved(self, ridge: float, ranks: Sequence[int]) -> Float[Tensor, "P P"]:
        """R over these ranks; the identity on the others, and where nothing was seen."""
        solution = torch.eye(len(self.gram), dtype=torch.float64)
        index = torch.tensor(ranks)
        gram, cross = self.gram[index][:, index], self.cross[index][:, index]
        level = gram.diagonal().mean()
        if level > 0:
            ridged = gram + ridge * level * torch.eye(len(index), dtype=torch.float64)
            solution[index[:, None], index] = torch.linalg.solve(ridged, cross, left=False)
        return solution

    def error(self, matrix: Float[Tensor, "P P"], up: Float[Tensor, "out P"], spans: Sequence[tuple[int, int]]) -> tuple[float, float]:
        """(sum over LoRAs of |B R z - B_k z_k|^2, the same of nothing at all) over the rows that were seen."""
        inner = up.double().T @ up.double()
        own = sum(float((inner[slice(*s), slice(*s)] * self.cross[slice(*s), slice(*s)]).sum()) for s in spans)
        both = float((inner * (matrix @ self.gram @ matrix.T)).sum() - 2 * (inner * (matrix @ self.cross.T)).sum())
        return both + own, own


def prepare(run: Run, step: Step, stack: ExitStack, asked: Prompts, ridge: float) -> None:
    """From now on until `stack` ends the run's LoRAs are mixed by R, measured now unless it was before. Nothing for fewer than two."""
    if len(run.names) < 2:
        return
    texts = calibration_prompts(run, asked)
    measured = Measured(
        run.request.model, tuple(run.tensors.get(name, name) for name in run.names), tuple(texts), run.request.negative if run.guided else None,
        ridge, float(step.t), tuple(step.latents.shape[1:]), str(step.latents.dtype))
    mixing = run.profiles.remembered(measured) or _kept(run, measured)
    if mixing is None:
        mixing = measure(run, step, texts, ridge)
        _keep(run, measured, mixing)
    run.profiles.remember(measured, mixing)
    run.notes["ssr"] = {"prompts": dict(zip(run.names, texts, strict=True)), "layers": len(mixing.matrices),
                        "error": round(mixing.error, 4), "error of adding up": round(mixing.merged, 4)}
    stack.enter_context(run.adapters.rewritten({path: mixed(matrix) for path, matrix in mixing.matrices.items()}))


def mixed(matrix: Float[Tensor, "P P"]) -> Rewrite:
    """The factors with R A in place of A: the gates of ranks act after R."""

    def rewrite(product: Product) -> Product:
        flat = matrix.to(product.down) @ product.down.flatten(1)
        return product._replace(down=flat.view_as(product.down))

    return rewrite


def measure(run: Run, step: Step, texts: Sequence[str], ridge: float) -> Mixing:
    """R of every layer that two or more LoRAs of the run touch, in K evaluations."""
    first = Step(0, step.count, step.t, noise(run, step))
    live = [run.adapters.names.index(name) for name in run.names]
    sums: dict[str, Sums] = {}
    for name, text in zip(run.names, texts, strict=True):
        k = run.adapters.names.index(name)

        def watch(layer: Stack, ranks: Float[Tensor, "rows places P"], k: int = k) -> None:
            mine = sums.setdefault(layer.path, Sums.empty(ranks.shape[-1]))
            mine.add(ranks.flatten(0, 1).float() if ranks.dtype != torch.float64 else ranks.flatten(0, 1), layer.spans[k])

        run.observe(first, {name: 1.0}, run.encode(text, {name: 1.0}), watch)
    matrices, wrong, merged, whole = {}, 0.0, 0.0, 0.0
    for path, layer in run.adapters.stacks().items():
        touching = [k for k in live if layer.touches(k)]
        if len(touching) < 2 or path not in sums:
            continue
        spans = [layer.spans[k] for k in touching]
        matrix = sums[path].solved(ridge, [rank for begin, end in spans for rank in range(begin, end)])
        up = layer.product(torch.zeros((), dtype=torch.float32)).up
        error, own = sums[path].error(matrix, up, spans)
        added, _ = sums[path].error(torch.eye(len(matrix), dtype=torch.float64), up, spans)
        matrices[path] = matrix.float() if step.latents.dtype != torch.float64 else matrix
        wrong, merged, whole = wrong + error, merged + added, whole + own
    return Mixing(matrices, wrong / whole if whole else 0.0, merged / whole if whole else 0.0)


def noise(run: Run, step: Step) -> Float[Tensor, "1 *S"]:
    """The noise that every set is measured with, as this run's scheduler begins."""
    drawn = torch.randn(1, *step.latents.shape[1:], generator=Generator().manual_seed(SEED), dtype=torch.float32)
    return (drawn * float(getattr(run.scheduler, "init_noise_sigma", 1.0))).to(step.latents)


def calibration_prompts(run: Run, asked: Prompts) -> list[str]:
    """What each LoRA is asked for by: its first trigger word (its name where it has none); the request's prompt with no other LoRA's trigger
    words ("own"); or the whole prompt ("request")."""
    if asked == "request":
        return [run.request.prompt] * len(run.names)
    if asked == "own":
        scene = prompts.scene(run.request.prompt, run.loras, run.categories, run.triggers)
        own = dict(zip(scene.concepts, scene.prompts[1:], strict=True))
        return [own.get(name, scene.prompts[0]) for name in run.names]
    return [next(iter(run.triggers.get(name, ())), name.replace("_", " ")) for name in run.names]


def _kept(run: Run, measured: Measured) -> Mixing | None:
    """From the user's store. A file that cannot be used is measured again, over it."""
    file = run.profiles.mixing_file(measured)
    if file is None or not file.is_file():
        return None
    try:
        held = load_safely(file)
        matrices = {path: matrix for path, matrix in held.tensors.items() if _fits(run.adapters.stacks(), path, matrix)}
        error, merged = float(held.metadata["error"]), float(held.metadata["merged"])
    except (Refused, KeyError, ValueError):
        return None
    return Mixing(matrices, error, merged) if held.metadata.get("key") == measured.key and len(matrices) == len(held.tensors) else None


def _fits(stacks: Mapping[str, Stack], path: str, matrix: Tensor) -> bool:
    ranks = stacks[path].spans[-1][1] if path in stacks else 0
    return matrix.shape == (ranks, ranks) and matrix.dtype in (torch.float32, torch.float64)


def _keep(run: Run, measured: Measured, mixing: Mixing) -> None:
    file = run.profiles.mixing_file(measured)
    if file is None:
        return
    header = {"format": "pt", "key": measured.key, "error": str(mixing.error), "merged": str(mixing.merged)}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, save({path: matrix.contiguous() for path, matrix in mixing.matrices.items()}, metadata=header))
