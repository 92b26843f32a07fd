"""Every LoRA at its own place in one evaluation: its deltas gated token by token, its prompt read only where it is.

The prompts of all segments (the base's and each concept's) lie one after the other on the text axis. A LoRA changes a layer on the
picture's side where its mask is, and keys and values of its own segment alone; a place reads each segment by its share. Layers
without a place (time embeddings, modulation) get every LoRA at once.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
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


@contextmanager
def regional(
    backbone: Backbone, adapters: Adapters, weights: Mapping[str, float], segments: Sequence[Collection[str]],
    shares: Float[Tensor, "B N h w"], *, rows: int, size: tuple[int, int], tokens: int,
) -> Iterator[None]:
    """While it lasts, the denoiser takes `joined` prompts and gives segment s its share of every place.

    segments: names of the LoRAs that are on in each; shares: theirs, summing to 1 over N, on any grid. rows: R guidance rows;
    size: (H, W) of the latents; tokens: of one segment. Raises RuntimeError when the model's attention cannot be led.
    """
    layers = backbone.prompt_attention()
    names = adapters.names
    on = shares.new_tensor([[float(name in segment) for name in names] for segment in segments])  # (N, K)
    levels = range(max(layers.values(), default=0) + 8)
    grids = {level: masks.resized(shares, (-(-size[0] // 2**level), -(-size[1] // 2**level))) for level in levels
             if min(size) >= 2**level}
    places: dict[Axis, Tensor] = {
        Axis("grid", level): torch.einsum("bshw,sk->bkhw", grid, on).repeat(rows, 1, 1, 1) for level, grid in grids.items()}
    count = rows * shares.shape[0]
    places[Axis("text")] = on.T.repeat_interleave(tokens, 1).expand(count, -1, -1)
    places[Axis("none")] = (on.sum(0) > 0).to(on).expand(count, -1)
    if backbone.joint:
        for level in set(layers.values()):
            both = (places[Axis("text")], places[Axis("grid", level)].flatten(2))
            places[Axis("both", level)] = torch.cat(both if backbone.joint == "text" else both[::-1], 2)
    led = (_together if backbone.joint else _apart)(backbone, grids, rows, tokens)
    with adapters.regional(weights, places), attention.edit(backbone.denoiser, tuple(layers), led):
        yield


def _apart(backbone: Backbone, grids: Mapping[int, Float[Tensor, "B N h w"]], rows: int, tokens: int) -> attention.AttentionOverride:
    """Cross-attention: to each segment apart, the answers blended by its share of the place."""
    layers = backbone.prompt_attention()

    def led(name: str, attend: attention.Attend, query: Tensor, key: Tensor, value: Tensor, rest: Mapping) -> Tensor:
        share = grids[layers[name]].flatten(2).repeat(rows, 1, 1).to(query.dtype)  # (rows, N, places)
        if share.shape[-1] != query.shape[-2]:
            raise RuntimeError(f"{name} has {query.shape[-2]} places, its mask {share.shape[-1]}")
        each = attention.parts(query, key, value, share.shape[1], attend, rest)
        return torch.einsum("srhqd,rsq->rhqd", each, share)

    return led


def _together(backbone: Backbone, grids: Mapping[int, Float[Tensor, "B N h w"]], rows: int, tokens: int) -> attention.AttentionOverride:
    """Joint attention: a place sees the whole picture and of each segment's words so much as its share; words see their own
    segment's and, by the same shares, the picture. Shares of 0 and 1 give each place what it would have with its segment alone.
    """
    layers, kept = backbone.prompt_attention(), {}

    def bias(level: int, like: Tensor) -> Float[Tensor, "rows 1 L L"]:
        share = grids[level].flatten(2).repeat(rows, 1, 1).to(like.dtype)  # (rows, N, places)
        count, segments, area = share.shape
        words = segments * tokens
        if words + area != like.shape[-2]:
            raise RuntimeError(f"a joint attention has {like.shape[-2]} tokens, its prompts and masks {words + area}")
        found = share.new_zeros(count, 1, words + area, words + area)
        text, image = attention.halves(words + area, area, backbone.joint)
        seen = share.log().repeat_interleave(tokens, 1)  # (rows, words, places)
        found[:, 0, text, image], found[:, 0, image, text] = seen, seen.transpose(1, 2)
        own = torch.arange(words, device=share.device) // tokens
        found[:, 0, text, text] = torch.where(own[:, None] == own, 0.0, -torch.inf).to(share)
        return found

    def led(name: str, attend: attention.Attend, query: Tensor, key: Tensor, value: Tensor, rest: Mapping) -> Tensor:
        level = layers[name]
        if (level, query.dtype) not in kept:
            kept[level, query.dtype] = bias(level, query)
        return attend(query, key, value, **{**rest, "attn_mask": kept[level, query.dtype]})

    return led
