"""Adapters: the LoRAs a backbone holds, which of them are live, and with what gates.

One forward hook on every linear layer and convolution, attached once, reads `module.stack`; with no stack it does
nothing. Loading parses a file once and keeps its factors by hash; a session lays the factors of one set of LoRAs into
stacks; `use`, `rows` and `combined` write the gates; `folded` writes the sum into the weights and gives them back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composition.adapters.stack import Combine, Gates, Stack
from composition.loras import reader
from composition.request import Lora, Receipt, Refused

KEPT_BYTES = 2 * 2**30  # main memory for the factors of LoRA files, least recently used first out


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
    axis: to what its tokens are (for `regional`). kept_bytes: main memory for factors of files that may be asked for again.
    """

    def __init__(
        self, components: Mapping[str, nn.Module], *, family: str, block: Callable[[str], str],
        axis: Callable[[str], Any] = lambda _: None, kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._axis = axis
        self.components = dict(components)
        self.family = family
        self._block = block
        self._denoiser = next(iter(self.components))
        self._layers: dict[str, dict[str, nn.Module]] = {}
        self._handles = []
        for component, model in self.components.items():
            layers: dict[str, nn.Module] = {
                path: module for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
            for module in layers.values():
                _attach(module, None)
                self._handles.append(module.register_forward_hook(_hook))
            self._layers[component] = layers
        self._kept_bytes = kept_bytes
        self._files: dict[tuple[str, str, bool], reader.LoraFile] = {}  # by what they hold, the last used last
        self._stamps: dict[tuple[object, ...], tuple[str, str, bool]] = {}  # state of a file on disk to what it holds
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

        The receipt has the name of the LoRA and the path given, whichever file of the same content was read first. Raises Refused when
        the file is unsafe, of another family, or not fully applicable and allow_partial is not set.
        """
        return self._read(path, lora, allow_partial).receipt

    def _read(self, path: Path, lora: Lora, allow_partial: bool) -> reader.LoraFile:
        path = path.absolute()  # as it was named: beside a link lie other files than beside what it leads to
        stamp = (allow_partial, *reader.stamp(path)) if path.is_file() else ()
        key = self._stamps.get(stamp)
        file = self._files.pop(key, None) if key else None
        if file is None:
            file = reader.read(path, self.components, self.family, name=lora.name, allow_partial=allow_partial)
            key = (file.receipt.sha256, file.outside, allow_partial)
            file = self._files.pop(key, file)
        assert key is not None
        self._files[key] = file  # most recently used last
        self._stamps[stamp] = key
        self._forget()
        return replace(file, receipt=replace(file.receipt, name=lora.name, path=reader.shown(path)))

    def _forget(self) -> None:
        """Let go of the files used longest ago until those that stay fit into their memory."""
        held = {key: file.nbytes for key, file in self._files.items()}
        total = sum(held.values())
        for key, size in held.items():
            if total <= self._kept_bytes:
                break
            total -= size
            del self._files[key]
        self._stamps = {stamp: key for stamp, key in self._stamps.items() if key in self._files}

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
        self, parts: Sequence[Mapping[str, Mapping[str, reader.Factors]]], names: tuple[str, ...], loras: tuple[Lora, ...]
    ) -> Iterator[None]:
        if self._names:
            raise RuntimeError("a session is already open on these adapters")
        self._names, self._loras = names, loras
        self._text_live = tuple(frozenset(c for c in part if c != self._denoiser and part[c]) for part in parts)
        try:
            for component in self.components if parts else ():
                factors = [part.get(component, {}) for part in parts]
                self._lay(component, factors)
            yield
        finally:
            for layers in self._layers.values():
                for module in layers.values():
                    _attach(module, None)
            self._gates, self._names, self._loras, self._text_live = {}, (), (), ()

    def _lay(self, component: str, factors: Sequence[Mapping[str, reader.Factors]]) -> None:
        """Build the stacks of one component from each adapter's factors by layer."""
        layers = self._layers[component]
        block = self._block if component == self._denoiser else (lambda _: "")
        blocks = sorted({block(path) for path in layers})
        device = _compute_device(self.components[component])
        table = torch.tensor(
            [[_factor(lora, name) if component == self._denoiser else 1.0 for lora in self._loras] for name in blocks],
            dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        gates = self._gates[component] = Gates(table)
        for path in dict.fromkeys(path for part in factors for path in part):
            module, found = layers[path], [part.get(path) for part in factors]
            down = torch.cat([f.down for f in found if f is not None]).to(device)
            up = torch.cat([f.up.flatten(1) for f in found if f is not None], dim=1).to(device)
            ends = torch.tensor([f.rank if f is not None else 0 for f in found]).cumsum(0).tolist()
            spans = list(zip([0, *ends[:-1]], ends, strict=True))
            _attach(module, Stack(down, up, spans, gates, blocks.index(block(path)), self._axis(path)))

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
        """The adapters that change layers of the denoiser whose rows have no place, as time embeddings: `regional` cannot bound them."""
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
    def regional(
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
                gates.places, gates.ready, gates.mode = places, {}, "regional" if gates.mode != "off" else "off"
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
        """True when the denoiser's weights are plain floating tensors that may be written: not quantized, not offloaded."""
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
    def training(
        self, names: Sequence[str], rank: int, layers: Mapping[str, Sequence[str]], *, alpha: float | None = None,
        generator: torch.Generator | None = None, start: Sequence[reader.LoraFile] = (),
    ) -> Iterator[dict[str, dict[str, Stack]]]:
        """New adapters to be trained, K = len(names) of one rank, in one stack per layer; yields them by component, layer.

        layers: component to layer paths. down begins uniform in 1/sqrt(in), up begins zero (as the original LoRA,
        arXiv 2106.09685). The factors are leaves with gradients: adapter k owns down[k*rank:(k+1)*rank] and
        up[:, k*rank:(k+1)*rank]; alpha/rank is folded into `up` as everywhere. `start` continues from saved factors.
        """
        def fresh(component: str, path: str) -> reader.Factors:
            module = self._layers[component][path]
            weight = cast(Tensor, module.weight)
            shape = (rank, *weight.shape[1:])
            down = (torch.rand(shape, generator=generator) * 2 - 1) / weight[0].numel() ** 0.5
            return reader.Factors(down, torch.zeros(weight.shape[0], rank), alpha)

        parts = [
            start[k].factors if start else {c: {path: fresh(c, path) for path in paths} for c, paths in layers.items()}
            for k in range(len(names))
        ]
        with self._stacked(parts, tuple(names), tuple(Lora(name) for name in names)):
            stacks: dict[str, dict[str, Stack]] = {}
            for component, found in self._layers.items():
                for path, module in found.items():
                    if (stack := _attached(module)) is not None:
                        stack.down.requires_grad_(True)
                        stack.up.requires_grad_(True)
                        stacks.setdefault(component, {})[path] = stack
            yield stacks

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
