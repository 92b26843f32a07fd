"""Every LoRA at its own place in one evaluation: its deltas gated token by token, its prompt read only where it is.

The prompts of all segments (the base's and each concept's) lie one after the other on the text axis. A LoRA changes a layer on the
picture's side where its mask is, and keys and values of its own segment alone; a place reads each segment by its share. Layers
without a place (time embeddings, modulation) get every LoRA at once.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from composition.adapters import Adapters
from composition.backbones.base import Axis, Backbone
from composition.hooks import attention, masks
from composition.loop import Conditioning


def joined(conds: Sequence[Conditioning], shares: Float[Tensor, "B N h w"]) -> Conditioning:
    """The prompts of N segments as one, text after text; of what is not text (a pooled embedding) the mean by their shares."""
    area = shares.mean((-2, -1))
    values = {"text": torch.cat([cond.values["text"] for cond in conds], dim=2)}
    for name in conds[0].values:
        if name != "text":
            each = torch.stack([cond.values[name] for cond in conds])  # (N, R, 1, ...)
            weight = area.T.to(each).view(len(conds), 1, -1, *[1] * (each.ndim - 3))
            values[name] = (each * weight).sum(0)
    return Conditioning(values)


class Segments(NamedTuple):
    """The prompts that lie one after the other on the text axis, and where each is read.

    shares: of each, summing to 1 over N, on any grid. rows: R guidance rows. size: (H, W) of the latents. tokens: of one segment.
    """

    shares: Float[Tensor, "B N h w"]
    rows: int
    size: tuple[int, int]
    tokens: int

    def grids(self, levels: Iterable[int]) -> dict[int, Float[Tensor, "B N h w"]]:
        """The shares on the grids of layers at these levels, as far down as the latents have places."""
        return {level: masks.resized(self.shares, (-(-self.size[0] // 2**level), -(-self.size[1] // 2**level))) for level in levels
                if min(self.size) >= 2**level}


@contextmanager
def regional(
    backbone: Backbone, adapters: Adapters, weights: Mapping[str, float], segments: Sequence[Collection[str]],
    shares: Float[Tensor, "B N h w"], *, rows: int, size: tuple[int, int], tokens: int,
) -> Iterator[None]:
    """While it lasts, the denoiser takes `joined` prompts and gives segment s its share of every place.

    segments: names of the LoRAs that are on in each; shares: theirs, summing to 1 over N, on any grid. rows: R guidance rows;
    size: (H, W) of the latents; tokens: of one segment. Raises RuntimeError when the model's attention cannot be overridden.
    """
    layers, places_of = backbone.prompt_attention(), Segments(shares, rows, size, tokens)
    names = adapters.names
    on = shares.new_tensor([[float(name in segment) for name in names] for segment in segments])  # (N, K)
    grids = places_of.grids(range(max(layers.values(), default=0) + 8))
    places: dict[Axis, Tensor] = {
        Axis("grid", level): torch.einsum("bshw,sk->bkhw", grid, on).repeat(rows, 1, 1, 1) for level, grid in grids.items()}
    count = rows * shares.shape[0]
    places[Axis("text")] = on.T.repeat_interleave(tokens, 1).expand(count, -1, -1)
    places[Axis("none")] = (on.sum(0) > 0).to(on).expand(count, -1)
    if backbone.joint:
        for level in set(layers.values()):
            both = (places[Axis("text")], places[Axis("grid", level)].flatten(2))
            places[Axis("both", level)] = torch.cat(both if backbone.joint == "text" else both[::-1], 2)
    override = _biased(backbone, grids, rows, tokens) if backbone.joint else split(layers, grids, places_of)
    with adapters.regional(weights, places), attention.override(backbone.denoiser, tuple(layers), override):
        yield


def split(layers: Mapping[str, int], grids: Mapping[int, Float[Tensor, "B N h w"]], segments: Segments) -> attention.AttentionOverride:
    """Cross-attention: to each segment apart, the outputs blended by its share of the place. Keys after the segments' own belong to all.

    layers: the level of each.
    """
    rows, tokens = segments.rows, segments.tokens

    def override(call: attention.Attention, attend: attention.Attend) -> Tensor:
        share = grids[layers[call.layer]].flatten(2).repeat(rows, 1, 1).to(call.query.dtype)  # (rows, N, places)
        count, own = share.shape[1], share.shape[1] * tokens
        if share.shape[-1] != call.query.shape[-2]:
            raise RuntimeError(f"{call.layer} has {call.query.shape[-2]} places, its mask {share.shape[-1]}")
        if call.key.shape[-2] < own:
            raise RuntimeError(f"{call.layer} has {call.key.shape[-2]} keys, the prompts of its {count} segments {own}")

        def segment(whole: Tensor, index: int, axis: int) -> Tensor:
            part = whole.narrow(axis, index * tokens, tokens)
            rest = whole.shape[axis] - own
            return torch.cat([part, whole.narrow(axis, own, rest)], axis) if rest else part

        each = [attend(call._replace(key=segment(call.key, index, -2), value=segment(call.value, index, -2),
                                     bias=None if call.bias is None or call.bias.shape[-1] == 1 else segment(call.bias, index, -1)))
                for index in range(count)]  # fmt: skip
        return torch.einsum("srhqd,rsq->rhqd", torch.stack(each), share)

    return override


def _biased(backbone: Backbone, grids: Mapping[int, Float[Tensor, "B N h w"]], rows: int, tokens: int) -> attention.AttentionOverride:
    """Joint attention: a place attends to the whole picture and to each segment's words by its share; words attend to their own
    segment's and, by the same shares, to the picture. Shares of 0 and 1 give each place what it would have with its segment alone.
    Keys after those of prompts and picture are left to the bias that comes with them.
    """
    layers, kept = backbone.prompt_attention(), {}

    def between(level: int, like: Tensor) -> Float[Tensor, "rows 1 L L"]:
        share = grids[level].flatten(2).repeat(rows, 1, 1).to(like.dtype)  # (rows, N, places)
        count, segments, area = share.shape
        words = segments * tokens
        if words + area != like.shape[-2]:
            raise RuntimeError(f"a joint attention has {like.shape[-2]} tokens, its prompts and masks {words + area}")
        bias = share.new_zeros(count, 1, words + area, words + area)
        text, image = attention.joint_slices(words + area, area, backbone.joint)
        seen = share.log().repeat_interleave(tokens, 1)  # (rows, words, places)
        bias[:, 0, text, image], bias[:, 0, image, text] = seen, seen.transpose(1, 2)
        own = torch.arange(words, device=share.device) // tokens
        bias[:, 0, text, text] = torch.where(own[:, None] == own, 0.0, -torch.inf).to(share)
        return bias

    def override(call: attention.Attention, attend: attention.Attend) -> Tensor:
        appended = call.key.shape[-2] - call.query.shape[-2]
        key = (layers[call.layer], call.query.dtype, appended)
        if key not in kept:
            bias = between(key[0], call.query)
            kept[key] = F.pad(bias, (0, appended)) if appended else bias
        bias = kept[key]
        return attend(call._replace(bias=bias if call.bias is None else bias + call.bias))

    return override
