"""Stable Diffusion's UNets: SD1.x, SD2.x and Pocket ("sd"), SDXL ("sdxl"), on the stock diffusers pipelines."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Generator, Tensor

from composition.backbones import chunks, vae
from composition.backbones.base import Axis, Defaults, Joint
from composition.backbones.loading.placement import Placement
from composition.backbones.pipeline import PipelineBackbone
from composition.loop import Conditioning
from composition.prompt_weights import Text, text_of
from composition.refusal import Refused
from composition.request import Request

_NONE = re.compile(r"time_emb|add_embedding|class_embedding|time_proj")
_TEXT = re.compile(r"\.attn2\.(to_k|to_v)")


class UNetBackbone(PipelineBackbone):
    """A StableDiffusionPipeline or StableDiffusionXLPipeline, reached through encode_prompt, unet and vae alone."""

    joint: Joint = ""
    parts = ("unet", "text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any, family: str, placement: Placement | None = None) -> None:
        super().__init__(pipeline, placement)
        self.family = family

    def size(self, request: Request) -> tuple[int, int]:
        factor, own = self.pipeline.vae_scale_factor, self.denoiser.config.sample_size
        high, wide = own if isinstance(own, (tuple, list)) else (own, own)
        size = request.size or (wide * factor, high * factor)
        if wrong := vae.fitting(size, factor):
            raise Refused(wrong)
        return size

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        both = ("text_encoder", "text_encoder_2")
        return {"text": both, "pooled": both[1:]} if self.family == "sdxl" else {"text": both[:1]}

    @property
    def defaults(self) -> Defaults:
        return Defaults(25, 5.0)

    def scale(self, request: Request) -> float:
        return request.guidance or 1.0

    def embedded_guidance(self, request: Request) -> float | None:
        return None

    def encode(
        self, prompts: Sequence[Text], negatives: Sequence[Text] | None, wanted: Collection[str] = ("text", "pooled"), least: int = 1,
        vectors: chunks.Vectors | None = None,
    ) -> Conditioning:
        guided = negatives is not None
        # SDXL zeroes the negative row only when no negative prompt is given at all, as its authors trained it.
        worded = negatives is not None and any(map(text_of, negatives))
        if not chunks.simple([*prompts, *(negatives or ())], self._tokenizer, least):
            return self._encode_parts(prompts, negatives, worded, wanted, least, vectors or {})
        negative_prompts = list(map(text_of, negatives)) if negatives is not None and worded else None
        call = {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": guided}
        texts = list(map(text_of, prompts))
        if self.family == "sdxl":
            positive, negative, pooled, negative_pooled = self.pipeline.encode_prompt(prompt=texts, negative_prompt=negative_prompts, **call)
            pairs = {"text": (negative, positive), "pooled": (negative_pooled, pooled)}
        else:
            positive, negative = self.pipeline.encode_prompt(texts, negative_prompt=negative_prompts, **call)
            pairs = {"text": (negative, positive)}
        return Conditioning({name: torch.stack(pair if guided else pair[1:]) for name, pair in pairs.items() if name in wanted})

    def _encode_parts(
        self, prompts: Sequence[Text], negatives: Sequence[Text] | None, worded: bool, wanted: Collection[str], least: int, vectors: chunks.Vectors
    ) -> Conditioning:
        """The same of prompts that are read in chunks. worded: whether any negative prompt has words."""
        def read(parts: list[chunks.Chunk]) -> dict[str, Tensor]:
            with chunks.inverted(self._encoders, parts, vectors):
                values = self.pipeline.encode_prompt([part.text for part in parts], device=self.device, num_images_per_prompt=1,
                                                     do_classifier_free_guidance=False)
            return {"text": values[0], "pooled": values[2]} if self.family == "sdxl" else {"text": values[0]}

        values = chunks.encoded([*(negatives or ()), *prompts], self._tokenizer, least, read)
        rows = {name: value.unflatten(0, (-1, len(prompts))) for name, value in values.items() if name in wanted}
        if negatives is not None and not worded and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            rows = {name: torch.cat([torch.zeros_like(value[:1]), value[1:]]) for name, value in rows.items()}
        return Conditioning(rows)

    @property
    def _encoders(self) -> Mapping[str, tuple[Any, Any]]:
        """Text encoder and tokenizer, by the former's name."""
        pairs = {name: (getattr(self.pipeline, name, None), getattr(self.pipeline, name.replace("text_encoder", "tokenizer"), None)) for name in self.parts[1:]}
        return {name: pair for name, pair in pairs.items() if pair[0] is not None}

    @property
    def _tokenizer(self) -> Any:
        return next(tokenizer for _, tokenizer in self._encoders.values())

    def chunks(self, prompt: Text) -> int:
        return len(chunks.chunks(prompt, self._tokenizer)[0])

    def truncated(self, prompt: Text) -> str:
        tokenizer = self._tokenizer
        if not isinstance(prompt, str):
            return chunks.chunks(prompt, tokenizer)[1]
        room = tokenizer.model_max_length - 2
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[room:]) if len(ids) > room else ""

    def offsets(self, prompt: Text) -> list[tuple[int, int]]:
        places = [chunks.offsets(prompt, tokenizer) for _, tokenizer in self._encoders.values()]
        if any(other != places[0] for other in places[1:]):
            raise Refused("the two tokenizers of this model split the prompt differently, so the places of its words are not known")
        return places[0]

    def start(
        self, request: Request, scheduler: Any, generators: Sequence[Generator]
    ) -> tuple[Float[Tensor, "B C H W"], Num[Tensor, "T"]]:
        width, height = self.size(request)
        factor = self.pipeline.vae_scale_factor
        shape = (len(generators), self.denoiser.config.in_channels, height // factor, width // factor)
        times = self.schedule(request, scheduler)
        return self.noise(shape, generators) * scheduler.init_noise_sigma, times

    @property
    def unit(self) -> int:
        return self.pipeline.vae_scale_factor

    def schedule(self, request: Request, scheduler: Any) -> Num[Tensor, "T"]:
        scheduler.set_timesteps(request.steps, device=self.device)
        return scheduler.timesteps

    def first(self, steps: int, strength: float) -> int:
        """As StableDiffusionImg2ImgPipeline has it."""
        return min(max(steps - min(int(steps * strength), steps), 0), steps - 1)

    def denoise(
        self, latents: Float[Tensor, "B C H W"], t: Num[Tensor, ""] | Num[Tensor, "B"], cond: Conditioning
    ) -> Float[Tensor, "R B C H W"]:
        rows, pictures = cond.rows, latents.shape[0]
        t = t.repeat(rows) if t.ndim else t

        def flat(value: Tensor) -> Tensor:
            return value.expand(rows, pictures, *value.shape[2:]).flatten(0, 1).to(latents.dtype)

        extra = None
        if self.family == "sdxl":
            extra = {"text_embeds": flat(cond.values["pooled"]), "time_ids": self._sizes(latents, rows * pictures)}
        out = self.denoiser(
            latents.expand(rows, *latents.shape).flatten(0, 1), t, encoder_hidden_states=flat(cond.values["text"]),
            added_cond_kwargs=extra, return_dict=False)[0]
        return out.unflatten(0, (rows, pictures))

    def _sizes(self, latents: Float[Tensor, "B C H W"], rows: int) -> Float[Tensor, "rows 6"]:
        """SDXL's micro-conditioning: original size, crop corner, target size, as (height, width) in pixels."""
        factor = self.pipeline.vae_scale_factor
        height, width = latents.shape[-2] * factor, latents.shape[-1] * factor
        # Filled there: a list of numbers would be copied from here, and such a copy waits for all pending work of the device.
        return torch.cat([latents.new_full((rows, 1), side) for side in (height, width, 0, 0, height, width)], 1)

    def axis(self, layer: str) -> Axis:
        if _NONE.search(layer):
            return Axis("none")
        if _TEXT.search(layer):
            return Axis("text")
        depth = len(self.denoiser.config.block_out_channels) - 1
        kind, _, rest = self.block(layer).partition(".")
        if kind == "down":
            return Axis("grid", min(int(rest) + ("downsamplers" in layer), depth))
        if kind == "up":
            return Axis("grid", max(depth - int(rest) - ("upsamplers" in layer), 0))
        return Axis("grid", depth if kind == "mid" else 0)

    def prompt_attention(self) -> Mapping[str, int]:
        names = [name for name, _ in self.denoiser.named_modules() if name.endswith(".attn2")]
        order = ("down", "mid", "up")
        return {name: self.axis(f"{name}.to_q").level for name in sorted(names, key=lambda name: order.index(name.partition("_")[0]))}

    def localizing_layers(self) -> tuple[str, ...]:
        layers = self.prompt_attention()
        sided = {name: level for name, level in layers.items() if not name.startswith("mid")} or layers
        coarse = [name for name, level in sided.items() if level == max(sided.values(), default=0)]
        inner = [name for name in coarse if self.family == "sdxl" and re.match(r"up_blocks\.0\..*transformer_blocks\.[2-5]\.", name)]
        return tuple(inner or coarse)

    def block(self, layer: str) -> str:
        if layer.startswith("mid_block"):
            return "mid"
        match = re.match(r"(down|up)_blocks\.(\d+)", layer)
        return f"{match[1]}.{match[2]}" if match else ""
