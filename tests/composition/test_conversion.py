"""LoRA files in another layout, added up, and with fewer ranks, against dense updates; stock diffusers reads them alike."""

from functools import reduce

import pytest
import torch
from safetensors.torch import load_file, save_file

from composition import Lora, Refused, conversion, fitting
from composition.loras import reader
from tests import toys
from tests.composition.loras import kind_writers
from tests.composition.loras import lora_writers as writers

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
MAKE = {"sd": toys.sd, "sdxl": toys.sdxl, "sd3": toys.sd3, "flux": toys.flux}
TARGETS = ("attn", "ff", "proj", "conv", "time")
BOTH = pytest.mark.parametrize("to", conversion.LAYOUTS)


@pytest.fixture(scope="module")
def pipes():
    return {family: make(dtype=torch.float64) for family, make in MAKE.items()}


@pytest.fixture
def base(pipes, monkeypatch):
    """Makes a toy what files are read for."""

    def choose(family):
        components = {part: module for part in PARTS if (module := getattr(pipes[family], part, None)) is not None}
        monkeypatch.setattr(conversion, "base_of", lambda *_: fitting.Base(family, components))
        return components

    return choose


def dense(file, components, family):
    """Component and path to the change of the weight, in float64; what is zero is left out."""
    changes = {}
    for component, inside in reader.read(file, components, family).factors.items():
        for path, layer in inside.items():
            change = layer.scale * layer.stored_up.double().flatten(1) @ layer.stored_down.double().flatten(1)
            changes |= {f"{component}.{path}": change} if change.any() else {}
    return changes


def alike(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, change in theirs.items():
        assert (ours[name] - change).norm() <= tolerance * change.norm(), name


@pytest.mark.parametrize(("family", "alpha"), [("sd", 1.3), ("sdxl", 2.0), ("sd3", 1.3), ("flux", None)])
@BOTH
def test_another_layout_is_the_same_lora(pipes, base, tmp_path, family, to, alpha):
    components = base(family)
    file = toys.lora(pipes[family], tmp_path / "a.safetensors", targets=TARGETS, alpha=alpha, dtype=torch.float16)
    written = conversion.convert(file, tmp_path / "b.safetensors", to=to)
    assert written.exact and written.error == 0 and written.layout == to
    receipt = reader.read(written.file, components, family).receipt
    assert receipt.applied == receipt.tensors and receipt.layout.startswith(to)
    alike(dense(written.file, components, family), dense(file, components, family), 1e-15)
    again = conversion.convert(written.file, tmp_path / "c.safetensors", to="diffusers" if to == "kohya" else "kohya")
    alike(dense(again.file, components, family), dense(file, components, family), 1e-15)


@pytest.mark.parametrize("layout", writers.WRITERS)
@BOTH
def test_every_spelling_with_alphas_of_its_own(pipes, base, tmp_path, layout, to):
    components = base("sd")
    updates = writers.updates(pipes["sd"], alphas=(1.0, 0.3, 8.0), every=11)
    file = writers.save(tmp_path / "a.safetensors", writers.WRITERS[layout](pipes["sd"], updates))
    written = conversion.convert(file, tmp_path / "b.safetensors", to=to)
    assert written.exact
    alike(dense(written.file, components, "sd"), {f"{one.component}.{one.path}": one.dense().flatten(1) for one in updates}, 1e-14)


@pytest.mark.parametrize(("family", "alpha"), [("sd", 1.3), ("flux", 2.0)])
def test_stock_diffusers_reads_the_alphas_too(pipes, base, tmp_path, family, alpha):
    components = base(family)
    file = toys.lora(pipes[family], tmp_path / "a.safetensors", targets=TARGETS, rank=4, alpha=alpha, dtype=torch.float32, text=False)
    tensors = load_file(file)
    one = next(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(("attn1.to_q.lora_A.weight", "transformer.proj_out.lora_A.weight")))
    tensors |= {f"{one}.lora_{part}.weight": tensors[f"{one}.lora_{part}.weight"].narrow(dim, 0, 2) for part, dim in (("A", 0), ("B", 1))}
    kohya = {f"{name}.alpha": torch.tensor(alpha if name != one else 0.7) for name in {key.rpartition(".lora_")[0] for key in tensors}}
    save_file({name: tensor.contiguous() for name, tensor in (tensors | kohya).items()}, file)
    written = conversion.convert(file, tmp_path / "b.safetensors", to="diffusers")
    pipe = MAKE[family](dtype=torch.float32)
    pipe.load_lora_weights(written.file, adapter_name="a")
    denoiser = "unet" if family == "sd" else "transformer"
    stock = {f"{denoiser}.{path}": module.get_delta_weight("a").double().flatten(1) for path, module in getattr(pipe, denoiser).named_modules()
             if hasattr(module, "get_delta_weight")}
    alike(stock, dense(file, components, family), 1e-6)


@pytest.mark.parametrize("family", ["sd", "flux"])
@BOTH
def test_fewer_ranks_lose_what_is_stated(pipes, base, tmp_path, family, to):
    """Against the singular values of the dense changes; of kohya's transformers those of its fused layers."""
    components = base(family)
    file = toys.lora(pipes[family], tmp_path / "a.safetensors", targets=TARGETS, dtype=torch.float64)
    written = conversion.convert(file, tmp_path / "b.safetensors", to=to, rank=2)
    assert set(written.ranks) == {2} and not written.exact
    before, after = dense(file, components, family), dense(written.file, components, family)
    whole = sum(float(change.square().sum()) for change in before.values())
    lost = sum(float((before[name] - after[name]).square().sum()) for name in before)
    assert written.error == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    if to == "diffusers" or family in ("sd", "sdxl"):
        best = {name: torch.linalg.svdvals(change) for name, change in before.items()}
        assert lost == pytest.approx(sum(float(values[2:].square().sum()) for values in best.values()), rel=1e-9)
        shares = {name: float((values[2:].square().sum() / values.square().sum()).sqrt()) for name, values in best.items()}
        assert written.worst[1] == pytest.approx(max(shares.values()), rel=1e-9) and shares[written.worst[0]] == max(shares.values())
    assert f"{100 * written.error:.3g} %" in written.line()


def test_fused_names_of_a_split_file_keep_its_rank(pipes, base, tmp_path):
    """A kohya file of FLUX is split for diffusers, where q, k and v have one down factor, and joined again without a number more."""
    base("flux")
    file = toys.lora(pipes["flux"], tmp_path / "a.safetensors", dtype=torch.float16)
    fused = conversion.convert(file, tmp_path / "b.safetensors", to="kohya")
    assert max(fused.ranks) == 16 and "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in load_file(fused.file)
    split = conversion.convert(fused.file, tmp_path / "c.safetensors", to="diffusers")
    joined = conversion.convert(split.file, tmp_path / "d.safetensors", to="kohya")
    assert joined.ranks == fused.ranks and {name: tensor.shape for name, tensor in load_file(joined.file).items()} == {
        name: tensor.shape for name, tensor in load_file(fused.file).items()}


@BOTH
@pytest.mark.parametrize("says", [{"ss_network_module": "networks.dylora"}, {"ss_network_args": '{"algo": "dylora", "block_size": "2"}'}])
def test_dylora_files_are_cut(pipes, base, tmp_path, to, says):
    components = base("sd")
    file = toys.lora(pipes["sd"], tmp_path / "a.safetensors", layout="kohya", alpha=2.0, dtype=torch.float16)
    save_file(load_file(file), file, metadata={"format": "pt", "title": "Owl", **says})
    written = conversion.convert(file, tmp_path / "b.safetensors", to=to, rank=2)
    assert written.cut and written.error == 0 and "DyLoRA" in written.line() and written.metadata["title"] == "Owl" and not conversion.dynamic(written.metadata)
    whole = reader.read(file, components, "sd").factors["unet"]
    for path, layer in reader.read(written.file, components, "sd").factors["unet"].items():
        cut = 2.0 / 2 * whole[path].stored_up[:, :2].double().flatten(1) @ whole[path].stored_down[:2].double().flatten(1)
        torch.testing.assert_close(layer.scale * layer.stored_up.double().flatten(1) @ layer.stored_down.double().flatten(1), cut, rtol=1e-12, atol=0)


@pytest.mark.parametrize("family", ["sd", "flux"])
@BOTH
def test_the_sum_of_files(pipes, base, tmp_path, family, to):
    components = base(family)
    files = [toys.lora(pipes[family], tmp_path / "a.safetensors", seed=1, targets=TARGETS, dtype=torch.float64),
             toys.lora(pipes[family], tmp_path / "b.safetensors", seed=2, rank=3, alpha=1.5, targets=("attn",), dtype=torch.float64)]
    loras = [Lora("a", weight=0.8, text_weight=0.5), Lora("b", weight=-0.3)]
    written = conversion.merge(list(zip(loras, files, strict=True)), tmp_path / "sum.safetensors", to=to, title="Both")
    assert written.error < 1e-14 and written.metadata["title"] == "Both"
    wanted = {}
    for lora, file in zip(loras, files, strict=True):
        for name, change in dense(file, components, family).items():
            weight = lora.text_weight if name.startswith("text") and lora.text_weight is not None else lora.weight
            wanted[name] = wanted.get(name, 0) + weight * change
    alike(dense(written.file, components, family), wanted, 1e-13)
    small = conversion.merge(list(zip(loras, files, strict=True)), tmp_path / "small.safetensors", to=to, rank=3, precision=torch.float32)
    assert max(small.ranks) == 3 and small.error > 0.01


def test_metadata_says_nothing_untrue_of_the_new_file(pipes, base, tmp_path):
    base("sd")
    file = toys.lora(pipes["sd"], tmp_path / "a.safetensors", layout="kohya", alpha=2.0)
    says = {"ss_network_alpha": "2", "ss_network_dim": "4", "lora_alpha": "2", "unet.lora_alpha": "2", "sshs_model_hash": "0", "title": "Owl", "ss_tag_frequency": "{}"}
    save_file(load_file(file), file, metadata={"format": "pt", **says})
    written = conversion.convert(file, tmp_path / "b.safetensors", to="diffusers")
    assert set(written.metadata) == {"title", "ss_tag_frequency", "converted_from", "software"}


def test_refusals_leave_nothing(pipes, base, tmp_path):
    base("sd")
    file = toys.lora(pipes["sd"], tmp_path / "a.safetensors", dtype=torch.float32, scale=1e12)
    for words, call in {
        "write the file in float32": lambda: conversion.convert(file, tmp_path / "b.safetensors", precision=torch.float16),
        "nothing to write": lambda: conversion.merge([(Lora("a", weight=0.0), file)], tmp_path / "b.safetensors"),
        "leave out start, end, region": lambda: conversion.merge([(Lora("a", start=0.5), file)], tmp_path / "b.safetensors"),
        "medley export knows blocks": lambda: conversion.merge([(Lora("a", blocks={"mid": 0.5}), file)], tmp_path / "b.safetensors"),
    }.items():  # fmt: skip
        with pytest.raises(Refused, match=words):
            call()
    assert not (tmp_path / "b.safetensors").exists()


def test_bases_without_weights(tmp_path):
    def pair(name, into=768, out=768):
        return {f"{name}.lora_down.weight": torch.ones(1, into), f"{name}.lora_up.weight": torch.ones(out, 1)}

    def file(name, tensors):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    sd = file("sd", pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768, 320))
    xl = file("xl", pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048, 640))
    plain = file("plain", pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, 640))
    flux = file("flux", pair("lora_unet_double_blocks_0_img_attn_proj", 3072, 3072))
    sd3 = file("sd3", pair("lora_unet_joint_blocks_0_x_block_attn_proj", 1536, 1536))
    assert [fitting.base_of([path]).family for path in (sd, xl, plain, flux)] == ["sd", "sdxl", "sd", "flux"]
    assert fitting.base_of([plain, sd]).family == "sd"
    for words, paths in {"different bases": [sd, xl], "name the one that this is for": [sd3]}.items():
        with pytest.raises(Refused, match=words):
            fitting.base_of(paths)
    odd = file("odd", pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 48, 48))
    with pytest.raises(Refused, match="CLI: --model"):
        fitting.base_of([odd])
    assert list(fitting.opened([odd])[0].factors) == [""] and list(fitting.opened([sd, plain])[1].factors) == ["unet"]
    written = conversion.convert(xl, tmp_path / "out.safetensors", to="diffusers")
    assert "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" in load_file(written.file)


def test_mutants_are_caught(pipes, base, tmp_path, monkeypatch):
    """An alpha that is lost, and parts of a fused layer in another order, are seen."""
    components = base("flux")
    file = toys.lora(pipes["flux"], tmp_path / "a.safetensors", alpha=1.3, dtype=torch.float64)
    whole = dense(file, components, "flux")
    monkeypatch.setattr(conversion, "_uniform", lambda layers: [layer._replace(alpha=None) for layer in layers])
    with pytest.raises(AssertionError):
        alike(dense(conversion.convert(file, tmp_path / "b.safetensors", to="kohya").file, components, "flux"), whole, 1e-12)
    assert reduce(lambda total, change: total + float(change.square().sum()), whole.values(), 0.0) > 0


@pytest.mark.parametrize("kind", ["lokr", "lokr whole", "lokr low", "lokr tucker", "loha big", "loha tucker", "full", "lora"])
@torch.no_grad()
def test_other_kinds_become_the_nearest_lora_of_a_rank(kind, pipes, base, tmp_path):
    """By the singular values of the dense change; what is lost is stated, whole and of the worst layer."""
    components, rank = base("sd"), 2
    truth = kind_writers.write(pipes["sd"], tmp_path / "a.safetensors", kind, only="down_blocks.1")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({key: value for key, value in tensors.items() if not key.endswith("diff_b")}, tmp_path / "a.safetensors")
    written = conversion.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", rank=rank)
    found = reader.read(written.file, components, "sd").factors["unet"]
    lost, whole, worst = 0.0, 0.0, 0.0
    for (_, path), change in truth.items():
        weight = components["unet"].get_submodule(path).weight
        change = change(weight, None)[0].flatten(1)
        outer, values, inner = torch.linalg.svd(change, full_matrices=False)
        torch.testing.assert_close(found[path].delta(weight).flatten(1), outer[:, :rank] * values[:rank] @ inner[:rank], rtol=0, atol=1e-10)
        squares = values.square()
        lost, whole, worst = lost + squares[rank:].sum(), whole + squares.sum(), max(worst, float((squares[rank:].sum() / squares.sum()) ** 0.5))
    assert written.error == pytest.approx(float((lost / whole) ** 0.5), rel=1e-6, abs=1e-9) and written.worst[1] == pytest.approx(worst, rel=1e-6, abs=1e-9)
    assert set(written.ranks) == {rank} and (kind == "lora" or written.error > 0.01)


@pytest.mark.parametrize(("kind", "rank", "why"), [("lokr", None, "medley convert --rank N"), ("dora", 2, "DoRA"), ("oft", 2, "OFT"), ("bias", 2, "Full")])
def test_kinds_that_ask_for_the_bases_weights_become_none(kind, rank, why, pipes, base, tmp_path):
    base("sd")
    kind_writers.write(pipes["sd"], tmp_path / "a.safetensors", kind, only="down_blocks.1")
    with pytest.raises(Refused, match=why):
        conversion.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", rank=rank)
    assert not (tmp_path / "b.safetensors").exists()


def test_kohyas_joined_names_of_flux_have_no_nearest_lora(pipes, base, tmp_path):
    base("flux")
    model = pipes["flux"].transformer.get_submodule("transformer_blocks.0.attn.to_q").weight
    made = kind_writers.make("lokr", model.shape, torch.Generator().manual_seed(0)).tensors
    save_file({f"transformer.transformer_blocks.0.attn.to_q.{key}": value for key, value in made.items()}, tmp_path / "a.safetensors")
    assert conversion.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers", rank=2).ranks == {2: 1}
    with pytest.raises(Refused, match="--to diffusers"):
        conversion.convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", to="kohya", rank=2)
