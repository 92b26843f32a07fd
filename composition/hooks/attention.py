"""The attention seam: see what chosen cross-attention layers look at, or lead them by masks, without replacing any processor.

Every eager processor of diffusers ends in `F.scaled_dot_product_attention`; one TorchFunctionMode sees q, k, v of the chosen
layers after LoRA and norm. All other layers stay on the fused kernel. A layer that was claimed and not seen raises.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Attend = Callable[..., Tensor]
# (layer's name, the fused kernel, query, key, value, the call's other arguments) -> the layer's output
AttentionOverride = Callable[[str, Attend, Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]


class Enough(Exception):
    """Every chosen layer was seen: nothing after them is needed. Not an error; `watched` catches it."""


class _Seam(TorchFunctionMode):
    """Calls `led` for attention while one of the chosen layers runs; anything else goes its way.

    It is entered by the layer's pre-hook and left by its hook, so that no other layer pays for it.
    """

    def __init__(self, led: AttentionOverride) -> None:
        super().__init__()
        self.led = led
        self.inside = ""

    def begin(self, name: str) -> None:
        self.inside = name
        self.__enter__()

    def end(self) -> None:
        self.inside = ""
        self.__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :]))[:3]
            return self.led(self.inside, func, query, key, value, {**_named(args[3:]), **kwargs})
        return func(*args, **kwargs)


def _named(rest: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False))


@contextmanager
def edit(module: nn.Module, layers: Sequence[str], led: AttentionOverride) -> Iterator[None]:
    """While it lasts, these layers' attention is what `led` answers. Raises RuntimeError at its end when one never ran.

    layers: names of attention modules inside `module`.
    """
    seen: set[str] = set()

    def noting(name: str, *rest: Any) -> Tensor:
        seen.add(name)
        return led(name, *rest)

    seam, handles = _Seam(noting), []
    try:
        for name in layers:
            inner = module.get_submodule(name)
            handles.append(inner.register_forward_pre_hook(lambda *_, name=name: seam.begin(name)))
            handles.append(inner.register_forward_hook(lambda *_: seam.end(), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
    if missed := [name for name in layers if name not in seen]:
        raise RuntimeError(f"attention of {len(layers)} layers was to be seen, and of {len(missed)} it was not (the first is {missed[0]}): "
                           "the model's attention backend does not call scaled_dot_product_attention; set the native one")


class Maps:
    """Attention probabilities of the chosen layers, averaged over heads and layers: `read` after every forward."""

    def __init__(
        self, layers: Sequence[str], rows: Callable[[int], Sequence[int]], grid: tuple[int, int], early: bool, joint: str
    ) -> None:
        self._layers, self._rows, self._grid, self._early, self._joint = tuple(layers), rows, grid, early, joint
        self._seen: dict[str, Tensor] = {}

    def read(self) -> Float[Tensor, "rows L h w"]:
        """The maps of the last forward, float32 (float64 stays), with their graph; then forgets them."""
        if set(self._seen) != set(self._layers):
            raise RuntimeError(f"{len(self._layers)} layers were to be seen, {len(self._seen)} were")
        maps = torch.stack([self._seen[name] for name in self._layers]).mean(0)
        self._seen = {}
        return maps.unflatten(-1, self._grid)

    def note(self, name: str, attend: Attend, query: Tensor, key: Tensor, value: Tensor, rest: Mapping[str, Any]) -> Tensor:
        rows = list(self._rows(query.shape[0]))
        wide = torch.promote_types(query.dtype, torch.float32)
        scale = rest.get("scale") or query.shape[-1] ** -0.5
        asking, asked = query[rows].to(wide) * scale, key[rows].to(wide)
        self._seen[name] = self._between(asking, asked) if self._joint else (asking @ asked.transpose(-1, -2)).softmax(-1).mean(1).transpose(1, 2)
        if self._early and len(self._seen) == len(self._layers):
            raise Enough
        return attend(query, key, value, **rest)


    def _between(self, query: Tensor, key: Tensor) -> Float[Tensor, "rows L places"]:
        """How much each token of the prompt looks at each place, head after head: the whole table would not fit at FLUX's size."""
        text, image = halves(query.shape[-2], self._grid[0] * self._grid[1], self._joint)
        total = query.new_zeros(query.shape[0], text.stop - text.start, image.stop - image.start)
        for head in range(query.shape[1]):
            total = total + (query[:, head, text] @ key[:, head].transpose(-1, -2)).softmax(-1)[..., image]
        return total / query.shape[1]


def halves(length: int, places: int, joint: str) -> tuple[slice, slice]:
    """The prompt's and the picture's part of a joint sequence. Raises RuntimeError when the picture is longer than it."""
    words = length - places
    if words <= 0:
        raise RuntimeError(f"a joint attention has {length} tokens, and the picture alone should have {places}")
    return (slice(0, words), slice(words, length)) if joint == "text" else (slice(places, length), slice(0, places))


@contextmanager
def watch(
    module: nn.Module, layers: Sequence[str], *, grid: tuple[int, int], rows: Callable[[int], Sequence[int]], early: bool = False,
    joint: str = "",
) -> Iterator[Maps]:
    """See what the chosen cross-attention layers look at; their output is untouched, and the maps have their gradient.

    grid: (h, w) of the layers' queries. rows: which rows of a forward of so many rows are recorded (the positive ones).
    early: a forward ends with Enough, for the caller to catch, as soon as all layers were seen. joint: as Backbone.joint; in
    joint attention a map is where the word's own query looks.
    """
    maps = Maps(layers, rows, grid, early, joint)
    with edit(module, layers, maps.note):
        yield maps


def parts(query: Tensor, key: Tensor, value: Tensor, count: int, attend: Attend, rest: Mapping[str, Any]) -> Float[Tensor, "N rows heads q d"]:
    """Attention to each of `count` equal parts of the keys apart."""
    pairs = zip(key.chunk(count, dim=-2), value.chunk(count, dim=-2), strict=True)
    return torch.stack([attend(query, k, v, **rest) for k, v in pairs])


@contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """No parameter asks for a gradient while it lasts: what a gradient by the latents or by adapters alone needs."""
    asked = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in asked:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)
