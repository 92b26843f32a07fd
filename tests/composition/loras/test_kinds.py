"""Every kind of update against a dense W + w D written out on its own, in float64: live, folded, in rows, at places, two kinds at once."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from composition import Lora, Refused, methods
from composition.adapters import Adapters
from composition.backbones.base import Axis
from composition.backbones.unet import UNetBackbone
from composition.export import export
from composition.loop import Step
from composition.loras import keys, reader, scale
from composition.loras.fused import Part
from composition.loras.kinds import read as kinds
from composition.loras.safetensors import load_safely
from tests import toys
from tests.composition import laws
from tests.composition.loras import kind_writers as writers

STEP = Step(0, 4, torch.tensor(300), torch.zeros(2, 4, 16, 16, dtype=torch.float64))
WEIGHT = 0.7


@pytest.fixture(scope="module")
def pipe():
    pipe = toys.sd(dtype=torch.float64)
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.LayerNorm | torch.nn.GroupNorm):
            module.weight.data += 0.1  # of ones alone
    return pipe


@pytest.fixture(scope="module")
def held(pipe):
    backbone = UNetBackbone(pipe, "sd")
    return Adapters(backbone.components, family="sd", block=backbone.block, axis=backbone.axis)


@pytest.fixture(scope="module")
def files(pipe, tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("kinds"), {}

    def file(kind, layout="kohya"):
        if (kind, layout) not in made:
            path = folder / f"{kind}-{layout}.safetensors".replace(" ", "-")
            truth = writers.norms(pipe, path) if kind == "norm" else writers.write(pipe, path, kind, seed=len(made), layout=layout, only="down_blocks.1")
            made[kind, layout] = path, truth
        return made[kind, layout]

    return file


def forward(unet, rows=2, seed=5):
    rng = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, 16, 16, generator=rng, dtype=torch.float64)
    text = torch.randn(rows, 7, unet.config.cross_attention_dim, generator=rng, dtype=torch.float64)
    return unet(sample, 300, encoder_hidden_states=text).sample


@contextmanager
def changed(pipe, changes):
    """A copy of the UNet whose weights are dense sums."""
    unet = copy.deepcopy(pipe.unet)
    for module in unet.modules():
        module._forward_hooks.clear()
    for (_, path), (weight, bias) in writers.dense(pipe, changes).items():
        module = unet.get_submodule(path)
        module.weight.data = weight
        if bias is not None:
            module.bias = torch.nn.Parameter(bias)
    yield unet


def close(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-10)


ALL = (*writers.KINDS, "norm")
EACH = ("loha", "loha big", "lokr", "dora", "dora inputs", "ia3", "ia3 input", "oft", "boft", "oftv2", "glora", "full", "lora bias", "norm")  # each operator once


@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_live_and_folded_are_dense(kind, pipe, held, files):
    path, truth = files(kind)
    plain = forward(pipe.unet)
    with changed(pipe, [(truth, WEIGHT)]) as unet:
        expected = forward(unet)
    assert (expected - plain).abs().max() > 1e-4
    with held.session([("one", Lora("one"), path)]) as (receipt,):
        assert receipt.applied == receipt.tensors and len(truth) == sum(receipt.kinds.values()) > 0
        held.use({"one": WEIGHT})
        close(forward(pipe.unet), expected)
        assert held.foldable
        with held.folded({"one": WEIGHT}):
            close(forward(pipe.unet), expected)
        close(forward(pipe.unet), expected)
    assert torch.equal(forward(pipe.unet), plain)


@pytest.mark.parametrize("kind", EACH)
@torch.no_grad()
def test_two_kinds_at_once_in_rows_and_combined(kind, pipe, held, files):
    """Beside a LoRA: in every row, one in each row, both in a row of several, and each apart for `combine`."""
    (path, truth), (other, plain) = files(kind), files("lora")
    with changed(pipe, [(truth, WEIGHT), (plain, -0.4)]) as unet:
        both = forward(unet)
    with changed(pipe, [(truth, WEIGHT)]) as unet:
        one = forward(unet)
    with changed(pipe, [(plain, 0.9)]) as unet:
        two = forward(unet)
    with held.session([("one", Lora("one"), path), ("two", Lora("two"), other)]):
        held.use({"one": WEIGHT, "two": -0.4})
        close(forward(pipe.unet), both)
        with held.folded({"one": WEIGHT, "two": -0.4}):
            close(forward(pipe.unet), both)
        with held.rows([{"one": WEIGHT}, {"two": 0.9}]):
            close(forward(pipe.unet), torch.stack([one[0], two[1]]))
        with held.rows([{"one": WEIGHT}, {"one": WEIGHT, "two": -0.4}]):
            close(forward(pipe.unet), torch.stack([one[0], both[1]]))
        with held.combined(lambda path, step, base, each: base + each.sum(0), {"one": WEIGHT, "two": -0.4}, STEP):
            close(forward(pipe.unet), both)
        with held.routed(lambda stack, step, ranks, gate: gate, {"one": WEIGHT, "two": -0.4}, STEP):
            close(forward(pipe.unet), both)


@pytest.mark.parametrize("kind", EACH)
@torch.no_grad()
def test_places_where_it_is_everywhere_or_nowhere(kind, pipe, held, files):
    """A mask of ones is Merge, of zeros the base; half a mask changes what a layer gives in that half alone."""
    path, truth = files(kind)
    grids = {Axis("grid", level): torch.ones(2, 1, -(-16 // 2**level), -(-16 // 2**level), dtype=torch.float64) for level in range(5)}
    places = grids | {Axis("text"): torch.ones(2, 1, 7, dtype=torch.float64), Axis("none"): torch.ones(2, 1, dtype=torch.float64)}
    (component, where), change = next(iter(truth.items()))
    module, level = pipe.unet.get_submodule(where), held._axis(where)
    seen = {}
    with changed(pipe, [(truth, WEIGHT)]) as unet:
        expected = forward(unet)
        changed_layer = copy.deepcopy(unet.get_submodule(where))
    plain = forward(pipe.unet)
    with held.session([("one", Lora("one"), path)]):
        for share, goal in ((1.0, expected), (0.0, plain)):
            with held.regional({"one": WEIGHT}, {axis: place * share for axis, place in places.items()}):
                close(forward(pipe.unet), goal)
        halves = {axis: place.clone() for axis, place in places.items()}
        halves[level][1] = 0
        halves[level][0].flatten()[: halves[level][0].numel() // 2] = 0
        with held.regional({"one": WEIGHT}, halves):
            handle = module.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
            forward(pipe.unet)
            handle.remove()
    x, y, share = seen["x"], seen["y"], halves[level][:, 0]
    share = share[:, None] if y.ndim == 4 else share.flatten(1)[..., None] if share.ndim > 1 else share.view(-1, *(1 for _ in y.shape[1:]))
    base = type(module).forward(module, x)
    close(y, base + share * (changed_layer(x) - base))


@pytest.mark.parametrize(("kind", "layout"), [("dora peft", "diffusers"), ("dora", "diffusers"), ("lokr", "diffusers"), ("loha", "diffusers"),
                                              ("peft bias", "diffusers"), ("full", "diffusers")])
@torch.no_grad()
def test_the_other_spelling(kind, layout, pipe, held, files):
    path, truth = files(kind, layout)
    with changed(pipe, [(truth, WEIGHT)]) as unet:
        expected = forward(unet)
    with held.session([("one", Lora("one"), path)]):
        held.use({"one": WEIGHT})
        close(forward(pipe.unet), expected)


FUSED = ("lora", "loha", "loha big", "lokr", "lokr whole", "dora", "ia3", "ia3 input", "oft", "oft bound", "oftv2", "oftv2 shared", "glora", "full", "peft bias")


@pytest.fixture(scope="module")
def flux():
    return toys.flux(dtype=torch.float64)


def read(flux, tmp_path, tensors):
    path = tmp_path / "a.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return reader.read(path, {"transformer": flux.transformer}, "flux")


@pytest.mark.parametrize("kind", FUSED)
@torch.no_grad()
def test_a_fused_layer_is_parted_exactly(kind, flux, tmp_path):
    """q, k and v in one, and a layer whose halves are the other way round in the base: each layer gets its own rows."""
    rng = torch.Generator().manual_seed(1)
    tensors, goals = {}, {}
    attention = [f"transformer_blocks.0.attn.to_{end}" for end in "qkv"]
    for name, paths in (("double_blocks_0_img_attn_qkv", attention), ("final_layer_adaLN_modulation_1", ["norm_out.linear"])):
        layers = [flux.transformer.get_submodule(path) for path in paths]
        turned = len(paths) == 1
        if turned and kind in ("oft", "oft bound"):
            continue
        weight, bias = (torch.cat([getattr(layer, side) for layer in layers]) for side in ("weight", "bias"))
        weight, bias = (torch.cat([side[len(side) // 2 :], side[: len(side) // 2]]) if turned else side for side in (weight, bias))
        made = writers.make(kind, weight.shape, rng)
        tensors |= {f"lora_unet_{name}.{key}": value for key, value in made.tensors.items()}
        change, shift = made.dense(weight, bias)
        shift = torch.zeros_like(bias) if shift is None else shift
        whole = [(change, shift)] if not turned else [tuple(torch.cat([side[len(side) // 2 :], side[: len(side) // 2]]) for side in (change, shift))]
        sizes = [layer.out_features for layer in layers]
        goals |= {path: (layer, *pair) for path, layer, *pair in zip(paths, layers, *(side.split(sizes) for side in whole[0]), strict=True)}
    lora = read(flux, tmp_path, tensors)
    assert lora.receipt.applied == lora.receipt.tensors and set(lora.factors["transformer"]) == set(goals)
    for path, (layer, change, shift) in goals.items():
        update = lora.factors["transformer"][path]
        x = torch.randn(2, 5, layer.in_features, generator=rng, dtype=torch.float64)
        close(update.delta(layer.weight.detach()), change)
        close(update.forward(layer, x)(layer, x, layer(x)), x @ change.T + shift)


@pytest.mark.parametrize(("kind", "why"), [("dora inputs", "columns of several layers"), ("boft", "cannot be parted")])
def test_what_cannot_be_parted_is_refused(kind, why, flux, tmp_path):
    made = writers.make(kind, (96, 32), torch.Generator().manual_seed(1))
    with pytest.raises(Refused, match=why):
        read(flux, tmp_path, {f"lora_unet_double_blocks_0_img_attn_qkv.{key}": value for key, value in made.tensors.items()})


OFT_SETTINGS = ({}, {"num_cayley_neumann_terms": 1}, {"num_cayley_neumann_terms": 2}, {"num_cayley_neumann_terms": 3}, {"num_cayley_neumann_terms": 4},
                {"num_cayley_neumann_terms": 7}, {"use_cayley_neumann": False}, {"coft": True, "eps": 0.02}, {"block_share": True})  # fmt: skip


@pytest.mark.parametrize("settings", OFT_SETTINGS)
@pytest.mark.parametrize("conv", [False, True])
def test_oft_is_what_peft_makes_of_its_own_file(settings, conv, tmp_path):
    """Saved by PEFT, with its settings beside it, and read here: the update that PEFT merges."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(16, 8, 1) if conv else torch.nn.Linear(16, 8)
    model = peft.get_peft_model(torch.nn.Sequential(layer.double()), peft.OFTConfig(target_modules=["0"], oft_block_size=4, **settings))
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            parameter.data = 0.2 * torch.randn_like(parameter, dtype=torch.float64)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    raw = load_safely(path)
    (key,) = raw.tensors
    assert key.endswith("0.oft_R.weight")
    stated = scale.rotation(scale.statements(path, raw.metadata), "unet")
    (update,) = kinds.fitted({"oft_R": raw.tensors[key]}, None, {"layer": layer}, (Part("layer"),), stated).values()
    weight = layer.weight.detach().clone()
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64) if conv else torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        change = update.forward(layer, x)(layer, x, layer(x))
        near = 1e-8 if "coft" in settings else 1e-10  # PEFT has the bound in float32
        torch.testing.assert_close(layer(x) + change, model(x), rtol=0, atol=near)
        merged = model.merge_and_unload()[0]
    torch.testing.assert_close(weight + update.delta(weight), merged.weight.detach(), rtol=0, atol=near)
    assert settings.get("num_cayley_neumann_terms") == 1 or update.delta(weight).abs().max() > 1e-3


@pytest.mark.parametrize(("settings", "why"), [({"use_cayley_neumann": 3}, "true or false"), ({"num_cayley_neumann_terms": 10**9}, "1 to 64"),
                                               ({"coft": True, "eps": "much"}, "positive number")])
def test_settings_of_rotations_that_are_none_are_refused(settings, why, flux, tmp_path):
    made = writers.make("oftv2", (32, 32), torch.Generator().manual_seed(1))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **settings}))
    with pytest.raises(Refused, match=why):
        read(flux, tmp_path, {f"transformer.transformer_blocks.0.attn.to_q.{key}": value for key, value in made.tensors.items()})


@torch.no_grad()
def test_kohyas_oft_of_a_fused_layer_has_blocks_for_each_of_its_layers(flux, tmp_path):
    """q, k, v and what goes to the feed-forward of one layer are turned apart, each bounded by itself."""
    names = [f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    layers = [flux.transformer.get_submodule(name) for name in names]
    rng = torch.Generator().manual_seed(2)
    made = [writers.make("oft bound", layer.weight.shape, rng) for layer in layers]
    head = "oft_unet_single_blocks_0_linear1"
    tensors = {f"{head}.oft_blocks.{number}": each.tensors["oft_blocks"] for number, each in enumerate(made)} | {f"{head}.alpha": made[0].tensors["alpha"]}
    lora = read(flux, tmp_path, tensors)
    assert lora.receipt.applied == lora.receipt.tensors == 5 and dict(lora.receipt.kinds) == {"OFT": 1}
    for name, layer, each in zip(names, layers, made, strict=True):
        close(lora.factors["transformer"][name].delta(layer.weight.detach()), each.dense(layer.weight.detach(), None)[0])
    with pytest.raises(Refused, match="3 layers where the base has 4"):
        read(flux, tmp_path, {key: value for key, value in tensors.items() if not key.endswith(".2")})


class Odd(torch.nn.Linear):
    """A linear whose numbers lie in a format of its own, as quantised ones do."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(torch.float64) / 8, self.bias)


@pytest.mark.parametrize("kind", ["dora", "dora inputs", "ia3", "ia3 input", "oft", "oftv2", "glora", "lokr", "full", "lora bias"])
@torch.no_grad()
def test_beside_weights_in_a_format_of_their_own(kind):
    """What needs the layer's weight asks the layer for it."""
    rng = torch.Generator().manual_seed(3)
    layer = Odd(8, 16, dtype=torch.float64)
    layer.weight = torch.nn.Parameter(torch.randint(-99, 99, (16, 8), generator=rng, dtype=torch.int8), requires_grad=False)
    weight, x = layer.weight.to(torch.float64) / 8, torch.randn(2, 5, 8, generator=rng, dtype=torch.float64)
    made = writers.make(kind, (16, 8), rng)
    (update,) = kinds.fitted(roles(made.tensors), writers.ALPHA, {"layer": layer}, (Part("layer"),)).values()
    change, shift = made.dense(weight, layer.bias)
    close(update.forward(layer, x)(layer, x, layer(x)), x @ change.T + (0.0 if shift is None else shift))


def roles(tensors):
    return {keys.understand(f"lora_unet_conv_in.{key}").role: value for key, value in tensors.items()}


@pytest.mark.parametrize("kind", writers.KINDS)
def test_half_precision_is_near_and_nothing_is_kept_wider(kind, pipe):
    """A file in half precision holds its own bytes, and its update is float32's to within half precision."""
    path = "down_blocks.1.resnets.0.conv1" if kind in writers.CONV else "down_blocks.1.attentions.0.proj_in"
    layer = pipe.unet.get_submodule(path)
    made = writers.make(kind, layer.weight.shape, torch.Generator().manual_seed(2))
    halves = {role: value if role in ("on_input", "scaled_oft") else value.half() for role, value in roles(made.tensors).items()}
    (update,) = kinds.fitted(halves, writers.ALPHA, {path: layer}, (Part(path),)).values()
    if "tucker" not in kind:  # whose cores are multiplied out
        assert update.nbytes <= sum(value.nbytes for value in halves.values())
    change, _ = made.dense(layer.weight.detach(), layer.bias)
    assert (update.delta(layer.weight.detach().float()) - change).abs().max() < 2e-2 * max(1.0, float(change.abs().max()))


BAD = {
    "loha": {"hada_w1_a": (16, 3), "hada_w2_b": (3, 16), "hada_w1_b": (0, 16)}, "loha tucker": {"hada_t1": (2, 3, 3, 3), "hada_t2": (2, 2)},
    "lokr": {"lokr_w1": (3, 4), "lokr_w2_a": (8, 3), "lokr_w2_b": (2, 5), "lokr_w1 ": (2, 0)}, "lokr whole": {"lokr_w2": (4, 7), "lokr_w1": (4,)},
    "lokr low": {"lokr_w1_b": (3, 2), "lokr_w1_a": (2, 3)}, "dora": {"dora_scale": (5, 1)}, "dora inputs": {"dora_scale": (1, 7)},
    "dora peft": {"lora_magnitude_vector.weight": (5,)}, "ia3": {"weight": (7,), "on_input": (2,)}, "ia3 input": {"weight": (3,)},
    "oft": {"oft_blocks": (3, 4, 4), "oft_blocks ": (4, 4, 3), "oft_blocks  ": (16,), "rescale": (3, 1)}, "boft": {"oft_blocks": (4, 4, 4, 4), "oft_blocks ": (2, 16, 1, 1)},
    "oftv2": {"oft_R.weight": (2, 6), "oft_R.weight ": (4, 5), "oft_R.weight  ": (24,)},
    "glora": {"a1.weight": (16, 3), "b1.weight": (5, 2), "b2.weight": (3, 16), "a2.weight": (0, 16)}, "full": {"diff": (15, 16), "diff_b": (3,)},
    "lora bias": {"diff_b": (2,)}, "peft bias": {"lora_up.bias": (7,)}, "tucker": {"lora_mid.weight": (2, 3, 3, 3), "lora_down.weight": (2, 5, 1, 1)},
}


@pytest.mark.parametrize(("kind", "role"), [(kind, role) for kind, roles in BAD.items() for role in roles])
def test_sizes_that_do_not_go_together_are_refused_in_one_line(kind, role, pipe, held, tmp_path):
    path = "down_blocks_1_resnets_0_conv1" if kind in writers.CONV else "down_blocks_1_attentions_0_proj_in"
    layer = pipe.unet.get_submodule("down_blocks.1.resnets.0.conv1" if kind in writers.CONV else "down_blocks.1.attentions.0.proj_in")
    made = writers.make(kind, layer.weight.shape[:4], torch.Generator().manual_seed(2)).tensors
    bad = torch.ones(BAD[kind][role], dtype=torch.int64 if role == "on_input" else torch.float64)
    file = tmp_path / "bad.safetensors"
    save_file({f"lora_unet_{path}.{key}": value for key, value in (made | {role.strip(): bad}).items()}, file)
    for partial in (False, True):
        with pytest.raises(Refused) as refused:
            held.load(file, Lora("bad"), allow_partial=partial)
        assert "\n" not in str(refused.value) and "bad.safetensors" in str(refused.value)


@pytest.mark.parametrize("kind", [kind for kind in writers.KINDS if kind != "bias"])
def test_a_part_that_is_missing_takes_its_module_out(kind, pipe, held, tmp_path):
    layer = "down_blocks.1.resnets.0.conv1" if kind in writers.CONV else "down_blocks.1.attentions.0.proj_in"
    made = writers.make(kind, pipe.unet.get_submodule(layer).weight.shape, torch.Generator().manual_seed(2)).tensors
    head = f"lora_unet_{layer.replace('.', '_')}"
    needed = [key for key in made if key not in ("alpha", "dora_scale", "rescale", "diff_b", "lora_up.bias", "diff", "lora_mid.weight", "bm.weight")
              and "magnitude" not in key and "scaled" not in key]
    for key in needed:
        save_file({f"{head}.{name}": value for name, value in made.items() if name != key}, tmp_path / "half.safetensors")
        with pytest.raises(Refused, match="half.safetensors"):
            held.load(tmp_path / "half.safetensors", Lora("half"), allow_partial=True)


# in the engine --------------------------------------------------------------------------------------------------------

METHODS = ("merge", "composite", "clora-fast", "regions", "switch", "cmlora", "loratorio")


@pytest.mark.parametrize("family", ["sd", "flux"])
@torch.no_grad()
def test_a_kind_without_factors_is_its_dense_lora_in_every_method(family, engines, tmp_path):
    """A LoKr whose larger matrix has rank one, and the same update as a LoRA file: the same pictures, where no method looks at ranks."""
    engine = engines[family]
    component, model = next(iter(engine.adapters.components.items()))
    rng, lokr, lora, other = torch.Generator().manual_seed(4), {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (".attn" in name or ".ff." in name):
            out, into = module.weight.shape
            small, a, b = (0.2 * torch.randn(size, generator=rng, dtype=torch.float64) for size in ((2, 2), (out // 2, 1), (1, into // 2)))
            prefix = f"{component}.{name}"
            lokr |= {f"{prefix}.lokr_w1": small, f"{prefix}.lokr_w2_a": a, f"{prefix}.lokr_w2_b": b}
            lora |= {f"{prefix}.lora_A.weight": torch.kron(torch.eye(2, dtype=torch.float64), b),
                     f"{prefix}.lora_B.weight": torch.kron(small, a)}
            other |= {f"{prefix}.lora_A.weight": 0.2 * torch.randn(2, into, generator=rng, dtype=torch.float64),
                      f"{prefix}.lora_B.weight": 0.2 * torch.randn(out, 2, generator=rng, dtype=torch.float64)}
    def file(folder, name, tensors):
        (tmp_path / folder).mkdir(exist_ok=True)
        save_file(tensors, tmp_path / folder / f"{name}.safetensors")
        return str(tmp_path / folder / f"{name}.safetensors")

    beside = Lora(file("b", "owl", other), weight=0.6, binds="owl")
    for method in METHODS:
        more = {"region": (0.0, 0.0, 0.5, 1.0)} if method == "regions" else {}
        operator, factors = (laws.latents(engine, laws.request(method, Lora(file(folder, "fox", tensors), weight=0.8, binds="fox", **more), beside, steps=2))
                             for folder, tensors in (("kron", lokr), ("plain", lora)))
        laws.same(operator, factors)
        laws.differ(operator, laws.merged(engine, steps=2))


@torch.no_grad()
def test_methods_of_ranks_say_what_they_do_with_kinds_that_have_none(engines, tmp_path):
    engine = engines["sd"]
    pipe = toys.sd(dtype=torch.float64)
    writers.write(pipe, tmp_path / "lokr.safetensors", "lokr", targets=("attn",))
    toys.lora(pipe, tmp_path / "lora.safetensors", text=False, targets=("attn", "ff"))
    loras = [Lora(str(tmp_path / f"{name}.safetensors"), weight=0.5, category=role) for name, role in (("lokr", "style"), ("lora", "character"))]
    for name, method in methods.all().items():
        asked = laws.request(name, *loras, steps=1) if name != "autolora" else None
        if asked is None:
            continue
        if method.ranks == "all":
            with pytest.raises(Refused, match="lokr changes layers without ranks"):
                engine.run(asked)
            laws.same(laws.latents(engine, laws.request(name, loras[0], steps=1)), laws.merged(engine, loras[0], steps=1))
        elif method.ranks:
            notes = engine.run(asked).notes
            assert list(notes["without ranks"]) == ["lokr"]
    with pytest.raises(Refused, match="no LoRA of a small rank"):
        export(engine, laws.request("merge", *loras), tmp_path / "out.safetensors")


def test_a_core_that_makes_numbers_infinite_is_refused():
    with pytest.raises(ValueError, match="infinite"):
        kinds._core(torch.full((2, 2, 3, 3), 1e30), torch.full((2, 2), 1e30))
