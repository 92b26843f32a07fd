"""The attention seam: record what chosen layers attend to, or override it, without replacing any processor.

Every eager processor of diffusers ends in `F.scaled_dot_product_attention`; one TorchFunctionMode sees q, k, v of the chosen
layers after LoRA, norm and rotary embedding. All other layers stay on the fused kernel. A layer that was claimed and not seen raises.

Overrides of one layer stack: the one entered last is called first and hands on to the one entered before it, the first to the
kernel. An override may append keys and values, always after those that are there, and must carry on the bias that it is given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn, overrides
from torch.overrides import TorchFunctionMode


class Attention(NamedTuple):
    """One layer's attention, softmax(query @ key^T * scale + bias) @ value, as `scaled_dot_product_attention` computes it.

    layer: the module's path. There may be more keys than queries. bias: what is added to the logits, broadcast to (rows, heads, q, k),
    -inf where a key is masked; None: nothing. scale: None is 1 / sqrt(d).
    """

    layer: str
    query: Float[Tensor, "rows heads q d"]
    key: Float[Tensor, "rows heads k d"]
    value: Float[Tensor, "rows heads k e"]
    bias: Float[Tensor, "rows_or_1 heads_or_1 q_or_1 k"] | None = None
    scale: float | None = None

    def logits(self) -> Float[Tensor, "rows heads q k"]:
        """Before the softmax, in float32 (float64 stays)."""
        wide = torch.promote_types(self.query.dtype, torch.float32)
        query = self.query.to(wide) * (self.scale or self.query.shape[-1] ** -0.5)
        logits = query @ self.key.to(wide).transpose(-1, -2)
        return logits if self.bias is None else logits + self.bias.to(wide)


Attend = Callable[[Attention], Tensor]  # -> (rows, heads, q, e)
AttentionOverride = Callable[[Attention, Attend], Tensor]  # what is computed, and what computes it from here on


_ADVICE = "the model's attention backend does not call scaled_dot_product_attention; set the native one"


class AllRecorded(Exception):
    """Every chosen layer was recorded and nothing after them is needed: ends the forward early. Not an error; the caller catches it."""


_BIRTHS = count()


class _Seam(TorchFunctionMode):
    """Calls an override for attention while one of the chosen layers runs; anything else goes its way. born: its place among all seams.

    It is entered by the layer's pre-hook and left by its hook, so that no other layer pays for it. Seams that are entered for the same
    layer lie on torch's stack of modes: attention asked for inside one reaches the seam below it, or the kernel.
    """

    def __init__(self, override: AttentionOverride) -> None:
        super().__init__()
        self.override = override
        self.layer = ""
        self.born = next(_BIRTHS)

    def begin(self, layer: str) -> None:
        self.layer = layer
        self.__enter__()

    def end(self) -> None:
        self.layer = ""
        self.__exit__(None, None, None)

    def leave(self) -> None:
        """Take it off this thread's stack of modes: torch calls no hook of a layer that Ctrl-C interrupted, so `end` may not have run."""
        above = []
        while any(mode is self for mode in overrides._get_current_function_mode_stack()):
            if (mode := overrides._pop_mode()) is not self:
                above.append(mode)
        for mode in reversed(above):
            overrides._push_mode(mode)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        query, key, value, scale = call.pop("query"), call.pop("key"), call.pop("value"), call.pop("scale", None)
        bias = _bias(call.pop("attn_mask", None), call.pop("is_causal", False), query, key)

        def below(attention: Attention) -> Tensor:
            more = {} if attention.scale is None else {"scale": attention.scale}
            return func(attention.query, attention.key, attention.value, attn_mask=attention.bias, **more, **call)

        return self.override(Attention(self.layer, query, key, value, bias, scale), below)


def _bias(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask of any kind as what is added to the logits."""
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask[(None,) * (4 - mask.ndim)]


class _Hook:
    """A layer's hook that begins a seam, or without the layer's name ends it."""

    def __init__(self, seam: _Seam, layer: str = "") -> None:
        self.seam, self._layer = seam, layer

    def __call__(self, *_: object) -> None:
        if self._layer:
            self.seam.begin(self._layer)
        else:
            self.seam.end()


def mark() -> int:
    """Now, for `abandon`."""
    return next(_BIRTHS)


def abandon(module: nn.Module, since: int) -> None:
    """Take off whatever overrides that began since then have left in this module and on this thread: those of contexts that were
    interrupted while they began or ended. Contexts that are closed later have nothing to undo any more."""
    for inner in module.modules():
        for hooks in (inner._forward_pre_hooks, inner._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Hook) and hook.seam.born >= since:
                    hooks.pop(key, None)
                    inner._forward_hooks_always_called.pop(key, None)
    for mode in overrides._get_current_function_mode_stack():
        if isinstance(mode, _Seam) and mode.born >= since:
            mode.leave()


@contextmanager
def override(module: nn.Module, layers: Sequence[str], function: AttentionOverride, *, whole: bool = True) -> Iterator[None]:
    """While it lasts, these layers' attention is what `function` returns. Raises RuntimeError at its end when one never ran.

    layers: names of attention modules inside `module`. Contexts on the same layers stack, as the top of this file says. whole: False
    where a part of the module is run again, as in gradient checkpointing: layers may then stay unseen.
    """
    seen: set[str] = set()

    def counted(attention: Attention, attend: Attend) -> Tensor:
        seen.add(attention.layer)
        return function(attention, attend)

    seam, handles = _Seam(counted), []
    try:
        for name in layers:
            inner = module.get_submodule(name)
            handles.append(inner.register_forward_pre_hook(_Hook(seam, name)))
            handles.append(inner.register_forward_hook(_Hook(seam), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        seam.leave()
    if whole and (missed := [name for name in layers if name not in seen]):
        raise RuntimeError(f"attention of {len(layers)} layers was to be seen, and of {len(missed)} it was not (the first is {missed[0]}): {_ADVICE}")


class AttentionMaps:
    """Attention probabilities of the chosen layers, averaged over heads and layers, of every forward since the last `read`."""

    def __init__(
        self, layers: Sequence[str], rows: Callable[[int], Sequence[int]], grid: tuple[int, int], early: bool, joint: str
    ) -> None:
        self._layers, self._rows, self._grid, self._early, self._joint = tuple(layers), rows, grid, early, joint
        self._seen: dict[str, list[Tensor]] = {}

    def read(self) -> Float[Tensor, "rows L h w"]:
        """The maps, float32 (float64 stays), with their graph, row after row; then forgets them.

        The rows of several forwards stand one after the other, as do those of one layer that attends several times in a forward (to
        each segment of a regional prompt apart). Raises RuntimeError when a chosen layer was not seen, or not as often as the others.
        """
        if set(self._seen) != set(self._layers) or len({len(calls) for calls in self._seen.values()}) > 1:
            raise RuntimeError(f"attention of {len(self._layers)} layers was to be recorded equally often, and {len(self._seen)} were seen: {_ADVICE}")
        maps = torch.stack([torch.cat(self._seen[name]) for name in self._layers]).mean(0)
        self._seen = {}
        return maps.unflatten(-1, self._grid)

    def record(self, attention: Attention, attend: Attend) -> Tensor:
        """The override that records a layer's map and leaves its output as it is."""
        rows = list(self._rows(attention.query.shape[0]))
        bias = attention.bias
        if bias is not None and bias.shape[0] > 1:
            bias = bias[rows]
        chosen = attention._replace(query=attention.query[rows], key=attention.key[rows], value=attention.value[rows], bias=bias)
        seen = self._of_words(chosen) if self._joint else chosen.logits().softmax(-1).mean(1).transpose(1, 2)
        self._seen.setdefault(attention.layer, []).append(seen)
        if self._early and set(self._seen) == set(self._layers) and len({len(calls) for calls in self._seen.values()}) == 1:
            raise AllRecorded
        return attend(attention)

    def _of_words(self, attention: Attention) -> Float[Tensor, "rows L places"]:
        """How much each token of the prompt attends to each place, head after head: the whole table would not fit at FLUX's size."""
        text, image = joint_slices(attention.query.shape[-2], self._grid[0] * self._grid[1], self._joint)
        bias, heads = attention.bias, attention.query.shape[1]
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[..., text, :]
        total = attention.query.new_zeros(())
        for head in range(heads):
            just = slice(head, head + 1)
            alone = attention._replace(query=attention.query[:, just, text], key=attention.key[:, just],
                                       bias=bias[:, just] if bias is not None and bias.shape[1] > 1 else bias)
            total = total + alone.logits()[:, 0].softmax(-1)[..., image]
        return total / heads


def joint_slices(length: int, places: int, joint: str) -> tuple[slice, slice]:
    """The prompt's and the picture's part of a joint sequence. Raises RuntimeError when the picture is longer than it."""
    words = length - places
    if words <= 0:
        raise RuntimeError(f"a joint attention has {length} tokens, and the picture alone should have {places}")
    return (slice(0, words), slice(words, length)) if joint == "text" else (slice(places, length), slice(0, places))


@contextmanager
def recorded(
    module: nn.Module, layers: Sequence[str], *, grid: tuple[int, int], rows: Callable[[int], Sequence[int]], early: bool = False,
    joint: str = "",
) -> Iterator[AttentionMaps]:
    """Record what the chosen layers attend to; their output is untouched, and the maps have their gradient.

    grid: (h, w) of the layers' queries. rows: which rows of a forward of so many rows are recorded (the positive ones).
    early: a forward ends with AllRecorded, for the caller to catch, as soon as all layers were seen. joint: as Backbone.joint; in
    joint attention a map is where the word's own query attends. Overrides entered inside this context are in the maps.
    """
    maps = AttentionMaps(layers, rows, grid, early, joint)
    with override(module, layers, maps.record):
        yield maps


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No parameter asks for a gradient while it lasts: what a gradient by the latents or by adapters alone needs."""
    parameters = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in parameters:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in parameters:
            weight.requires_grad_(True)
