"""CLoRA: every concept keeps its own place, found by the attention of its own pass (arXiv 2403.19776).

N + 1 passes a step: the base with a plain prompt, and each concept's LoRA with its trigger words at its own place. Early, the latents
are moved so that attention maps of one concept agree over the passes and those of different concepts part (NT-Xent, equation 4). A mask
for each concept from its own pass (equation 5) then fuses the predictions before guidance. LoRAs bound to nothing are on in every pass.
In joint attention (SD 3, FLUX) a LoRA's place is by default where its pass changes the base's prediction most, and latents are not moved:
the words' maps tell little there of words that the base does not know. `reference` does what the authors' code does where it parts from
this: maps of both guidance rows, a constant step, no early stop, no closing of masks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from composition import prompts
from composition.hooks import masks
from composition.hooks.attention import frozen
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import nt_xent
from composition.request import Refused
from composition.run import Pass, Run, grid

CLIP = 0.1  # an update's root mean square is at most this share of the latents'
RELATIVE = 0.02  # the update's root mean square over the latents', for latents other than Stable Diffusion's
DEFAULT_STEP = 20.0
UNTIL, REFINE, ROUNDS = 0.5, "0,0.2,0.4", 20
JOINT_UNTIL, JOINT_REFINE, JOINT_ROUNDS = 0.0, "0,0.07", 5  # in joint attention, where moves were seen to cost the scene
BREADTH = 1 / 8  # the blur of maps of change, as a share of the picture's shorter side


@dataclass(frozen=True)
class Options:
    update: bool = field(default=True, metadata={"help": "Move the latents so that the concepts' attention parts."})
    until: float | None = field(default=None, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps in which the latents are moved; empty: 0.5, and none for SD 3 and FLUX, where moves cost the scene (if any, 0.15)."})
    refine: str | None = field(default=None, metadata={"help":
        "Shares of the steps at which they are moved many times; empty: 0,0.2,0.4, and 0,0.07 for SD 3 and FLUX."})
    rounds: int | None = field(default=None, metadata={"ge": 0, "le": 1000, "help":
        "How many more times, at most; 0: none; empty: 20, and 5 for SD 3 and FLUX."})
    stop: float = field(default=0.3, metadata={"ge": 0.0, "le": 1.0, "help":
        "No more moves in a step once the loss has come this near its least value; 1 is where all maps are equal. 0: never."})
    step_size: float = field(default=0.0, metadata={"ge": 0.0, "le": 1000.0, "help":
        "Of a move; 0: 20 for Stable Diffusion, as the paper has it, and relative to the latents elsewhere."})
    temperature: float = field(default=0.5, metadata={"ge": 0.01, "le": 10.0, "help": "Of the contrastive loss."})
    maps: Literal["auto", "attention", "change"] = field(default="auto", metadata={"help":
        "What tells a concept's place: where its words are looked at, or where its LoRA changes the base's prediction most. auto: "
        "attention, and change for SD 3 and FLUX."})
    threshold: float = field(default=0.4, metadata={"ge": 0.0, "le": 1.0, "help": "Share of a map's maximum from which a place is the concept's."})
    smooth: float | None = field(default=None, metadata={"ge": 0.0, "le": 8.0, "help":
        "Blur of the maps, in their own places; empty: none, and an eighth of the picture's shorter side for maps of change."})
    closing: bool = field(default=True, metadata={"help": "Fill holes and clefts of a mask."})
    grow: int = field(default=0, metadata={"ge": 0, "le": 32, "help": "Places of the maps' grid by which a mask is widened on every side."})
    overlap: Literal["average", "argmax"] = field(default="average", metadata={"help":
        "Where concepts meet: average their predictions, or give the place to the one that looks there most."})
    soft: float = field(default=0.0, metadata={"ge": 0.0, "le": 16.0, "help": "Softness of a mask's edge, in places of the latent."})
    masks_from: float = field(default=0.0, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps before which nothing has a place and all passes are averaged."})
    regions: Literal["replace", "intersect"] = field(default="replace", metadata={"help":
        "What a LoRA's own region does with its mask."})
    recompute: bool = field(default=False, metadata={"help": "Ask again after the last move of a step."})
    two_phase: bool = field(default=True, metadata={"help": "The same gradient pass by pass, in memory that does not grow with them."})
    reference: bool = field(default=False, metadata={"help": "Do as the authors' released code does."})


@method(title="CLoRA", about="Every concept keeps its own place, found by its attention.", paper="2403.19776",
        cost="K + 1 (early about twice that; not so with SD 3 and FLUX)", single=False, regional=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    with frozen([run.backbone.denoiser]):
        yield _Course(run, options).predict


class _Course:
    """The state of one run: the prompt taken apart, and which steps move the latents."""

    def __init__(self, run: Run, options: Options) -> None:
        self.run, self.options = run, options
        self.scene = taken_apart(run)
        self.layers = run.backbone.localizing_layers()
        self.positions = positions(run, self.scene)
        until, refine, rounds = (JOINT_UNTIL, JOINT_REFINE, JOINT_ROUNDS) if run.backbone.joint else (UNTIL, REFINE, ROUNDS)
        self.until = until if options.until is None else options.until
        self.rounds = rounds if options.rounds is None else options.rounds
        self.refined = shares(refine if options.refine is None else options.refine)
        self.by_change = options.maps == "change" or options.maps == "auto" and bool(run.backbone.joint) and not options.reference
        self.losses: list[list[float]] = []
        run.notes["clora"] = {"prompts": list(self.scene.prompts), "everywhere": list(self.scene.everywhere), "loss": self.losses,
                              "maps": "change" if self.by_change else "attention"}

    def predict(self, step: Step) -> Prediction:
        run = self.run
        live = run.live(step)
        concepts = [index for index, name in enumerate(self.scene.concepts) if name in live]
        if not concepts:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        passes = passes_of(run, self.scene, live, concepts)
        step, values, maps = self._moved(step, passes, concepts)
        shared = shared_places(step, self._masks(step, values, maps, concepts), self.options.soft)
        if step.index < self.options.masks_from * step.count:
            shared = torch.full_like(shared, 1 / shared.shape[1])
        return Prediction(run.guide(fused(values, shared)), step.latents)

    # moving the latents --------------------------------------------------------------------------------------------------

    def _moved(
        self, step: Step, passes: Sequence[Pass], concepts: Sequence[int]
    ) -> tuple[Step, Float[Tensor, "N R B C H W"], Float[Tensor, "N B L h w"] | None]:
        """The step after its moves, and the predictions and maps asked last; no maps where nobody needs them."""
        options, rows = self.options, "all" if self.options.reference else "positive"
        kinds = self._kinds(concepts)
        guided = options.update and len(concepts) > 1 and step.index < self.until * step.count
        moves = (1 + self.rounds * (step.index in {int(share * step.count) for share in self.refined})) if guided else 0
        least, flat = nt_xent.bounds(kinds, options.temperature) if guided else (0.0, 1.0)
        values = maps = None
        told: list[float] = []
        for move in range(moves):
            values = maps = None
            if move == moves - 1:
                values, maps = self.run.denoise_watched(step, passes, self.layers, rows)
            else:
                maps = self.run.attend(step, passes, self.layers, rows)
            gradient, loss = self._gradient(step, passes, concepts, kinds, maps)
            told.append(round(float(loss.mean()), 5))
            near = (loss.mean() - least) / (flat - least)
            if options.stop and not options.reference and near <= options.stop:
                break
            step = step._replace(latents=step.latents - self._move(step, gradient))
            if options.recompute:
                values = None
        if told:
            self.losses.append(told)
        if self.by_change:
            return step, self.run.denoise_passes(step, passes) if values is None else values, None
        if values is None or maps is None:
            values, maps = self.run.denoise_watched(step, passes, self.layers, rows)
        return step, values, maps.mean(1)

    def _gradient(
        self, step: Step, passes: Sequence[Pass], concepts: Sequence[int], kinds: Sequence[int], maps: Float[Tensor, "N R B L h w"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
        """d(sum of losses) / d latents, and the losses. maps: of these latents, without a graph."""
        rows = "all" if self.options.reference else "positive"
        with torch.enable_grad():
            if self.options.two_phase:
                leaves = maps.detach().requires_grad_()
                loss = self._loss(leaves, concepts, kinds)
                (wanted,) = torch.autograd.grad(loss.sum(), leaves)
                total = torch.zeros_like(step.latents)
                for one, want in zip(passes, wanted, strict=True):
                    latents = step.latents.detach().requires_grad_()
                    seen = self.run.attend(step._replace(latents=latents), [one], self.layers, rows)
                    total += torch.autograd.grad((seen[0] * want).sum(), latents)[0]
                    del seen, latents
                return total, loss.detach()
            latents = step.latents.detach().requires_grad_()
            loss = self._loss(self.run.attend(step._replace(latents=latents), passes, self.layers, rows), concepts, kinds)
            return torch.autograd.grad(loss.sum(), latents)[0], loss.detach()

    def _kinds(self, concepts: Sequence[int]) -> list[int]:
        """The concept of each map that the loss compares, in the order of `_loss`."""
        return [c for c in concepts for p in (0, *(other + 1 for other in concepts)) for _ in self.positions[c][p]]

    def _loss(self, maps: Float[Tensor, "N R B L h w"], concepts: Sequence[int], kinds: Sequence[int]) -> Float[Tensor, " B"]:
        seen = maps.mean(1)
        asked = [0, *(c + 1 for c in concepts)]
        chosen = [seen[index][:, self.positions[c][p]] for c in concepts for index, p in enumerate(asked)]
        every = masks.normalised(self._smoothed(torch.cat(chosen, 1)))
        return nt_xent.nt_xent(every.flatten(2), kinds, self.options.temperature)

    def _smoothed(self, maps: Float[Tensor, "B T h w"]) -> Float[Tensor, "B T h w"]:
        return masks.blurred(maps, self.options.smooth) if self.options.smooth and not self.options.reference else maps

    def _move(self, step: Step, gradient: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """What is taken from the latents: the step in the denoiser's own scale, never more than a tenth of them."""
        options, latents = self.options, step.latents
        ratio = latents.norm() / self.run.scaled(step).norm()  # samplers like Euler scale what the denoiser reads
        inner = gradient * ratio
        size = inner.square().mean((1, 2, 3), keepdim=True).sqrt()
        wide = (latents / ratio).square().mean((1, 2, 3), keepdim=True).sqrt()
        decay = 1.0 if options.reference else (1 - 0.5 * step.index / max(step.count - 1, 1)) ** 0.5
        if options.step_size or options.reference or latents.shape[1] == 4 and self.run.backbone.family == "sd":
            move = inner * ((options.step_size or DEFAULT_STEP) * decay)
            if not options.reference:
                move = move * (CLIP * wide / (size * (options.step_size or DEFAULT_STEP) * decay + 1e-12)).clamp(max=1.0)
        else:
            move = inner * (RELATIVE * decay * wide / (size + 1e-12))
        return (move * ratio).detach()

    # masks ---------------------------------------------------------------------------------------------------------------

    def _masks(
        self, step: Step, values: Float[Tensor, "N R B C H W"], maps: Float[Tensor, "N B L h w"] | None, concepts: Sequence[int]
    ) -> Float[Tensor, "B K h w"]:
        """Each concept's mask from its own pass, or its own region; told in the notes as they are at the last step."""
        names = [self.scene.concepts[c] for c in concepts]
        if maps is None:
            places, strength = placed_by_change(self.run, step, values, self.options, names)
        else:
            own = [self._smoothed(maps[index + 1][:, self.positions[c][c + 1]]) for index, c in enumerate(concepts)]
            places, strength = placed_by(own, self.options, names, self.run)
        tell(self.run, names, strength, places)
        return places


def taken_apart(run: Run) -> prompts.Scene:
    """The run's prompt by its LoRAs' words. Raises Refused for a LoRA with a region and no words: no map could be its own."""
    loras = dict(zip(run.names, run.request.loras, strict=True))
    scene = prompts.scene(run.request.prompt, loras, run.categories, run.triggers)
    if lost := [name for name in scene.everywhere if loras[name].region is not None]:
        raise Refused(f"LoRA {lost[0]} has a region, but the prompt has no words of it: say with binds which are its own, or use "
                      "method regions, which needs none")
    return scene


def passes_of(run: Run, scene: prompts.Scene, live: Mapping[str, float], concepts: Sequence[int]) -> list[Pass]:
    """The base's pass, then one for each of these concepts: its LoRA and those that are everywhere, with its prompt."""
    everywhere = {name: live[name] for name in scene.everywhere if name in live}
    uses = [everywhere, *({scene.concepts[c]: live[scene.concepts[c]]} | everywhere for c in concepts)]
    texts = [scene.prompts[0], *(scene.prompts[c + 1] for c in concepts)]
    return [(use, run.encode(text, use)) for use, text in zip(uses, texts, strict=True)]


def positions(run: Run, scene: prompts.Scene) -> list[list[list[int]]]:
    """[concept][prompt] the positions of the tokens of the concept's words. Raises Refused where they are cut off."""
    offsets = [run.backbone.offsets(text) for text in scene.prompts]
    cut = [bool(run.backbone.truncated(text)) for text in scene.prompts]
    return [[list(prompts.tokens(text, span, offsets[p], cut=cut[p])) for p, (text, span) in enumerate(zip(scene.prompts, spans, strict=True))]
            for spans in scene.spans]


def shares(text: str) -> list[float]:
    """"0,0.2" as numbers. Raises Refused."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [-1.0]
    if any(not 0 <= share <= 1 for share in found):
        raise Refused(f"option refine is {text!r}; write shares of the steps from 0 to 1, as in 0,0.2,0.4")
    return found


def placed_by(
    own: Sequence[Float[Tensor, "B _T h w"]], options: Any, names: Sequence[str], run: Run
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"]]:
    """(masks, strength) of concepts from the attention maps of their tokens: threshold, closing, regions, overlap.

    strength: each concept's strongest token, its map from 0 to 1.
    """
    found = torch.stack([masks.claimed(maps, options.threshold) for maps in own], 1)
    strength = torch.stack([masks.normalised(maps.amax(1)) for maps in own], 1)
    return settled(found, strength, options, names, run), strength


def placed_by_change(
    run: Run, step: Step, values: Float[Tensor, "N R B C H W"], options: Any, names: Sequence[str]
) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B K h w"]]:
    """(masks, strength) of concepts from what their passes change in the base's prediction, which comes first in `values`.

    A place is the concept's whose change stands out most there, if it reaches the threshold's share of that concept's most. Who has a
    region contends inside it alone, and in one that replaces its mask against nobody. strength: each concept's change from 0 to 1.
    Both lie on the grid of the watched layers.
    """
    size = grid(step, run.backbone.prompt_attention()[run.backbone.localizing_layers()[0]])
    change = masks.changes(values, size)
    smooth = BREADTH * min(size) if options.smooth is None else options.smooth
    change = masks.blurred(change, smooth) if smooth else change
    strength, standing = masks.normalised(change), masks.standing(change)
    loras = dict(zip(run.names, run.request.loras, strict=True))
    for k, name in enumerate(names):
        if loras[name].region is not None:
            own = masks.region(loras[name], size).to(change) > 0
            inside = torch.inf if options.regions == "replace" else standing[:, k]
            standing[:, k] = torch.where(own, inside, -torch.inf)
    found = masks.leading(standing) * (strength > options.threshold)
    return settled(found, strength, options, names, run), strength


def settled(
    found: Float[Tensor, "B K h w"], strength: Float[Tensor, "B K h w"], options: Any, names: Sequence[str], run: Run
) -> Float[Tensor, "B K h w"]:
    """The claims as masks: closed, grown, with the users' regions, and parted where they meet, as the options say."""
    plain = getattr(options, "reference", False)
    if options.closing and not plain:
        found = masks.closed(found)
    if options.grow and not plain:
        found = masks.grown(found, options.grow)
    loras = dict(zip(run.names, run.request.loras, strict=True))
    found = bounded(found, names, run, intersect=options.regions == "intersect")
    if options.overlap == "argmax" and not plain:
        said = strength.new_tensor([loras[name].region is not None for name in names])[:, None, None]
        found = masks.parted(found, strength + 2 * said)  # a user's own region goes before what the maps say
    return found


def shared_places(step: Step, places: Float[Tensor, "B K h w"], soft: float) -> Float[Tensor, "B K1 H W"]:
    """The base's and each concept's share of every place of the latents."""
    return masks.shares(masks.resized(places, grid(step, 0), soft=soft)).to(step.latents.dtype)


def fused(values: Float[Tensor, "N R B C H W"], shared: Float[Tensor, "B N H W"]) -> Float[Tensor, "R B C H W"]:
    """The passes' predictions, each by its share of the place."""
    return torch.einsum("bshw,srbchw->rbchw", shared.to(values.dtype), values)


def bounded(found: Float[Tensor, "B K h w"], names: Sequence[str], run: Run, *, intersect: bool) -> Float[Tensor, "B K h w"]:
    """The masks with the users' own regions in their place, or cut by them."""
    loras = dict(zip(run.names, run.request.loras, strict=True))
    rows = []
    for index, name in enumerate(names):
        mask = found[:, index]
        if loras[name].region is not None:
            own = masks.region(loras[name], (found.shape[-2], found.shape[-1])).to(mask).expand_as(mask)
            mask = mask * own if intersect else own
        rows.append(mask)
    return torch.stack(rows, 1)


def tell(run: Run, names: Sequence[str], strength: Float[Tensor, "B K h w"], places: Float[Tensor, "B K h w"]) -> None:
    """Each concept's map and mask of the first picture, into the notes."""
    run.notes["masks"] = {name: {"map": masks.as_bytes(strength[0, k]), "mask": masks.as_bytes(places[0, k])} for k, name in enumerate(names)}
