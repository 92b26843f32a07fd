"""The picture that a request starts from: brought to its size, made latents with noise on them, kept where its mask is black.

A run from a picture is shorter: only the last part of the sampler's steps runs. What a method sees (`Pass.shown`) has the steps that run as its
steps, counted from 0, so that start and end of LoRAs, turns and refreshes are of them. It lies around the methods, none of which knows of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Num
from PIL import Image, ImageFilter, ImageOps
from torch import Generator, Tensor

from composition import pictures
from composition.backbones.base import Backbone
from composition.refusal import Refused
from composition.request import FITTED_NOTE, HIRES_NOTE, MAX_PIXELS, STARTED_NOTE, Picture, Request

FITS = {"crop": "what stands out was cut off", "contain": "its borders were drawn out", "stretch": "its shape was changed"}
BLACK = 8  # a mask's grey below this is black: JPEG leaves some around an edge


class Pass(NamedTuple):
    """One way through the loop. whole: the request as the sampler is set for it; shown: as a method sees it, its steps those that run.

    strength: of what it starts from, None from noise.
    """

    whole: Request
    shown: Request
    strength: float | None


class Begun(NamedTuple):
    """What the loop starts from. keep: as of `loop.sample`, None without a mask."""

    latents: Float[Tensor, "B *S"]
    times: Num[Tensor, "T"]
    keep: Callable[[Tensor, Tensor | None], Tensor] | None


# settled: everything of it in the request -----------------------------------------------------------------------------


def settled(request: Request, backbone: Backbone) -> tuple[Request, dict[str, Any]]:
    """The request with its picture and mask in it, at its size, and a note on how they were fitted. Raises Refused for what cannot be read."""
    source = request.picture
    if source is None:
        return (replace(request, size=backbone.size(request)) if request.hires else request), {}
    picture = pictures.start(source.image)
    size = backbone.size(replace(request, size=request.size or _own_size(request, picture.size, backbone)))
    mask = pictures.repainted(source.mask) if source.mask else None
    stretched = mask is not None and mask.size != picture.size
    if picture.size == size and source.image.startswith("data:") and (mask is None or mask.size == size and str(source.mask).startswith("data:")):
        return replace(request, size=size), {}
    note = {}
    if picture.size != size:
        note[FITTED_NOTE] = f"the picture was brought from {_by(picture.size)} to {_by(size)} pixels ({FITS[source.fit]})"
    elif stretched and mask is not None:
        note[FITTED_NOTE] = f"the mask was stretched from {_by(mask.size)} to {_by(size)} pixels"
    fitted = fit(picture, size, source.fit)
    white = None
    if mask is not None:
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR) if stretched else mask
        white = pictures.mask_text(fit(mask, size, source.fit, border=255), source.mask or "")
    return replace(request, size=size, picture=replace(source, image=pictures.lossless(fitted, pictures.origin(source.image)), mask=white)), note


def _own_size(request: Request, picture: tuple[int, int], backbone: Backbone) -> tuple[int, int]:
    """The picture's own size where the model takes it, else its shape at about the pixels of the model's own size."""
    wide, high = backbone.size(replace(request, size=None, picture=None, hires=None))
    unit, pixels = backbone.unit, wide * high
    if not (picture[0] % unit or picture[1] % unit) and pixels / 2 <= picture[0] * picture[1] <= 2 * pixels:
        return picture
    scale = sqrt(pixels / (picture[0] * picture[1]))
    return max(unit, round(picture[0] * scale / unit) * unit), max(unit, round(picture[1] * scale / unit) * unit)


def fit(picture: Image.Image, size: tuple[int, int], how: str, border: int | None = None) -> Image.Image:
    """The picture at this (width, height). border: what a "contain"ed mask has around it, None: of a picture, its own last pixels."""
    if picture.size == size:
        return picture
    kind = Image.Resampling.LANCZOS if border is None else Image.Resampling.BILINEAR  # which does not ring beside a mask's edge
    if how == "crop":
        return ImageOps.fit(picture, size, kind)
    if how == "stretch":
        return picture.resize(size, kind)
    inner = ImageOps.contain(picture, size, kind)
    left, top = (size[0] - inner.width) // 2, (size[1] - inner.height) // 2
    sides = ((top, size[1] - inner.height - top), (left, size[0] - inner.width - left))
    values = np.asarray(inner)
    sides += ((0, 0),) * (values.ndim - 2)
    return Image.fromarray(np.pad(values, sides, "edge") if border is None else np.pad(values, sides, constant_values=border))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# the passes of a request ---------------------------------------------------------------------------------------------


def passes(request: Request, backbone: Backbone) -> tuple[Pass, ...]:
    """Of a settled request: the picture, and its hires pass where it has part. Raises Refused for a size that the model cannot make."""
    first = _pass(request, request.picture.strength if request.picture else None, backbone)
    if request.hires is None:
        return (first,)
    factor, unit = request.hires.factor, backbone.unit
    width, height = (max(unit, round(side * factor / unit) * unit) for side in backbone.size(request))
    if width * height > MAX_PIXELS:
        raise Refused(f"hires {factor:g}: its pass would have {width}x{height} pixels, over {MAX_PIXELS:,}: use a smaller factor or size")
    larger = replace(request, size=(width, height), steps=request.hires.steps or request.steps)
    backbone.size(larger)
    return first, _pass(larger, request.hires.strength, backbone)


def _pass(request: Request, strength: float | None, backbone: Backbone) -> Pass:
    run = request.length if strength is None else request.length - backbone.first(request.length, strength)
    return Pass(request, replace(request, steps=run), strength)


def noted(request: Request, parts: Sequence[Pass]) -> dict[str, Any]:
    """What a picture started from, for its notes."""
    notes: dict[str, Any] = {}
    if source := request.picture:
        notes[STARTED_NOTE] = {"file": pictures.origin(source.image), "strength": source.strength, "steps": parts[0].shown.length,
                          "of": parts[0].whole.length}
        if source.mask:
            kept = 1 - np.asarray(_white(pictures.repainted(source.mask))).astype(bool).mean()
            notes[STARTED_NOTE]["kept"] = round(float(kept), 3)
    if request.hires:
        size = parts[1].whole.size or (0, 0)
        notes[HIRES_NOTE] = {"size": _by(size), "strength": request.hires.strength, "steps": parts[1].shown.length, "of": parts[1].whole.length}
    return notes


# the loop's start, and what is kept ------------------------------------------------------------------------------------


def begin(
    backbone: Backbone, part: Pass, scheduler: Any, generators: Sequence[Generator], start: Sequence[Image.Image] | Float[Tensor, "B *S"],
    mask: Image.Image | None,
) -> Begun:
    """A pass from pictures, or from latents already enlarged, as the stock pipelines begin it: the latents are drawn first, then the noise,
    each picture's by its own generator. mask: white where they are made anew; at strength 1 that begins as noise alone."""
    strength = 1.0 if part.strength is None else part.strength
    clean = start if isinstance(start, Tensor) else backbone.encode_pixels(pixels(start), generators)
    noise = backbone.noise(tuple(clean.shape), generators)
    skipped = backbone.first(part.whole.length, strength) * getattr(scheduler, "order", 1)
    times = backbone.schedule(part.whole, scheduler)[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    latents = noised(scheduler, clean, noise, times[0])
    if mask is None:
        return Begun(latents, times, None)
    free = _free(mask, (clean.shape[-2], clean.shape[-1])).to(clean.device)
    if strength == 1.0:
        latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)

    def keep(latents: Tensor, t: Tensor | None) -> Tensor:
        return torch.where(free, latents, clean if t is None else noised(scheduler, clean, noise, t))

    return Begun(latents, times, keep)


def noised(scheduler: Any, clean: Float[Tensor, "B *S"], noise: Float[Tensor, "B *S"], t: Num[Tensor, ""]) -> Float[Tensor, "B *S"]:
    """Latents with noise of this time: of the scheduler's present step, where it counts them."""
    times = t.reshape(1).repeat(clean.shape[0])
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, times, noise).to(clean.dtype)
    return scheduler.add_noise(clean, noise, times).to(clean.dtype)


def pixels(images: Sequence[Image.Image]) -> Float[Tensor, "B 3 height width"]:
    """Pictures as numbers from -1 to 1, as the autoencoder reads them."""
    values = np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])
    return torch.from_numpy(values / 255.0).permute(0, 3, 1, 2) * 2.0 - 1.0


def _white(mask: Image.Image) -> Image.Image:
    return mask.point([0 if value < BLACK else value for value in range(256)])


def _free(mask: Image.Image, grid: tuple[int, int]) -> Bool[Tensor, "1 1 h w"]:
    """The places of the latents in which any pixel is made anew."""
    values = torch.from_numpy(np.array(_white(mask), np.float32))[None, None]
    return F.adaptive_max_pool2d(values, grid) > 0


def composed(new: Image.Image, old: Image.Image, mask: Image.Image, soft: int) -> Image.Image:
    """The new picture where the mask is white, the given one, to the bit, where it is black, blended over `soft` pixels inside the white."""
    share = np.asarray(_inner(_white(mask), soft))[..., None]
    kept, fresh = np.asarray(old.convert("RGB"), np.float64), np.asarray(new.convert("RGB"), np.float64)
    return Image.fromarray((kept + (fresh - kept) * share).round().clip(0, 255).astype(np.uint8))


def _inner(mask: Image.Image, soft: int) -> Float[np.ndarray, "height width"]:
    """How much of the new picture shows, 0 to 1: the mean of the mask and the mask made smaller by a pixel, by two, ... by `soft`."""
    total, shrunk = np.asarray(mask, np.float64), mask
    for _ in range(soft):
        shrunk = shrunk.filter(ImageFilter.MinFilter(3))
        total = total + np.asarray(shrunk, np.float64)
    return total / (255.0 * (soft + 1))


def enlarged(images: Sequence[Image.Image], latents: Float[Tensor, "B *S"], request: Request, size: tuple[int, int]) -> list[Image.Image] | Tensor:
    """What the hires pass starts from: the finished pictures, or their latents, at this (width, height)."""
    if request.hires is not None and request.hires.space == "latent":
        ratio = size[1] / images[0].height, size[0] / images[0].width
        grid = tuple(round(side * scale) for side, scale in zip(latents.shape[-2:], ratio, strict=True))
        wide = torch.promote_types(latents.dtype, torch.float32)
        return F.interpolate(latents.to(wide), grid, mode="bicubic", antialias=True).to(latents.dtype)
    return [image.resize(size, Image.Resampling.LANCZOS) for image in images]


def repaint(picture: Picture | None, size: tuple[int, int]) -> Image.Image | None:
    """The settled picture's mask at this (width, height), None without part."""
    if picture is None or picture.mask is None:
        return None
    mask = pictures.repainted(picture.mask)
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)
