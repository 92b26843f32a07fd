"""Banks: the keys and values of condition tokens, computed once by a forward of their own and appended to every other one's.

A condition is tokens with their own position ids, their own time and their own LoRA, that attend to each other alone. Run through the
stock transformer by themselves (no prompt, their time, their LoRA on) they leave their keys and values, after norm and rotary embedding, in
a bank; appended to a denoising forward's own, these give what one masked forward over everything would give, without its cost and
without a mask. EasyControl (arXiv 2503.07027: t = 0, a LoRA on q, k, v and on the output of the projection), OminiControl2 (2503.08280:
t = 0, an ordinary LoRA) and FLUX.2-klein's references (no LoRA) are settings of it. All of it has its gradient: training uses the same two
contexts, and `Banks.checkpoint` for gradient checkpointing.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from composition.hooks import attention
from composition.hooks.attention import Attend, Attention, AttentionOverride
from composition.loras import condition
from composition.loras.kinds.lora import Factors


class Update(NamedTuple):
    """A condition's own change of one linear layer: scale * up @ down of the layer's input, or, with of_output, of its output, bias included."""

    down: Float[Tensor, "r in"]
    up: Float[Tensor, "out r"]
    scale: float = 1.0
    of_output: bool = False

    def __call__(self, x: Float[Tensor, "*rows in"], y: Float[Tensor, "*rows out"]) -> Float[Tensor, "*rows out"]:
        read = y if self.of_output else x.to(y)
        return y + F.linear(F.linear(read, self.down.to(y)), self.up.to(y)) * self.scale


Change = Callable[[Tensor, Tensor], Tensor]  # a layer's input and output -> its output: an Update, or anything that is called like one


class Stored(NamedTuple):
    """One layer's keys and values, as its attention had them: after LoRA, norm and rotary embedding."""

    key: Float[Tensor, "rows heads N d"]
    value: Float[Tensor, "rows heads N e"]


@dataclass(eq=False)
class Bank:
    """What one condition leaves in every attention layer; complete once the context that fills it has ended."""

    layers: dict[str, Stored] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return next(iter(self.layers.values())).key.shape[0]

    @property
    def tokens(self) -> int:
        return next(iter(self.layers.values())).key.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.itemsize for stored in self.layers.values() for part in stored)


class Appended(NamedTuple):
    """A bank as a forward reads it.

    strength: how much its tokens count, as if there were that many of each: log(strength) is added to the logits of their columns; at 0
    the bank is not appended. rows: which of the bank's rows each row of the forward reads; None: the same one, or the only one.
    """

    bank: Bank
    strength: float = 1.0
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class _Act:
    """What is done while a context lasts: updates of layers, by path, and an override of attention. repeat: that for a recomputation."""

    updates: Mapping[str, Change]
    override: AttentionOverride
    repeat: AttentionOverride


class _Updating:
    """A linear layer's hook that updates its output while its act is acting. born: as of a seam, for `abandon`."""

    def __init__(self, banks: "Banks", act: _Act, path: str, update: Change) -> None:
        self.banks, self.act, self.path, self.update = banks, act, path, update
        self.ran, self.born = False, attention.mark()

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.act not in self.banks._acting:
            return None
        self.ran = True
        return self.update(inputs[0], output)


def abandon(denoiser: nn.Module, since: int) -> None:
    """Take off the updates that contexts begun since then (`attention.mark`) have left, interrupted; `attention.abandon` takes the rest."""
    for module in denoiser.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Updating) and hook.born >= since:
                module._forward_hooks.pop(key, None)


class Banks:
    """The attention layers of one denoiser that banks are of: those that read the prompt (`Backbone.prompt_attention`)."""

    def __init__(self, denoiser: nn.Module, layers: Sequence[str]) -> None:
        self.denoiser, self.layers = denoiser, tuple(layers)
        self._acting: tuple[_Act, ...] = ()

    @contextmanager
    def extracting(self, updates: Mapping[str, Change] | None = None) -> Iterator[Bank]:
        """While it lasts, one forward of the condition's tokens alone (`Backbone.read_alone`) fills the bank that is yielded.

        updates: the condition's LoRA, by path of the linear layer. Raises RuntimeError at its end for an attention layer or an updated one
        that did not run. A seam for keys and values of nothing else: use it inside no other override of the same layers.
        """
        if self._acting:
            raise RuntimeError("a bank cannot be filled while others are read or filled: its tokens attend to themselves alone")
        bank = Bank()

        def keep(call: Attention, attend: Attend) -> Tensor:
            if call.layer in bank.layers:
                raise RuntimeError(f"{call.layer} ran twice: a bank is filled by one forward")
            if call.key.shape[-2] != call.query.shape[-2]:
                raise RuntimeError(f"{call.layer} has keys that are not of the condition's own tokens")
            bank.layers[call.layer] = Stored(call.key, call.value)
            return attend(call)

        with self._hooked(_Act(updates or {}, keep, lambda call, attend: attend(call))):
            yield bank

    @contextmanager
    def appended(self, banks: Sequence[Appended], *, skips: Callable[[str], bool] = lambda path: False) -> Iterator[None]:
        """While it lasts, every attention layer reads these banks too, in whichever order they are; those of strength 0 are left out.

        Without any left the denoiser is the stock one. skips: says of a layer's path that it will not run. Raises RuntimeError for another
        that did not run, or that a bank lacks.
        """
        banks = [item for item in banks if item.strength > 0]
        if not banks:
            yield
            return
        for item in banks:
            if missed := [name for name in self.layers if name not in item.bank.layers]:
                raise RuntimeError(f"a bank lacks {len(missed)} of {len(self.layers)} layers (the first is {missed[0]})")

        def append(call: Attention, attend: Attend) -> Tensor:
            return attend(_with(call, banks))

        with self._hooked(_Act({}, append, append), skips=skips):
            yield

    def checkpoint(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing that recomputes with the updates and banks of the forward, whichever contexts are open by then.

        For `denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=banks.checkpoint)`.
        """
        then = self._acting
        kwargs.pop("use_reentrant", None)
        return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (ExitStack(), self._again(then)), **kwargs)

    @contextmanager
    def _again(self, acts: Sequence[_Act]) -> Iterator[None]:
        """Those that were open then, and no others. A part of the denoiser is recomputed: layers may stay unseen."""
        now, self._acting = self._acting, ()
        try:
            with ExitStack() as stack:
                for act in acts:
                    stack.enter_context(self._hooked(_Act(act.updates, act.repeat, act.repeat), whole=False))
                yield
        finally:
            self._acting = now

    @contextmanager
    def _hooked(self, act: _Act, *, whole: bool = True, skips: Callable[[str], bool] = lambda path: False) -> Iterator[None]:
        """The hooks of an act, which do nothing while it is not acting. whole: every layer has to run."""
        before, handles, hooks = self._acting, [], []

        def override(call: Attention, attend: Attend) -> Tensor:
            return act.override(call, attend) if act in self._acting else attend(call)

        try:
            self._acting = (*before, act)
            for path, update in act.updates.items():
                hooks.append(_Updating(self, act, path, update))
                handles.append(self.denoiser.get_submodule(path).register_forward_hook(hooks[-1]))
            with attention.override(self.denoiser, [name for name in self.layers if not skips(name)], override, whole=whole):
                yield
        finally:
            self._acting = before
            for handle in handles:
                handle.remove()
        if whole and (missed := [hook.path for hook in hooks if not hook.ran]):
            raise RuntimeError(f"{len(missed)} of the {len(act.updates)} layers that a condition's LoRA changes did not run (the first is {missed[0]})")


def _with(call: Attention, banks: Sequence[Appended]) -> Attention:
    """An attention with these banks' keys and values after its own, and with the bias that their strengths amount to."""
    keys, values = [call.key], [call.value]
    for item in banks:
        key, value = (_rows(part, item.rows, call.query.shape[0]).to(call.key) for part in item.bank.layers[call.layer])
        keys.append(key)
        values.append(value)
    bias = call.bias
    if bias is not None or any(item.strength != 1 for item in banks):
        bias = call.key.new_zeros(1, 1, 1, 1) if bias is None else bias
        columns = [bias.new_full((1, 1, 1, item.bank.tokens), math.log(item.strength)) for item in banks]
        own = bias.expand(*bias.shape[:-1], call.key.shape[-2])
        bias = torch.cat([own, torch.cat(columns, -1).expand(*bias.shape[:-1], -1)], -1)
    return call._replace(key=torch.cat(keys, -2), value=torch.cat(values, -2), bias=bias)


def _rows(part: Float[Tensor, "rows heads N d"], rows: Sequence[int] | None, count: int) -> Float[Tensor, "count heads N d"]:
    """The rows of a bank that a forward of `count` rows reads. Raises RuntimeError when they are not as many."""
    if rows is not None:
        part = part[list(rows)]
    if part.shape[0] not in (1, count):
        raise RuntimeError(f"a bank of {part.shape[0]} rows is to be read by a forward of {count}: name the row of each")
    return part.expand(count, -1, -1, -1)


def easycontrol(factors: Mapping[str, Factors], weight: float = 1.0) -> dict[str, Update]:
    """A condition LoRA's factors (`composition.loras.condition`) as updates: that of the projection acts on its output."""
    return {path: Update(layer.stored_down, layer.stored_up, weight * layer.scale, condition.of_output(path)) for path, layer in factors.items()}
