"""Stable Diffusion 3 and 3.5 on the stock StableDiffusion3Pipeline: three text encoders, joint attention of picture and text."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Generator, Tensor

from composition.backbones import chunks, vae
from composition.backbones.base import Axis, Defaults, Joint
from composition.backbones.flux import LOCALIZING, shift
from composition.backbones.pipeline import PipelineBackbone
from composition.loop import Conditioning
from composition.prompt_weights import Text, text_of
from composition.refusal import Refused
from composition.request import Request

LONGEST = 256  # T5 tokens, as the stock pipeline gives them

_NONE = re.compile(r"time_text_embed|(?<!\w)norm\w*\.linear$|norm_out")
_TEXT = re.compile(r"context_embedder|ff_context|\.attn\.(?:add_\w_proj|to_add_out)$")


class SD3Backbone(PipelineBackbone):
    """A StableDiffusion3Pipeline, reached through encode_prompt, transformer and vae alone; T5 may be left out."""

    family = "sd3"
    joint: Joint = "image"
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    reads: Mapping[str, tuple[str, ...]] = {
        "text": ("text_encoder", "text_encoder_2", "text_encoder_3"), "pooled": ("text_encoder", "text_encoder_2")}

    @property
    def defaults(self) -> Defaults:
        return Defaults(28, 4.5 if self.denoiser.config.qk_norm else 7.0)  # 3.5, 3

    def scale(self, request: Request) -> float:
        return request.guidance or 1.0

    def embedded_guidance(self, request: Request) -> float | None:
        return None

    def size(self, request: Request) -> tuple[int, int]:
        config, factor = self.denoiser.config, self.pipeline.vae_scale_factor
        size = request.size or (config.sample_size * factor,) * 2
        if wrong := vae.fitting(size, self.unit):
            raise Refused(wrong)
        most = (config.pos_embed_max_size or max(size)) * self.unit
        if max(size) > most:
            raise Refused(f"size {size[0]}x{size[1]}: this model makes at most {most} pixels a side")
        return size

    def encode(
        self, prompts: Sequence[Text], negatives: Sequence[Text] | None, wanted: Collection[str] = ("text", "pooled"), least: int = 1,
        vectors: chunks.Vectors | None = None,
    ) -> Conditioning:
        guided = negatives is not None
        if not chunks.simple([*prompts, *(negatives or ())], self.pipeline.tokenizer, least):
            return self._encode_parts(prompts, negatives, wanted, least)
        text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            prompt=list(map(text_of, prompts)), prompt_2=None, prompt_3=None, device=self.device, num_images_per_prompt=1,
            do_classifier_free_guidance=guided, negative_prompt=list(map(text_of, negatives)) if negatives is not None else None,
            max_sequence_length=LONGEST)
        pairs = {"text": (negative, text), "pooled": (negative_pooled, pooled)}
        return Conditioning({name: torch.stack(pairs[name] if guided else pairs[name][1:]) for name in wanted})

    def _encode_parts(
        self, prompts: Sequence[Text], negatives: Sequence[Text] | None, wanted: Collection[str], least: int
    ) -> Conditioning:
        """The same of prompts that the CLIP encoders read in chunks, both in step; T5 reads each whole, with its weights."""
        pipe, every = self.pipeline, [*(negatives or ()), *prompts]

        def read(parts: list[chunks.Chunk]) -> dict[str, Tensor]:
            texts = [part.text for part in parts]
            both = [pipe._get_clip_prompt_embeds(texts, device=self.device, clip_model_index=index) for index in (0, 1)]
            return {"text": torch.cat([text for text, _ in both], -1), "pooled": torch.cat([pooled for _, pooled in both], -1)}

        values = chunks.encoded(every, pipe.tokenizer, least, read)
        t5 = pipe._get_t5_prompt_embeds([*map(text_of, every), ""], device=self.device, max_sequence_length=LONGEST)
        if pipe.text_encoder_3 is not None:
            t5 = chunks.weighted(t5, t5[-1], t5.new_tensor(chunks.token_weights([*every, ""], pipe.tokenizer_3, LONGEST)))
        wide = torch.nn.functional.pad(values["text"], (0, t5.shape[-1] - values["text"].shape[-1]))
        values["text"] = torch.cat([wide, t5[:-1].to(wide)], 1)
        return Conditioning({name: values[name].unflatten(0, (-1, len(prompts))) for name in wanted})

    def chunks(self, prompt: Text) -> int:
        return len(chunks.chunks(prompt, self.pipeline.tokenizer)[0])

    def truncated(self, prompt: Text) -> str:
        pipe = self.pipeline
        if not isinstance(prompt, str):
            return chunks.chunks(prompt, pipe.tokenizer)[1]
        whole = pipe.text_encoder_3 is not None
        tokenizer, room = (pipe.tokenizer_3, LONGEST - 1) if whole else (pipe.tokenizer, pipe.tokenizer.model_max_length - 2)
        ids = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return tokenizer.decode(ids[room:]) if len(ids) > room else ""

    def offsets(self, prompt: Text) -> list[tuple[int, int]]:
        pipe = self.pipeline
        first, second = (chunks.offsets(prompt, tokenizer) for tokenizer in (pipe.tokenizer, pipe.tokenizer_2))
        if first != second:
            raise Refused("the CLIP tokenizers of this model split the prompt differently, so the places of its words are not known")
        length = pipe.tokenizer_max_length
        short = first + [(0, 0)] * (-len(first) % length)
        return short + (_offsets(pipe.tokenizer_3, text_of(prompt), LONGEST) if pipe.text_encoder_3 is not None else [])

    def start(
        self, request: Request, scheduler: Any, generators: Sequence[Generator]
    ) -> tuple[Float[Tensor, "B C H W"], Num[Tensor, "T"]]:
        width, height = self.size(request)
        factor = self.pipeline.vae_scale_factor
        noise = self.noise((len(generators), self.denoiser.config.in_channels, height // factor, width // factor), generators)
        return noise, self.schedule(request, scheduler)

    @property
    def unit(self) -> int:
        return self.denoiser.config.patch_size * self.pipeline.vae_scale_factor

    def schedule(self, request: Request, scheduler: Any) -> Num[Tensor, "T"]:
        width, height = self.size(request)
        shifted = {}
        if scheduler.config.get("use_dynamic_shifting"):
            shifted["mu"] = shift(scheduler.config, height // self.unit * (width // self.unit))
        scheduler.set_timesteps(request.steps, device=self.device, **shifted)
        return scheduler.timesteps

    def denoise(
        self, latents: Float[Tensor, "B C H W"], t: Num[Tensor, ""] | Num[Tensor, "B"], cond: Conditioning
    ) -> Float[Tensor, "R B C H W"]:
        rows, count = cond.rows, latents.shape[0]

        def flat(value: Tensor) -> Tensor:
            return value.expand(rows, count, *value.shape[2:]).flatten(0, 1).to(latents.dtype)

        out = self.denoiser(
            hidden_states=latents.repeat(rows, 1, 1, 1), timestep=t.expand(count).repeat(rows),
            encoder_hidden_states=flat(cond.values["text"]), pooled_projections=flat(cond.values["pooled"]), return_dict=False)[0]
        return out.unflatten(0, (rows, count))

    def axis(self, layer: str) -> Axis:
        if _NONE.search(layer):
            return Axis("none")
        return Axis("text") if _TEXT.search(layer) else Axis("grid", 1)

    def prompt_attention(self) -> Mapping[str, int]:
        return {f"transformer_blocks.{i}.attn": 1 for i in range(len(self.denoiser.transformer_blocks))}

    def localizing_layers(self) -> tuple[str, ...]:
        names = list(self.prompt_attention())[:-1] or list(self.prompt_attention())  # the last block no longer writes to the text
        return tuple(names[int(LOCALIZING * len(names)) :])

    def block(self, layer: str) -> str:
        match = re.match(r"transformer_blocks\.(\d+)", layer)
        return f"joint.{match[1]}" if match else ""


def _offsets(tokenizer: Any, prompt: str, longest: int) -> list[tuple[int, int]]:
    encoded = tokenizer(prompt, return_offsets_mapping=True, truncation=True, max_length=longest)
    return [tuple(pair) for pair in encoded.offset_mapping]
