"""Adapters: the LoRAs a backbone holds, which of them are live, and with what gates.

One forward hook on every linear layer, convolution and norm, attached once, reads `module.stack`; with no stack it does
nothing. Loading parses a file once and keeps its updates by hash; a session lays the updates of one set of LoRAs into
stacks; `use`, `rows`, `regional`, `routed` and `combined` write the gates; `rewritten` changes the factors for a while; `folded` writes the
sum into the weights and gives them back.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composition.adapters import fold as folding
from composition.adapters.fold import Fold
from composition.adapters.gates import Combine, Gates
from composition.adapters.held import KEPT_BYTES, Held
from composition.adapters.layers import Laid, Layers, _attached
from composition.adapters.stack import Rewrite, Route, Stack, Watch
from composition.adapters.trainable import Trainable
from composition.loop import Step
from composition.loras import reader
from composition.request import Lora, Receipt


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
        self.components = dict(components)
        self.family = family
        self._model = Layers(components, block, axis)
        self._axis = axis
        self._denoiser = self._model.denoiser
        self._layers = self._model.modules
        self._held = Held(self.components, family, kept_bytes)

    def close(self) -> None:
        """Take every hook off again."""
        self._held.close()
        self._model.close()

    @property
    def whole(self) -> bool:
        """False when the session that is open was interrupted while its fold made way for another or came back."""
        fold = self._model.current.fold
        return fold is None or fold.whole

    @property
    def learning(self) -> bool:
        """True when the session that is open is one of `training`."""
        return self._model.current.learning

    def repair(self) -> bool:
        """Make the model the bare base, whatever an interrupted session or fold has left; True when anything was left.

        Not inside a session: it would end there.
        """
        return self._model.repair()

    # loading -------------------------------------------------------------------------------------------------------

    def load(self, path: Path, lora: Lora, *, allow_partial: bool = False) -> Receipt:
        """Read a LoRA file for this base and keep its factors; a file already held is not read again.

        The receipt has the name of the LoRA and the path given, whichever file of the same content was read first. Raises Refused when
        the file is unsafe, of another family, or not fully applicable and allow_partial is not set.
        """
        return self._read(path, lora, allow_partial).receipt

    def prefetch(self, paths: Sequence[Path], *, allow_partial: bool = False) -> None:
        """Read these files in another thread, for `load` and `session` to find them read; what was read ahead and not asked for is let go of."""
        self._held.prefetch(paths, allow_partial)

    def _read(self, path: Path, lora: Lora, allow_partial: bool) -> reader.LoraFile:
        return self._held.read(path, lora.name, allow_partial)

    # one set of LoRAs ----------------------------------------------------------------------------------------------

    @contextmanager
    def session(
        self, loras: Sequence[tuple[str, Lora, Path]], *, allow_partial: bool = False, always: Collection[str] = (),
    ) -> Iterator[tuple[Receipt, ...]]:
        """Lay the factors of these LoRAs, as (name, LoRA, file), into stacks; every gate begins closed.

        always: names of those that are a part of the base while it lasts, in every row and place, the text encoders too: on at their weights
        whatever is done with the others, among which they are not counted (`names`). `use_always` writes their weights in the denoiser.

        Yields their receipts, in order. On leaving, every layer is as it was. Sessions nest: while an inner one lasts, its LoRAs
        alone are on the bare base, even where the outer ones are folded, and afterwards the outer ones are as they were.
        """
        for name, lora, _ in loras:
            self._model.check_blocks(name, lora)
        read = [self._read(path, lora, allow_partial) for _, lora, path in loras]
        laid, under = (self._model.lay([loras[k][0] for k in some], [loras[k][1] for k in some], [read[k].factors for k in some])
                       for some in ([k for k, (name, _, _) in enumerate(loras) if (name in always) is apart] for apart in (False, True)))
        laid.under = under if under.names else None
        for component, gates in under.gates.items():
            gates.use([lora.weight if component == self._denoiser or lora.text_weight is None else lora.text_weight for lora in under.loras])
        with self._model.attached(laid):
            yield tuple(file.receipt for file in read)

    # gates ---------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return self._model.current.names

    @property
    def always(self) -> tuple[str, ...]:
        """The names of those that are a part of the base while the session lasts."""
        under = self._model.current.under
        return under.names if under else ()

    def use_always(self, weights: Mapping[str, float]) -> None:
        """These weights of the denoiser's LoRAs that are a part of the base: for those that are on in some of the steps."""
        under = self._model.current.under
        if under is not None and self._denoiser in under.gates:
            self._model.prepare()
            under.gates[self._denoiser].use([float(weights[name]) for name in under.names])

    def use(self, weights: Mapping[str, float]) -> None:
        """Every row of the denoiser alike: these adapters at these weights, all others off."""
        vector, folded = self._vector(weights), self._model.current.fold
        if folded is not None and vector != folded.weights:
            raise RuntimeError("the weights of a fold cannot change while it lasts")
        gates = self._model.current.gates.get(self._denoiser)
        if gates is not None and folded is None:
            self._model.prepare()
            gates.use(vector)

    def use_text(self, weights: Mapping[str, float]) -> None:
        """The same for the text encoders."""
        vector = self._vector(weights)
        for component, gates in self._model.current.gates.items():
            if component != self._denoiser:
                gates.use(vector)

    def touches(self, name: str, component: str) -> bool:
        """True when this adapter changes that text encoder: only then is a prompt read anew for it."""
        return component in self._model.current.text_live[self.names.index(name)]

    def sizes(self) -> dict[str, tuple[float, str]]:
        """How large each adapter's update at weight 1 is at most, over the length of the weight it changes, and in which layer."""
        largest: dict[str, tuple[float, str]] = {}
        for component, stacks in self._model.current.stacks.items():
            for path, stack in stacks.items():
                weight = cast(Tensor, self._layers[component][path].weight)
                plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta
                length = float(torch.linalg.vector_norm(weight.detach().double().cpu())) if plain else weight.numel() ** 0.5
                values = weight.detach().double().cpu() if plain else None
                for k, name in enumerate(self.names):
                    largest[name] = max(largest.get(name, (0.0, "")), (stack.size(k, values) / max(length, 1e-30), f"{component}.{path}"))
        return largest

    def placeless(self) -> tuple[str, ...]:
        """The adapters that change layers of the denoiser whose rows have no place, as time embeddings: `regional` cannot bound them."""
        stacks = [stack for path, module in self._layers[self._denoiser].items()
                  if (stack := _attached(module)) is not None and getattr(self._axis(path), "kind", "") == "none"]
        return tuple(name for k, name in enumerate(self.names) if any(stack.changes(k) for stack in stacks))

    @contextmanager
    def rows(self, weights: Sequence[Mapping[str, float]]) -> Iterator[None]:
        """Row i of the denoiser's batch uses weights[i]. Rows with one adapter each pay that adapter's rank alone."""
        self._live("rows cannot differ")
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
        self._live("places cannot differ")
        with self._borrowed() as gates:
            if gates is not None:
                gates.use(self._vector(weights))
                gates.places, gates.ready, gates.mode = places, {}, "regional" if gates.mode != "off" else "off"
            yield

    @contextmanager
    def combined(self, combine: Combine, weights: Mapping[str, float], step: Step) -> Iterator[None]:
        """Each layer of the denoiser that an adapter touches hands `combine` its path, the step, its base output (rows, *out) and
        every adapter's gated output (K, rows, *out), in the order of `names`; what `combine` answers is the layer's output."""
        self._live("adapters cannot be combined")
        with self._borrowed() as gates:
            if gates is not None:
                gates.use(self._vector(weights))
                gates.combine, gates.step, gates.mode = combine, step, "combined" if gates.mode != "off" else "off"
            yield

    @contextmanager
    def routed(self, route: Route, weights: Mapping[str, float], step: Step) -> Iterator[None]:
        """Each layer of the denoiser that an adapter touches hands `route` its stack, the step, A x of its input (rows, places, P) and the
        gate (P,) that these weights would be; what `route` answers is the gate of every rank, as (P,), or by row and place."""
        self._live("adapters cannot be routed")
        with self._borrowed() as gates:
            if gates is not None:
                gates.use(self._vector(weights))
                gates.route, gates.step, gates.mode = route, step, "routed" if gates.mode != "off" else "off"
            yield

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """While it lasts, every layer of the denoiser that an adapter touches shows its stack and A x (rows, places, P) of its input for
        all adapters, whichever are live; `watch` may keep what it makes of them."""
        self._live("A x cannot be seen")
        with self._borrowed() as gates:
            if gates is not None:
                gates.watch = torch.compiler.disable(watch)
            yield

    def layer(self, path: str) -> nn.Linear | nn.Conv2d | None:
        """The denoiser's linear layer or convolution of this path."""
        layer = self._layers[self._denoiser].get(path)
        return layer if isinstance(layer, nn.Linear | nn.Conv2d) else None

    def stacks(self) -> Mapping[str, Stack]:
        """The layers of the denoiser in which this set of LoRAs has ranks, by path, with their factors."""
        return {path: stack for path, stack in self._model.current.stacks.get(self._denoiser, {}).items() if stack.ranked}

    def unranked(self) -> tuple[str, ...]:
        """The adapters that change layers by updates without small exact factors, as LoKr or DoRA: rank by rank nothing can be done to those."""
        stacks = [stack for by_path in self._model.current.stacks.values() for stack in by_path.values()]
        return tuple(name for k, name in enumerate(self.names) if any(stack.operators.of(k) for stack in stacks))

    @contextmanager
    def rewritten(self, rewrites: Mapping[str, Rewrite]) -> Iterator[None]:
        """While it lasts, the factors of these layers of the denoiser, by path, are what these functions make of them."""
        self._live("factors cannot be rewritten")
        with self._model.rewritten(rewrites):
            yield

    def constant(self, text: Mapping[str, float], like: Tensor) -> Iterator[tuple[str, str, Float[Tensor, "P in *kernel"], Float[Tensor, "out P"]]]:
        """(component, path, down, up) of every layer that this set of LoRAs touches, as factors of one LoRA: the denoiser's as `use` left
        them, the text encoders' at these weights. Weights, and the factors of blocks, are in `up`.

        On the device of `like` and in its number type, float32 or better. Raises RuntimeError where rows differ.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        by_layer: dict[tuple[str, str], list[tuple[Stack, Tensor]]] = {}
        for laid in (self._model.current, self._model.current.under or Laid()):
            for component, stacks in laid.stacks.items():
                gates, written = laid.gates[component], component == self._denoiser or laid is not self._model.current
                if written and gates.mode not in ("off", "one", "dense") or written and gates.rows > 1:
                    raise RuntimeError("gates that differ by row or place are those of no one LoRA")
                if written and gates.mode == "off":
                    continue
                table = gates.values.dense[0] if written else gates.factors * gates.factors.new_tensor(self._vector(text))
                for path, stack in (row for row in stacks.items() if row[1].ranked):
                    by_layer.setdefault((component, path), []).append((stack, table[stack.block]))
        for (component, path), parts in by_layer.items():
            downs, ups = zip(*(stack.constant(gate, like.device, dtype) for stack, gate in parts), strict=True)
            yield component, path, torch.cat(downs), torch.cat(ups, 1)

    def _live(self, what: str) -> None:
        if self._model.current.fold is not None:
            raise RuntimeError(f"{what} while the weights are folded")
        self._model.prepare()

    @contextmanager
    def _borrowed(self) -> Iterator[Gates | None]:
        """The denoiser's gates, as they were again afterwards; None when no LoRA touches it."""
        gates = self._model.current.gates.get(self._denoiser)
        state = gates.snapshot() if gates is not None else ()
        try:
            yield gates
        finally:
            if gates is not None:
                gates.restore(state)

    def _vector(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        strange = set(weights) - set(self.names)
        if strange:
            raise KeyError(f"no adapter named {sorted(strange)}; there are {list(self.names)}")
        return tuple(float(weights.get(name, 0.0)) for name in self.names)

    # folding -------------------------------------------------------------------------------------------------------

    @property
    def in_weights(self) -> bool:
        """True while the sum of this session is in the weights."""
        return self._model.current.fold is not None

    @property
    def foldable(self) -> bool:
        """True when the denoiser's weights are plain floating tensors that may be written: not quantized, not offloaded."""
        return folding.foldable(self._model.touched())

    def keep(self, free: folding.Free) -> folding.Keep:
        """Where the originals of a fold of this session would be kept, and why. free: bytes free on a device."""
        return folding.keep(*folding.size(self._model.touched()), free)

    @contextmanager
    def folded(self, weights: Mapping[str, float], device: torch.device | None = None) -> Iterator[None]:
        """Write W + sum w B A into the denoiser while the context lasts; the original values are kept and put back.

        Costs one copy of the touched weights, on `device` (None: beside them); a forward then costs what the bare base costs.
        """
        with self._borrowed() as gates, self._model.folded(Fold(self._model.touched(), self._vector(weights), device)):
            if gates is not None:
                gates.off()
            yield

    # training ------------------------------------------------------------------------------------------------------

    @contextmanager
    def training(
        self, names: Sequence[str], rank: int, layers: Mapping[str, Sequence[str]], device: torch.device | None = None,
    ) -> Iterator[Trainable]:
        """New adapters to be trained, one per name, all of one rank; yields their factors, which begin at zero.

        layers: component to layer paths. device: where the model computes (None: where the denoiser's weights are).
        """
        laid, trained = self._model.lay_trainable(names, rank, layers, device)
        with self._model.attached(laid):
            yield trained

    @contextmanager
    def in_turn(self, size: int, *, text: bool = False) -> Iterator[None]:
        """Adapter k alone, at weight 1, in rows k * size to (k + 1) * size of the denoiser, with `text` of a text
        encoder's prompts. Nothing is written to the device for it."""
        with self.kept():
            for component, gates in self._model.current.gates.items():
                if (component != self._denoiser) == text:
                    gates.in_turn(size)
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done to the gates while it lasts, they are afterwards as they were."""
        before = {gates: gates.snapshot() for gates in self._model.current.gates.values()}
        try:
            yield
        finally:
            for gates, state in before.items():
                gates.restore(state)

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing that recomputes with the gates of the forward pass, whatever they are by then.

        For `enable_gradient_checkpointing(gradient_checkpointing_func=adapters.checkpoint)`.
        """
        states = {gates: gates.snapshot() for gates in self._model.current.gates.values()}

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
