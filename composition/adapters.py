"""Adapters: the LoRAs a backbone holds, which of them are live, and with what gates.

One forward hook on every linear layer and convolution, attached once, reads `module.stack`; with no stack it does
nothing. Loading parses a file once and keeps its factors by hash; a session lays the factors of one set of LoRAs into
stacks; `use`, `rows` and `combined` write the gates; `folded` writes the sum into the weights and gives them back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composition import files
from composition.request import Lora, Receipt, Refused
from composition.stack import Combine, Gates, Stack
from composition.trainable import Shape, Trainable, TrainableStack

KEPT_FILES = 32  # parsed LoRA files held in memory, least recently used first out


def _hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    stack = cast(Stack | None, module.stack)
    if stack is None or stack.gates.mode == "off":
        return output
    return stack(module, args[0], output)


def _attach(module: nn.Module, stack: Stack | None) -> None:
    module.__dict__["stack"] = stack  # a plain attribute: neither a submodule nor in the state dict


def _attached(module: nn.Module) -> Stack | None:
    return module.__dict__["stack"]


class Adapters:
    """The LoRAs of one backbone.

    components: "unet", "text_encoder", ... to the modules LoRAs may touch; the first is the denoiser, the others are
    text encoders, whose rows are prompts and whose gates are their own. block: layer path of the denoiser to its block;
    axis: to what its tokens are (for `placed`).
    """

    def __init__(
        self, components: Mapping[str, nn.Module], *, family: str, block: Callable[[str], str],
        axis: Callable[[str], Any] = lambda _: None,
    ) -> None:
        self._axis = axis
        self.components = dict(components)
        self.family = family
        self._block = block
        self._denoiser = next(iter(self.components))
        self._layers: dict[str, dict[str, nn.Linear | nn.Conv2d]] = {}
        self._handles = []
        for component, model in self.components.items():
            layers: dict[str, nn.Linear | nn.Conv2d] = {
                path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
            for module in layers.values():
                _attach(module, None)
                self._handles.append(module.register_forward_hook(_hook))
            self._layers[component] = layers
        self._files: dict[tuple[str, bool], files.LoraFile] = {}
        self._stamps: dict[tuple[Path, int, int, bool], tuple[str, bool]] = {}
        self._gates: dict[str, Gates] = {}
        self._names: tuple[str, ...] = ()
        self._loras: tuple[Lora, ...] = ()
        self._folded: tuple[float, ...] | None = None
        self._text_live: tuple[frozenset[str], ...] = ()

    def close(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()

    # loading -------------------------------------------------------------------------------------------------------

    def load(self, path: Path, lora: Lora, *, allow_partial: bool = False) -> Receipt:
        """Read a LoRA file for this base and keep its factors; a file already held is not read again.

        Raises Refused when it is unsafe, of another family, or not fully applicable and allow_partial is not set.
        """
        return self._read(path, lora, allow_partial).receipt

    def _read(self, path: Path, lora: Lora, allow_partial: bool) -> files.LoraFile:
        path = path.resolve()
        stamp = (path, path.stat().st_mtime_ns, path.stat().st_size, allow_partial) if path.is_file() else None
        key = self._stamps.get(stamp) if stamp else None
        if key is None or key not in self._files:
            read = files.read(path, self.components, self.family, name=lora.name, allow_partial=allow_partial)
            key = (read.receipt.sha256, allow_partial)
            self._files[key] = read
            if stamp:
                self._stamps[stamp] = key
        self._files[key] = self._files.pop(key)  # most recently used last
        while len(self._files) > KEPT_FILES:
            self._files.pop(next(iter(self._files)))
        return self._files[key]

    # one set of LoRAs ----------------------------------------------------------------------------------------------

    @contextmanager
    def session(
        self, loras: Sequence[tuple[str, Lora, Path]], *, allow_partial: bool = False
    ) -> Iterator[tuple[Receipt, ...]]:
        """Lay the factors of these LoRAs, as (name, LoRA, file), into stacks; every gate begins closed.

        Yields their receipts, in order. On leaving, every layer is as it was. Sessions do not nest.
        """
        for name, lora, _ in loras:
            self._has_blocks(name, lora)
        read = [self._read(path, lora, allow_partial) for _, lora, path in loras]
        parts = [{component: file.factors.get(component, {}) for component in self.components} for file in read]
        with self._stacked(parts, tuple(name for name, _, _ in loras), tuple(lora for _, lora, _ in loras)):
            yield tuple(file.receipt for file in read)

    def _has_blocks(self, name: str, lora: Lora) -> None:
        """Raises Refused for a factor on a block that this denoiser has not: it would be read by nothing."""
        blocks = sorted({self._block(path) for path in self._layers[self._denoiser]} - {""})
        for asked in lora.blocks:
            if asked and not any(block == asked or block.startswith(f"{asked}.") for block in blocks):
                raise Refused(f"LoRA {name}: this model has no block {asked!r}; its blocks are {', '.join(blocks)}")

    @contextmanager
    def _stacked(
        self, parts: Sequence[Mapping[str, Mapping[str, files.Factors]]], names: tuple[str, ...], loras: tuple[Lora, ...]
    ) -> Iterator[None]:
        live = [frozenset(c for c in part if c != self._denoiser and part[c]) for part in parts]
        with self._named(names, loras, live):
            for component in self.components if parts else ():
                self._lay(component, [part.get(component, {}) for part in parts])
            yield

    @contextmanager
    def _named(
        self, names: tuple[str, ...], loras: tuple[Lora, ...], text_live: Sequence[frozenset[str]]
    ) -> Iterator[None]:
        """These are the adapters while it lasts; whatever was attached for them is taken off at its end."""
        if self._names:
            raise RuntimeError("a session is already open on these adapters")
        self._names, self._loras, self._text_live = names, loras, tuple(text_live)
        try:
            yield
        finally:
            for layers in self._layers.values():
                for module in layers.values():
                    _attach(module, None)
            self._gates, self._names, self._loras, self._text_live = {}, (), (), ()

    def _block_of(self, component: str, path: str) -> str:
        return self._block(path) if component == self._denoiser else ""

    def _gated(self, component: str) -> tuple[Gates, list[str]]:
        """New gates of a component, all closed, and the blocks that their rows are of."""
        blocks = sorted({self._block_of(component, path) for path in self._layers[component]})
        device = _compute_device(self.components[component])
        table = torch.tensor(
            [[_factor(lora, name) if component == self._denoiser else 1.0 for lora in self._loras] for name in blocks],
            dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        gates = self._gates[component] = Gates(table)
        return gates, blocks

    def _lay(self, component: str, factors: Sequence[Mapping[str, files.Factors]]) -> None:
        """Build the stacks of one component from each adapter's factors by layer."""
        layers, device = self._layers[component], _compute_device(self.components[component])
        gates, blocks = self._gated(component)
        for path in dict.fromkeys(path for part in factors for path in part):
            module, found = layers[path], [part.get(path) for part in factors]
            down = torch.cat([f.down for f in found if f is not None]).to(device)
            up = torch.cat([f.up.flatten(1) for f in found if f is not None], dim=1).to(device)
            ends = torch.tensor([f.rank if f is not None else 0 for f in found]).cumsum(0).tolist()
            spans = list(zip([0, *ends[:-1]], ends, strict=True))
            _attach(module, Stack(down, up, spans, gates, blocks.index(self._block_of(component, path)), self._axis(path)))

    # gates ---------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def use(self, weights: Mapping[str, float]) -> None:
        """Every row of the denoiser alike: these adapters at these weights, all others off."""
        vector = self._vector(weights)
        if self._folded is not None and vector != self._folded:
            raise RuntimeError("the weights of a fold cannot change while it lasts")
        gates = self._gates.get(self._denoiser)
        if gates is not None:
            gates.off() if self._folded is not None else gates.use(vector)

    def use_text(self, weights: Mapping[str, float]) -> None:
        """The same for the text encoders."""
        vector = self._vector(weights)
        for component, gates in self._gates.items():
            if component != self._denoiser:
                gates.use(vector)

    def touches(self, name: str, component: str) -> bool:
        """True when this adapter changes that text encoder: only then is a prompt read anew for it."""
        return component in self._text_live[self._names.index(name)]

    def placeless(self) -> tuple[str, ...]:
        """The adapters that change layers of the denoiser whose rows have no place, as time embeddings: `placed` cannot bound them."""
        stacks = [stack for path, module in self._layers[self._denoiser].items()
                  if (stack := _attached(module)) is not None and getattr(self._axis(path), "kind", "") == "none"]
        return tuple(name for k, name in enumerate(self._names) if any(stack.touches(k) for stack in stacks))

    @contextmanager
    def rows(self, weights: Sequence[Mapping[str, float]]) -> Iterator[None]:
        """Row i of the denoiser's batch uses weights[i]. Rows with one adapter each pay that adapter's rank alone."""
        if self._folded is not None:
            raise RuntimeError("rows cannot differ while the weights are folded")
        with self._borrowed() as gates:
            if gates is not None:
                gates.per_row([self._vector(row) for row in weights])
            yield

    @contextmanager
    def placed(
        self, weights: Mapping[str, float], places: Mapping[Any, Float[Tensor, "rows K *place"]]
    ) -> Iterator[None]:
        """Token by token: adapter k (in the order of `names`) at its weight times places[axis of the layer][row, k, token].

        places: by the axes of the touched layers: grids (rows, K, h, w), text (rows, K, tokens), no place (rows, K).
        """
        if self._folded is not None:
            raise RuntimeError("places cannot differ while the weights are folded")
        with self._borrowed() as gates:
            if gates is not None:
                gates.use(self._vector(weights))
                gates.places, gates.ready, gates.mode = places, {}, "placed" if gates.mode != "off" else "off"
            yield

    @contextmanager
    def combined(self, combine: Combine, weights: Mapping[str, float]) -> Iterator[None]:
        """Each layer of the denoiser hands its base output and every adapter's gated output to `combine`."""
        with self._borrowed() as gates:
            if gates is not None:
                gates.use(self._vector(weights))
                gates.mode, gates.combine = "combined", combine
            yield

    @contextmanager
    def _borrowed(self) -> Iterator[Gates | None]:
        """The denoiser's gates, as they were again afterwards; None when no LoRA touches it."""
        gates = self._gates.get(self._denoiser)
        state = gates.snapshot() if gates is not None else ()
        try:
            yield gates
        finally:
            if gates is not None:
                gates.restore(state)

    def _vector(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        strange = set(weights) - set(self._names)
        if strange:
            raise KeyError(f"no adapter named {sorted(strange)}; there are {list(self._names)}")
        return tuple(float(weights.get(name, 0.0)) for name in self._names)

    # folding -------------------------------------------------------------------------------------------------------

    @property
    def foldable(self) -> bool:
        """True when the denoiser's weights are plain floating tensors that may be written: not quantised, not offloaded."""
        touched = [m for m in self._layers[self._denoiser].values() if _attached(m) is not None]
        plain = all(type(module) in (nn.Linear, nn.Conv2d) and type(module.weight) is nn.Parameter and not hasattr(module, "_hf_hook")
                    for module in touched)
        weights = [cast(Tensor, module.weight) for module in touched]
        return plain and all(w.is_floating_point() and w.itemsize >= 2 and not w.is_meta for w in weights)

    @contextmanager
    def folded(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Write W + sum w B A into the denoiser while the context lasts; the original values are kept and put back.

        Costs one copy of the touched weights; a forward then costs what the bare base costs.
        """
        vector = self._vector(weights)
        with ExitStack() as undo:
            if (gates := self._gates.get(self._denoiser)) is not None:
                undo.callback(gates.restore, gates.snapshot())
            for module in self._layers[self._denoiser].values():
                stack = _attached(module)
                if stack is None:
                    continue
                weight = cast(Tensor, module.weight)
                original = weight.detach().clone()
                undo.callback(_write, weight, original)
                wide = torch.promote_types(weight.dtype, torch.float32)
                _write(weight, (original.to(wide) + stack.delta(vector, wide).to(original.device).view(weight.shape)))
            self._folded = vector
            undo.callback(setattr, self, "_folded", None)
            yield

    # training ------------------------------------------------------------------------------------------------------

    @contextmanager
    def training(self, names: Sequence[str], rank: int, layers: Mapping[str, Sequence[str]]) -> Iterator[Trainable]:
        """New adapters to be trained, one per name, all of one rank; yields their factors, which begin at zero.

        layers: component to layer paths.
        """
        shapes = {c: {path: Shape.of(self._layers[c][path]) for path in layers[c]} for c in self.components if layers.get(c)}
        with self._named(tuple(names), tuple(Lora(name) for name in names), [frozenset(shapes) - {self._denoiser}] * len(names)):
            trained = Trainable(names, rank, shapes, _compute_device(self.components[self._denoiser]))
            slots = count()
            for component, paths in shapes.items():
                gates, blocks = self._gated(component)
                for path in paths:
                    stack = TrainableStack(trained, next(slots), gates, blocks.index(self._block_of(component, path)), self._axis(path))
                    _attach(self._layers[component][path], stack)
            yield trained

    @contextmanager
    def in_turn(self, size: int, *, text: bool = False) -> Iterator[None]:
        """Adapter k alone, at weight 1, in rows k * size to (k + 1) * size of the denoiser, with `text` of a text
        encoder's prompts. Nothing is written to the device for it."""
        with self.kept():
            for component, gates in self._gates.items():
                if (component != self._denoiser) == text:
                    gates.in_turn(size)
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done to the gates while it lasts, they are afterwards as they were."""
        before = {gates: gates.snapshot() for gates in self._gates.values()}
        try:
            yield
        finally:
            for gates, state in before.items():
                gates.restore(state)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing that recomputes with the gates of the forward pass, whatever they are by then.

        For `enable_gradient_checkpointing(gradient_checkpointing_func=adapters.checkpoint)`.
        """
        states = {gates: gates.snapshot() for gates in self._gates.values()}

        @contextmanager
        def as_then() -> Iterator[None]:
            now = {gates: gates.snapshot() for gates in states}
            try:
                for gates, state in states.items():
                    gates.restore(state)
                yield
            finally:
                for gates, state in now.items():
                    gates.restore(state)

        kwargs.pop("use_reentrant", None)
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (ExitStack(), as_then()), **kwargs)


def _factor(lora: Lora, block: str) -> float:
    """What Lora.blocks says of a block: the longest name that is it or its beginning; 1 when none is."""
    fitting = [name for name in lora.blocks if block == name or block.startswith(f"{name}.")]
    return lora.blocks[max(fitting, key=len)] if fitting else 1.0


def _write(weight: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def _compute_device(model: nn.Module) -> torch.device:
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found
