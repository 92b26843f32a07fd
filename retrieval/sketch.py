"""A LoRA's updates as one small matrix a layer, whatever its rank and however its updates are written as factors.

The two-sided Gaussian sketch of an update dW = B A is S = (P B)(A Q), with alpha / rank in B and P (k, out), Q (in, k) fixed, their entries
N(0, 1/k). S depends on dW alone and is linear in it; <S, S'> is <dW, dW'> on average, with a standard deviation of about |dW| |dW'| / k for
updates that are far apart, and less over many layers. Beside S stand the exact norm of dW and four figures of its singular values.
"""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from composition import untrusted
from composition.loras import reader
from composition.loras.kinds.base import Update
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import SafeFile, load_safely
from retrieval.singular import Figures, spectrum

SIDE = 32  # k: LoRAs of one kind have cosines of 0.01 to 0.04, and on 91 layers the deviation of an estimate is 0.024 at 8, 0.014 at 16, 0.008 at 32
VERSION = 1  # of P, Q and the figures; sketches of different versions cannot be compared
ORDERS = (0.5, 1.0, 2.0, math.inf)
FAINT = 1e-6
MAX_WORDS = 4 * 2**20  # bytes of the names in a packed sketch

End = Literal["in", "out"]


@dataclass(frozen=True, eq=False)
class Sketch:
    """One LoRA. layers: component and module path ("unet.mid_block.attentions.0.proj_in"), of those whose update is not zero.

    units: S / |dW|. norms: |dW|. shapes: (out, in) of dW as a matrix. entropies: the Renyi entropies of ORDERS of the squared singular
    values, as shares of their sum: each 0 for rank 1, at most log(rank); exp of the second is the effective rank, exp of minus the last the largest share.
    family, tensor_sha256: the receipt's.
    """

    layers: tuple[str, ...]
    units: Float[Tensor, "L k k"]
    norms: Float64[Tensor, " L"]
    shapes: Int[Tensor, "L 2"]
    entropies: Float[Tensor, "L 4"]
    family: str = "unknown"
    tensor_sha256: str = ""

    @property
    def side(self) -> int:
        """k"""
        return self.units.shape[1]

    @property
    def figures(self) -> Figures:
        """As `singular.figures`."""
        if not len(self.norms):
            return Figures()
        ranks, spikes = self.entropies[:, 1].double().exp(), (-self.entropies[:, 3].double()).exp()
        energies = self.norms.square()
        total = energies.sum()
        return Figures(total.sqrt().item(), ((energies * ranks).sum() / total).item(), ((energies * spikes).sum() / total).item())

    def shrunk(self, side: int) -> "Sketch":
        """As if it had been made with a smaller k. Raises ValueError for a larger one."""
        if not 0 < side <= self.side:
            raise ValueError(f"a sketch of side {self.side} cannot become one of side {side}")
        return replace(self, units=self.units[:, :side, :side] * (self.side / side))

    def matrices(self, layers: Sequence[str]) -> Float64[Tensor, "L k k"]:
        """S of these layers, zero where there is no update. Linear: those of a sum of updates are the sum."""
        own = self.units.double() * self.norms[:, None, None]
        place = {layer: index for index, layer in enumerate(self.layers)}
        rows = torch.tensor([place.get(layer, len(own)) for layer in layers], dtype=torch.long)
        return torch.cat([own, own.new_zeros(1, *own.shape[1:])])[rows]

    def inner(self, other: "Sketch") -> float:
        """An estimate of <dW, dW'> over the layers that both have; `singular.inner` is exact."""
        return (self.matrices(other.layers) * other.matrices(other.layers)).sum().item()

    def cosine(self, other: "Sketch") -> float:
        """An estimate of the cosine of all updates as two vectors: 1 for equal ones, 0 where either has none."""
        norms = math.sqrt(self.inner(self) * other.inner(other))
        return self.inner(other) / norms if norms else 0.0


def sketch(
    path: Path, components: Mapping[str, nn.Module] | None = None, family: str = "", *, raw: SafeFile | None = None, side: int = SIDE
) -> Sketch:
    """That of a LoRA file for a base, its modules on any device ("meta" too). What the base has no layer for is left out.

    Without a base the layers have the file's own names, with underscores: sketches of files in one spelling can be compared. raw: the file,
    where it was read already; it is read once. Raises Refused as `reader.read` does, also for a file of which nothing fits this base.
    """
    raw = raw or load_safely(path)
    if components is None:
        own = {name.replace(".text_model_", "."): layer for name, layer in reader.unplaced(path, raw).items()}
        return sketched(own, reader.inspect(path, raw).family, raw.tensor_sha256, side)
    lora = reader.read(path, components, family, allow_partial=True, raw=raw)
    return sketched(named(lora.factors), lora.receipt.family, raw.tensor_sha256, side)


def named(updates: Mapping[str, Mapping[str, Update]]) -> dict[str, Factors]:
    """The factors of a read file by the names of a sketch, which no version of transformers changes. Updates without exact factors are left out."""
    return {f"{component}.{path.removeprefix('text_model.')}": factors for component, inside in updates.items() for path, update in inside.items()
            if (factors := update.factors) is not None}


def sketched(factors: Mapping[str, Factors], family: str = "unknown", tensor_sha256: str = "", side: int = SIDE) -> Sketch:
    """That of factors by layer. units and entropies are in float32, in float64 when a layer is stored so."""
    inner: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # of the down factors, which q, k and v may share
    ranks: dict[int, list[int]] = {}
    halves: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # P B, (A Q)^T, B^T B, A A^T
    for index, layer in enumerate(factors.values()):
        stored = layer.stored_down
        key = stored.data_ptr(), stored.dtype, tuple(stored.shape), layer.dtype
        if key not in inner:
            inner[key] = _half(layer.down.flatten(1).mT, "in", side)
        left, outer_gram = _half(layer.up.flatten(1), "out", side)
        halves.append((left, inner[key][0], outer_gram, inner[key][1]))
        ranks.setdefault(layer.rank, []).append(index)
    norms = torch.zeros(len(halves), dtype=torch.float64)
    figures = torch.zeros(len(halves), len(ORDERS), dtype=torch.float64)
    for several in ranks.values():
        energies = spectrum(*(torch.stack([halves[index][part] for index in several]) for part in (2, 3)))
        norms[several] = energies.sum(-1).sqrt()
        figures[several] = entropies(energies)
    shapes = torch.tensor([(layer.stored_up.shape[0], layer.stored_down[0].numel()) for layer in factors.values()], dtype=torch.int32).reshape(-1, 2)
    matrices = torch.stack([left @ right.mT for left, right, *_ in halves]) if halves else torch.zeros(0, side, side, dtype=torch.float64)
    live = norms > 0
    dtype = torch.float64 if any(layer.dtype == torch.float64 for layer in factors.values()) else torch.float32
    return Sketch(
        tuple(name for name, lives in zip(factors, live.tolist(), strict=True) if lives), (matrices[live] / norms[live, None, None]).to(dtype),
        norms[live], shapes[live], figures[live].to(dtype), family, tensor_sha256)


def _half(factor: Float[Tensor, "width r"], end: End, side: int) -> tuple[Float64[Tensor, "k r"], Float64[Tensor, "r r"]]:
    """P B and B^T B of B; of the transpose of A, (A Q)^T and A A^T. Numbers whose squares float32 does not hold are taken in float64."""
    gram = factor.mT @ factor
    if not 1e-25 < gram.diagonal().sum() < 1e30:
        factor = factor.double()
        gram = factor.mT @ factor
    return (projection(factor.shape[0], end, side).to(factor.dtype) @ factor).double(), gram.double()


def entropies(energies: Float64[Tensor, "*n r"]) -> Float64[Tensor, "*n 4"]:
    """The Renyi entropies of ORDERS of these as shares of their sum; 0 where all are 0. What is below FAINT of the largest is rounding and counts as 0."""
    energies = torch.where(energies > FAINT * energies.amax(-1, keepdim=True), energies, 0.0)
    total = energies.sum(-1, keepdim=True)
    shares = torch.where(total > 0, energies / total, torch.eye(1, energies.shape[-1], dtype=energies.dtype))
    return torch.stack([2 * shares.sqrt().sum(-1).log(), torch.special.entr(shares).sum(-1), -shares.square().sum(-1).log(),
                        -shares.amax(-1).log()], -1)  # fmt: skip


@lru_cache(maxsize=512)
def projection(width: int, end: End, side: int = SIDE) -> Float64[Tensor, "k width"]:
    """P, or the transpose of Q: the same in every version of numpy, whose RandomState is frozen, and but for its scale the first rows of a larger one."""
    stream = np.random.RandomState([VERSION, width, {"in": 0, "out": 1}[end]])
    return torch.from_numpy(stream.standard_normal((side, width)) / math.sqrt(side))


def packed(sketch: Sketch) -> bytes:
    """A sketch as bytes to keep: its numbers in float16, about 2 k^2 + 40 bytes a layer."""
    words = json.dumps([VERSION, sketch.family, sketch.tensor_sha256, sketch.layers])
    return save({"units": sketch.units.half(), "norms": sketch.norms, "shapes": sketch.shapes, "entropies": sketch.entropies.half(),
                 "words": torch.frombuffer(bytearray(zlib.compress(words.encode())), dtype=torch.uint8)})  # fmt: skip


def unpacked(data: bytes) -> Sketch:
    """What `packed` made bytes of. Raises ValueError for anything else, and for a sketch of another version: make it anew."""
    try:
        tensors = load(data)
        words = zlib.decompressobj().decompress(tensors["words"].numpy().tobytes(), MAX_WORDS)
        version, family, tensor_sha256, layers = untrusted.parse(words)
        parts = [tensors[name] for name in ("units", "norms", "shapes", "entropies")]
    except (SafetensorError, zlib.error, untrusted.Unreadable, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"no sketch: {error}") from None
    if version != VERSION:
        raise ValueError(f"a sketch of version {version}; this is version {VERSION}")
    units, norms, shapes, figures = parts
    if {len(part) for part in parts} != {len(layers)}:
        raise ValueError("no sketch: its parts are of different numbers of layers")
    return Sketch(tuple(layers), units.float(), norms, shapes, figures.float(), family, tensor_sha256)
