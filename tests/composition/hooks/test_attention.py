"""The attention seam against attention written out, the token-gated adapters against deltas added place by place."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from composition.adapters.adapters import _attached
from composition.backbones.base import Axis
from composition.hooks import attention, masks
from composition.hooks.regional import joined, regional
from tests.composition import laws

SIZES = [(16, 16), (12, 20), (20, 10)]


@pytest.fixture(params=["sd", "sdxl"])
def opened(request, engines, lora_files):
    """A backbone with three LoRAs in a session, and their conditionings of one prompt."""
    engine = engines[request.param]
    loras = laws.loras_of(lora_files[request.param])
    found = [(name, lora, engine.find(lora.source)) for name, lora in zip("abc", loras, strict=True)]
    with engine.adapters.session(found), torch.no_grad():
        yield engine.backbone, engine.adapters


def latents(size, pictures=1, seed=3):
    return torch.randn(pictures, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encode(opened, text, **use):
    backbone, adapters = opened
    adapters.use_text(use)
    try:
        return backbone.encode([text], ["an owl"])
    finally:
        adapters.use_text({})


def written_out(backbone, layers, call):
    """Mean over layers and heads of softmax(q k^T / sqrt d), from what the layers' own projections answered."""
    kept, handles = {}, []
    for name in layers:
        for part in ("to_q", "to_k"):
            module = backbone.denoiser.get_submodule(f"{name}.{part}")
            handles.append(module.register_forward_hook(lambda m, i, o, key=(name, part): kept.__setitem__(key, o.clone())))
    call()
    for handle in handles:
        handle.remove()
    found = []
    for name in layers:
        heads = backbone.denoiser.get_submodule(name).heads
        q, k = (kept[name, part].unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
        found.append(((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1).mean(1))
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("size", SIZES)
def test_maps_are_attention_written_out_on_any_grid(opened, size):
    """7: positions row by row whatever the shape; LoRAs are in them; the prediction is untouched."""
    backbone, adapters = opened
    layers, cond, x = backbone.localizing_layers(), encode(opened, "the fox and the owl"), latents(size, 2)
    level = backbone.prompt_attention()[layers[0]]
    grid = tuple(-(-side // 2**level) for side in size)
    adapters.use({"a": 1.0})
    call = lambda: backbone.denoise(x, torch.tensor(500), cond)  # noqa: E731
    plain = call()
    expected = written_out(backbone, layers, call)
    with attention.recorded(backbone.denoiser, layers, grid=grid, rows=range) as maps:
        assert torch.equal(call(), plain)
        seen = maps.read()
    assert seen.shape == (4, cond.values["text"].shape[2], *grid)
    laws.same(seen, expected.unflatten(1, grid).permute(0, 3, 1, 2), 1e-12)
    assert torch.allclose(seen.sum(1), torch.ones(4, *grid, dtype=torch.float64))
    with attention.recorded(backbone.denoiser, layers, grid=grid, rows=lambda count: [2, 3]) as maps:
        call()
        laws.same(maps.read(), seen[2:], 1e-12)  # the positive rows of two pictures
    adapters.use({})
    laws.differ(seen, written_out(backbone, layers, call).unflatten(1, grid).permute(0, 3, 1, 2))


def test_6_a_pass_that_ends_early_has_the_same_maps_and_gradient(opened):
    backbone, adapters = opened
    layers, cond = backbone.localizing_layers(), encode(opened, "the fox").positive()
    level, ran = backbone.prompt_attention()[layers[0]], []
    grid = (16 // 2**level,) * 2
    handle = backbone.denoiser.conv_out.register_forward_hook(lambda *_: ran.append(1))
    adapters.use({"a": 1.0, "b": 0.5})
    found = []
    for early in (False, True):
        x = latents((16, 16)).requires_grad_()
        with torch.enable_grad(), attention.recorded(backbone.denoiser, layers, grid=grid, rows=range, early=early) as maps:
            try:
                backbone.denoise(x, torch.tensor(500), cond)
            except attention.AllRecorded:
                assert early
            seen = maps.read()
            found.append((seen.detach(), torch.autograd.grad(seen[:, 1].square().sum(), x)[0]))
    handle.remove()
    assert len(ran) == 1
    assert torch.equal(found[0][0], found[1][0])
    laws.same(found[1][1], found[0][1], 1e-12)
    assert found[0][1].abs().max() > 0


def test_a_backend_that_is_not_seen_is_told(opened):
    """Coverage: a processor that does not end in scaled_dot_product_attention raises, and nothing stays behind."""
    backbone, _ = opened
    layers, cond = backbone.localizing_layers(), encode(opened, "the fox")
    before = {name: len(module._forward_hooks) for name, module in backbone.denoiser.named_modules()}
    module = backbone.denoiser.get_submodule(layers[0])
    kept = module.processor
    module.processor = AttnProcessor()
    try:
        with pytest.raises(RuntimeError, match="native"), attention.recorded(backbone.denoiser, layers, grid=(8, 8), rows=range):
            backbone.denoise(latents((16, 16)), torch.tensor(500), cond)
    finally:
        module.processor = kept
    assert before == {name: len(module._forward_hooks) for name, module in backbone.denoiser.named_modules()}


def test_the_coarsest_grid_with_words_is_watched():
    """At the true sizes: five layers of 16 x 16 at 512 pixels for SD1.5, twelve of 32 x 32 at 1024 for SDXL."""
    import json
    from pathlib import Path
    from types import SimpleNamespace

    from diffusers import UNet2DConditionModel

    import composition
    from composition.backbones.unet import UNetBackbone

    for family, config, count, level in (("sd", "sd15", 5, 2), ("sdxl", "sdxl", 12, 2)):
        path = Path(composition.__file__).parent / f"backbones/loading/configs/{config}/unet/config.json"
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(json.loads(path.read_text()))
        backbone = UNetBackbone(SimpleNamespace(unet=unet, scheduler=None), family)
        watched = backbone.localizing_layers()
        assert len(watched) == count and {backbone.prompt_attention()[name] for name in watched} == {level}
    assert watched[0].startswith("up_blocks.0.attentions.0.transformer_blocks.2.")


# LoRAs at their places -----------------------------------------------------------------------------------------------


class _Parted:
    """Cross-attention of N texts with N sets of deltas, blended by shares: written out for one layer, as a processor."""

    def __init__(self, deltas, shares):
        self.deltas, self.shares = deltas, shares  # {"to_k": [N deltas or None], ...}, (N, places)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        heads = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        query, out = heads(attn.to_q(hidden_states)), 0
        for n, text in enumerate(encoder_hidden_states.chunk(len(self.shares), 1)):
            key, value = (getattr(attn, part)(text) + (text @ d.T if (d := self.deltas[part][n]) is not None else 0) for part in ("to_k", "to_v"))
            part = F.softmax(query @ heads(key).transpose(-1, -2) / query.shape[-1] ** 0.5, -1) @ heads(value)
            out = out + part * self.shares[n][None, None, :, None]
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def _reference(backbone, adapters, segments, shares, weights, call):
    """The regional evaluation, each layer's deltas dense and added place by place, without any gate or seam of ours."""
    unet, names, handles, kept = backbone.denoiser, adapters.names, [], {}
    on = torch.tensor([[float(name in segment) for name in names] for segment in segments], dtype=torch.float64)
    stacks = {path: (module, stack) for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
              and (stack := _attached(module)) is not None}
    dense = {path: [stack.delta([weights.get(name, 0.0) if name == one else 0.0 for name in names], torch.device("cpu"), torch.float64) if stack.touches(k) else None
                    for k, one in enumerate(names)] for path, (_, stack) in stacks.items()}
    grid = lambda level, size: masks.resized(shares[None], tuple(-(-side // 2**level) for side in size))[0]  # noqa: E731

    def add(module, args, out, path):
        axis, x = backbone.axis(path), args[0]
        if axis.kind == "text":
            return out
        total = out
        for k, delta in enumerate(dense[path]):
            if delta is None:
                continue
            step = F.conv2d(x, delta, None, module.stride, module.padding) if isinstance(module, nn.Conv2d) else x @ delta.T
            if axis.kind == "grid":
                place = torch.einsum("nhw,n->hw", grid(axis.level, shares.shape[-2:]), on[:, k])
                step = step * (place[None, None] if step.ndim == 4 else place.flatten()[None, :, None])
            total = total + step * (1.0 if axis.kind == "grid" else float(on[:, k].max()))
        return total

    for path, (module, _) in stacks.items():
        handles.append(module.register_forward_hook(lambda m, a, o, path=path: add(m, a, o, path)))
    for name, level in backbone.prompt_attention().items():
        module = unet.get_submodule(name)
        kept[module] = module.processor
        of = {part: [None if f"{name}.{part}" not in dense else sum((d for k, d in enumerate(dense[f"{name}.{part}"]) if d is not None and on[n, k]),
                                                                    torch.zeros(1, dtype=torch.float64)) for n in range(len(segments))]
              for part in ("to_k", "to_v")}  # fmt: skip
        of = {part: [d if d is not None and d.ndim == 2 else None for d in found] for part, found in of.items()}
        module.processor = _Parted(of, grid(level, shares.shape[-2:]).flatten(1))
    try:
        adapters.use({})
        return call()
    finally:
        for handle in handles:
            handle.remove()
        for module, processor in kept.items():
            module.processor = processor


@pytest.mark.parametrize("size", SIZES)
def test_placed_is_deltas_added_place_by_place(opened, size):
    """Two concepts and a LoRA that is everywhere, shares of any value, each segment with a text of its own."""
    backbone, adapters = opened
    segments, weights = [("c",), ("a", "c"), ("b", "c")], {"a": 1.0, "b": 0.7, "c": 0.5}
    conds = [encode(opened, text) for text in ("the fox and the owl", "the fox", "the owl on a thin moon")]
    shares = torch.rand(3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shares = shares / shares.sum(0)
    x, cond = latents(size), joined(conds, shares[None])
    call = lambda: backbone.denoise(x, torch.tensor(400), cond)  # noqa: E731
    with regional(backbone, adapters, weights, segments, shares[None], rows=2, size=size, tokens=conds[0].values["text"].shape[2]):
        found = call()
    laws.same(found, _reference(backbone, adapters, segments, shares, weights, call), 1e-9)


def _segments(opened, size):
    """Shares of three segments, their prompts' conditioning joined, the regional context's arguments, and the tokens of each."""
    backbone, adapters = opened
    conds = [encode(opened, text) for text in ("the fox and the owl", "the fox", "the owl on a thin moon")]
    shares = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shares = shares / shares.sum(1, keepdim=True)
    tokens = conds[0].values["text"].shape[2]
    context = lambda: regional(backbone, adapters, {"a": 1.0, "b": 0.7}, [(), ("a",), ("b",)], shares, rows=2, size=size, tokens=tokens)  # noqa: E731
    return shares, joined(conds, shares), context, tokens


def test_maps_are_recorded_under_a_regional_override(opened):
    """Each segment's attention to its own prompt, segment after segment; the output is that of the regional override alone."""
    backbone, _ = opened
    layers, x = backbone.localizing_layers(), latents((16, 16))
    _, cond, context, tokens = _segments(opened, (16, 16))
    grid = (16 // 2 ** backbone.prompt_attention()[layers[0]],) * 2
    call = lambda: backbone.denoise(x, torch.tensor(400), cond)  # noqa: E731
    with context():
        alone = call()
    kept, handles = {}, []
    for name in layers:
        for part in ("to_q", "to_k"):
            module = backbone.denoiser.get_submodule(f"{name}.{part}")
            handles.append(module.register_forward_hook(lambda m, i, o, key=(name, part): kept.__setitem__(key, o.clone())))
    with attention.recorded(backbone.denoiser, layers, grid=grid, rows=range) as maps, context():
        assert torch.equal(call(), alone)
        seen = maps.read()
    for handle in handles:
        handle.remove()
    each = []
    for name in layers:
        heads = backbone.denoiser.get_submodule(name).heads
        q, k = (kept[name, part].unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
        each.append(torch.cat([((q @ part.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1).mean(1) for part in k.split(tokens, 2)]))
    expected = torch.stack(each).mean(0).unflatten(1, grid).permute(0, 3, 1, 2)
    assert seen.shape == (3 * 2, tokens, *grid)
    laws.same(seen, expected, 1e-12)


class _Bank:
    """An override that appends five keys and values to every layer, each counted `strength` times."""

    def __init__(self, strength, seed=6):
        self.strength, self.generator, self.kept = strength, torch.Generator().manual_seed(seed), {}

    def of(self, layer, key):
        if layer not in self.kept:
            shape = (2, 1, key.shape[1], 5, key.shape[-1])
            self.kept[layer] = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self.kept[layer]

    def __call__(self, call, attend):
        key, value = self.of(call.layer, call.key).expand(-1, len(call.key), -1, -1, -1)
        own = call.bias if call.bias is not None else call.key.new_zeros(1, 1, 1, call.key.shape[-2])
        more = torch.full((*own.shape[:-1], 5), self.strength, dtype=torch.float64).log()
        return attend(call._replace(key=torch.cat([call.key, key], -2), value=torch.cat([call.value, value], -2), bias=torch.cat([own, more], -1)))


@pytest.mark.parametrize("below", [True, False], ids=["after", "before"])
def test_keys_that_are_appended_under_a_regional_override_belong_to_every_segment(opened, below):
    """Against dense attention: every segment attends to its own prompt and to the bank, whichever override comes first."""
    backbone, _ = opened
    x, (shares, cond, context, tokens) = latents((16, 16)), _segments(opened, (16, 16))
    layers, bank, wrong = backbone.prompt_attention(), _Bank(0.5), []

    def dense(call, attend):
        share = masks.resized(shares, (16 // 2 ** layers[call.layer],) * 2).flatten(2)[0]
        keys, values = bank.of(call.layer, call.key)
        out = 0
        for n, (key, value) in enumerate(zip(call.key.split(tokens, 2), call.value.split(tokens, 2), strict=True)):
            weight = torch.cat([(call.query @ key.transpose(-1, -2) / call.query.shape[-1] ** 0.5).exp(),
                                0.5 * (call.query @ keys.transpose(-1, -2) / call.query.shape[-1] ** 0.5).exp()], -1)
            part = weight @ torch.cat([value, values.expand(len(value), -1, -1, -1)], 2) / weight.sum(-1, keepdim=True)
            out = out + part * share[n][:, None]
        answer = attend(call)
        wrong.append(laws.apart(answer, out))
        return answer

    names = tuple(layers)
    inner = lambda: attention.override(backbone.denoiser, names, bank)  # noqa: E731
    with attention.override(backbone.denoiser, names, lambda call, attend: attend(call)):
        with inner() if below else context(), context() if below else inner():
            with attention.override(backbone.denoiser, names, dense):
                found = backbone.denoise(x, torch.tensor(400), cond)
    assert len(wrong) == len(names) and max(wrong) < 1e-12
    with context():
        laws.differ(found, backbone.denoise(x, torch.tensor(400), cond))


def test_an_override_that_hands_nothing_on_is_noticed_by_the_one_below(opened):
    backbone, _ = opened
    layers, cond = backbone.localizing_layers(), encode(opened, "the fox")
    with pytest.raises(RuntimeError, match="not"), attention.recorded(backbone.denoiser, layers, grid=(8, 8), rows=range):
        with attention.override(backbone.denoiser, layers, lambda call, attend: torch.zeros_like(call.query)):
            backbone.denoise(latents((16, 16)), torch.tensor(500), cond)


def test_one_segment_everywhere_is_that_lora_alone(opened):
    backbone, adapters = opened
    conds = [encode(opened, text) for text in ("the moon", "the fox", "the owl")]
    x, tokens = latents((16, 16), 2), conds[0].values["text"].shape[2]
    for n, use in enumerate(({"c": 0.5}, {"a": 1.0, "c": 0.5}, {"b": 0.7, "c": 0.5})):
        shares = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
        shares[:, n] = 1
        adapters.use(use)
        expected = backbone.denoise(x, torch.tensor(300), conds[n])
        times = [path for path in adapters._layers["unet"] if backbone.axis(path) == Axis("none") and _attached(adapters._layers["unet"][path])]
        assert not times  # with a LoRA on the time embedding this law could not hold
        with regional(backbone, adapters, {"a": 1.0, "b": 0.7, "c": 0.5}, [("c",), ("a", "c"), ("b", "c")], shares, rows=2, size=(16, 16), tokens=tokens):
            laws.same(backbone.denoise(x, torch.tensor(300), joined(conds, shares)), expected, 1e-11)


def test_a_mask_of_the_wrong_size_is_told(opened):
    backbone, adapters = opened
    conds = [encode(opened, "the moon"), encode(opened, "the fox")]
    shares = torch.full((1, 2, 16, 16), 0.5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mask|places|rows"):
        with regional(backbone, adapters, {"a": 1.0}, [(), ("a",)], shares, rows=2, size=(12, 16), tokens=conds[0].values["text"].shape[2]):
            backbone.denoise(latents((16, 16)), torch.tensor(300), joined(conds, shares))
