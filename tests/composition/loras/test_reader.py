"""LoRA files of every layout, read against toys: the factors equal the written update, the receipt tells all of it."""

import json

import pytest
import torch
from torch import nn

from composition.loras import layers as layer_map
from composition.loras import reader, scale
from composition.refusal import Refused
from tests import toys
from tests.composition.loras import lora_writers as writers

MAKERS = {"sd": toys.sd, "sdxl": toys.sdxl}
UNEVEN = (2.0, 0.25, 1.0, 16.0, -3.0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of tiny products: threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipes():
    return {family: make() for family, make in MAKERS.items()}


def components(pipe) -> dict[str, nn.Module]:
    names = ("unet", "text_encoder", "text_encoder_2")
    return {name: getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None}


def check(lora: reader.LoraFile, made: list[writers.Update]) -> None:
    """Exactly the written modules, each with the written update, to 1e-10 of its size."""
    assert {(part, path) for part, inside in lora.factors.items() for path in inside} == {one[:2] for one in made}
    for one in made:
        found = lora.factors[one.component][one.path]
        dense = (found.up.flatten(1) @ found.down.flatten(1)).reshape(one.dense().shape)
        assert dense.dtype == torch.float64
        assert (dense - one.dense()).abs().max() <= 1e-10 * one.dense().abs().max(), one.path
        assert (found.rank, found.alpha) == (writers.RANK, one.alpha)


def law(receipt) -> None:
    assert receipt.applied + sum(len(keys) for keys in receipt.ignored.values()) == receipt.tensors


@pytest.mark.parametrize("alphas", [(2.0,), (0.5,), UNEVEN], ids=["rank", "half", "uneven"])
@pytest.mark.parametrize("layout", writers.WRITERS)
@pytest.mark.parametrize("family", MAKERS)
def test_layouts(family, layout, alphas, pipes, tmp_path):
    pipe = pipes[family]
    made = writers.updates(pipe, alphas=alphas)
    written = writers.WRITERS[layout](pipe, made)
    lora = reader.read(writers.save(tmp_path / "a.safetensors", written), components(pipe), family)
    check(lora, made)
    law(lora.receipt)
    assert lora.receipt.applied == lora.receipt.tensors == len(written[0]) and not lora.receipt.ignored
    assert sum(lora.receipt.alphas.values()) == lora.receipt.ranks[2] == len(made)
    assert lora.receipt.family == family and lora.receipt.coverage == 1.0
    assert list(lora.receipt.components) == list(components(pipe))


def test_names_without_a_component(pipes, tmp_path):
    """As a model's own save_lora_adapter writes them, settings without a prefix too."""
    made = [one for one in writers.updates(pipes["sd"], alphas=(3.0,)) if one.component == "unet"]
    tensors, said = writers.metadata_alphas(pipes["sd"], made)
    tensors = {key.removeprefix("unet."): one for key, one in tensors.items()}
    said = {key: value.replace("unet.", "") for key, value in said.items()}
    path = writers.save(tmp_path / "a.safetensors", (tensors, said))
    check(reader.read(path, components(pipes["sd"]), "sd"), made)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_processors(prefix, pipes, tmp_path):
    made = [one for one in writers.updates(pipes["sd"], only="attn") if one.component == "unet"]
    path = writers.save(tmp_path / "a.safetensors", writers.processors(made, prefix))
    lora = reader.read(path, components(pipes["sd"]), "sd")
    check(lora, made)
    assert lora.receipt.layout == "processors"


def test_old_text_encoder_attention_names(pipes, tmp_path):
    made = [one for one in writers.updates(pipes["sd"], only="self_attn") if one.component == "text_encoder"]
    tensors = {}
    for one in made:
        head, part = one.path.rsplit(".", 1)
        key = f"text_encoder.text_model.{head}.to_{part.removesuffix('_proj')}_lora"
        tensors |= {f"{key}.down.weight": one.down, f"{key}.up.weight": one.up}
    check(reader.read(writers.save(tmp_path / "a.safetensors", (tensors, {})), components(pipes["sd"]), "sd"), made)


def test_first_generation(pipes, tmp_path):
    """Numbers in the order down, up, middle; attn1, gate, attn2; k, v, q, out."""
    unet = {one.path: one for one in writers.updates(pipes["sd"]) if one.component == "unet"}
    text = {one.path: one for one in writers.updates(pipes["sd"]) if one.component == "text_encoder"}
    blocks = ["down_blocks.0", "down_blocks.1", *(f"up_blocks.{level}" for level in (1, 1, 2, 2)), "mid_block"]
    indices = [0, 0, 0, 1, 0, 1, 0]
    ends = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj",
            "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    order = [f"{block}.attentions.{index}.transformer_blocks.0.{end}"
             for block, index in zip(blocks, indices, strict=True) for end in ends]
    words = [f"encoder.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in ("k", "v", "q", "out")]
    for paths in (order, [path for path in order if ".ff." not in path]):
        made = [unet[path] for path in paths] + [text[path] for path in words]
        tensors = {}
        for component, places in (("unet", [unet[path] for path in paths]), ("text_encoder", [text[p] for p in words])):
            for index, one in enumerate(places):
                tensors |= {f"{component}:{index}:down": one.down, f"{component}:{index}:up": one.up}
        path = writers.save(tmp_path / "a.safetensors", (tensors, {"unet:0:rank": "2"}))
        lora = reader.read(path, components(pipes["sd"]), "sd")
        check(lora, made)
        assert lora.receipt.layout == "first-generation"
    del tensors["unet:3:down"], tensors["unet:3:up"]
    with pytest.raises(Refused, match="no such layer"):
        reader.read(writers.save(tmp_path / "b.safetensors", (tensors, {})), components(pipes["sd"]), "sd")


class Nested(nn.Module):
    """A text encoder as transformers had it before 5.6: everything below text_model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.text_model = inner


@pytest.mark.parametrize("layout", ["peft", "kohya", "linear-layer"])
def test_text_model_prefix_either_way(layout, pipes, tmp_path):
    made = [one for one in writers.updates(pipes["sd"]) if one.component == "text_encoder"]
    tensors, _ = writers.WRITERS[layout](pipes["sd"], made)
    nested = {"unet": pipes["sd"].unet, "text_encoder": Nested(pipes["sd"].text_encoder)}
    for spell in (lambda key: key, lambda key: key.replace("text_model.", "").replace("text_model_", "")):
        path = writers.save(tmp_path / "a.safetensors", ({spell(key): one for key, one in tensors.items()}, {}))
        check(reader.read(path, components(pipes["sd"]), "sd"), made)
        below = [one._replace(path=f"text_model.{one.path}") for one in made]
        check(reader.read(path, nested, "sd"), below)


@pytest.mark.parametrize("family", MAKERS)
def test_linear_and_1x1_convolution_are_one(family, pipes, tmp_path):
    """SD 1.5 has convolutions where SDXL has linears; files write either in 2-D and 4-D."""
    made = writers.updates(pipes[family], only="proj_")
    tensors, _ = writers.WRITERS["kohya"](pipes[family], made)
    for spell in (lambda one: one.flatten(1), lambda one: one.flatten(1)[:, :, None, None]):
        turned = {key: spell(one) if one.ndim else one for key, one in tensors.items()}
        lora = reader.read(writers.save(tmp_path / "a.safetensors", (turned, {})), components(pipes[family]), family)
        check(lora, made)
        for one in made:
            found = lora.factors[one.component][one.path]
            assert (found.down.shape, found.up.shape) == (one.down.shape, one.up.shape)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_stored_dtypes_become_float32(dtype, pipes, tmp_path):
    """The alpha/rank product is exact to float32 even where the file is coarser, and nothing aliases the file."""
    made = writers.updates(pipes["sd"], dtype=getattr(torch, dtype), every=9, alphas=(0.3,))
    path = writers.save(tmp_path / "a.safetensors", writers.WRITERS["kohya"](pipes["sd"], made))
    lora = reader.read(path, components(pipes["sd"]), "sd")
    path.write_bytes(b"replaced")
    for one in made:
        found = lora.factors[one.component][one.path]
        assert found.down.dtype == found.up.dtype == torch.float32 and found.up.is_contiguous()
        dense = (found.up.flatten(1) @ found.down.flatten(1)).reshape(one.dense().shape).double()
        assert (dense - one.dense()).abs().max() <= 1e-6 * one.dense().abs().max()


def _stock(pipe, path) -> dict[tuple[str, str], torch.Tensor]:
    """The update stock diffusers makes of a file, by component and module path."""
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="one")
    found = {}
    for name, part in components(pipe).items():
        for module_path, module in part.named_modules():
            if hasattr(module, "lora_A"):
                found[name, module_path] = module.get_delta_weight("one").detach()
    return found


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", MAKERS)
def test_stock_reads_the_same(family, layout, alpha, tmp_path):
    """Second witness, for uniform alpha (it misreads alphas per layer)."""
    pipe = MAKERS[family]()
    path = toys.lora(pipe, tmp_path / "a.safetensors", layout=layout, alpha=alpha)
    ours = reader.read(path, components(pipe), family).factors
    stock = _stock(pipe, path)
    assert set(stock) == {(part, module) for part, inside in ours.items() for module in inside}
    for (part, module), update in stock.items():
        mine = (ours[part][module].up.flatten(1) @ ours[part][module].down.flatten(1)).reshape(update.shape)
        torch.testing.assert_close(mine, update, rtol=1e-5, atol=1e-7)


def test_rank_stabilised_scaling_as_stock_does(tmp_path):
    pipe = toys.sd()
    made = [one for one in writers.updates(pipe, dtype=torch.float32, only="attn1") if one.component == "unet"]
    tensors = {key: one for key, one in writers.WRITERS["peft"](pipe, made)[0].items() if not key.endswith("alpha")}
    settings = {"unet.r": 2, "unet.lora_alpha": 3, "unet.use_rslora": True, "unet.alpha_pattern": {"attn1.to_k": 0.5},
                "unet.target_modules": [f"attn1.to_{part}" for part in ("q", "k", "v", "out.0")]}
    path = writers.save(tmp_path / "a.safetensors", (tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    ours = reader.read(path, components(pipe), "sd").factors["unet"]
    compared = 0
    for (_, module), update in _stock(pipe, path).items():
        torch.testing.assert_close(ours[module].up @ ours[module].down, update, rtol=1e-5, atol=1e-5)
        compared += 1
    assert compared == len(ours) == len(made)


def test_mutants_are_caught(pipes, tmp_path, monkeypatch):
    """Readers that are wrong in the ways readers are wrong: none passes the oracle."""
    made = writers.updates(pipes["sd"], alphas=UNEVEN)
    paths = [writers.save(tmp_path / f"{layout}.safetensors", writers.WRITERS[layout](pipes["sd"], made))
             for layout in ("kohya", "peft-header")]
    fitted, names, alphas = reader.kinds.fitted, layer_map.names, scale.alphas

    def swapped(component, module, of=None):
        turn = {"to_q": "to_k", "to_k": "to_q"}
        return {name: path.replace(path[-4:], turn.get(path[-4:], path[-4:])) if ".attn1." in path else path
                for name, path in names(component, module, of).items()}

    mutants = [
        ("alpha ignored", scale, "alphas", lambda *given: (alphas(*given)[0]._replace(value=2.0),), (0, 1)),
        ("rank not divided", reader.kinds, "fitted", lambda tensors, alpha, *rest: fitted(tensors, 2 * alpha, *rest), (0, 1)),
        ("one alpha for all", scale.Statement, "_pattern", lambda *given: None, (1,)),
        ("layers swapped", layer_map, "names", swapped, (0, 1)),
    ]
    for what, place, name, wrong, hit in mutants:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, wrong)
            for index in hit:
                with pytest.raises(AssertionError):
                    check(reader.read(paths[index], components(pipes["sd"]), "sd"), made)
                    pytest.fail(f"not caught: {what}", pytrace=False)
    for path in paths:
        check(reader.read(path, components(pipes["sd"]), "sd"), made)
