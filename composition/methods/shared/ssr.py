"""SSR-Merge's matrices: R of each layer so that B R A does, on what each LoRA sees when it is asked for, what that LoRA does alone.

Measured once for a set of LoRAs: each in turn is asked for by a prompt of its own, alone and at weight 1, in one evaluation of the same noise
at the run's first time. Over all rows z = A x of all LoRAs' ranks, G is the sum of z z^T and Q that of the asked LoRA's ranks times z; then
R = Q (G + ridge)^-1, the least squares optimum (arXiv 2606.10617; float64). The ridge is a share of G's mean diagonal. Shapes: P ranks.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Generator, Tensor

from composition import atomic, prompt_syntax, prompts
from composition.adapters.stack import Product, Rewrite, Stack
from composition.loop import Step
from composition.loras.safetensors import load_safely
from composition.methods.shared.factors import adapters_of, ranks_of
from composition.profiles.mixing import Measured, Mixing
from composition.refusal import Refused
from composition.run import Run

RIDGE = 1e-2  # of G's mean diagonal
SEED = 42  # of the noise, as the reference has it
Prompts = Literal["trigger", "own", "request"]
Where = Literal["all", "text", "picture"]


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

    def of(self, ranks: Int[Tensor, "p"]) -> "Sums":
        """These ranks alone."""
        return Sums(self.gram[ranks][:, ranks], self.cross[ranks][:, ranks])

    def solved(self, ridge: float) -> Float[Tensor, "P P"]:
        """R; the identity where nothing was seen."""
        identity = torch.eye(len(self.gram), dtype=torch.float64)
        level = self.gram.diagonal().mean()
        return torch.linalg.solve(self.gram + ridge * level * identity, self.cross, left=False) if level > 0 else identity

    def error(self, matrix: Float[Tensor, "P P"], up: Float[Tensor, "out P"]) -> float:
        """The sum over LoRAs of |B R z - B_k z_k|^2 over the rows that were seen, less what no R changes, the sum of |B_k z_k|^2."""
        inner = up.T @ up
        return float((inner * (matrix @ self.gram @ matrix.T)).sum() - 2 * (inner * (matrix @ self.cross.T)).sum())

    def alone(self, up: Float[Tensor, "out P"], owner: Int[Tensor, "P"]) -> float:
        """The sum over LoRAs of |B_k z_k|^2."""
        return float(((up.T @ up) * self.cross * (owner[:, None] == owner)).sum())


class Rewrites:
    """R A in place of A for a set of LoRAs: as it was measured before, by this process or in the user's store, else measured now.

    All sets of a run are measured at its first time.
    """

    def __init__(self, run: Run, wanted: Prompts, ridge: float, on: Where = "all") -> None:
        self.run, self.ridge, self.on = run, ridge, on
        self.first: Step | None = None
        self.texts = dict(zip(run.names, calibration_prompts(run, wanted), strict=True)) if len(run.names) > 1 else {}

    def __call__(self, step: Step, names: Sequence[str]) -> dict[str, Rewrite]:
        """By the path of each layer that two or more of these LoRAs touch."""
        self.first = self.first or step
        if len(names) < 2:
            return {}
        layers, live = self.run.adapters.stacks(), adapters_of(self.run, names)
        matrices = self._mixing(names, self.first).matrices
        return {path: mixed(matrix, ranks_of(layers[path], live)) for path, matrix in matrices.items()
                if self.on == "all" or (getattr(layers[path].axis, "kind", "") == "text") == (self.on == "text")}

    def _mixing(self, names: Sequence[str], first: Step) -> Mixing:
        run, texts = self.run, [self.texts[name] for name in names]
        measured = Measured(
            run.request.model, tuple(_identity(run, name) for name in names), tuple(texts), run.request.negative if run.guided else None,
            self.ridge, float(first.t), tuple(first.latents.shape[1:]), str(first.latents.dtype))
        mixing = run.profiles.remembered(measured) or _kept(run, names, measured)
        if mixing is None:
            mixing = measure(run, first, names, texts, self.ridge)
            _keep(run, measured, mixing)
        run.profiles.remember(measured, mixing)
        run.notes.setdefault("ssr", {})[", ".join(names)] = {
            "prompts": texts, "layers": len(mixing.matrices), "error": round(mixing.error, 4), "error of adding up": round(mixing.merged, 4)}
        return mixing


def mixed(matrix: Float[Tensor, "p p"], ranks: Int[Tensor, "p"]) -> Rewrite:
    """The factors with R A in place of these ranks' A: the gates of ranks act after R."""

    def rewrite(product: Product) -> Product:
        index = ranks.to(product.down.device)
        flat = product.down.flatten(1)
        flat = flat.index_copy(0, index, matrix.to(flat) @ flat.index_select(0, index))
        return product._replace(down=flat.view_as(product.down))

    return rewrite


def measure(run: Run, step: Step, names: Sequence[str], texts: Sequence[str], ridge: float) -> Mixing:
    """R of every layer that two or more of these LoRAs touch, in K evaluations, each asked for by its text."""
    first = Step(0, step.count, step.t, noise(run, step))
    live = adapters_of(run, names)
    exact = step.latents.dtype == torch.float64
    sums: dict[str, Sums] = {}
    for name, text in zip(names, texts, strict=True):
        k = run.adapters.names.index(name)

        def watch(layer: Stack, ranks: Float[Tensor, "rows places P"], k: int = k) -> None:
            mine = sums.setdefault(layer.path, Sums.empty(ranks.shape[-1]))
            rows = ranks.flatten(0, 1)
            mine.add(rows if exact else rows.float(), layer.spans[k])

        run.observe(first, {name: 1.0}, run.encode(run.spelling.text(text), {name: 1.0}), watch)
    matrices, wrong, merged, whole = {}, 0.0, 0.0, 0.0
    for path, layer in run.adapters.stacks().items():
        ranks, factors = ranks_of(layer, live), layer.stored()
        assert factors.owner is not None
        owner = factors.owner[ranks]
        if len(owner.unique()) < 2 or path not in sums:
            continue
        mine, up = sums[path].of(ranks), factors.up.double()[:, ranks]
        matrix, own = mine.solved(ridge), mine.alone(up, owner)
        matrices[path] = matrix if exact else matrix.float()
        wrong += mine.error(matrix, up) + own
        merged += mine.error(torch.eye(len(matrix), dtype=torch.float64), up) + own
        whole += own
    return Mixing(matrices, wrong / whole if whole else 0.0, merged / whole if whole else 0.0)


def noise(run: Run, step: Step) -> Float[Tensor, "1 *S"]:
    """The noise that every set is measured with, as this run's scheduler begins."""
    drawn = torch.randn(1, *step.latents.shape[1:], generator=Generator().manual_seed(SEED), dtype=torch.float32)
    return (drawn * float(getattr(run.scheduler, "init_noise_sigma", 1.0))).to(step.latents)


def calibration_prompts(run: Run, wanted: Prompts) -> list[str]:
    """What each LoRA is asked for by: its first trigger word (its name where it has none); the request's prompt without the words of the
    others ("own"); or the whole prompt ("request")."""
    if wanted == "request":
        return [prompt_syntax.words(run.request)] * len(run.names)
    if wanted == "own":
        return list(prompts.alone(prompt_syntax.words(run.request), run.loras, run.triggers).values())
    return [next(iter(run.triggers.get(name, ())), name.replace("_", " ")) for name in run.names]


def _identity(run: Run, name: str) -> str:
    """What of a LoRA its measurement depends on: its tensors, and where it says so the factors of blocks and of the text encoders' part."""
    lora = run.loras[name]
    text = 1.0 if lora.text_weight is None else lora.text_weight / lora.weight
    blocks = "".join(f" {block}={factor!r}" for block, factor in sorted(lora.blocks.items()))
    return run.tensors.get(name, name) + blocks + (f" text={text!r}" if text != 1.0 else "")


def _kept(run: Run, names: Sequence[str], measured: Measured) -> Mixing | None:
    """From the user's store. A file that cannot be used is measured again, over it."""
    file = run.profiles.mixing_file(measured)
    if file is None or not file.is_file():
        return None
    try:
        held = load_safely(file)
        matrices = {path: matrix for path, matrix in held.tensors.items() if _fits(run, names, path, matrix)}
        error, merged = float(held.metadata["error"]), float(held.metadata["merged"])
    except (Refused, KeyError, ValueError):
        return None
    return Mixing(matrices, error, merged) if held.metadata.get("key") == measured.key and len(matrices) == len(held.tensors) else None


def _fits(run: Run, names: Sequence[str], path: str, matrix: Tensor) -> bool:
    layers = run.adapters.stacks()
    ranks = len(ranks_of(layers[path], adapters_of(run, names))) if path in layers else 0
    return ranks > 0 and matrix.shape == (ranks, ranks) and matrix.dtype in (torch.float32, torch.float64)


def _keep(run: Run, measured: Measured, mixing: Mixing) -> None:
    file = run.profiles.mixing_file(measured)
    if file is None:
        return
    header = {"format": "pt", "key": measured.key, "error": str(mixing.error), "merged": str(mixing.merged)}
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, save({path: matrix.contiguous() for path, matrix in mixing.matrices.items()}, metadata=header))
