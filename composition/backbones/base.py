"""What every model family answers: encode, start, denoise, decode, and where each layer's rows lie."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Num
from PIL import Image
from torch import Generator, Tensor, nn

from composition.backbones.chunks import Vectors
from composition.backbones.loading.placement import Placement
from composition.loop import Conditioning
from composition.prompt_weights import Text
from composition.request import Request


class Axis(NamedTuple):
    """What a layer's tokens are: picture positions ("grid", at 1/2**level of the latent), prompt tokens ("text"),
    both in one sequence ("both"), or nothing with a place ("none": time and size embeddings)."""

    kind: Literal["grid", "text", "both", "none"]
    level: int = 0


# Where a prompt is read: "" in cross-attention of its own; else in one attention with the picture, and which of both comes first.
Joint = Literal["", "text", "image"]


class Defaults(NamedTuple):
    """What a request gets that does not say: steps, and guidance (a request's own field of that name)."""

    steps: int
    guidance: float


@runtime_checkable
class Backbone(Protocol):
    """One model family. Shapes as in composition.loop; *S is (C, H, W): latents are pictures in every family.
    """

    family: str
    joint: Joint
    pipeline: Any
    denoiser: nn.Module
    scheduler: Any
    placement: Placement | None
    vae_sha256: str  # of the weights of an autoencoder in place of the model's own, "" for its own

    @property
    def writable(self) -> bool:
        """True when the weights may be written in place: they are whole tensors in one spot, not shards on the move."""
        ...

    @property
    def components(self) -> Mapping[str, nn.Module]:
        """The modules a LoRA may touch, by their names in diffusers: "unet", "text_encoder", ..."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes (its weights may rest elsewhere when offloaded)."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def size(self, request: Request) -> tuple[int, int]:
        """(width, height) in pixels. Raises Refused for a size this model cannot make."""
        ...

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """The values of a conditioning, and the text encoders each is made by."""
        ...

    @property
    def defaults(self) -> Defaults: ...

    def scale(self, request: Request) -> float:
        """The scale of classifier-free guidance over rows; at 1 or less there is no negative row."""
        ...

    def embedded_guidance(self, request: Request) -> float | None:
        """The guidance that a distilled model reads as a number, for the value "guidance" of a conditioning; None for others."""
        ...

    def encode(
        self, prompts: Sequence[Text], negatives: Sequence[Text] | None, wanted: Collection[str] = ..., least: int = 1,
        vectors: Vectors | None = None,
    ) -> Conditioning:
        """(R, B, ...) tensors: R = 2 with negatives, 1 without. wanted: which of `reads`, by default all. A str is encoded as the stock
        pipeline does. least: so many chunks at the least (`chunks`). vectors: of the prompts' textual inversions."""
        ...

    def chunks(self, prompt: Text) -> int:
        """How many chunks of 75 tokens the prompt is read in: prompts lie beside each other when they have equally many."""
        ...

    def truncated(self, prompt: Text) -> str:
        """The end of the prompt that no text encoder sees, "" when all is seen."""
        ...

    def start(
        self, request: Request, scheduler: Any, generators: Sequence[Generator]
    ) -> tuple[Float[Tensor, "B *S"], Num[Tensor, "T"]]:
        """Initial noise, one generator per picture, and the scheduler's times."""
        ...

    @property
    def unit(self) -> int:
        """Width and height of a picture are multiples of so many pixels."""
        ...

    def schedule(self, request: Request, scheduler: Any) -> Num[Tensor, "T"]:
        """The scheduler's times for the request's steps and size, set."""
        ...

    def first(self, steps: int, strength: float) -> int:
        """The step, from 0, at which a picture of this strength enters, as in the family's stock pipeline; at least one step runs."""
        ...

    def encode_pixels(self, pixels: Float[Tensor, "B 3 height width"], generators: Sequence[Generator]) -> Float[Tensor, "B *S"]:
        """Pictures in -1..1 as latents, drawn from what the autoencoder says by each one's generator."""
        ...

    def noise(self, shape: tuple[int, ...], generators: Sequence[Generator]) -> Float[Tensor, "B *S"]:
        """Standard normal noise, a generator for each picture."""
        ...

    def denoise(
        self, latents: Float[Tensor, "B *S"], t: Num[Tensor, ""] | Num[Tensor, "B"], cond: Conditioning
    ) -> Float[Tensor, "R B *S"]:
        """One evaluation on all rows of `cond`; `latents` are already scaled for the scheduler.

        t: one time for all pictures, or a time for each.
        """
        ...

    def decode(self, latents: Float[Tensor, "B *S"]) -> list[Image.Image]: ...

    def axis(self, layer: str) -> Axis: ...

    def offsets(self, prompt: Text) -> list[tuple[int, int]]:
        """The letters of the prompt's text that each token the model sees stands for; (0, 0) for one that stands for none."""
        ...

    def prompt_attention(self) -> Mapping[str, int]:
        """The attention modules that read the prompt, in the order in which they run, and the level of the grid the picture has there."""
        ...

    def localizing_layers(self) -> tuple[str, ...]:
        """Those whose attention localizes words best: of the coarsest grid (16 x 16 at 512 pixels for Stable Diffusion 1.x), for
        SDXL the third to sixth of each in the first up block, for transformers the last quarter of those with a text of their own."""
        ...

    def block(self, layer: str) -> str:
        """The block of the denoiser a layer belongs to: "down.0", "mid", "up.2", "double.18", "single.0", "joint.3" or "" (for Lora.blocks)."""
        ...

    def release(self) -> None:
        """Let offloading hooks put every component back to rest."""
        ...


@runtime_checkable
class ReadsConditions(Protocol):
    """A backbone whose denoiser can read tokens beside the picture's (`hooks.banks`)."""

    @property
    def pixels_per_token(self) -> int:
        """The side of the square that one token stands for."""
        ...

    def tokens(self, latents: Float[Tensor, "rows C H W"]) -> Float[Tensor, "rows N c"]:
        """Latents as the tokens that the denoiser reads, row after row."""
        ...

    def read_alone(
        self, tokens: Float[Tensor, "rows N c"], ids: Float[Tensor, "N 3"], t: Num[Tensor, ""] | Num[Tensor, "rows"], cond: Conditioning
    ) -> Float[Tensor, "_ N c"]:
        """One evaluation of tokens by themselves, with ids and a time of their own and no prompt: what a condition's bank is filled by.

        tokens: of one row, or of R B. Of `cond` the pooled prompt and the guidance are read, which modulate every layer.
        """
        ...
