"""Joint attention of SD3 and FLUX: maps, places and the early end against attention written out, by a processor of the test's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from composition.adapters.adapters import _attached
from composition.hooks import attention, masks
from composition.hooks.regional import joined, regional
from tests.composition import laws

SIZES = [(16, 16), (12, 20), (20, 8)]


@pytest.fixture(params=["sd3", "flux", "flux-dev"])
def opened(request, engines, lora_files):
    engine = engines[request.param]
    loras = laws.loras_of(lora_files[request.param])
    found = [(name, lora, engine.find(lora.source)) for name, lora in zip("abc", loras, strict=True)]
    with engine.adapters.session(found), torch.no_grad():
        yield engine.backbone, engine.adapters


def latents(size, pictures=1, seed=3):
    return torch.randn(pictures, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def encode(opened, text):
    backbone, _ = opened
    return backbone.encode([text], None if backbone.family == "flux" and backbone.distilled else ["an owl"])


class Plain:
    """Joint attention without any kernel: softmax written out, with a bias; keeps the probabilities of the last call."""

    def __init__(self, bias=None, bank=None):
        self.bias, self.bank, self.seen = bias, bank, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None, **_):
        def heads(x, norm):
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return norm(x) if norm is not None else x

        parts = [heads(getattr(attn, f"to_{p}")(hidden_states), getattr(attn, f"norm_{p}", None)) for p in "qkv"]
        words = encoder_hidden_states is not None
        flux = type(attn).__name__ == "FluxAttention"
        if words:
            of = [heads(getattr(attn, f"add_{p}_proj")(encoder_hidden_states), getattr(attn, f"norm_added_{p}", None)) for p in "qkv"]
            parts = [torch.cat([b, a] if flux else [a, b], 2) for a, b in zip(parts, of, strict=True)]
        q, k, v = parts
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=2) for x in (q, k))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        logits = logits + (self.bias if self.bias is not None and (words or flux) else 0)
        if self.bank is not None and (words or flux):
            keys, values, strength = self.bank
            logits = torch.cat([logits, q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5 + math.log(strength)], -1)
            v = torch.cat([v, values.expand(len(v), -1, -1, -1)], 2)
        self.seen = F.softmax(logits, -1)
        out = (self.seen @ v).transpose(1, 2).flatten(2)
        if not words:
            return out if getattr(attn, "pre_only", False) else attn.to_out[0](out)
        length = encoder_hidden_states.shape[1]
        text, picture = (out[:, :length], out[:, length:]) if flux else (out[:, -length:], out[:, :-length])
        return attn.to_out[0](picture), attn.to_add_out(text) if getattr(attn, "to_add_out", None) is not None else text


class Written:
    """While it lasts every attention that reads the prompt is `Plain`."""

    def __init__(self, backbone, bias=None, bank=None):
        self.modules = {name: backbone.denoiser.get_submodule(name) for name in backbone.prompt_attention()}
        self.plain = {name: Plain(bias, bank) for name in self.modules}

    def __enter__(self):
        self.kept = {name: module.processor for name, module in self.modules.items()}
        for name, module in self.modules.items():
            module.processor = self.plain[name]
        return self

    def __exit__(self, *_):
        for name, module in self.modules.items():
            module.processor = self.kept[name]


def sides(backbone, words, area):
    """Where the prompt and the picture stand in the sequence."""
    return (slice(0, words), slice(words, None)) if backbone.joint == "text" else (slice(area, None), slice(0, area))


@pytest.mark.parametrize("size", SIZES)
def test_maps_are_attention_written_out_on_any_grid(opened, size):
    backbone, adapters = opened
    layers, cond, x = backbone.localizing_layers(), encode(opened, "the fox and the owl"), latents(size, 2)
    grid, tokens = (size[0] // 2, size[1] // 2), cond.values["text"].shape[2]
    adapters.use({"a": 1.0})
    plain = backbone.denoise(x, torch.tensor(500), cond)
    with Written(backbone) as written:
        laws.same(backbone.denoise(x, torch.tensor(500), cond), plain, 1e-9)  # the test's own processor is the stock one
    text, picture = sides(backbone, tokens, grid[0] * grid[1])
    expected = torch.stack([written.plain[name].seen[:, :, text, picture].mean(1) for name in layers]).mean(0).unflatten(-1, grid)
    rows = cond.rows * 2
    with attention.recorded(backbone.denoiser, layers, grid=grid, rows=range, joint=backbone.joint) as maps:
        assert torch.equal(backbone.denoise(x, torch.tensor(500), cond), plain)
        seen = maps.read()
    assert seen.shape == (rows, tokens, *grid)
    laws.same(seen, expected, 1e-9)
    with attention.recorded(backbone.denoiser, layers, grid=grid, rows=lambda count: [count - 1], joint=backbone.joint) as maps:
        backbone.denoise(x, torch.tensor(500), cond)
        laws.same(maps.read(), seen[-1:], 1e-12)


def test_a_pass_that_ends_early_has_the_same_maps_and_gradient(opened):
    backbone, adapters = opened
    layers, cond, ran, found = backbone.localizing_layers(), encode(opened, "the fox").positive(), [], []
    handle = backbone.denoiser.proj_out.register_forward_hook(lambda *_: ran.append(1))
    adapters.use({"a": 1.0, "b": 0.5})
    for early in (False, True):
        x = latents((16, 16)).requires_grad_()
        with torch.enable_grad(), attention.recorded(backbone.denoiser, layers, grid=(8, 8), rows=range, early=early, joint=backbone.joint) as maps:
            try:
                backbone.denoise(x, torch.tensor(500), cond)
            except attention.AllRecorded:
                assert early
            seen = maps.read()
            found.append((seen.detach(), torch.autograd.grad(seen[:, 1].square().sum(), x)[0]))
    handle.remove()
    assert len(ran) == 1 and torch.equal(found[0][0], found[1][0])
    laws.same(found[1][1], found[0][1], 1e-12)
    assert found[0][1].abs().max() > 0


def test_a_backend_that_is_not_seen_is_told(opened):
    backbone, _ = opened
    with Written(backbone), pytest.raises(RuntimeError, match="native"):
        with attention.recorded(backbone.denoiser, backbone.localizing_layers(), grid=(8, 8), rows=range, joint=backbone.joint):
            backbone.denoise(latents((16, 16)), torch.tensor(500), encode(opened, "the fox"))


def test_a_picture_longer_than_the_sequence_is_told(opened):
    backbone, _ = opened
    with pytest.raises(RuntimeError, match="tokens"):
        with attention.recorded(backbone.denoiser, backbone.localizing_layers(), grid=(40, 40), rows=range, joint=backbone.joint):
            backbone.denoise(latents((16, 16)), torch.tensor(500), encode(opened, "the fox"))


def _reference(backbone, adapters, segments, shares, weights, tokens, call, bank=None, seen=None):
    """The regional evaluation: dense deltas added token by token, a bias written out; no gate or seam of ours."""
    names, handles = adapters.names, []
    on = torch.tensor([[float(name in segment) for name in names] for segment in segments], dtype=torch.float64)
    grid = masks.resized(shares[None], (shares.shape[-2] // 2, shares.shape[-1] // 2))[0].flatten(1)  # (N, places)
    words, area = tokens * len(segments), grid.shape[1]
    owner = torch.arange(words) // tokens
    text, picture = sides(backbone, words, area)
    bias = torch.zeros(words + area, words + area, dtype=torch.float64)
    bias[picture, text] = grid.T.log()[:, owner]
    bias[text, picture] = grid.log()[owner]
    bias[text, text] = torch.where(owner[:, None] == owner, 0.0, -torch.inf)

    def add(module, args, out, path):
        stack, axis, x, total = _attached(module), backbone.axis(path), args[0], out
        for k, one in enumerate(names):
            if not stack.touches(k):
                continue
            delta = stack.delta([weights.get(name, 0.0) if name == one else 0.0 for name in names], torch.device("cpu"), torch.float64)
            place, said = torch.einsum("np,n->p", grid, on[:, k]), on[:, k][owner]
            where = {"grid": place, "text": said, "both": torch.cat([said, place]), "none": on[:, k].max()}[axis.kind]
            if isinstance(module, nn.Conv2d):
                total = total + F.conv2d(x, delta, None, module.stride) * where.view(out.shape[-2:])
            else:
                total = total + x @ delta.T * (where[:, None] if where.ndim else where)
        return total

    for path, module in backbone.denoiser.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and _attached(module) is not None:
            handles.append(module.register_forward_hook(lambda m, a, o, path=path: add(m, a, o, path)))
    try:
        adapters.use({})
        with Written(backbone, bias, bank) as written:
            out = call()
            if seen is not None:
                seen |= {name: plain.seen for name, plain in written.plain.items()}
            return out
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("size", SIZES)
def test_placed_is_deltas_added_place_by_place(opened, size):
    """Two concepts and a LoRA that is everywhere, shares of any value, each segment with a text of its own."""
    backbone, adapters = opened
    segments, weights = [("c",), ("a", "c"), ("b", "c")], {"a": 1.0, "b": 0.7, "c": 0.5}
    conds = [encode(opened, text) for text in ("the fox and the owl", "the fox", "the owl on a thin moon")]
    shares = torch.rand(3, *size, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shares = shares / shares.sum(0)
    x, cond, tokens = latents(size), joined(conds, shares[None]), conds[0].values["text"].shape[2]
    call = lambda: backbone.denoise(x, torch.tensor(400), cond)  # noqa: E731
    with regional(backbone, adapters, weights, segments, shares[None], rows=conds[0].rows, size=size, tokens=tokens):
        found = call()
    laws.same(found, _reference(backbone, adapters, segments, shares, weights, tokens, call), 1e-9)


@pytest.mark.parametrize("order", ["regional alone", "bank first", "regional first"])
def test_overrides_stack_and_keys_may_be_appended(opened, order):
    """A regional override, a bank of five more keys that count half, and maps recorded under both, against attention written out."""
    backbone, adapters = opened
    segments, weights = [(), ("a",), ("b",)], {"a": 1.0, "b": 0.7}
    conds = [encode(opened, text) for text in ("the fox and the owl", "the fox", "the owl on a thin moon")]
    shares = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    shares = shares / shares.sum(0)
    x, cond, tokens = latents((16, 16)), joined(conds, shares[None]), conds[0].values["text"].shape[2]
    keys, values = torch.randn(2, 1, 2, 5, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    bank = None if order == "regional alone" else (keys, values, 0.5)
    layers, names, seen = backbone.localizing_layers(), tuple(backbone.prompt_attention()), {}
    call = lambda: backbone.denoise(x, torch.tensor(400), cond)  # noqa: E731

    def append(call, attend):
        rows = len(call.key)
        own = call.bias if call.bias is not None else call.key.new_zeros(1, 1, 1, call.key.shape[-2])
        more = torch.full((*own.shape[:-1], 5), math.log(0.5), dtype=torch.float64)
        return attend(call._replace(key=torch.cat([call.key, keys.expand(rows, -1, -1, -1)], 2), bias=torch.cat([own, more], -1),
                                    value=torch.cat([call.value, values.expand(rows, -1, -1, -1)], 2)))

    by_region = lambda: regional(backbone, adapters, weights, segments, shares[None], rows=cond.rows, size=(16, 16), tokens=tokens)  # noqa: E731
    appended = lambda: attention.override(backbone.denoiser, names, append if bank else lambda call, attend: attend(call))  # noqa: E731
    first, second = (by_region, appended) if order == "bank first" else (appended, by_region)  # the one entered last is called first
    expected = _reference(backbone, adapters, segments, shares, weights, tokens, call, bank, seen)
    with attention.recorded(backbone.denoiser, layers, grid=(8, 8), rows=range, joint=backbone.joint) as maps, first(), second():
        laws.same(call(), expected, 1e-9)
        text, picture = sides(backbone, 3 * tokens, 64)
        both = 3 * tokens + 64
        laws.same(maps.read(), torch.stack([seen[name][:, :, :both, :both][:, :, text, picture].mean(1) for name in layers]).mean(0).unflatten(-1, (8, 8)), 1e-9)


def test_one_segment_everywhere_is_that_lora_alone(opened):
    """Words of the other segments are seen by nobody, whatever they say: each place is as in that segment's own pass."""
    backbone, adapters = opened
    conds = [encode(opened, text) for text in ("the moon", "the fox", "the owl")]
    x, tokens = latents((16, 16), 2), conds[0].values["text"].shape[2]
    for n, use in enumerate(({"c": 0.5}, {"a": 1.0, "c": 0.5}, {"b": 0.7, "c": 0.5})):
        shares = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
        shares[:, n] = 1
        adapters.use(use)
        expected = backbone.denoise(x, torch.tensor(300), conds[n])
        with regional(backbone, adapters, {"a": 1.0, "b": 0.7, "c": 0.5}, [("c",), ("a", "c"), ("b", "c")], shares,
                    rows=conds[0].rows, size=(16, 16), tokens=tokens):
            laws.same(backbone.denoise(x, torch.tensor(300), joined(conds, shares)), expected, 1e-11)


def test_a_mask_of_the_wrong_size_is_told(opened):
    backbone, adapters = opened
    conds = [encode(opened, "the moon"), encode(opened, "the fox")]
    shares = torch.full((1, 2, 16, 16), 0.5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="mask|places|tokens"):
        with regional(backbone, adapters, {"a": 1.0}, [(), ("a",)], shares, rows=conds[0].rows, size=(12, 16), tokens=conds[0].values["text"].shape[2]):
            backbone.denoise(latents((16, 16)), torch.tensor(300), joined(conds, shares))
