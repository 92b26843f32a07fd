"""The prompts of a run as they are encoded: with weights, textual inversions, and of any length, as the request's schema has them."""

from collections.abc import Mapping
from functools import cached_property

from composition import inversions, prompt_syntax
from composition.backbones.base import Backbone
from composition.inversions import Inversion
from composition.prompt_weights import Prompt, Text
from composition.request import Request


class Spelling:
    """inversions: the request's, by the word that stands for each."""

    def __init__(self, backbone: Backbone, request: Request, inversions: Mapping[str, Inversion]) -> None:
        self._backbone, self._request, self._inversions = backbone, request, inversions
        self._lengths: dict[Text, int] = {}

    @cached_property
    def prompt(self) -> Text:
        return self.spelled(prompt_syntax.prompts_of(self._request)[0])

    @cached_property
    def negative(self) -> Text:
        return self.spelled(prompt_syntax.prompts_of(self._request)[1])

    def spelled(self, prompt: Text) -> Text:
        """The prompt with the textual inversions that its words name."""
        return inversions.named(prompt, self._inversions) if isinstance(prompt, Prompt) else prompt

    def text(self, words: str) -> Text:
        """Words as a prompt of this request: of any length, where the request's are."""
        return words if self._request.schema_version < prompt_syntax.WEIGHTED else Prompt(words)

    def offsets(self, prompt: Text) -> list[tuple[int, int]]:
        """The letters of the prompt's text that each token the model sees stands for."""
        return self._backbone.offsets(self.spelled(prompt))

    def chunks(self, prompt: Text) -> int:
        """How many chunks a prompt has, worked out once a run."""
        if not isinstance(prompt, Prompt):
            return 1
        if prompt not in self._lengths:
            self._lengths[prompt] = self._backbone.chunks(self.spelled(prompt))
        return self._lengths[prompt]
