"""A static method: the LoRAs' factors rewritten once for the set that is live, then added up, and folded where their weights are constant."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from composition.adapters.stack import Rewrite
from composition.loop import Predict, Prediction, Step
from composition.run import Run

# (the first step at which the set is live, the names of the LoRAs in it) -> what becomes of each layer's factors, by its path
Rewriting = Callable[[Step, tuple[str, ...]], Mapping[str, Rewrite]]


class Rewritten:
    """The factors as `rewriting` says for the LoRAs that are live; asked again whenever others are. A context that gives them back."""

    def __init__(self, run: Run, rewriting: Rewriting) -> None:
        self.run, self.rewriting = run, rewriting
        self.live: tuple[str, ...] | None = None
        self.stack = ExitStack()

    def __enter__(self) -> "Rewritten":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def at(self, step: Step) -> None:
        """From this step on."""
        live = tuple(self.run.live(step))
        if live != self.live:
            self.stack.close()
            self.stack.enter_context(self.run.adapters.rewritten(self.rewriting(step, live)))
            self.live = live

    def folded(self, step: Step) -> None:
        """The same, and constant weights are written into the model."""
        before = self.live
        self.at(step)
        if before != self.live:
            self.run.fold(self.stack)


@contextmanager
def added_up(run: Run, rewriting: Rewriting) -> Iterator[Predict]:
    """What a static method yields: every prediction is of the rewritten factors, added up."""
    with Rewritten(run, rewriting) as rewritten:

        def predict(step: Step) -> Prediction:
            rewritten.folded(step)
            return Prediction(run.guide(run.denoise(step)), step.latents)

        yield predict
