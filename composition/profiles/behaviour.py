"""A LoRA's behaviour: what it does to pictures, as a direction in the space of an image encoder (CARLoS, arXiv 2512.08826).

For every prompt and seed d is the vector of the picture with the LoRA less that of the base's, and every vector has length 1. The
direction is the mean of d, the strength the mean length of d, the consistency the mean cosine between two different d. Beside them
stands the spread, how far two of the base's own pictures lie apart: strength over spread means the same with every encoder.
"""

from typing import Annotated, ClassVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from composition import untrusted
from composition.refusal import Refused, explain

Number = Annotated[float, Field(allow_inf_nan=False)]
MOST = 65_536  # numbers of a direction: more than any encoder has


@dataclass(frozen=True)
class Probe:
    """What is drawn to see a LoRA act: `seeds` pictures of each prompt, in `steps` steps.

    guidance None: the model's usual one. Prompts are used verbatim: no trigger word is added, so that a file without any metadata
    is measured as one with them.
    """

    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[int, Field(ge=1)] = 2
    steps: Annotated[int, Field(ge=1)] = 8
    guidance: Number | None = None

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise ValueError("a behaviour is measured on at least two pictures: give two prompts, or two seeds")

    @property
    def pictures(self) -> int:
        """With a LoRA, and again without."""
        return len(self.prompts) * self.seeds


@dataclass(frozen=True)
class Behaviour:
    """direction: of length 1, or all zeros where the LoRA changed no picture. judge: the image encoder, as it names itself."""

    ENDING: ClassVar[str] = ".behaviour.json"
    AGAIN: ClassVar[str] = "`medley profile --behaviour --again`"

    name: str
    tensor_sha256: str
    model: str
    judge: str
    probe: Probe
    direction: Annotated[tuple[Number, ...], Field(min_length=1, max_length=MOST)]
    strength: Annotated[Number, Field(ge=0)]
    consistency: Annotated[Number, Field(ge=-1, le=1)]
    spread: Annotated[Number, Field(ge=0)]

    @property
    def relative(self) -> float:
        """Strength over spread: 1 moves a picture as far as another prompt would; 0 where the base draws one picture only."""
        return self.strength / self.spread if self.spread else 0.0

    def json(self) -> str:
        return _BEHAVIOUR.dump_json(self).decode()

    @staticmethod
    def read(text: str | bytes) -> "Behaviour":
        """Raises Refused for what is none."""
        try:
            untrusted.parse(text)  # within limits
            return _BEHAVIOUR.validate_json(text)
        except ValidationError as error:
            raise Refused(f"not a behaviour: {explain(error)}") from None
        except untrusted.Unreadable as error:
            raise Refused(f"not a behaviour: the text {error}") from None


_BEHAVIOUR = TypeAdapter(Behaviour)
