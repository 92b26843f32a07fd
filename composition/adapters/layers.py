"""The model's layers, norms among them: a forward hook each, and the stacks of one set of LoRAs at a time attached to them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from composition.adapters.fold import Fold
from composition.adapters.gates import Gates
from composition.adapters.stack import Rewrite, Stack
from composition.adapters.trainable import Shape, Trainable, TrainableStack
from composition.loras.kinds.base import Update
from composition.loras.layers import Norm
from composition.refusal import Refused
from composition.request import Lora


@dataclass(eq=False)
class Laid:
    """One set of LoRAs laid out over the layers: what is attached while its session lasts.

    stacks, gates: by component. text_live: the text encoders that each of the LoRAs changes. fold: while their sum is in the weights.
    learning: they are in training. prepared: `Layers.prepare` has seen it. under: LoRAs that are a part of the base while it lasts, whatever
    is done with the others.
    """

    names: tuple[str, ...] = ()
    loras: tuple[Lora, ...] = ()
    text_live: tuple[frozenset[str], ...] = ()
    stacks: dict[str, dict[str, Stack]] = field(default_factory=dict)
    gates: dict[str, Gates] = field(default_factory=dict)
    fold: Fold | None = None
    learning: bool = False
    prepared: bool = False
    under: "Laid | None" = None


class Layers:
    """Every linear layer, convolution and norm of the components, by component and path; the first component is the denoiser.

    block: layer path of the denoiser to its block; axis: to what its tokens are. current: the set that is attached.
    """

    def __init__(
        self, components: Mapping[str, nn.Module], block: Callable[[str], str], axis: Callable[[str], Any],
    ) -> None:
        self.components = dict(components)
        self.denoiser = next(iter(self.components))
        self.modules: dict[str, dict[str, nn.Linear | nn.Conv2d | Norm]] = {
            component: {path: module for path, module in model.named_modules()
                        if isinstance(module, nn.Linear | nn.Conv2d) or isinstance(module, Norm) and module.weight is not None}
            for component, model in self.components.items()}
        self._block, self._axis = block, axis
        self.current = Laid()
        self._folds: list[Fold] = []  # begun and not yet ended, for `repair`
        self._repairs = 0
        self._handles = []
        for module in self._all():
            _attach(module, None, None)
            self._handles.append(module.register_forward_hook(_hook))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _all(self) -> Iterator[nn.Module]:
        return (module for modules in self.modules.values() for module in modules.values())

    # laying out ----------------------------------------------------------------------------------------------------

    def lay(self, names: Sequence[str], loras: Sequence[Lora], parts: Sequence[Mapping[str, Mapping[str, Update]]]) -> Laid:
        """Stacks of each LoRA's updates, by component and path; every gate is closed. Nothing is attached yet."""
        live = tuple(frozenset(c for c in part if c != self.denoiser and part[c]) for part in parts)
        laid = Laid(tuple(names), tuple(loras), live)
        for component in self.components if parts else ():
            mine = [part.get(component, {}) for part in parts]
            gates, blocks = self._gated(laid, component)
            laid.stacks[component] = {
                path: Stack([part.get(path) for part in mine], gates, blocks[self._block_of(component, path)], self._axis(path), path)
                for path in dict.fromkeys(path for part in mine for path in part)}
        return laid

    def lay_trainable(
        self, names: Sequence[str], rank: int, paths: Mapping[str, Sequence[str]], device: torch.device | None,
    ) -> tuple[Laid, Trainable]:
        """The same for new adapters of one rank, whose factors are one leaf. device: of the leaf; None: where the denoiser's weights are."""
        shapes = {c: {path: Shape.of(self._trained(c, path)) for path in paths[c]} for c in self.components if paths.get(c)}
        rest = next((weight.device for weight in self.components[self.denoiser].parameters()), torch.device("cpu"))
        trained, slots = Trainable(names, rank, shapes, device or rest), count()
        laid = Laid(tuple(names), tuple(Lora(name) for name in names), (frozenset(shapes) - {self.denoiser},) * len(names), learning=True)
        for component, mine in shapes.items():
            gates, blocks = self._gated(laid, component)
            laid.stacks[component] = {
                path: TrainableStack(trained, next(slots), gates, blocks[self._block_of(component, path)], self._axis(path), path)
                for path in mine}
        return laid, trained

    def _trained(self, component: str, path: str) -> nn.Linear | nn.Conv2d:
        module = self.modules[component][path]
        assert not isinstance(module, Norm), "norms have no LoRA"
        return module

    def _block_of(self, component: str, path: str) -> str:
        return self._block(path) if component == self.denoiser else ""

    def _gated(self, laid: Laid, component: str) -> tuple[Gates, dict[str, int]]:
        """New gates of a component, all closed, and the row that each block has in them."""
        blocks = sorted({self._block_of(component, path) for path in self.modules[component]})
        table = [[_factor(lora, name) if component == self.denoiser else 1.0 for lora in laid.loras] for name in blocks]
        gates = laid.gates[component] = Gates(torch.tensor(table, dtype=torch.float64))
        return gates, {name: row for row, name in enumerate(blocks)}

    def check_blocks(self, name: str, lora: Lora) -> None:
        """Raises Refused for a factor on a block that this denoiser does not have: nothing would read it."""
        blocks = sorted({self._block(path) for path in self.modules[self.denoiser]} - {""})
        for wanted in lora.blocks:
            if wanted and not any(block == wanted or block.startswith(f"{wanted}.") for block in blocks):
                raise Refused(f"LoRA {name}: this model has no block {wanted!r}; its blocks are {', '.join(blocks)}")

    # attaching -----------------------------------------------------------------------------------------------------

    @contextmanager
    def attached(self, laid: Laid) -> Iterator[None]:
        """This set is in the model while it lasts, on the bare base, and then again what was there before, folded or live."""
        outer, repairs = self.current, self._repairs
        try:
            if outer.fold is not None:
                outer.fold.lift()
            self._show(laid)
            yield
        finally:
            if repairs == self._repairs:
                self._show(outer)
                if outer.fold is not None:
                    outer.fold.write()

    def _show(self, laid: Laid) -> None:
        for component, modules in self.modules.items():
            stacks = laid.stacks.get(component, {})
            under = laid.under.stacks.get(component, {}) if laid.under else {}
            for path, module in modules.items():
                _attach(module, stacks.get(path), under.get(path))
        self.current = laid

    def touched(self) -> dict[str, tuple[nn.Module, Stack]]:
        """The denoiser's layers that the current set changes, with their stacks, by path."""
        stacks = self.current.stacks.get(self.denoiser, {})
        return {path: (module, stacks[path]) for path, module in self.modules[self.denoiser].items() if path in stacks}

    def prepare(self) -> None:
        """Where the denoiser or a part of it is compiled, make the layers' copies of their factors now, once for each set.

        Made by the first forward they would be a part of its graph, and every later one would be compiled anew.
        """
        laid = self.current
        if laid.prepared or laid.learning:
            return
        laid.prepared = True
        if any(module._compiled_call_impl is not None for module in self.components[self.denoiser].modules()):
            for each in (laid, laid.under) if laid.under else (laid,):
                for path, stack in each.stacks.get(self.denoiser, {}).items():
                    module = self.modules[self.denoiser][path]
                    weight = module.weight
                    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta:
                        stack.prepare(module, weight)

    @contextmanager
    def rewritten(self, rewrites: Mapping[str, Rewrite]) -> Iterator[None]:
        """The factors of these layers of the denoiser are, while it lasts, what the functions make of them."""
        laid = self.current
        stacks = {path: laid.stacks[self.denoiser][path] for path in rewrites}
        try:
            for path, stack in stacks.items():
                stack.rewrite(rewrites[path])
            laid.prepared = False
            yield
        finally:
            for stack in stacks.values():
                stack.rewrite(None)
            laid.prepared = False

    @contextmanager
    def folded(self, fold: Fold) -> Iterator[None]:
        """The current set's sum is in the weights while it lasts."""
        laid, repairs = self.current, self._repairs
        try:
            self._folds.append(fold)
            fold.write()
            laid.fold = fold
            yield
        finally:
            if repairs == self._repairs:
                fold.lift()
                laid.fold = None
                self._folds.remove(fold)

    def repair(self) -> bool:
        """Make the model the bare base, whatever an interrupted session or fold has left; True when anything was left."""
        self._repairs += 1  # a context that was abandoned may be closed any time from now on, and has nothing to undo any more
        left = bool(self._folds) or any(_attached(module) is not None or module.__dict__["under"] is not None for module in self._all())
        while self._folds:
            self._folds[-1].lift()
            self._folds.pop()
        self._show(Laid())
        return left


def _hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    stack, under = cast(Stack | None, module.stack), cast(Stack | None, module.under)
    if under is not None and under.gates.mode != "off":
        output = under(module, args[0], output)
    if stack is None:
        return output
    if stack.gates.watch is not None and stack.ranked:
        stack.gates.watch(stack, stack.ranks(module, args[0], output))
    return output if stack.gates.mode == "off" else stack(module, args[0], output)


def _attach(module: nn.Module, stack: Stack | None, under: Stack | None) -> None:
    module.__dict__["stack"] = stack  # a plain attribute: neither a submodule nor in the state dict
    module.__dict__["under"] = under  # acts before it, as a part of the base


def _attached(module: nn.Module) -> Stack | None:
    return module.__dict__["stack"]


def _factor(lora: Lora, block: str) -> float:
    """What Lora.blocks says of a block: the longest name that is it or its beginning; 1 when none is."""
    fitting = [name for name in lora.blocks if block == name or block.startswith(f"{name}.")]
    return lora.blocks[max(fitting, key=len)] if fitting else 1.0
