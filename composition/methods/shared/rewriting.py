"""Methods that only change factors: rewritten when the set of LoRAs that are live changes, and written into the weights where it never does."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from composition.adapters.stack import Rewrite
from composition.loop import Step
from composition.run import Run


class Rewritten:
    """The layers of a run as `rewrites` has them for the LoRAs that are live, by name with their weights; a LoRA alone stays as it is."""

    def __init__(self, run: Run, rewrites: Callable[[Step, Mapping[str, float]], Mapping[str, Rewrite]]) -> None:
        self.run, self.rewrites = run, rewrites
        self.live: dict[str, float] | None = None
        self.stack = ExitStack()

    def __enter__(self) -> "Rewritten":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def at(self, step: Step) -> None:
        """From now on the factors are those of this step's LoRAs."""
        live = self.run.live(step)
        if live != self.live:
            self.stack.close()
            if len(live) > 1:
                self.stack.enter_context(self.run.adapters.rewritten(self.rewrites(step, live)))
            self.live = live
            self.run.fold(self.stack)
