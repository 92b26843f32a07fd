"""Banks against one masked forward over everything (`tests.one_pass`), in three settings; their seams, their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from composition.hooks.banks import Appended, Banks, Update
from composition.loop import Conditioning
from tests.composition import conditioned, laws
from tests.one_pass import Controlled, OnePass, rotated


@pytest.fixture(autouse=True)
def exactly_rotated(monkeypatch):
    """Keys and queries in float64 to the end: a number that is rounded to float32 on one side alone would be 1e-8 off."""
    monkeypatch.setattr("diffusers.models.transformers.transformer_flux.apply_rotary_emb", rotated)


@pytest.fixture(autouse=True)
def shapes_checked_once(request):
    if "equals" not in request.node.name:
        request.getfixturevalue("shapes_unchecked")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=["flux", "flux-dev"])
def backbone(request, engines):
    return engines[request.param].backbone


def banks_of(backbone):
    return Banks(backbone.denoiser, tuple(backbone.prompt_attention()))


def reading(rows=1, seed=5):
    return Conditioning({"text": noise(rows, 1, 7, 24, seed=seed), "pooled": noise(rows, 1, 16, seed=seed + 1), "guidance": torch.full((rows, 1), 3.5)})


def condition(seed, setting="easycontrol", strength=1.0, tokens=16):
    """A condition of the test's reference, and what a bank needs for the same."""
    ids = torch.zeros(tokens, 3)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // 4 * 1.5, torch.arange(tokens) % 4 * 2.0
    own = {"easycontrol": conditioned.by_layer(conditioned.factors(seed=seed), 0.7), "klein": {}, "ominicontrol": {
        f"{block}s.{i}.{layer}": (noise(3, width, seed=seed + i), 0.2 * noise(outputs, 3, seed=seed + i + 9), 1.0, False)
        for i in range(2) for block, layer, width, outputs in (
            ("transformer_block", "attn.to_q", 32, 32), ("transformer_block", "attn.to_out.0", 32, 32), ("transformer_block", "norm1.linear", 32, 192),
            ("transformer_block", "ff.net.2", 128, 32), ("single_transformer_block", "proj_mlp", 32, 128),
            ("single_transformer_block", "proj_out", 160, 32))}}[setting]
    own = own | ({"x_embedder": (noise(3, 16, seed=seed), 0.2 * noise(32, 3, seed=seed), 1.0, False)} if setting == "ominicontrol" else {})
    return Controlled(noise(1, tokens, 16, seed=seed), ids, own, strength, 0.0 if setting != "klein" else 0.3)


def filled(banks, backbone, item, cond):
    with banks.extracting({path: Update(*values) for path, values in item.own.items()}) as bank:
        backbone.read_alone(item.tokens, item.ids, torch.tensor(1000 * item.t), cond)
    return bank


def expected(backbone, items, cond, latents):
    from composition.backbones.flux import packed, places

    whole = OnePass(backbone.denoiser)
    guidance = 3.5 if backbone.distilled else None
    out = [whole(packed(latents), places(latents), cond.values["text"][row], 0.5, cond.values["pooled"][row], guidance, items) for row in range(cond.rows)]
    return torch.stack(out), packed


@pytest.mark.parametrize("setting", ["easycontrol", "ominicontrol", "klein"])
@pytest.mark.parametrize("strengths", [(1.0,), (0.3,), (1.0, 2.5)])
@torch.no_grad()
def test_equals_one_masked_forward(setting, strengths, backbone):
    """One and two conditions, of different lengths, in two guidance rows; in every order."""
    items = [condition(seed, setting, strength, tokens) for seed, strength, tokens in zip((1, 2), strengths, (16, 8), strict=False)]
    banks, cond, latents = banks_of(backbone), reading(rows=2), noise(1, 4, 12, 16)
    appended = [Appended(filled(banks, backbone, item, cond), item.strength) for item in items]
    wanted, packed = expected(backbone, items, cond, latents)
    for order in (appended, appended[::-1]):
        with banks.appended(order):
            out = backbone.denoise(latents, torch.tensor(500.0), cond)
        laws.same(torch.stack([packed(row) for row in out]), wanted, 1e-10)


@torch.no_grad()
def test_the_projection_acts_on_the_output(backbone):
    """Read as an ordinary LoRA of to_out.0 it is another picture."""
    item, banks, cond, latents = condition(1), banks_of(backbone), reading(), noise(1, 4, 12, 16)
    wanted, packed = expected(backbone, [item], cond, latents)
    item.own = {path: (*values[:3], False) for path, values in item.own.items()}
    with banks.appended([Appended(filled(banks, backbone, item, cond))]):
        laws.differ(torch.stack([packed(row) for row in backbone.denoise(latents, torch.tensor(500.0), cond)]), wanted)


@torch.no_grad()
def test_none_or_strength_0_is_the_stock_model(backbone):
    banks, cond, latents = banks_of(backbone), reading(), noise(2, 4, 8, 8)
    plain = backbone.denoise(latents, torch.tensor(500.0), cond)
    bank = filled(banks, backbone, condition(1), cond)
    for nothing in ([], [Appended(bank, 0.0)]):
        with banks.appended(nothing):
            assert torch.equal(backbone.denoise(latents, torch.tensor(500.0), cond), plain)
    with banks.appended([Appended(bank, 1e-3)]):
        faint = laws.apart(backbone.denoise(latents, torch.tensor(500.0), cond), plain)
    assert 0 < faint < 0.01


@torch.no_grad()
def test_rows_of_a_bank_go_where_they_are_sent(backbone):
    """Two rows of a bank, one condition picture each, sent to three pictures."""
    banks, cond, latents = banks_of(backbone), reading(), noise(3, 4, 8, 8)
    first, second = condition(1), condition(2)
    single = [filled(banks, backbone, Controlled(item.tokens, item.ids, first.own), cond) for item in (first, second)]
    joint = Controlled(torch.cat([first.tokens, second.tokens]), first.ids, first.own)
    both = filled(banks, backbone, joint, cond)
    with banks.appended([Appended(both, rows=(1, 0, 1))]):
        out = backbone.denoise(latents, torch.tensor(500.0), cond)
    for index, row in enumerate((1, 0, 1)):
        with banks.appended([Appended(single[row])]):
            laws.same(out[:, index : index + 1], backbone.denoise(latents[index : index + 1], torch.tensor(500.0), cond), 1e-12)
    with pytest.raises(RuntimeError, match="rows"), banks.appended([Appended(both)]):
        backbone.denoise(latents, torch.tensor(500.0), cond)


def trained(backbone, banks, closed=True):
    """The gradients of a loss by a condition LoRA's factors, and by the latents."""
    leaves = [leaf.requires_grad_() for pair in conditioned.factors(seed=3).values() for leaf in pair]
    updates = {path: Update(leaves[2 * i], leaves[2 * i + 1], 1.0, values[3])
               for i, (path, values) in enumerate(conditioned.by_layer(conditioned.factors(seed=3)).items())}
    cond, latents = reading(), noise(2, 4, 8, 8).requires_grad_()
    item = condition(1)
    with banks.extracting(updates) as bank:
        backbone.read_alone(torch.cat([item.tokens, -item.tokens]), item.ids, torch.zeros(()), cond)
    with banks.appended([Appended(bank, 0.6)]):
        loss = backbone.denoise(latents, torch.tensor(500.0), cond).square().sum()
        if not closed:  # while another bank is appended too
            with banks.appended([Appended(bank, 2.0)]):
                return torch.autograd.grad(loss, [*leaves, latents], allow_unused=True)
    return torch.autograd.grad(loss, [*leaves, latents], allow_unused=True)


@pytest.mark.parametrize("closed", [True, False], ids=["after", "inside"])
def test_checkpointing_changes_no_gradient(closed, backbone, monkeypatch):
    """Recomputed when both contexts are closed, and when others are open; a mutant without `checkpoint` fails."""
    denoiser, banks = backbone.denoiser, banks_of(backbone)
    plain = trained(backbone, banks)
    before = {module: vars(module).copy() for module in denoiser.modules() if hasattr(module, "gradient_checkpointing")}
    calls = []
    handle = denoiser.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: calls.append(1))
    try:
        denoiser.train()
        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=banks.checkpoint)
        again = trained(backbone, banks, closed)
        assert len(calls) == 4  # two forwards, each run twice
        denoiser.enable_gradient_checkpointing()
        with pytest.raises(Exception, match="(?i)checkpoint|shape|bank"):
            trained(backbone, banks)
    finally:
        handle.remove()
        denoiser.disable_gradient_checkpointing()
        denoiser.eval()
        for module, state in before.items():
            vars(module).clear()
            vars(module).update(state)
    absent = [index for index, grad in enumerate(plain) if grad is None]
    assert len(absent) == 2 and [index for index, grad in enumerate(again) if grad is None] == absent  # the last layer's query
    for one, other in zip(plain, again, strict=True):
        assert one is None or torch.equal(one, other)
    assert not any(module._forward_hooks for module in denoiser.modules() if not isinstance(module, nn.Linear))


def test_gradients_are_those_of_finite_differences(backbone):
    """Of the loss by one number of each kind of factor, through the bank."""
    banks, cond, latents, item = banks_of(backbone), reading(), noise(1, 4, 8, 8), condition(1)

    def loss(own):
        with banks.extracting({path: Update(*values) for path, values in own.items()}) as bank:
            backbone.read_alone(item.tokens, item.ids, torch.zeros(()), cond)
        with banks.appended([Appended(bank)]):
            return backbone.denoise(latents, torch.tensor(500.0), cond).square().sum()

    for path in ("transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_k"):
        down, up, scale, of_output = item.own[path]
        leaf = up.clone().requires_grad_()
        slope = torch.autograd.grad(loss(item.own | {path: (down, leaf, scale, of_output)}), leaf)[0][3, 1]
        nudge = torch.zeros_like(up)
        nudge[3, 1] = 1e-5
        with torch.no_grad():
            high, low = (loss(item.own | {path: (down, up + sign * nudge, scale, of_output)}) for sign in (1, -1))
        assert float(slope) == pytest.approx(float(high - low) / 2e-5, rel=1e-5)


@torch.no_grad()
def test_a_seam_that_sees_less_than_it_claims_raises(backbone, monkeypatch):
    banks, cond, item = banks_of(backbone), reading(), condition(1)
    bank = filled(banks, backbone, item, cond)
    latents = noise(1, 4, 8, 8)
    with pytest.raises(RuntimeError, match="not seen|was not"), banks.extracting():
        pass
    with pytest.raises(RuntimeError, match="twice"), banks.extracting():
        for _ in range(2):
            backbone.read_alone(item.tokens, item.ids, torch.zeros(()), cond)
    with pytest.raises(RuntimeError, match="themselves alone"), banks.appended([Appended(bank)]), banks.extracting():
        backbone.read_alone(item.tokens, item.ids, torch.zeros(()), cond)
    backbone.denoiser.add_module("spare", nn.Linear(1, 1))  # which its forward does not know
    try:
        with pytest.raises(RuntimeError, match="did not run"), banks.extracting({"spare": lambda x, y: y}):
            backbone.read_alone(item.tokens, item.ids, torch.zeros(()), cond)
    finally:
        del backbone.denoiser.spare
    lacking = type(bank)(dict(list(bank.layers.items())[1:]))
    with pytest.raises(RuntimeError, match="lacks 1 of 4"), banks.appended([Appended(lacking)]):
        pass
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value, **_: (query @ key.transpose(-1, -2)).softmax(-1) @ value)
    with pytest.raises(RuntimeError, match="native"), banks.appended([Appended(bank)]):
        backbone.denoise(latents, torch.tensor(500.0), cond)
    with pytest.raises(RuntimeError, match="native"), banks.extracting():
        backbone.read_alone(item.tokens, item.ids, torch.zeros(()), cond)
    assert not any(hook for module in backbone.denoiser.modules() for hook in module._forward_pre_hooks)
