"""A LoRA's frequency profile: how H of the latent moves while it draws, over what the base does (arXiv 2502.04923, section 3).

Two numbers, each over the first 60 % of the steps, less the same of the base for the same prompt and noise, mean over seeds:
change is the mean of |H(t + 0.1 T) - H(t)|, the paper's; level is the mean of H(t). They may disagree: H falls while a picture is
drawn, so a LoRA that keeps it high (a line drawing) changes it less, and one that ends smooth (a black sky) more.
"""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from composition import untrusted
from composition.refusal import Refused, explain

EARLY = 0.6  # of the steps: over which H is compared


@dataclass(frozen=True)
class Profile:
    """high, base: H after each step with the LoRA and without, mean over seeds. change: see above. prompt: what was drawn."""

    ENDING: ClassVar[str] = ".json"
    AGAIN: ClassVar[str] = "`medley profile --again`"

    name: str
    tensor_sha256: str
    model: str
    prompt: str
    steps: int
    seeds: int
    high: tuple[float, ...]
    base: tuple[float, ...]
    change: float

    @property
    def level(self) -> float:
        """How much higher H is with the LoRA than without, mean over the early steps."""
        early = max(1, int(EARLY * len(self.high)))
        return (sum(self.high[:early]) - sum(self.base[:early])) / early

    def json(self) -> str:
        return _PROFILE.dump_json(self).decode()

    @staticmethod
    def read(text: str | bytes) -> "Profile":
        """Raises Refused for what is none."""
        try:
            untrusted.parse(text)  # within limits
            return _PROFILE.validate_json(text)
        except ValidationError as error:
            raise Refused(f"not a frequency profile: {explain(error)}") from None
        except untrusted.Unreadable as error:
            raise Refused(f"not a frequency profile: the text {error}") from None


_PROFILE = TypeAdapter(Profile)


def ordered(profiles: Mapping[str, Profile], by: str = "change") -> tuple[list[str], list[str]]:
    """(all names by falling frequency, those of low frequency). by: "change" or "level".

    Low is who is at or under the base; where none is, of three LoRAs or more the last. All low is none low.
    """
    values = {name: getattr(profile, by) for name, profile in profiles.items()}
    names = sorted(values, key=lambda name: -values[name])
    low = [name for name in names if values[name] <= 0] or (names[-1:] if len(names) >= 3 else [])
    return names, [] if len(low) == len(names) else low
