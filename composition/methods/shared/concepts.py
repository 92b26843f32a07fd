"""What CLoRA and CLoRA fast share: the passes of a prompt's concepts, the masks of those concepts, and how predictions are fused by them.

A concept is a LoRA with words of its own in the prompt (`composition.prompts`). Shapes: K concepts, N = K + 1 passes with the base's first,
L tokens, (h, w) the grid of the layers whose maps are read; masks and strengths are (B, K, h, w).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from composition import prompts
from composition.hooks import masks
from composition.loop import Step
from composition.refusal import Refused
from composition.run import Pass, Run, grid

BREADTH = 1 / 8  # the blur of maps of change, as a share of the picture's shorter side


def scene_of(run: Run) -> prompts.Scene:
    """The run's prompt by its LoRAs' words. Raises Refused for a LoRA with a region and no words: no map could be its own."""
    scene = prompts.scene(run.spelling.prompt, run.loras, run.categories, run.triggers)
    if wordless := [name for name in scene.everywhere if run.loras[name].region is not None]:
        raise Refused(f"LoRA {wordless[0]} has a region, but the prompt has no words of it: say with binds which are its own, or use "
                      "method regions, which needs none")
    return scene


def passes_of(run: Run, scene: prompts.Scene, live: Mapping[str, float], concepts: Sequence[int], *, worn: bool = False) -> list[Pass]:
    """The base's pass, then one for each of these concepts: its LoRA and those that are everywhere, with its prompt.

    worn: the LoRAs of clothing and of who wears it are on in each other's pass.
    """
    everywhere = {name: live[name] for name in scene.everywhere if name in live}
    company = worn_by(scene, run.categories) if worn else {}
    together = {c: {name: live[name] for name in (scene.concepts[other] for other in sorted({c, *company.get(c, ())})) if name in live} for c in concepts}
    uses = [everywhere, *(together[c] | everywhere for c in concepts)]
    texts = [scene.prompts[0], *(scene.prompts[c + 1] for c in concepts)]
    return [Pass(use, run.encode(text, use, among=scene.prompts)) for use, text in zip(uses, texts, strict=True)]


def worn_by(scene: prompts.Scene, categories: Mapping[str, str]) -> dict[int, set[int]]:
    """Concept to the concepts at whose places its LoRA acts, too: clothing and the character that the prompt names last before it."""
    places = [spans[0][0] for spans in scene.spans]
    kinds = [categories.get(name, "") for name in scene.concepts]
    company: dict[int, set[int]] = {}
    for c, kind in enumerate(kinds):
        wearers = [w for w, other in enumerate(kinds) if other == "character" and places[w] < places[c]]
        if kind == "clothing" and wearers:
            wearer = max(wearers, key=lambda w: places[w])
            company.setdefault(c, set()).add(wearer)
            company.setdefault(wearer, set()).add(c)
    return company


def token_positions(run: Run, scene: prompts.Scene) -> list[list[list[int]]]:
    """[concept][prompt] the positions of the tokens of the concept's words. Raises Refused where they are cut off."""
    offsets = [run.spelling.offsets(prompt) for prompt in scene.prompts]
    cut = [bool(run.backbone.truncated(prompt)) for prompt in scene.prompts]
    return [[list(prompts.tokens(text, span, offsets[p], cut=cut[p])) for p, (text, span) in enumerate(zip(scene.texts, spans, strict=True))]
            for spans in scene.spans]


def masks_from_attention(
    own: Sequence[Float[Tensor, "B _T h w"]], options: Any, names: Sequence[str], run: Run
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"]]:
    """(masks, strength) of concepts from the attention maps of their tokens: threshold, closing, regions, overlap.

    strength: each concept's strongest token, its map from 0 to 1.
    """
    claims = torch.stack([masks.claimed(maps, options.threshold) for maps in own], 1)
    strength = torch.stack([masks.normalised(maps.amax(1)) for maps in own], 1)
    return _cleaned(claims, strength, options, names, run), strength


def masks_from_change(
    run: Run, step: Step, values: Float[Tensor, "N R B C H W"], options: Any, names: Sequence[str]
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"]]:
    """(masks, strength) of concepts from what their passes change in the base's prediction, which comes first in `values`.

    A place is the concept's whose change stands out most there, if it reaches the threshold's share of that concept's most. A concept with a
    region contends inside it alone, and without rivals where the region replaces its mask. strength: each concept's change from 0 to 1.
    Both lie on the grid of the localizing layers.
    """
    size = grid(step, run.backbone.prompt_attention()[run.backbone.localizing_layers()[0]])
    change = masks.changes(values, size)
    smooth = BREADTH * min(size) if options.smooth is None else options.smooth
    change = masks.blurred(change, smooth) if smooth else change
    strength, standing = masks.normalised(change), masks.standing(change)
    for k, name in enumerate(names):
        if run.loras[name].region is not None:
            own = masks.region(run.loras[name], size).to(change) > 0
            inside = torch.inf if options.regions == "replace" else standing[:, k]
            standing[:, k] = torch.where(own, inside, -torch.inf)
    claims = masks.leading(standing) * (strength > options.threshold)
    return _cleaned(claims, strength, options, names, run), strength


def _cleaned(
    claims: Float[Tensor, "B K h w"], strength: Float[Tensor, "B K h w"], options: Any, names: Sequence[str], run: Run
) -> Float[Tensor, "B K h w"]:
    """The claims as masks: closed, grown, with the users' regions, and parted where they meet, as the options say."""
    plain = getattr(options, "reference", False)
    if options.closing and not plain:
        claims = masks.closed(claims)
    if options.grow and not plain:
        claims = masks.grown(claims, options.grow)
    claims = _with_regions(claims, names, run, intersect=options.regions == "intersect")
    if options.overlap == "argmax" and not plain:
        own = strength.new_tensor([run.loras[name].region is not None for name in names])[:, None, None]
        claims = masks.parted(claims, strength + 2 * own)  # a user's own region takes precedence over the maps
    return claims


def _with_regions(claims: Float[Tensor, "B K h w"], names: Sequence[str], run: Run, *, intersect: bool) -> Float[Tensor, "B K h w"]:
    """The masks with the users' own regions in their place, or cut by them."""
    rows = []
    for index, name in enumerate(names):
        mask = claims[:, index]
        if run.loras[name].region is not None:
            own = masks.region(run.loras[name], (claims.shape[-2], claims.shape[-1])).to(mask).expand_as(mask)
            mask = mask * own if intersect else own
        rows.append(mask)
    return torch.stack(rows, 1)


def latent_shares(step: Step, places: Float[Tensor, "B K h w"], soft: float) -> Float[Tensor, "B K1 H W"]:
    """The base's and each concept's share of every place of the latents."""
    return masks.shares(masks.resized(places, grid(step, 0), soft=soft)).to(step.latents.dtype)


def fused(values: Float[Tensor, "N R B C H W"], shares: Float[Tensor, "B N H W"]) -> Float[Tensor, "R B C H W"]:
    """The passes' predictions, each by its share of the place."""
    return torch.einsum("bshw,srbchw->rbchw", shares.to(values.dtype), values)


def note_masks(run: Run, names: Sequence[str], strength: Float[Tensor, "B K h w"], places: Float[Tensor, "B K h w"]) -> None:
    """Each concept's map and mask of the first picture, into the notes."""
    run.notes["masks"] = {name: {"map": masks.as_bytes(strength[0, k]), "mask": masks.as_bytes(places[0, k])} for k, name in enumerate(names)}
