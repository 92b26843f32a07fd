"""FLUX.1 (dev, schnell and models of that shape, Pocket-FLUX among them) on the stock FluxPipeline.

Latents are pictures (B, C, H, W) here as in every family; that the transformer reads them in packed 2 x 2 squares is its own
affair, so masks, frequencies and previews need not know. A sampler moves each number by itself: the pictures are the stock ones.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Generator, Tensor

from composition.backbones import chunks, vae
from composition.backbones.base import Axis, Defaults, Joint
from composition.backbones.pipeline import PipelineBackbone
from composition.loop import Conditioning
from composition.prompt_weights import Text, text_of
from composition.refusal import Refused
from composition.request import Request

LONGEST, LONGEST_FAST = 512, 256  # T5 tokens that FLUX.1-dev and FLUX.1-schnell were trained on
LOCALIZING = 14 / 19  # the share of the double blocks before those that localize words best: 14 to 18 of FLUX.1's 19

_NONE = re.compile(r"time_text_embed|(?<!\w)norm\w*\.linear$|norm_out")
_TEXT = re.compile(r"context_embedder|ff_context|\.attn\.(?:add_\w_proj|to_add_out)$")


class FluxBackbone(PipelineBackbone):
    """A FluxPipeline, reached through its text encoders, transformer and vae alone."""

    family = "flux"
    joint: Joint = "text"
    parts = ("transformer", "text_encoder", "text_encoder_2")
    reads: Mapping[str, tuple[str, ...]] = {"text": ("text_encoder_2",), "pooled": ("text_encoder",)}

    @property
    def distilled(self) -> bool:
        """True when guidance is a number the transformer reads (FLUX.1-dev), not a second row."""
        return bool(self.denoiser.config.guidance_embeds)

    @property
    def fast(self) -> bool:
        """True for a model of few steps that knows no guidance of any kind (FLUX.1-schnell): its sigmas are not shifted."""
        return not self.distilled and not self.scheduler.config.get("use_dynamic_shifting")

    @property
    def defaults(self) -> Defaults:
        return Defaults(4, 1.0) if self.fast else Defaults(28, 3.5) if self.distilled else Defaults(25, 4.5)

    def scale(self, request: Request) -> float:
        return request.true_guidance if self.distilled else request.guidance or 1.0

    def embedded_guidance(self, request: Request) -> float | None:
        return request.guidance if self.distilled else None

    @property
    def longest(self) -> int:
        """Tokens of a prompt that T5 is given, padding included."""
        return min(LONGEST_FAST if self.fast else LONGEST, self.pipeline.tokenizer_2.model_max_length)

    @property
    def pixels_per_token(self) -> int:
        """The side of the square that one token of the picture stands for."""
        return 2 * self.pipeline.vae_scale_factor

    def size(self, request: Request) -> tuple[int, int]:
        own = self.pipeline.vae.config.sample_size
        size = request.size or (own, own)
        if wrong := vae.fitting(size, self.pixels_per_token):
            raise Refused(wrong)
        return size

    def encode(
        self, prompts: Sequence[Text], negatives: Sequence[Text] | None, wanted: Collection[str] = ("text", "pooled"), least: int = 1,
        vectors: chunks.Vectors | None = None,
    ) -> Conditioning:
        sides = [self._read(list(side), wanted) for side in (negatives, prompts) if side is not None]
        return Conditioning({name: torch.stack([side[name] for side in sides]) for name in wanted})

    def _read(self, prompts: list[Text], wanted: Collection[str]) -> dict[str, Tensor]:
        pipe, where, texts = self.pipeline, self.device, list(map(text_of, prompts))
        if set(wanted) == {"pooled"}:  # encode_prompt would read T5 again, by far the larger
            return {"pooled": pipe._get_clip_prompt_embeds(texts, num_images_per_prompt=1, device=where)}
        text, pooled, _ = pipe.encode_prompt(
            prompt=texts, prompt_2=None, device=where, num_images_per_prompt=1, max_sequence_length=self.longest)
        weights = chunks.token_weights(prompts, pipe.tokenizer_2, text.shape[1])
        if any(weight != 1.0 for row in weights for weight in row):
            empty = pipe._get_t5_prompt_embeds([""], num_images_per_prompt=1, max_sequence_length=self.longest, device=where)
            text = chunks.weighted(text, empty[0], text.new_tensor(weights))
        return {name: value for name, value in {"text": text, "pooled": pooled}.items() if name in wanted}

    def chunks(self, prompt: Text) -> int:
        return 1  # T5 reads it whole, and of CLIP the pooled value alone is read

    def truncated(self, prompt: Text) -> str:
        tokenizer, room = self.pipeline.tokenizer_2, self.longest - 1
        ids = tokenizer(text_of(prompt), add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[room:]) if len(ids) > room else ""

    def offsets(self, prompt: Text) -> list[tuple[int, int]]:
        encoded = self.pipeline.tokenizer_2(text_of(prompt), return_offsets_mapping=True, truncation=True, max_length=self.longest)
        return [tuple(pair) for pair in encoded.offset_mapping]

    def start(
        self, request: Request, scheduler: Any, generators: Sequence[Generator]
    ) -> tuple[Float[Tensor, "B C H W"], Num[Tensor, "T"]]:
        width, height = self.size(request)
        factor = self.pipeline.vae_scale_factor
        shape = (len(generators), self.denoiser.config.in_channels // 4, height // factor, width // factor)
        return self.noise(shape, generators), self.schedule(request, scheduler)

    @property
    def unit(self) -> int:
        return self.pixels_per_token

    def schedule(self, request: Request, scheduler: Any) -> Num[Tensor, "T"]:
        width, height = self.size(request)
        sigmas = np.linspace(1.0, 1 / request.length, request.length)
        scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=shift(scheduler.config, height // self.unit * (width // self.unit)))
        scheduler.set_begin_index(0)
        return scheduler.timesteps

    def denoise(
        self, latents: Float[Tensor, "B C H W"], t: Num[Tensor, ""] | Num[Tensor, "B"], cond: Conditioning
    ) -> Float[Tensor, "R B C H W"]:
        rows, count = cond.rows, latents.shape[0]

        def flat(value: Tensor) -> Tensor:
            return value.expand(rows, count, *value.shape[2:]).flatten(0, 1)

        text = flat(cond.values["text"]).to(latents.dtype)
        time = t.to(latents.dtype).expand(count).repeat(rows) / 1000
        guidance = None
        if self.distilled:
            guidance = flat(cond.values["guidance"]).float() if "guidance" in cond.values else torch.ones_like(time)
        out = self.denoiser(
            hidden_states=packed(latents).repeat(rows, 1, 1), timestep=time, guidance=guidance, encoder_hidden_states=text,
            pooled_projections=flat(cond.values["pooled"]).to(latents.dtype), txt_ids=latents.new_zeros(text.shape[1], 3),
            img_ids=places(latents), return_dict=False)[0]
        return unpacked(out, latents.shape[-2:]).unflatten(0, (rows, count))

    def tokens(self, latents: Float[Tensor, "rows C H W"]) -> Float[Tensor, "rows N c"]:
        return packed(latents)

    def read_alone(
        self, tokens: Float[Tensor, "rows N c"], ids: Float[Tensor, "N 3"], t: Num[Tensor, ""] | Num[Tensor, "rows"], cond: Conditioning
    ) -> Float[Tensor, "_ N c"]:
        pooled = cond.values["pooled"].flatten(0, 1).to(tokens.dtype)
        rows = max(tokens.shape[0], pooled.shape[0])
        time = t.to(tokens.dtype).expand(rows) / 1000
        guidance = None
        if self.distilled:
            each = cond.values.get("guidance")
            guidance = torch.ones_like(time) if each is None else each.expand(*cond.values["pooled"].shape[:2]).flatten().float()
        return self.denoiser(
            hidden_states=tokens.expand(rows, -1, -1), timestep=time, guidance=guidance,
            encoder_hidden_states=tokens.new_zeros(rows, 0, self.denoiser.config.joint_attention_dim),
            pooled_projections=pooled.expand(rows, -1), txt_ids=ids.new_zeros(0, 3), img_ids=ids, return_dict=False)[0]

    def axis(self, layer: str) -> Axis:
        if _NONE.search(layer):
            return Axis("none")
        if _TEXT.search(layer):
            return Axis("text")
        return Axis("both" if layer.startswith("single_transformer_blocks") else "grid", 1)

    def prompt_attention(self) -> Mapping[str, int]:
        double, single = len(self.denoiser.transformer_blocks), len(self.denoiser.single_transformer_blocks)
        names = [*(f"transformer_blocks.{i}.attn" for i in range(double)), *(f"single_transformer_blocks.{i}.attn" for i in range(single))]
        return dict.fromkeys(names, 1)

    def localizing_layers(self) -> tuple[str, ...]:
        double = len(self.denoiser.transformer_blocks)
        return tuple(list(self.prompt_attention())[int(LOCALIZING * double) : double])

    def block(self, layer: str) -> str:
        match = re.match(r"(single_)?transformer_blocks\.(\d+)", layer)
        return f"{'single' if match[1] else 'double'}.{match[2]}" if match else ""


def shift(config: Mapping[str, Any], tokens: int) -> float:
    """mu of a scheduler with dynamic shifting: a line through (base_image_seq_len, base_shift), (max_image_seq_len, max_shift)."""
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return tokens * slope + (low - slope * few)


def packed(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N c"]:
    """Each square of 2 x 2 latent places as one token of 4 C numbers, in rows of the picture."""
    rows, channels, high, wide = latents.shape
    squares = latents.view(rows, channels, high // 2, 2, wide // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(rows, high // 2 * (wide // 2), 4 * channels)


def unpacked(tokens: Float[Tensor, "B N c"], size: Sequence[int]) -> Float[Tensor, "B C H W"]:
    """The inverse of `packed` for latents of this (H, W)."""
    rows, _, numbers = tokens.shape
    squares = tokens.view(rows, size[0] // 2, size[1] // 2, numbers // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(rows, numbers // 4, size[0], size[1])


def places(latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "N 3"]:
    """Where each token stands: (0, row, column), for the rotary embedding."""
    high, wide = latents.shape[-2] // 2, latents.shape[-1] // 2
    ids = latents.new_zeros(high, wide, 3)
    ids[..., 1] += torch.arange(high, device=latents.device)[:, None]
    ids[..., 2] += torch.arange(wide, device=latents.device)
    return ids.flatten(0, 1)
