"""LoRA files of every kind of update for a toy pipeline, and beside each the dense change of the weight, computed here on its own.

Imports nothing of Medley. A made update has its tensors by the words of LyCORIS and kohya, and `dense`: base weight and bias (float64) to
their changes, written out entry by entry or with other operations than a reader would use.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests import toys

ALPHA, RANK = 1.5, 2
KINDS = ("lora", "tucker", "loha", "loha big", "loha tucker", "lokr", "lokr whole", "lokr low", "lokr tucker", "dora", "dora inputs", "dora peft", "dora loha",
         "dora lokr inputs", "ia3", "ia3 input", "oft", "oft bound", "boft", "oftv2", "oftv2 shared", "glora", "glora old", "glora tucker", "full", "bias", "lora bias", "peft bias")
FLAT = ("oftv2", "oftv2 shared")  # of linears and of convolutions over one pixel
CONV = ("tucker", "loha tucker", "lokr tucker", "glora tucker")  # of kernels over more than one pixel

Dense = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Made(NamedTuple):
    """tensors: end of a key to tensor, as kohya and LyCORIS write it. dense: see above."""

    tensors: dict[str, Tensor]
    dense: Dense


def make(kind: str, size: Sequence[int], rng: torch.Generator) -> Made:
    """An update of a layer of this size (out, in, *kernel), about a tenth of a weight of size one; all in float64."""
    out, into, *kernel = size
    taps = tuple(kernel)

    def r(*shape: int, scale: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale

    alpha = {"alpha": torch.tensor(ALPHA, dtype=torch.float64)}
    ones = (1,) * len(taps)

    def weighted(change: Callable[[Tensor], Tensor] | Tensor) -> Dense:
        return lambda weight, bias: ((change(weight) if callable(change) else change).reshape(weight.shape), None)

    def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """core (i, j, *k), up (i, out), down (j, in)."""
        return sum(torch.tensordot(torch.outer(up[i], down[j]), core[i, j], dims=0) for i in range(core.shape[0]) for j in range(core.shape[1]))

    def lora() -> tuple[dict[str, Tensor], Tensor]:
        down, up = r(RANK, into, *taps), r(out, RANK, *ones)
        total = sum(torch.tensordot(up.flatten(1)[:, k], down[k], dims=0) for k in range(RANK))
        return {"lora_down.weight": down, "lora_up.weight": up, **alpha}, ALPHA / RANK * total

    def loha(rank: int = RANK) -> tuple[dict[str, Tensor], Tensor]:
        a, b, c, d = r(out, rank), r(rank, into * _many(taps)), r(out, rank), r(rank, into * _many(taps))
        total = sum(a[:, i : i + 1] * b[i] * (c[:, j : j + 1] * d[j]) for i in range(rank) for j in range(rank))
        return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, **alpha}, (ALPHA / rank * total).view(*size)

    def kron(small: Tensor, large: Tensor) -> Tensor:
        rows = [torch.cat([small[i, j] * large for j in range(small.shape[1])], 1) for i in range(small.shape[0])]
        return torch.cat(rows, 0)

    def lokr() -> tuple[dict[str, Tensor], Tensor]:
        small, a, b = r(2, 4), r(out // 2, RANK), r(RANK, into // 4 * _many(taps))
        return {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b, **alpha}, ALPHA / RANK * kron(small, (a @ b).view(out // 2, into // 4, *taps))

    def scaled(change: Tensor, lengths: Tensor, by_output: bool) -> Dense:
        def dense(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
            whole = weight + change
            new = torch.empty_like(whole)
            for n in range(whole.shape[0 if by_output else 1]):
                line = whole[n] if by_output else whole[:, n]
                line = lengths[n] * line / line.square().sum().sqrt()
                if by_output:
                    new[n] = line
                else:
                    new[:, n] = line
            return new - weight, None
        return dense

    if kind == "lora":
        tensors, change = lora()
        return Made(tensors, weighted(change))
    if kind == "tucker":
        up, core, down = r(out, RANK, 1, 1), r(RANK, RANK, *taps), r(RANK, into, 1, 1)
        return Made({"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up, **alpha},
                    weighted(ALPHA / RANK * tucker(core, up.flatten(1).T, down.flatten(1))))
    if kind in ("loha", "loha big"):
        tensors, change = loha(RANK if kind == "loha" else 12)
        return Made(tensors, weighted(change))
    if kind == "loha tucker":
        parts = [(r(RANK, RANK, *taps, scale=0.7), r(RANK, out, scale=0.7), r(RANK, into, scale=0.7)) for _ in range(2)]
        names = {f"hada_{name}": parts[n][at] for n in range(2) for at, name in enumerate((f"t{n + 1}", f"w{n + 1}_a", f"w{n + 1}_b"))}
        return Made(names | alpha, weighted(ALPHA / RANK * tucker(*parts[0]) * tucker(*parts[1])))
    if kind == "lokr":
        tensors, change = lokr()
        return Made(tensors, weighted(change))
    if kind == "lokr whole":  # alpha does not count
        small, large = r(4, 2), r(out // 4, into // 2, *taps)
        return Made({"lokr_w1": small, "lokr_w2": large, **alpha}, weighted(kron(small, large)))
    if kind == "lokr low":
        a, b, large = r(2, RANK), r(RANK, 2), r(out // 2, into // 2, *taps)
        return Made({"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2": large, **alpha}, weighted(ALPHA / RANK * kron(a @ b, large)))
    if kind == "lokr tucker":
        small, core, a, b = r(2, 2), r(RANK, RANK, *taps), r(RANK, out // 2), r(RANK, into // 2)
        return Made({"lokr_w1": small, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b, **alpha}, weighted(ALPHA / RANK * kron(small, tucker(core, a, b))))
    if kind.startswith("dora"):
        tensors, change = loha() if "loha" in kind else lokr() if "lokr" in kind else lora()
        by_output = "inputs" not in kind
        lengths = r(out if by_output else into).abs() + 0.5
        if "peft" in kind:
            lengths_key, shaped = "lora_magnitude_vector.weight", lengths.view(1, -1, *ones) if taps else lengths
        else:
            lengths_key, shaped = "dora_scale", lengths.view(-1, 1, *ones) if by_output else lengths.view(1, -1, *ones)
        return Made(tensors | {lengths_key: shaped}, scaled(change, lengths, by_output))
    if kind.startswith("ia3"):
        on_input = kind == "ia3 input"
        numbers = r(into if on_input else out)
        stored = numbers.view(1, -1, *ones) if taps else numbers

        def rows(weight: Tensor) -> Tensor:
            whole = weight.clone()
            for n, number in enumerate(numbers.tolist()):
                (whole[:, n] if on_input else whole[n]).mul_(number)
            return whole

        return Made({"weight": stored, "on_input": torch.tensor(int(on_input))}, weighted(rows))
    if kind in ("oft", "oft bound"):
        side = 4
        blocks, rescale = r(out // side, side, side), r(out, 1, *ones) + 1
        bound = 1e-3 if kind == "oft bound" else 0.0

        def turned(weight: Tensor) -> Tensor:
            skew = blocks - blocks.transpose(1, 2)
            if bound:
                skew = skew * min(1.0, bound * out / float(skew.square().sum().sqrt()))
            whole = torch.block_diag(*((torch.eye(side).double() + q) @ torch.linalg.inv(torch.eye(side).double() - q) for q in skew))
            new = (whole.T @ weight.flatten(1)).view_as(weight)
            return (new if bound else rescale * new) - weight

        more = {"alpha": torch.tensor(bound, dtype=torch.float64)} if bound else {"rescale": rescale}
        return Made({"oft_blocks": blocks, **more}, weighted(turned))
    if kind == "boft":
        side, levels = 4, 2
        blocks = r(levels, out // side, side, side)

        def butterfly(weight: Tensor) -> Tensor:
            rows = weight.flatten(1)
            for level in range(levels):
                reach = 2**level * side // 2
                order = [group * 2 * reach + half * reach + at for group in range(out // (2 * reach)) for at in range(reach) for half in range(2)]
                skew = blocks[level] - blocks[level].transpose(1, 2)
                whole = torch.block_diag(*((torch.eye(side).double() + q) @ torch.linalg.inv(torch.eye(side).double() - q) for q in skew))
                new = torch.empty_like(rows)
                new[order] = whole @ rows[order]
                rows = new
            return rows.view_as(weight) - weight

        return Made({"oft_blocks": blocks}, weighted(butterfly))
    if kind in FLAT:
        side = 4
        count, scaled = (1, True) if kind == "oftv2 shared" else (into // side, False)
        above = r(count, side * (side - 1) // 2, scale=0.1 if not scaled else 0.3)

        def from_inputs(weight: Tensor) -> Tensor:
            new = weight.clone()
            for block in range(into // side):
                skew, numbers = torch.zeros(side, side, dtype=torch.float64), iter(above[block % count].tolist())
                for i in range(side):
                    for j in range(i + 1, side):
                        skew[i, j] = next(numbers) / ((side * (side - 1) // 2) ** 0.5 if scaled else 1.0)
                        skew[j, i] = -skew[i, j]
                one = torch.eye(side, dtype=torch.float64)
                turn = one + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew
                for k in range(side):  # x_k of the block becomes sum_m x_m R[m, k]
                    own = slice(block * side, (block + 1) * side)
                    new[:, block * side + k] = 0
                    for m in range(side):
                        new[:, block * side + k] += turn[k, m] * weight[:, own][:, m]
            return new - weight

        return Made({"oft_R.weight": above} | ({"oft_R.scaled_oft": torch.tensor(1)} if scaled else {}), weighted(from_inputs))
    if kind.startswith("glora"):
        a1, a2, b1 = r(into, RANK, *ones), r(RANK, into, *ones), r(out, RANK, *ones)
        core = r(RANK, RANK, *taps) if kind == "glora tucker" else None
        b2 = r(RANK, into, *(taps if core is None else ones))
        beside = sum(torch.tensordot(b1.flatten(1)[:, k], b2[k], dims=0) for k in range(RANK)) if core is None else tucker(core, b1.flatten(1).T, b2.flatten(1))

        def changed(weight: Tensor) -> Tensor:
            mixed = torch.tensordot(weight.movedim(1, -1), a1.flatten(1) @ a2.flatten(1), dims=1).movedim(-1, 1)
            return ALPHA / RANK * (mixed + beside)

        a1, a2, first, second = (a2, a1, b2, b1) if kind == "glora old" else (a1, a2, b1, b2)
        names = {"a1.weight": a1, "a2.weight": a2, "b1.weight": first, "b2.weight": second, **alpha}
        a1, a2 = (a2, a1) if kind == "glora old" else (a1, a2)
        return Made(names | ({} if core is None else {"bm.weight": core}), weighted(changed))
    if kind in ("full", "bias"):
        diff, shift = r(*size), r(out)
        if kind == "bias":
            return Made({"diff_b": shift}, lambda weight, bias: (torch.zeros_like(weight), shift))
        return Made({"diff": diff, "diff_b": shift}, lambda weight, bias: (diff, shift))
    if kind in ("lora bias", "peft bias"):
        tensors, change = lora()
        shift = r(out)
        key, factor = ("diff_b", 1.0) if kind == "lora bias" else ("lora_up.bias", ALPHA / RANK)
        return Made(tensors | {key: shift}, lambda weight, bias: (change, factor * shift))
    raise ValueError(kind)


def write(pipe, path: Path, kind: str, *, seed: int = 0, targets: Sequence[toys.Target] = ("attn", "ff", "proj", "conv"),
          layout: str = "kohya", only: str = "") -> dict[tuple[str, str], Dense]:
    """A file of one kind for the layers of a pipe's denoiser that it can be of, and the dense changes by (component, path)."""
    rng = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    truth: dict[tuple[str, str], Dense] = {}
    for component, name, module in toys._modules(pipe, targets, False):
        size = tuple(module.weight.shape)
        if only not in name or kind in CONV and len(size) < 3 or "bias" in kind and module.bias is None or kind == "full" and module.bias is None:
            continue
        if kind == "boft" and size[0] % 8 or kind in FLAT and torch.Size(size[2:]).numel() > 1:
            continue
        made = make(kind, size, rng)
        if layout == "kohya":
            prefix = f"lora_{'unet' if component == 'unet' else component}_{name.replace('.', '_')}"
        else:
            prefix = f"{component}.{name}"
        for key, value in made.tensors.items():
            if layout == "diffusers":
                key = key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")
            tensors[f"{prefix}.{key}"] = value.contiguous().clone()
        truth[component, name] = made.dense
    save_file(tensors, path)
    return truth


def norms(pipe, path: Path, seed: int = 0) -> dict[tuple[str, str], Dense]:
    """Differences of every norm of the UNet, as LyCORIS (`w_norm`, `b_norm`) and as full differences (`diff`, `diff_b`) write them, in turn."""
    rng, tensors, truth = torch.Generator().manual_seed(seed), dict[str, Tensor](), dict[tuple[str, str], Dense]()
    for count, (name, module) in enumerate((name, module) for name, module in pipe.unet.named_modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)):
        weight, bias = (0.3 * torch.randn(module.weight.shape, generator=rng, dtype=torch.float64) for _ in range(2))
        words = ("w_norm", "b_norm") if count % 2 else ("diff", "diff_b")
        tensors |= {f"lora_unet_{name.replace('.', '_')}.{word}": value for word, value in zip(words, (weight, bias), strict=True)}
        truth["unet", name] = lambda w, b, weight=weight, bias=bias: (weight, bias)
    save_file(tensors, path)
    return truth


def dense(pipe, changes: Sequence[tuple[dict[tuple[str, str], Dense], float]]) -> dict[tuple[str, str], tuple[Tensor, Tensor | None]]:
    """W + sum w D and the bias of every changed layer, each change made of the base's own values."""
    found: dict[tuple[str, str], tuple[Tensor, Tensor | None]] = {}
    for truth, weight in changes:
        for place, change in truth.items():
            module = pipe.components[place[0]].get_submodule(place[1])
            base, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
            new, old = change(base, bias), found.get(place, (base.clone(), None if bias is None else bias.clone()))
            shift = old[1] if new[1] is None else old[1] + weight * new[1] if old[1] is not None else weight * new[1]
            found[place] = old[0] + weight * new[0].reshape(base.shape), shift
    return found


def _many(taps: Sequence[int]) -> int:
    return torch.Size(taps).numel()
