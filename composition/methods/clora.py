"""CLoRA: every concept has a mask, from the attention maps of its own pass (arXiv 2403.19776).

N + 1 passes a step: the base with a plain prompt, and each concept's LoRA with its trigger words at its own place. Early, the latents
are optimised so that attention maps of one concept agree over the passes and those of different concepts differ (NT-Xent, equation 4).
A mask for each concept from its own pass (equation 5) then fuses the predictions before guidance. LoRAs bound to nothing are on in every
pass. In joint attention (SD 3, FLUX) a LoRA's mask is by default where its pass changes the base's prediction most, and latents are not
optimised: maps of words that the base does not know say little there. `reference` does what the authors' code does where it differs from
this: maps of both guidance rows, a constant step, no early stop, no closing of masks. Of a step with several evaluations (Heun's method)
the latents are optimised at the first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from composition.hooks import masks
from composition.hooks.attention import frozen
from composition.hooks.kernels import attention_for
from composition.loop import Predict, Prediction, Step
from composition.methods import method
from composition.methods.shared import concepts as shared
from composition.methods.shared import nt_xent
from composition.refusal import Refused
from composition.run import Pass, Run

CLIP = 0.1  # an update's root mean square is at most this share of the latents'
RELATIVE = 0.02  # the update's root mean square over the latents', for latents other than Stable Diffusion's
DEFAULT_STEP = 20.0
UNTIL, REFINE, ROUNDS = 0.5, "0,0.2,0.4", 20
JOINT_UNTIL, JOINT_REFINE, JOINT_ROUNDS = 0.0, "0,0.07", 5  # in joint attention, where updates were seen to cost the scene


@dataclass(frozen=True)
class Options:
    update: bool = field(default=True, metadata={"help": "Optimise the latents so that the concepts' attention maps separate."})
    until: float | None = field(default=None, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps in which the latents are optimised; empty: 0.5, and none for SD 3 and FLUX, where it costs the scene (if any, 0.15)."})
    refine: str | None = field(default=None, metadata={"help":
        "Shares of the steps at which they are updated many times; empty: 0,0.2,0.4, and 0,0.07 for SD 3 and FLUX."})
    rounds: int | None = field(default=None, metadata={"ge": 0, "le": 1000, "help":
        "How many more updates, at most; 0: none; empty: 20, and 5 for SD 3 and FLUX."})
    stop: float = field(default=0.3, metadata={"ge": 0.0, "le": 1.0, "help":
        "No more updates in a step once the loss is this near its minimum; 1 is where all maps are equal. 0: never stop early."})
    step_size: float = field(default=0.0, metadata={"ge": 0.0, "le": 1000.0, "help":
        "Step size of an update; 0: 20 for Stable Diffusion, as the paper has it, and relative to the latents elsewhere."})
    temperature: float = field(default=0.5, metadata={"ge": 0.01, "le": 10.0, "help": "Temperature of the contrastive loss."})
    maps: Literal["auto", "attention", "change"] = field(default="auto", metadata={"help":
        "What a concept's mask is made from: the attention to its words, or where its LoRA changes the base's prediction most. auto: "
        "attention, and change for SD 3 and FLUX."})
    threshold: float = field(default=0.4, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of a map's maximum from which a place belongs to the concept's mask."})
    smooth: float | None = field(default=None, metadata={"ge": 0.0, "le": 8.0, "help":
        "Blur of the maps, in cells of their grid; empty: none, and an eighth of the picture's shorter side for maps of change."})
    closing: bool = field(default=True, metadata={"help": "Fill holes and gaps of a mask."})
    grow: int = field(default=0, metadata={"ge": 0, "le": 32, "help": "Cells of the maps' grid by which a mask is widened on every side."})
    overlap: Literal["average", "argmax"] = field(default="average", metadata={"help":
        "Where masks overlap: average the predictions, or use only the concept with the strongest map."})
    soft: float = field(default=0.0, metadata={"ge": 0.0, "le": 16.0, "help": "Softness of a mask's edge, in cells of the latent."})
    masks_from: float = field(default=0.0, metadata={"ge": 0.0, "le": 1.0, "help":
        "Share of the steps before which there are no masks and all passes are averaged."})
    regions: Literal["replace", "intersect"] = field(default="replace", metadata={"help":
        "What a LoRA's own region does with its mask."})
    recompute: bool = field(default=False, metadata={"help": "Compute the predictions again after the last update of a step."})
    two_phase: bool = field(default=True, metadata={"help": "Compute the same gradient pass by pass, in memory that does not grow with their number."})
    reference: bool = field(default=False, metadata={"help": "Do what the authors' released code does."})


@method(title="CLoRA", about="Every concept has its own mask, from the attention to its words.", paper="2403.19776",
        cost="K + 1 (early about twice that; not so with SD 3 and FLUX)", single=False, regional=True)
@contextmanager
def compose(run: Run, options: Options) -> Iterator[Predict]:
    with frozen([run.backbone.denoiser]):
        yield _Course(run, options).predict


class _Course:
    """The state of one run: the prompt by concepts, and which steps optimise the latents."""

    def __init__(self, run: Run, options: Options) -> None:
        self.run, self.options = run, options
        self.scene = shared.scene_of(run)
        self.layers = run.backbone.localizing_layers()
        self.positions = shared.token_positions(run, self.scene)
        until, refine, rounds = (JOINT_UNTIL, JOINT_REFINE, JOINT_ROUNDS) if run.backbone.joint else (UNTIL, REFINE, ROUNDS)
        self.until = until if options.until is None else options.until
        self.rounds = rounds if options.rounds is None else options.rounds
        self.refined = shares(refine if options.refine is None else options.refine)
        self.by_change = options.maps == "change" or options.maps == "auto" and bool(run.backbone.joint) and not options.reference
        self.losses: list[list[float]] = []
        run.notes["clora"] = {"prompts": self.scene.texts, "everywhere": list(self.scene.everywhere), "loss": self.losses,
                              "maps": "change" if self.by_change else "attention"}

    def predict(self, step: Step) -> Prediction:
        run = self.run
        live = run.live(step)
        concepts = [index for index, name in enumerate(self.scene.concepts) if name in live]
        if not concepts:
            return Prediction(run.guide(run.denoise(step)), step.latents)
        passes = shared.passes_of(run, self.scene, live, concepts)
        step, values, maps = self._updated(step, passes, concepts)
        by_place = shared.latent_shares(step, self._masks(step, values, maps, concepts), self.options.soft)
        if step.index < self.options.masks_from * step.count:
            by_place = torch.full_like(by_place, 1 / by_place.shape[1])
        return Prediction(run.guide(shared.fused(values, by_place)), step.latents)

    # optimising the latents ----------------------------------------------------------------------------------------------

    def _updated(
        self, step: Step, passes: Sequence[Pass], concepts: Sequence[int]
    ) -> tuple[Step, Float[Tensor, "N R B C H W"], Float[Tensor, "N B L h w"] | None]:
        """The step after its updates, and the last predictions and maps; no maps where none are needed."""
        options, rows = self.options, "all" if self.options.reference else "positive"
        kinds = self._kinds(concepts)
        guided = options.update and len(concepts) > 1 and step.stage == 0 and step.index < self.until * step.count
        updates = (1 + self.rounds * (step.index in {int(share * step.count) for share in self.refined})) if guided else 0
        least, flat = nt_xent.bounds(kinds, options.temperature) if guided else (0.0, 1.0)
        values = maps = None
        losses: list[float] = []
        for update in range(updates):
            values = maps = None
            if update == updates - 1:
                values, maps = self._observed(step, passes)
            else:
                maps = self.run.attention_maps(step, passes, self.layers, rows)
            gradient, loss = self._gradient(step, passes, concepts, kinds, maps)
            losses.append(round(float(loss.mean()), 5))
            near = (loss.mean() - least) / (flat - least)
            if options.stop and not options.reference and near <= options.stop:
                break
            step = step._replace(latents=step.latents - self._update(step, gradient))
            if options.recompute:
                values = None
        if losses:
            self.losses.append(losses)
        if self.by_change:
            return step, self.run.denoise_passes(step, passes) if values is None else values, None
        if values is None or maps is None:
            values, maps = self._observed(step, passes)
        return step, values, maps.mean(1)

    def _observed(
        self, step: Step, passes: Sequence[Pass]
    ) -> tuple[Float[Tensor, "N R B C H W"], Float[Tensor, "N _R B L h w"]]:
        """The passes' predictions and, of the same evaluations, their attention maps."""
        with self.run.recording(step, passes, self.layers, "all" if self.options.reference else "positive") as read:
            return self.run.denoise_passes(step, passes), read()

    def _gradient(
        self, step: Step, passes: Sequence[Pass], concepts: Sequence[int], kinds: Sequence[int], maps: Float[Tensor, "N R B L h w"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
        """d(sum of losses) / d latents, and the losses. maps: of these latents, without a graph."""
        rows = "all" if self.options.reference else "positive"
        with torch.enable_grad(), attention_for(self.run.backbone.device, gradients=True):
            if self.options.two_phase:
                leaves = maps.detach().requires_grad_()
                loss = self._loss(leaves, concepts, kinds)
                (wanted,) = torch.autograd.grad(loss.sum(), leaves)
                total = torch.zeros_like(step.latents)
                for item, want in zip(passes, wanted, strict=True):
                    latents = step.latents.detach().requires_grad_()
                    seen = self.run.attention_maps(step._replace(latents=latents), [item], self.layers, rows)
                    total += torch.autograd.grad((seen[0] * want).sum(), latents)[0]
                    del seen, latents
                return total, loss.detach()
            latents = step.latents.detach().requires_grad_()
            loss = self._loss(self.run.attention_maps(step._replace(latents=latents), passes, self.layers, rows), concepts, kinds)
            return torch.autograd.grad(loss.sum(), latents)[0], loss.detach()

    def _kinds(self, concepts: Sequence[int]) -> list[int]:
        """The concept of each map that the loss compares, in the order of `_loss`."""
        return [c for c in concepts for p in (0, *(other + 1 for other in concepts)) for _ in self.positions[c][p]]

    def _loss(self, maps: Float[Tensor, "N R B L h w"], concepts: Sequence[int], kinds: Sequence[int]) -> Float[Tensor, " B"]:
        seen = maps.mean(1)
        prompts = [0, *(c + 1 for c in concepts)]
        chosen = [seen[index][:, self.positions[c][p]] for c in concepts for index, p in enumerate(prompts)]
        every = masks.normalised(self._smoothed(torch.cat(chosen, 1)))
        return nt_xent.nt_xent(every.flatten(2), kinds, self.options.temperature)

    def _smoothed(self, maps: Float[Tensor, "B T h w"]) -> Float[Tensor, "B T h w"]:
        return masks.blurred(maps, self.options.smooth) if self.options.smooth and not self.options.reference else maps

    def _update(self, step: Step, gradient: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """What is taken from the latents: the update in the denoiser's own scale, never more than a tenth of them."""
        options, latents = self.options, step.latents
        ratio = latents.norm() / self.run.scaled(step).norm()  # samplers like Euler scale what the denoiser reads
        inner = gradient * ratio
        size = inner.square().mean((1, 2, 3), keepdim=True).sqrt()
        wide = (latents / ratio).square().mean((1, 2, 3), keepdim=True).sqrt()
        decay = 1.0 if options.reference else (1 - 0.5 * step.index / max(step.count - 1, 1)) ** 0.5
        if options.step_size or options.reference or latents.shape[1] == 4 and self.run.backbone.family == "sd":
            update = inner * ((options.step_size or DEFAULT_STEP) * decay)
            if not options.reference:
                update = update * (CLIP * wide / (size * (options.step_size or DEFAULT_STEP) * decay + 1e-12)).clamp(max=1.0)
        else:
            update = inner * (RELATIVE * decay * wide / (size + 1e-12))
        return (update * ratio).detach()

    # masks ---------------------------------------------------------------------------------------------------------------

    def _masks(
        self, step: Step, values: Float[Tensor, "N R B C H W"], maps: Float[Tensor, "N B L h w"] | None, concepts: Sequence[int]
    ) -> Float[Tensor, "B K h w"]:
        """Each concept's mask from its own pass, or its own region; the notes have those of the last step."""
        names = [self.scene.concepts[c] for c in concepts]
        if maps is None:
            places, strength = shared.masks_from_change(self.run, step, values, self.options, names)
        else:
            own = [self._smoothed(maps[index + 1][:, self.positions[c][c + 1]]) for index, c in enumerate(concepts)]
            places, strength = shared.masks_from_attention(own, self.options, names, self.run)
        shared.note_masks(self.run, names, strength, places)
        return places



def shares(text: str) -> list[float]:
    """"0,0.2" as numbers. Raises Refused."""
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = [-1.0]
    if any(not 0 <= share <= 1 for share in numbers):
        raise Refused(f"option refine is {text!r}; write shares of the steps from 0 to 1, as in 0,0.2,0.4")
    return numbers
