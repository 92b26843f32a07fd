"""A weight encoder as a transformer, to compare `linear` with: a LoRA's sketch as a vector in the space of a judge's texts.

Each layer's update is one token; a transformer without order looks at those that are there and pools them into one vector (after AutoLoRA,
arXiv 2508.02107). The text side is a linear map on the judge's frozen text vectors. The vector does not depend on how updates are factored, on the
order of layers, or on the LoRA's weight. An encoder fits the one base whose LoRAs it was trained on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor, nn

from composition import atomic, untrusted
from composition.loras.kinds.lora import Factors
from composition.loras.safetensors import load_safely
from composition.refusal import Refused
from retrieval import sketch as sketches
from retrieval.probes import Probes, Updates, updates
from retrieval.sketch import ORDERS, Sketch
from retrieval.tokens import Layer, Tokens, layer, tokens

SETTINGS, WEIGHTS = "encoder.json", "encoder.safetensors"
PART = 256  # LoRAs encoded at a time
FAINT = -8.0  # log of the least share of a LoRA's norm that is told from less

_MOST = {"side": 64, "focus": 64, "width": 8192, "depth": 64, "heads": 256, "dimension": 65536, "text": 65536}
_LEAST = {"depth": 0, "focus": 0}  # where it is not 1


@dataclass(frozen=True)
class Settings:
    """layers: by name, in the order of the tokens. base: the model whose LoRAs it was trained on; family: its kind. judge: whose texts. reads: sketches, or
    factors through learned probes. side: of the sketches as they are read, which may be larger. focus: each kind of layer looks at a sketch through two learned
    projections onto so many directions, which a small pool overfits less; 0 at all of it. dimension: D. text: of the judge's text vectors.
    """

    layers: Mapping[str, Layer]
    base: str
    family: str
    judge: str
    text: int
    dimension: int
    reads: Literal["sketches", "factors"] = "sketches"
    side: int = sketches.SIDE
    focus: int = 8
    width: int = 192
    depth: int = 2
    heads: int = 6
    sketch_version: int = sketches.VERSION


class Batch(Protocol):
    """LoRAs as arrays: Tokens or Updates."""

    @property
    def present(self) -> Bool[Tensor, "n L"]: ...
    @property
    def entropies(self) -> Float[Tensor, "n L 4"]: ...
    @property
    def shares(self) -> Float[Tensor, "n L"]: ...


class Encoder(nn.Module):
    """Open it with `Encoder.open`, train it with `training.train`.

    name: the base and the first letters of the weights' hash; vectors of encoders of different names cannot be compared.
    """

    def __init__(self, settings: Settings, dropout: float = 0.0) -> None:
        super().__init__()
        self.settings, self.name = settings, ""
        kinds, blocks = ({part: index for index, part in enumerate(sorted({getattr(entry, name) for entry in settings.layers.values()}))}
                         for name in ("kind", "block"))  # fmt: skip
        self.kinds = torch.tensor([kinds[entry.kind] for entry in settings.layers.values()], device="cpu")
        self.blocks = torch.tensor([blocks[entry.block] for entry in settings.layers.values()], device="cpu")
        width, figures = settings.width, len(ORDERS) + 1
        if settings.reads == "sketches":
            self.probes = None
            if focus := settings.focus:
                self.ends = nn.Parameter(torch.randn(2, len(kinds), settings.side, focus) / settings.side**0.5)
            self.project = nn.Parameter(torch.randn(len(kinds), (focus or settings.side) ** 2, width) / (focus or settings.side))
        else:
            self.probes = Probes(list(settings.layers.values()), width)
        self.figures = nn.Parameter(torch.randn(len(kinds), figures, width) / figures**0.5)
        self.kind = nn.Parameter(torch.randn(len(kinds), width) * 0.02)
        self.block = nn.Parameter(torch.randn(len(blocks), width) * 0.02)
        self.transformer = nn.ModuleList(_Block(width, settings.heads, dropout) for _ in range(settings.depth))
        self.pool = _Pool(width, settings.heads, settings.dimension)
        self.translate = nn.Linear(settings.text, settings.dimension)
        nn.init.zeros_(self.translate.weight)
        nn.init.zeros_(self.translate.bias)

    @classmethod
    def open(cls, folder: Path | str) -> "Encoder":
        """The encoder that `save` wrote into a folder, in float32 on the CPU. Raises Refused, in plain words, for anything else."""
        folder = Path(folder)
        settings = _settings(folder / SETTINGS)
        file = load_safely(folder / WEIGHTS)
        try:
            with torch.device("meta"):
                encoder = cls(settings)
            encoder.load_state_dict({name: weight.float() for name, weight in file.tensors.items()}, assign=True)
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            raise Refused(f"{folder}: {WEIGHTS} and {SETTINGS} do not belong together ({' '.join(str(error).split())[:200]})") from None
        encoder.name = f"{settings.base} {file.tensor_sha256[:12]}"
        return encoder.eval().requires_grad_(False)

    def save(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the weights and the settings, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        words = asdict(self.settings) | {"layers": {name: list(entry.shape) for name, entry in self.settings.layers.items()}}
        atomic.write(folder / WEIGHTS, save({name: weight.detach().to(dtype).contiguous() for name, weight in self.state_dict().items()}))
        atomic.write(folder / SETTINGS, json.dumps(words, indent=1) + "\n")

    def forward(self, batch: Batch) -> Float[Tensor, "n D"]:
        """LoRAs as vectors of length 1."""
        shares = (batch.shares.clamp_min(FAINT) + 3).to(self.figures.dtype) / 2
        figures = torch.cat([shares[..., None], batch.entropies.to(self.figures.dtype)], -1)
        hidden = _by_layer(figures, self.figures[self.kinds]) + self.kind[self.kinds] + self.block[self.blocks]
        if self.probes is not None:
            assert isinstance(batch, Updates)
            hidden = hidden + self.probes(batch)
        else:
            assert isinstance(batch, Tokens)
            units = batch.units.to(self.figures.dtype) * self.settings.side  # entries of variance 1
            if self.settings.focus:
                left, right = self.ends[:, self.kinds]
                units = torch.einsum("nlst,lsa,ltb->nlab", units.unflatten(-1, (self.settings.side, -1)), left, right).flatten(2)
            hidden = hidden + _by_layer(units, self.project[self.kinds])
        for block in self.transformer:
            hidden = block(hidden, batch.present)
        return F.normalize(self.pool(hidden, batch.present), dim=-1)

    def read(self, texts: Float[Tensor, "t T"]) -> Float[Tensor, "t D"]:
        """The judge's text vectors (`Judge.read`), or differences of them, as vectors of length 1 in the space of the LoRAs."""
        texts = F.normalize(texts.to(self.figures.dtype), dim=-1)
        return F.normalize(F.pad(texts, (0, self.settings.dimension - self.settings.text)) + self.translate(texts), dim=-1)

    @torch.no_grad()
    def encode(self, loras: Sequence[Sketch] | Sequence[Mapping[str, Factors]]) -> Float[Tensor, "n D"]:
        """Sketches, or for an encoder of factors what `sketch.named` gives, as vectors of length 1. Raises Refused as `coverage` says 0."""
        vectors = [torch.zeros(0, self.settings.dimension)]
        for first in range(0, len(loras), PART):
            batch = self.batch(loras[first : first + PART])
            if not batch.present.any(1).all():
                raise Refused(f"a LoRA changes no layer that this encoder knows: it is for {self.settings.base}")
            vectors.append(self(batch).float())
        return torch.cat(vectors)

    def batch(self, loras: Sequence[Any]) -> Tokens | Updates:
        """What `forward` reads of LoRAs."""
        known = self.settings.layers
        return tokens(loras, known, self.settings.side) if self.settings.reads == "sketches" else updates(loras, known)

    def coverage(self, sketch: Sketch) -> float:
        """The share of a LoRA's energy in layers that the encoder knows, 0 to 1: 0 for a LoRA of another base, whose layers have other shapes."""
        if sketch.side < self.settings.side:
            return 0.0
        known = [name in self.settings.layers and self.settings.layers[name].shape == tuple(shape)
                 for name, shape in zip(sketch.layers, sketch.shapes.tolist(), strict=True)]  # fmt: skip
        energies = sketch.norms.square()
        return (energies[torch.tensor(known, dtype=torch.bool)].sum() / energies.sum()).item() if len(known) else 0.0


def _by_layer(features: Float[Tensor, "n L f"], weights: Float[Tensor, "L f w"]) -> Float[Tensor, "n L w"]:
    return torch.bmm(features.transpose(0, 1), weights).transpose(0, 1)


class _Block(nn.Module):
    """A layer of a transformer, normalised before attention and before its MLP; absent tokens are not seen."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Float[Tensor, "n L w"], present: Bool[Tensor, "n L"]) -> Float[Tensor, "n L w"]:
        q, k, v = self.qkv(self.before(hidden)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, present[:, None, None])
        hidden = hidden + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return hidden + F.dropout(self.mlp(self.between(hidden)), self.dropout, self.training)


class _Pool(nn.Module):
    """Attention of one learned query a head over the tokens that are there."""

    def __init__(self, width: int, heads: int, dimension: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.look, self.value, self.out = nn.Linear(width, heads), nn.Linear(width, width), nn.Linear(width, dimension)

    def forward(self, hidden: Float[Tensor, "n L w"], present: Bool[Tensor, "n L"]) -> Float[Tensor, "n D"]:
        hidden = self.norm(hidden)
        looks = self.look(hidden).masked_fill(~present[..., None], -torch.inf).softmax(1)
        values = self.value(hidden).unflatten(-1, (self.heads, -1))
        return self.out((values * looks[..., None]).sum(1).flatten(1))


def _settings(file: Path) -> Settings:
    """Those in a file of `save`. Raises Refused."""
    try:
        words = untrusted.parse_file(file)
        own = {field.name for field in fields(Settings)}
        if not isinstance(words, dict) or set(words) != own or not isinstance(words["layers"], dict) or not words["layers"]:
            raise ValueError("does not have the settings of an encoder")
        shapes = words.pop("layers")
        if not all(isinstance(shape, list) and len(shape) == 2 and all(type(x) is int and x > 0 for x in shape) for shape in shapes.values()):
            raise ValueError("has layers without shapes")
        for name, most in _MOST.items():
            if type(words[name]) is not int or not _LEAST.get(name, 1) <= words[name] <= most:
                raise ValueError(f"has no {name} from {_LEAST.get(name, 1)} to {most}")
        if not all(isinstance(words[name], str) for name in ("base", "family", "judge")) or words["reads"] not in ("sketches", "factors"):
            raise ValueError("does not say what it was trained on")
        if words["width"] % words["heads"]:
            raise ValueError("has a width that its heads do not divide")
        settings = Settings({name: layer(name, (shape[0], shape[1])) for name, shape in shapes.items()}, **words)
    except untrusted.Unreadable as error:
        raise Refused(f"{file} {error}") from None
    except (ValueError, TypeError) as error:
        raise Refused(f"{file} {error}") from None
    if settings.sketch_version != sketches.VERSION:
        raise Refused(f"{file.parent} reads sketches of version {settings.sketch_version}; this Medley makes version {sketches.VERSION}: train it anew")
    return settings
