"""What a picture is made from, and what comes back: Request, Lora, Condition, Picture, Hires, Receipt, Result.

One schema for the Python API, the CLI, the UI, manifests and the text inside a PNG. Everything is frozen and
validated once, when it is built; nothing below this file checks it again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator
from pydantic.dataclasses import dataclass

from composition import untrusted
from composition.refusal import Refused, explain
from composition.request_parts import MAX_IMAGE, Embedding, Hires, Picture, last_part
from composition.sampler_names import canonical

SCHEMA_VERSION = 2  # 1: brackets, BREAK and the end of a long prompt meant nothing (`prompt_syntax`)
MAX_PIXELS = 4096 * 4096
MAX_LORAS = 64
MAX_CONDITIONS = 16
MAX_EMBEDDINGS = 32
SAMPLER_NOTE = "sampler"  # in Result.notes: what the sampler amounted to, as A1111 calls it
DISTILLED_NOTE = "distilled guidance"  # there: the guidance that the model read as a number
ALWAYS_NOTE = "always on"  # there: the LoRAs that no method touched
EMBEDDINGS_NOTE = "embeddings"  # there: of each textual inversion, by its word, the sha256 of its file and the number of its vectors
UNNAMED_NOTE = "embeddings not named"  # there: the words of those that stand in neither prompt
VAE_NOTE = "vae"  # there: the sha256 of the weights of an autoencoder in place of the model's own
FITTED_NOTE = "fitted"  # there: how the picture that it starts from was brought to its size
STARTED_NOTE, HIRES_NOTE = "started from", "hires"  # there: which steps of them ran, and what of the picture was kept
_LATER = ("anchored", "windows", "named_only", "embeddings", "vae", "picture", "hires")  # fields of a request that its JSON leaves out where they are not set
SEEDS = 2**64  # what a torch.Generator takes, and other tools write
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=-10.0, le=10.0, allow_inf_nan=False)]
ConditionKind = Literal["", "spatial", "subject"]
Windows = Literal["", "both", "style"]
Category = Literal["", "character", "clothing", "style", "place", "object", "pose", "speed", "other"]
ALWAYS_ON: Category = "speed"  # of LoRAs that change how a model samples: no method switches, gates or bounds them

_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


def _unique(all_names: Iterable[str]) -> tuple[str, ...]:
    names: list[str] = []
    for name in all_names:
        same = sum(other == name or other.startswith(f"{name}#") for other in names)
        names.append(f"{name}#{same + 1}" if same else name)
    return tuple(names)


@dataclass(frozen=True, config=_config)
class Lora:
    """One LoRA of a request.

    source: a bundled name ("raccoon"), a path to a .safetensors file, or a name in one of the LoRA folders.
    weight: factor on alpha/rank in the denoiser; text_weight the same in the text encoders (None: as weight).
    blocks: factor per block of the denoiser, by prefix: {"down": 0.5, "mid": 1, "up.1": 0} of a UNet, {"double": 0.5,
    "single.30": 0} of FLUX, {"joint.3": 0} of SD 3; blocks not named keep 1.
    start, end: the part of the steps in which it is on, as fractions: on while start <= step/steps < end.
    binds: the words of the prompt it belongs to. region: box (x0, y0, x1, y1) in fractions of the picture, or the
    path of a mask image. Both are read by the regional methods; others say so in their notes.
    category, triggers: what kind of thing it is and the words it was trained on (empty: as its file says). "speed" is on in every step, row and
    place whatever the method does with the others; another category lets a method treat it as it treats them.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    weight: Weight = 1.0
    text_weight: Weight | None = None
    blocks: Mapping[str, Weight] = Field(default_factory=dict)
    start: Fraction = 0.0
    end: Fraction = 1.0
    binds: str | None = None
    region: tuple[Fraction, Fraction, Fraction, Fraction] | str | None = None
    category: Category = ""
    triggers: tuple[str, ...] = ()

    @field_validator("region", mode="before")
    @classmethod
    def _box(cls, region: Any) -> Any:
        numbers = isinstance(region, list | tuple) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in region)
        if region is None or isinstance(region, str) or numbers and len(region) == 4 and all(0 <= x <= 1 for x in region):
            return region
        raise ValueError(f"a box is [left, top, right, bottom] in fractions of the picture from 0 to 1, as [0, 0, 0.5, 1] for its left half "
                         f"(given {region!r:.200}); or write the path of a black and white image")

    @model_validator(mode="after")
    def _ordered(self) -> "Lora":
        if self.start >= self.end:
            raise ValueError(f"LoRA {self.source!r}: start {self.start} must lie before end {self.end}")
        if isinstance(self.region, tuple) and (self.region[0] >= self.region[2] or self.region[1] >= self.region[3]):
            raise ValueError(f"LoRA {self.source!r}: region {self.region} must be x0 < x1 and y0 < y1")
        return self

    @property
    def name(self) -> str:
        """The last part of the source without its ending: "loras/owl.safetensors" is "owl"."""
        return last_part(self.source)

    @property
    def scheduled(self) -> bool:
        """True when it is off in some of the steps."""
        return self.start > 0.0 or self.end < 1.0

    def scaled(self, factor: float) -> "Lora":
        """This LoRA at `factor` times its weights, which are rounded to six decimals, so that equal requests are written alike."""
        text = None if self.text_weight is None else round(self.text_weight * factor, 6)
        return self if factor == 1.0 else replace(self, weight=round(self.weight * factor, 6), text_weight=text)

    def weight_at(self, index: int, count: int) -> float:
        """Its weight at step `index` (from 0) of `count`: 0 outside start..end."""
        return self.weight if self.start <= index / count < self.end else 0.0


@dataclass(frozen=True, config=_config)
class Condition:
    """One picture that controls, with what reads it: a condition LoRA or a ControlNet.

    source: a bundled name ("canny"), a path, or a name in one of the LoRA folders; of a ControlNet its folder or file.
    image: the path of a picture, or the picture as a data URL. annotator: what makes the condition from it, a name in
    composition.annotators; "" when it is drawn for the condition already, None: as the file of the source says.
    kind: "spatial" (it lies over the picture) or "subject" (it shows what is to appear); "": as the file says.
    weight: factor on alpha/rank of a condition LoRA. strength: how much heed is paid to it; 0 removes it exactly, 1 is as trained.
    start, end: the part of the steps in which it is on, as fractions: on while start <= step/steps < end.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    image: Annotated[str, Field(min_length=1, max_length=MAX_IMAGE)]
    annotator: Annotated[str, Field(max_length=100)] | None = None
    kind: ConditionKind = ""
    weight: Weight = 1.0
    strength: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] = 1.0
    start: Fraction = 0.0
    end: Fraction = 1.0

    @field_validator("kind", mode="before")
    @classmethod
    def _earlier(cls, kind: Any) -> Any:
        """Records of earlier versions name what is seen."""
        return "spatial" if kind in ("edges", "depth", "pose") else kind

    @model_validator(mode="after")
    def _ordered(self) -> "Condition":
        if self.start >= self.end:
            raise ValueError(f"condition {self.name!r}: start {self.start} must lie before end {self.end}")
        return self

    @property
    def name(self) -> str:
        """The last part of the source without its ending: "conditions/canny.safetensors" is "canny"."""
        return last_part(self.source)

    def on(self, index: int, count: int) -> bool:
        """Whether it acts at step `index` (from 0) of `count`."""
        return self.strength > 0.0 and self.start <= index / count < self.end


@dataclass(frozen=True, config=_config)
class Request:
    """All that is needed to make a picture again.

    prompt is used verbatim: a trigger word that is missing becomes a note, never an insertion. (word:1.2), (word), [word] and BREAK in it and in
    negative are read as A1111 does, and \\( is a bracket (docs/prompts.md).
    size is (width, height) in pixels, None for the model's own. count pictures are made, with seeds seed, seed+1, ...;
    each has a generator of its own. batched: ask all LoRAs in one batch of rows (more memory, faster) or one by
    one; on a processor, pictures of 512 pixels and more are evaluated one by one all the same, which is faster there.
    steps and guidance None are the model's usual ones; a result has the numbers. guidance 1 or less switches guidance
    off. Of a model that guidance was distilled into (FLUX.1-dev) it is the number that the model reads, and true_guidance
    over 1 adds guidance against the negative prompt. sampler "default" is the one the model was saved with; a title as A1111 writes it
    ("Euler a") is taken for our name of it.
    anchored: the negative row of guidance is the base's own prediction, without any LoRA; without guidance there is none. windows: LoRAs that
    are on in all steps get a part of them by their category: content early and style late ("both"), or style late alone ("style";
    `composition.windows`). named_only: LoRAs of whose trigger words the prompt says none are off (`composition.named`). embeddings: textual
    inversions. vae: the autoencoder that the engine was opened with in place of the model's own.
    picture: what it starts from; without a size the picture's own shape, at about as many pixels as the model's own size has. hires: a second
    pass at a larger size. Where a part of the steps runs, start and end of LoRAs and conditions, and whatever else is said of steps, mean
    the steps that run.
    """

    prompt: Annotated[str, Field(max_length=20_000)]
    negative: Annotated[str, Field(max_length=20_000)] = ""
    loras: Annotated[Sequence[Lora], Field(max_length=MAX_LORAS), AfterValidator(tuple)] = ()
    conditions: Annotated[Sequence[Condition], Field(max_length=MAX_CONDITIONS), AfterValidator(tuple)] = ()
    model: Annotated[str, Field(min_length=1)] = "pocket"
    method: str = "merge"
    options: Mapping[str, Any] = Field(default_factory=dict)
    sampler: str = "default"
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    guidance: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] | None = None
    true_guidance: Annotated[float, Field(ge=1.0, le=100.0, allow_inf_nan=False)] = 1.0
    size: tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] = 0
    count: Annotated[int, Field(ge=1, le=1024)] = 1
    batched: bool = True
    allow_partial: bool = False
    anchored: bool = False
    windows: Windows = ""
    named_only: bool = False
    embeddings: Annotated[Sequence[Embedding], Field(max_length=MAX_EMBEDDINGS), AfterValidator(tuple)] = ()
    vae: Annotated[str, Field(max_length=4096)] = ""
    picture: Picture | None = None
    hires: Hires | None = None
    schema_version: int = SCHEMA_VERSION

    @field_validator("size")
    @classmethod
    def _pixels(cls, size: tuple[int, int] | None) -> tuple[int, int] | None:
        if size and size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"size {size[0]}x{size[1]} is over {MAX_PIXELS} pixels")
        return size

    @field_validator("sampler")
    @classmethod
    def _named(cls, sampler: str) -> str:
        """A title ("Euler a") as our name for it; unknown names are refused by `backbones.schedulers`."""
        return canonical(sampler)

    @model_validator(mode="after")
    def _one_space(self) -> "Request":
        if self.hires and self.hires.space == "latent" and self.picture and self.picture.mask:
            raise ValueError("hires: with a mask the picture is enlarged in pixels, since what is kept must not change: set space to pixel")
        return self

    @field_validator("schema_version")
    @classmethod
    def _version(cls, version: int) -> int:
        if version > SCHEMA_VERSION:
            raise ValueError(f"this request was written by a newer Medley (schema {version}; this one reads up to "
                             f"{SCHEMA_VERSION}): update Medley")
        return version

    @property
    def names(self) -> tuple[str, ...]:
        """One name per LoRA, in order, unique: a second "owl" is "owl#2"."""
        return _unique(lora.name for lora in self.loras)

    @property
    def condition_names(self) -> tuple[str, ...]:
        """One name per condition, in order, unique as those of LoRAs are."""
        return _unique(condition.name for condition in self.conditions)

    @property
    def controls(self) -> dict[str, Condition]:
        """The conditions that act in at least one of the steps, by name, in order: one of strength 0 is as if it were not there."""
        count = self.steps or 1000
        return {name: condition for name, condition in zip(self.condition_names, self.conditions, strict=True)
                if any(condition.on(index, count) for index in range(count))}

    @property
    def weights(self) -> dict[str, float]:
        """Name to weight, for every LoRA of the request."""
        return {name: lora.weight for name, lora in zip(self.names, self.loras, strict=True)}

    @property
    def active(self) -> dict[str, Lora]:
        """The LoRAs that are on in at least one of the steps, by name: one of weight 0 is as if it were not there."""
        count = self.steps or 1000
        return {name: lora for name, lora in zip(self.names, self.loras, strict=True)
                if any(lora.weight_at(index, count) != 0.0 for index in range(count))}

    @property
    def composed(self) -> dict[str, Lora]:
        """Those of them that are not always on, where that is said: what a method composes."""
        return {name: lora for name, lora in self.active.items() if lora.category != ALWAYS_ON}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple((self.seed + index) % SEEDS for index in range(self.count))

    @property
    def length(self) -> int:
        """Its steps, as a number. Raises RuntimeError where they are still to be settled by the model."""
        if self.steps is None:
            raise RuntimeError("this request leaves its steps to the model: settle it first")
        return self.steps

    def settled(self, steps: int, guidance: float) -> "Request":
        """The same with the model's usual steps and guidance where it says nothing of them."""
        return replace(self, steps=steps if self.steps is None else self.steps,
                       guidance=guidance if self.guidance is None else self.guidance)

    def alone(self, index: int) -> "Request":
        """The request of its picture `index` alone: the seed of that picture, count 1."""
        return replace(self, seed=self.seeds[index], count=1)

    def json(self) -> str:
        """One line of JSON, from which `Request.read` makes an equal request.

        Fields that came later are in it only where they are set: a request without them is written, and named, as it always was.
        """
        return _REQUEST.dump_json(self, exclude={name for name in _LATER if not getattr(self, name)}).decode()

    @staticmethod
    def read(text: str | bytes) -> "Request":
        """A request from its JSON. Raises Refused naming every field that is wrong."""
        try:
            untrusted.parse(text)  # within limits
            return _REQUEST.validate_json(text)
        except ValidationError as error:
            raise Refused(f"not a request: {explain(error)}") from None
        except untrusted.Unreadable as error:
            raise Refused(f"not a request: the text {error}") from None


@dataclass(frozen=True, config=_config)
class Receipt:
    """What of a LoRA file was applied. `tensors == applied + ignored`: every tensor of the raw file is accounted for.

    family: the kind of base the file was made for, from its keys and shapes ("sd", "sd2", "sdxl", "sd3", "flux",
    "unknown"); layout: how its keys are written ("diffusers", "kohya", ...). components: tensors applied and modules
    reached in the denoiser and in each text encoder. ignored: reason to the raw keys left out for it. no_effect:
    modules whose update is exactly zero. kinds: of update ("LoRA", "LoKr", "DoRA", ...), to the number of the file's modules. ranks and
    alphas: value to the number of modules that have it. alpha_from: who states alpha, to the number of modules. remarks: what a user should
    know of how the file was read. A receipt from a header alone has neither alphas nor hashes.
    sha256 is of the whole file, tensor_sha256 of names, shapes, dtypes and bytes of the tensors alone (metadata may
    change without changing it), data_sha256 of the bytes after the header: what A1111 and Civitai (AutoV3) call a LoRA's hash, of
    which they write the first 12 digits.
    """

    name: str
    path: str
    sha256: str
    tensor_sha256: str
    family: str
    layout: str
    tensors: int
    applied: int
    components: Mapping[str, Mapping[str, int]] = Field(default_factory=dict)
    ignored: Mapping[str, tuple[str, ...]] = Field(default_factory=dict)
    no_effect: tuple[str, ...] = ()
    kinds: Mapping[str, int] = Field(default_factory=dict)
    ranks: Mapping[int, int] = Field(default_factory=dict)
    alphas: Mapping[float, int] = Field(default_factory=dict)
    alpha_from: Mapping[str, int] = Field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    title: str = ""
    category: str = ""
    triggers: tuple[str, ...] = ()
    metadata: Mapping[str, str] = Field(default_factory=dict)
    data_sha256: str = ""

    @property
    def coverage(self) -> float:
        """Share of the file's tensors that was applied, 0 to 1."""
        return self.applied / self.tensors if self.tensors else 0.0

    def line(self) -> str:
        """One line for people: "raccoon: applied 92/92 tensors (unet 84, text_encoder 8), rank 8"."""
        parts = ", ".join(f"{name} {count['tensors']}" for name, count in self.components.items())
        ranks = "/".join(str(rank) for rank in sorted(self.ranks))
        text = f"{self.name}: applied {self.applied}/{self.tensors} tensors" + (f" ({parts})" if parts else "")
        text += f", rank {ranks}" if ranks else ""
        if set(self.kinds) - {"LoRA"}:
            text += ", kinds: " + " + ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        if self.no_effect:
            text += f", {len(self.no_effect)} modules with no effect"
        for reason, keys in self.ignored.items():
            text += f"; ignored {len(keys)}: {reason}"
        return "; ".join([text, *self.remarks])


@dataclass(frozen=True, config=_config)
class Result:
    """Pictures, the request they came from, and what happened: notes by the method, seconds by stage, receipts of its LoRAs, and of what its
    conditions were read with, by name."""

    images: tuple[Image.Image, ...]
    request: Request
    notes: Mapping[str, Any]
    seconds: Mapping[str, float]
    receipts: tuple[Receipt, ...]
    condition_receipts: Mapping[str, Receipt] = Field(default_factory=dict)


_REQUEST = TypeAdapter(Request)
