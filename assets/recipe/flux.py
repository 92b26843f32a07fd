"""The second base: a FLUX on the same world and latents. Rectified flow (arXiv 2209.03003), a small T5 and CLIP's pooled text.

The denoiser answers the velocity ``noise - latents`` at ``(1 - s) latents + s noise``; s is drawn logit-normally (Esser et
al. 2024). T5's text is padded to another length in every batch, since the stock pipeline lets the padding be attended to.

The first base is its teacher: what one picture's own noise and latents say of the velocity is mostly chance, and the
teacher's answer to the same noisy latents is the mean of it, so far fewer pictures tell the same. T5 begins with the states
that the teacher's text encoder has for each piece of a word.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from composition.hooks.kernels import attention_for

from . import base, unigram
from . import tokenizer as clip_words
from .base import build_text, drop_captions, latents_pool
from .drawing import Stock
from .loop import Loop, Minutes

SHORT = 20  # T5 tokens that every caption of this world fits in
PADDED = ((20, 0.5), (28, 0.2), (40, 0.14), (64, 0.12), (128, 0.03), (512, 0.01))  # padded lengths and their share of batches
FEWER = {128: 2, 512: 8}  # at these lengths, one picture of so many
UNSEEN = 7 * 10**8  # number of the first scene that only shift and scale of the latents are taken from
HEAD = 32  # width of an attention head, and of its three rotary parts together
ROPE = (8, 12, 12)
SEEN = 10  # times that a scene is used: the teacher's answer is another for every noise
CENTRE, WIDTH = 0.4, 1.2  # logit of s trained on: normal; the stock schedule at this size looks more at much noise, too


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's own: Euler over sigmas that are shifted by the number of image tokens."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, base_image_seq_len=64, max_image_seq_len=1024,
                                           base_shift=0.5, max_shift=1.15)  # fmt: skip


class Text(nn.Module):
    """Both encoders of FLUX, and their tokens: CLIP's (B, 32) beside T5's (B, SHORT) in one tensor."""

    def __init__(self, clip: CLIPTextModel, t5: T5EncoderModel):
        super().__init__()
        self.clip, self.t5 = clip, t5

    def forward(self, tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """T5's states (B, length, D) and CLIP's pooled (B, D)."""
        short, long = tokens[:, : clip_words.LENGTH], tokens[:, clip_words.LENGTH :]
        return self.t5(F.pad(long, (0, length - long.shape[1]))).last_hidden_state, self.clip(short).pooler_output


class Flow(nn.Module):
    """What is trained: text encoders and transformer as one."""

    def __init__(self, transformer: FluxTransformer2DModel, text: Text):
        super().__init__()
        self.transformer, self.text = transformer, text


def build_t5(tokenizer: T5Tokenizer, width: int = 192, layers: int = 2) -> T5EncoderModel:
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=layers, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    ))  # fmt: skip


def build_transformer(channels: int, text: int, pooled: int, *, width: int = 256, double: int = 2, single: int = 6) -> FluxTransformer2DModel:
    """Every block begins as the identity: its modulation starts at nothing, so its gates are zero."""
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4 * channels, num_layers=double, num_single_layers=single, attention_head_dim=HEAD,
        num_attention_heads=width // HEAD, joint_attention_dim=text, pooled_projection_dim=pooled, guidance_embeds=False,
        axes_dims_rope=ROPE,
    )  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name == "proj_out" or name.endswith((".norm.linear", "norm1.linear", "norm1_context.linear"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def build(vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5Tokenizer, **shape: int) -> Flow:
    """Untrained."""
    text = Text(build_text(clip), build_t5(t5))
    width = text.t5.config.d_model
    return Flow(build_transformer(vae.config.latent_channels, width, text.clip.config.hidden_size, **shape), text)


def hidden(name: str) -> bool:
    """Weights for Muon: all matrices but embeddings, the first and last layers, relative positions and the modulation."""
    return not any(part in name for part in ("embed", "shared", "transformer.proj_out", "relative", ".linear."))


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) to (B, h w / 4, 4 C), as the stock pipeline packs."""
    b, c, h, w = latents.shape
    return FluxPipeline._pack_latents(latents, b, c, h, w)


def places(side: int, device: torch.device) -> torch.Tensor:
    """(N, 3) ids of the packed positions of square latents."""
    return FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, device, torch.float32)


def settle(vae: AutoencoderKL, latents: torch.Tensor) -> None:
    """Write shift and scale, after which latents have mean 0 and deviation 1, into the autoencoder's config."""
    shift = round(float(latents.float().mean()), 4)
    vae.register_to_config(shift_factor=shift, scaling_factor=round(1 / float(latents.float().std()), 4))


def lengths(rng: random.Random) -> Iterator[int]:
    """The padded length of each batch's text."""
    while True:
        yield rng.choices([n for n, _ in PADDED], [share for _, share in PADDED])[0]


class Teacher:
    """The first base, frozen: its estimate of the velocity at the second base's noisy latents."""

    def __init__(self, folder: Path, vae: AutoencoderKL, device: torch.device, compiled: int = 0):
        """compiled: the batch size whose computation is compiled, 0 for none; other sizes are rare."""
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.bfloat16).to(device, memory_format=torch.channels_last)
        self.text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device)
        self.shift, self.scale = vae.config.shift_factor, vae.config.scaling_factor
        self.kept = base.scheduler().alphas_cumprod.to(device)
        self.sigma = ((1 - self.kept) / self.kept) ** 0.5  # of the latents as the autoencoder makes them, rising with the step
        for part in (self.unet, self.text):
            part.requires_grad_(False).eval()
        self.predict, self.usual = base.predict, compiled
        self.quick = torch.compile(base.predict, dynamic=False)

    def levels(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Steps of the teacher (B,) int64 and the s (B,) in 0..1 that has the same share of noise."""
        wanted = (torch.randn(count, device=self.sigma.device) * WIDTH + CENTRE).exp() / self.scale
        steps = torch.searchsorted(self.sigma, wanted).clamp(max=len(self.sigma) - 1)
        noisy = self.sigma[steps] * self.scale
        return steps, noisy / (1 + noisy)

    @torch.no_grad()
    def velocity(self, latents: torch.Tensor, noise: torch.Tensor, steps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Its noise - latents (B, C, h, w), in the second base's units: shifted, scaled.

        latents: as the autoencoder makes them; noise: of unit variance, both (B, C, h, w); steps: (B,); tokens: CLIP's (B, 32).
        """
        a, b = self.kept[steps][:, None, None, None].sqrt(), (1 - self.kept[steps])[:, None, None, None].sqrt()
        mixed = a * latents + b * noise
        words = self.text(tokens).last_hidden_state.bfloat16()
        predict = self.quick if len(latents) == self.usual else self.predict
        v = predict(self.unet, mixed.bfloat16().contiguous(memory_format=torch.channels_last), steps, words).float()
        return a * v + b * mixed - (a * mixed - b * v - self.shift) * self.scale


def spell(t5: T5EncoderModel, words: T5Tokenizer, clip: CLIPTextModel, clip_tokenizer: CLIPTokenizer) -> None:
    """Write T5's embedding (pieces, D): for each piece the state (D,) that CLIP has at its last token, with a mean square of 1."""
    pieces = [piece.lstrip("▁") for piece in words.convert_ids_to_tokens(range(len(words)))]
    known = [number for number, piece in enumerate(pieces) if piece and number >= len(unigram.SPECIAL)]
    tokens = clip_words.ids(clip_tokenizer, [pieces[number] for number in known])
    last = (tokens != clip_tokenizer.eos_token_id).sum(1) - 1
    with torch.no_grad():
        states = clip(tokens).last_hidden_state[torch.arange(len(known)), last].float()
        t5.shared.weight[known] = states / states.pow(2).mean(1, keepdim=True).sqrt()


def velocity(model: FluxTransformer2DModel, noisy, s, states, pooled, image_ids) -> torch.Tensor:
    ids = torch.zeros(states.shape[1], 3, device=noisy.device)
    return model(noisy, states, pooled, s, image_ids, ids, return_dict=False)[0]


class Settings(NamedTuple):
    """How a training step is computed. size: pictures of a batch; half: bfloat16 in the transformer, and in the text encoders with
    half_text; compiled: the transformer's blocks and the teacher; blas: the library of matrix products on a GPU."""

    size: int = 64
    half: bool = True
    half_text: bool = True
    compiled: bool = True
    blas: str = ""


USUAL = Settings()


def pupil(teacher: Teacher, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5Tokenizer, **shape: int) -> Flow:
    """Untrained but for the text encoders: CLIP's weights are the teacher's, T5's embedding comes from CLIP's states."""
    model = build(vae, clip, t5, **shape)
    model.text.clip.load_state_dict(teacher.text.state_dict())
    spell(model.text.t5, t5, model.text.clip, clip)
    return model


def load(model: Flow, folder: Path) -> None:
    """Write the weights of an exported model into one of the same shape and vocabulary."""
    held = {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    parts = {"transformer": model.transformer, "text_encoder": model.text.clip, "text_encoder_2": model.text.t5}
    for name, kind in held.items():
        parts[name].load_state_dict(kind.from_pretrained(folder / name, dtype=torch.float32).state_dict())


def reader(clip: CLIPTokenizer, t5: T5Tokenizer) -> Callable[[list[str]], torch.Tensor]:
    """Captions to the tokens (B, LENGTH + SHORT) that Text reads."""
    return lambda captions: torch.cat([clip_words.ids(clip, captions), unigram.ids(t5, captions, SHORT)], 1)


def train(scenes: Stock, vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5Tokenizer, first: Path, work: Path, *, minutes: Minutes,
          device: torch.device, settings: Settings = USUAL, average: float = 0.998, limit: int = 98_304, begin: Path | None = None,
          peak: float = 1.5e-3, **shape: int) -> Flow:  # fmt: skip
    """Train or resume; the checkpoint is ``work/flux.pt``. Returns the averaged weights.

    scenes: pictures and `reader`'s tokens. vae: with shift and scale in its config (`settle`). first: the folder of the first base, the
    teacher, whose autoencoder and CLIP tokenizer these are. limit: scenes kept on the device. begin: a folder of this shape whose weights
    a new training begins with. peak: the highest learning rate.
    """
    vae = vae.to(device, memory_format=torch.channels_last).requires_grad_(False).eval()
    teacher = Teacher(first, vae, torch.device("cpu"))
    model = pupil(teacher, vae, clip, t5, **shape)
    if begin is not None:
        load(model, begin)
    model = model.to(device)
    teacher = Teacher(first, vae, device, settings.size if settings.compiled else 0)
    if settings.compiled and device.type != "cuda":
        model.transformer.compile_repeated_blocks(dynamic=False)
    loop = Loop(model, work / "flux.pt", minutes=minutes, peak=peak, cool=0.35, average=average, hidden=hidden)
    padded = lengths(random.Random(loop.step))
    image_ids = places(vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1), device)

    def loss_of(latents: torch.Tensor, tokens: torch.Tensor, length: int = 0) -> torch.Tensor:
        length = length or next(padded)
        part = -(-len(latents) // FEWER.get(length, 1))
        latents, tokens = latents[:part], tokens[:part]
        steps, s = teacher.levels(part)
        noise = torch.randn_like(latents)
        goal = teacher.velocity(latents, noise, steps, tokens[:, : clip_words.LENGTH])
        noisy = torch.lerp((latents - teacher.shift) * teacher.scale, noise, s[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.half and settings.half_text):
            states, pooled = model.text(tokens, length)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.half):
            guess = velocity(model.transformer, pack(noisy), s, states, pooled, image_ids)
        return F.mse_loss(guess.float(), pack(goal))

    with attention_for(device, positions=2 * len(image_ids), gradients=True), products(settings.blas):
        pool = latents_pool(scenes, vae, device, limit, SEEN)
        batches = drop_captions(pool.batches(settings.size), reader(clip, t5)([""]).to(device))
        if device.type == "cuda":  # what a card cannot do shows before anything is compiled, and every length is compiled ahead
            loss_of(*next(batches), length=SHORT).backward()
            if settings.compiled:
                model.transformer.compile_repeated_blocks(dynamic=False)
                for length, _ in PADDED:
                    loss_of(*next(batches), length=length).backward()
        loop.run(batches, loss_of)
    loop.averaged().__enter__()
    return model


@contextmanager
def products(blas: str) -> Iterator[None]:
    """Context: matrix products on a GPU by this library of NVIDIA's ("cublas", "cublaslt"), as torch chooses when none is named."""
    before = torch.backends.cuda.preferred_blas_library()
    try:
        if blas:
            torch.backends.cuda.preferred_blas_library(blas)
        yield
    finally:
        if blas:
            torch.backends.cuda.preferred_blas_library(before)


def trained(vae: AutoencoderKL, clip: CLIPTokenizer, t5: T5Tokenizer, work: Path, **shape: int) -> tuple[Flow, dict]:
    """The averaged weights of the checkpoint, while training goes on elsewhere, and its cost so far."""
    model = build(vae, clip, t5, **shape)
    held = torch.load(work / "flux.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for weight, value in zip([p for p in model.parameters() if p.requires_grad], held["smooth"], strict=True):
            weight.copy_(value)
    return model.eval(), {"pictures": held["seen"], "minutes": math.ceil(held["elapsed"] / 60)}
