"""Run: all that a method may touch while it makes one batch of pictures."""

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from composition.adapters import Adapters
from composition.backbones.base import Backbone
from composition.guidance import guide
from composition.hooks.attention import Enough, watch
from composition.hooks.cache import Cache
from composition.hooks.costs import layer_costs
from composition.hooks.regional import joined, regional
from composition.loop import Conditioning, Step
from composition.request import Cancelled, Request

# Latent places over which a processor is faster with one LoRA after the other than with a batch of rows: measured at Stable
# Diffusion 1.5's size (cached passes 14 % faster at 64 x 64, whole ones 4 %; at 48 x 48 whole ones 10 % slower).
PROCESSOR_BATCH = 3000
Pass = tuple[Mapping[str, float], Conditioning]  # LoRAs that are on, with their weights, and the prompt that is read


def grid(step: Step, level: int) -> tuple[int, int]:
    """(h, w) of the layers at this level."""
    return -(-step.latents.shape[-2] // 2**level), -(-step.latents.shape[-1] // 2**level)


@dataclass(eq=False)
class Run:
    """One batch of B pictures of a request. A method asks it for predictions; it owns nothing that outlives them.

    scheduler: this run's own instance. notes: what the method did, plain JSON values. encodings: what prompts were
    already read as, value by value, by prompt and text-LoRA weights. categories, triggers: of each LoRA by name, as the request or else its file
    says.
    """

    backbone: Backbone
    adapters: Adapters
    request: Request
    scheduler: Any
    generators: Sequence[Generator]
    notes: dict[str, Any] = field(default_factory=dict)
    encodings: dict[Any, Tensor] = field(default_factory=dict)
    cancel: threading.Event | None = None
    categories: Mapping[str, str] = field(default_factory=dict)
    triggers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _shares: dict[Any, float] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The request's LoRAs, in order, one unique name each."""
        return self.request.names

    def live(self, step: Step) -> dict[str, float]:
        """The LoRAs that are on at this step, with their weights: inside start..end and of a weight other than 0."""
        pairs = zip(self.names, self.request.loras, strict=True)
        return {name: w for name, lora in pairs if (w := lora.weight_at(step.index, step.count)) != 0.0}

    def encode(self, prompt: str | None = None, use: Mapping[str, float] | None = None) -> Conditioning:
        """The prompt (None: the request's) and its negative, read with the text-encoder part of these LoRAs.

        use: name to denoiser weight (None: all at their own); a LoRA's text_weight, when set, is used in proportion.
        """
        use = self.request.weights if use is None else use
        text = {name: self._text_weight(name, weight) for name, weight in use.items()}
        prompt = self.request.prompt if prompt is None else prompt
        guided = self.backbone.scale(self.request) > 1.0
        keys = {value: (value, prompt, self.request.negative if guided else None, self._touching(text, encoders))
                for value, encoders in self.backbone.reads.items()}
        if missing := [value for value, key in keys.items() if key not in self.encodings]:
            self._check_cancel()
            self.adapters.use_text({name: weight for name, weight in text.items() if weight != 0.0})
            try:
                with torch.no_grad():
                    made = self.backbone.encode([prompt], [self.request.negative] if guided else None, missing)
                self.encodings.update({keys[value]: tensor for value, tensor in made.values.items()})
            finally:
                self.adapters.use_text({})
        values = {value: self.encodings[key] for value, key in keys.items()}
        if (told := self.backbone.embedded_guidance(self.request)) is not None:
            values["guidance"] = torch.full((2 if guided else 1, 1), told, device=self.backbone.device)
        return Conditioning(values)

    def _touching(self, weights: Mapping[str, float], encoders: Collection[str]) -> tuple[tuple[str, float], ...]:
        """The weights of the LoRAs that change any of these text encoders: only with them a prompt is read anew."""
        return tuple(sorted((name, weight) for name, weight in weights.items()
                            if weight != 0.0 and any(self.adapters.touches(name, encoder) for encoder in encoders)))

    def denoise(
        self, step: Step, use: Mapping[str, float] | None = None, cond: Conditioning | None = None,
        rows: Literal["all", "positive"] = "all",
    ) -> Float[Tensor, "R B *S"]:
        """One prediction with these LoRAs in every row (None: all that are live at this step), unguided.

        cond: another conditioning than the request's prompt read with the same LoRAs. rows="positive": R = 1.
        """
        use = self.live(step) if use is None else use
        cond = self.encode(use=use) if cond is None else cond
        cond = cond.positive() if rows == "positive" else cond
        self.adapters.use(use)
        return self._evaluate(step, cond, 1)

    def denoise_each(
        self, step: Step, conds: Mapping[str, Conditioning] | None = None, others_weight: float = 0.0
    ) -> Float[Tensor, "K R B *S"]:
        """One prediction per live LoRA, each with that LoRA alone, in one batch of rows or a loop as the request says.

        With none live, one prediction of the base (K = 1). conds: a conditioning per LoRA instead of the request's
        prompt read with that LoRA. others_weight: the share of their weights at which the other LoRAs are on beside it.
        """
        uses = self._uses(self.live(step), others_weight) or {"": {}}
        return self._each(step, list(uses), list(uses.values()), conds or {})

    def denoise_passes(
        self, step: Step, passes: Sequence[Pass], rows: Literal["all", "positive"] = "all"
    ) -> Float[Tensor, "N R B *S"]:
        """One prediction for each pass, with its own LoRAs and prompt, in one batch of rows or a loop as the request says."""
        conds = [cond.positive() if rows == "positive" else cond for _, cond in passes]
        given = {str(index): cond for index, cond in enumerate(conds)}
        return self._each(step, list(given), [use for use, _ in passes], given)

    def attend(
        self, step: Step, passes: Sequence[Pass], layers: Sequence[str], rows: Literal["all", "positive"] = "positive",
    ) -> Float[Tensor, "N R B L h w"]:
        """What each pass looks at: attention to its prompt's tokens by place, averaged over these layers and their heads, float32.

        The denoiser stops after the last of them. Differentiable in step.latents where gradients are on.
        """
        level = self.backbone.prompt_attention()[layers[0]]
        share = self._until(tuple(layers), step)
        found = []
        for use, cond in passes:
            cond = cond.positive() if rows == "positive" else cond
            self.adapters.use(use)
            with watch(self.backbone.denoiser, layers, grid=grid(step, level), rows=range, early=True, joint=self.backbone.joint) as maps:
                with suppress(Enough):
                    self._evaluate(step, cond, share * cond.rows / self.encode().rows)
                found.append(maps.read().unflatten(0, (cond.rows, step.latents.shape[0])))
        return torch.stack(found)

    def denoise_watched(
        self, step: Step, passes: Sequence[Pass], layers: Sequence[str], rows: Literal["all", "positive"] = "positive",
    ) -> tuple[Float[Tensor, "N R B *S"], Float[Tensor, "N _R B L h w"]]:
        """`denoise_passes` and what `attend` sees, in the same evaluations. rows: of the maps; the predictions have all."""
        level, values, found = self.backbone.prompt_attention()[layers[0]], [], []
        kinds, pictures = passes[0][1].rows, step.latents.shape[0]

        def positive(count: int) -> list[int]:
            return [row for row in range(count) if row // pictures % kinds == kinds - 1]

        for part in [passes] if self._batched(step) else [[one] for one in passes]:
            recorded = range if rows == "all" else positive
            with watch(self.backbone.denoiser, layers, grid=grid(step, level), rows=recorded, joint=self.backbone.joint) as maps:
                values.append(self.denoise_passes(step, part))
                found.append(maps.read().unflatten(0, (len(part), -1, pictures)))
        return torch.cat(values), torch.cat(found)

    def denoise_regional(
        self, step: Step, passes: Sequence[Pass], shares: Float[Tensor, "B N h w"]
    ) -> Float[Tensor, "R B *S"]:
        """One evaluation in which each pass, with its LoRAs and prompt, has its share of every place (shares sum to 1 over N)."""
        conds = [cond for _, cond in passes]
        if step.index == 0 and (names := self.adapters.placeless()):
            self.notes["acts everywhere in part"] = list(names)
        weights = {name: weight for use, _ in passes for name, weight in use.items()}
        with regional(self.backbone, self.adapters, weights, [set(use) for use, _ in passes], shares, rows=conds[0].rows,
                    size=grid(step, 0), tokens=conds[0].values["text"].shape[2]):
            return self._evaluate(step, joined(conds, shares), 1)

    def scaled(self, step: Step) -> Float[Tensor, "B *S"]:
        """The latents as the denoiser reads them: flow samplers leave them as they are."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return scale(step.latents, step.t) if scale else step.latents

    def denoise_cached(
        self, step: Step, cache: Cache, full: Collection[str], others_weight: float = 0.0
    ) -> Float[Tensor, "K R B *S"]:
        """As denoise_each, but only the LoRAs in `full` pay a whole evaluation, which fills their slots; the others take
        what is deep in the network from theirs. Each of the two kinds is one batch of rows, or a loop as the request says.

        Evaluations are counted in whole ones: a cached one counts by its multiply-adds, attention products left out.
        """
        live, parts = self._uses(self.live(step), others_weight), {}
        fresh, aged = [name for name in live if name in full], [name for name in live if name not in full]
        for names, opened in ((fresh, cache.full), (aged, cache.cached)):
            for group in [names] if self._batched(step) and names else [[name] for name in names]:
                share = 1.0 if opened == cache.full else self._share(cache, step)
                with opened(group):
                    parts |= zip(group, self._each(step, group, [live[name] for name in group], {}, share), strict=True)
        return torch.stack([parts[name] for name in live])

    @staticmethod
    def _uses(live: Mapping[str, float], others_weight: float) -> dict[str, dict[str, float]]:
        """By LoRA, the weights of all in the pass that asks it."""
        return {name: {other: w if other == name else others_weight * w for other, w in live.items() if other == name or others_weight}
                for name in live}

    def _batched(self, step: Step) -> bool:
        """Whether rows of several LoRAs go in one batch: as the request says, but never where that is slower."""
        large = step.latents.shape[-1] * step.latents.shape[-2] > PROCESSOR_BATCH
        return self.request.batched and not (large and self.backbone.device.type == "cpu")

    def _until(self, layers: tuple[str, ...], step: Step) -> float:
        """The cost of a pass that ends after these layers over a whole one: multiply-adds, attention products left out."""
        if layers not in self._shares:
            costs = layer_costs(self.backbone.denoiser, self.backbone.axis, grid(step, 0), self.encode().values["text"].shape[2])
            turns = ("conv_in", "time", "add", "down", "mid", "up")
            paths = sorted(costs, key=lambda path: next((turn for turn, name in enumerate(turns) if path.startswith(name)), len(turns)))
            last = max(index for index, path in enumerate(paths) if path.startswith(layers))
            self._shares[layers] = sum(costs[path] for path in paths[: last + 1]) / sum(costs.values())
        return self._shares[layers]

    def _share(self, cache: Cache, step: Step) -> float:
        """A cached pass's cost over a full one's, worked out once a run."""
        if cache not in self._shares:
            tokens = self.encode().values["text"].shape[2]
            self._shares[cache] = cache.share(self.backbone.axis, tuple(step.latents.shape[-2:]), tokens)
        return self._shares[cache]

    def _each(
        self, step: Step, names: Sequence[str], uses: Sequence[Mapping[str, float]], given: Mapping[str, Conditioning],
        share: float = 1.0,
    ) -> Float[Tensor, "K R B *S"]:
        """One prediction for each of `uses`, which asks the LoRA of `names`, in one batch of rows or one after the other."""
        read = [given[name] if name in given else self.encode(use=use) for name, use in zip(names, uses, strict=True)]
        if not self._batched(step) or len(uses) == 1:
            found = []
            for use, cond in zip(uses, read, strict=True):
                self.adapters.use(use)
                found.append(self._evaluate(step, cond, share))
            return torch.stack(found)
        each = read[0].rows * step.latents.shape[0]
        with self.adapters.rows([use for use in uses for _ in range(each)]):
            out = self._evaluate(step, Conditioning.stacked(read), share * len(uses))
            return out.unflatten(0, (len(uses), read[0].rows))

    def guide(self, rows: Float[Tensor, "R B *S"]) -> Float[Tensor, "B *S"]:
        """The request's classifier-free guidance over the rows."""
        return guide(rows, self.backbone.scale(self.request))

    def _evaluate(self, step: Step, cond: Conditioning, predictions: float) -> Float[Tensor, "R B *S"]:
        self._check_cancel()
        latents = self.scaled(step)
        self.notes["evaluations"] = self.notes.get("evaluations", 0) + (int(predictions) if predictions % 1 == 0 else predictions)
        return self.backbone.denoise(latents, step.t, cond)

    def _check_cancel(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            raise Cancelled("cancelled before the next evaluation; nothing was kept")

    def _text_weight(self, name: str, weight: float) -> float:
        lora = self.request.loras[self.names.index(name)]
        if lora.text_weight is None:
            return weight
        return lora.text_weight * (weight / lora.weight if lora.weight else 1.0)
