"""Alphas stated outside the tensors: applied, or refused, and what is said where several state one. The truth is the written update."""

import json
import re
import time

import pytest
import torch

from composition.loras import reader, scale
from composition.refusal import Refused
from tests import toys
from tests.composition.loras import lora_writers as writers


@pytest.fixture(scope="module")
def pipe():
    return toys.sd()


@pytest.fixture(scope="module")
def parts(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def bare(pipe, alpha: float, only: str = "attn1"):
    """(updates of that alpha in the UNet, their PEFT tensors without an alpha)."""
    made = [update for update in writers.updates(pipe, alphas=(alpha,), only=only) if update.component == "unet"]
    tensors, _ = writers.WRITERS["peft"](pipe, made)
    return made, {key: tensor for key, tensor in tensors.items() if not key.endswith("alpha")}


def check(lora: reader.LoraFile, made, factor: float = 1.0) -> None:
    assert set(lora.factors["unet"]) == {update.path for update in made}
    for update in made:
        layer = lora.factors["unet"][update.path]
        dense = (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(update.dense().shape)
        assert (dense - factor * update.dense()).abs().max() <= 1e-10 * update.dense().abs().max(), update.path


def config(folder, **settings):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **settings}))


HEADERS = {
    "unet.lora_alpha": {"unet.lora_alpha": "6", "unet.r": "2"},
    "transformer.lora_alpha": {"transformer.lora_alpha": "6", "transformer.r": "2"},
    "lora_alpha": {"lora_alpha": "6"},
    "network_alpha": {"network_alpha": "6.0"},
    "ss_network_alpha": {"ss_network_alpha": "6", "ss_network_dim": "2"},
    "alpha": {"alpha": "6"},
    "diffusers": {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6})},
    "no prefix": {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 6})},
    "peft's config": {"peft_config": json.dumps({"r": 2, "lora_alpha": 6})},
    "rslora": {"lora_alpha": str(6 / 2**0.5), "use_rslora": "True"},
    "first of several": {"alpha": "3", "ss_network_alpha": "None", "unet.lora_alpha": "6"},
    "words beside": {"alpha": "the first one", "ss_network_alpha": "6"},
}


@pytest.mark.parametrize("case", HEADERS)
def test_alphas_in_the_header(case, pipe, parts, tmp_path):
    made, tensors = bare(pipe, 6.0)
    path = writers.save(tmp_path / "a.safetensors", (tensors, HEADERS[case]))
    lora = reader.read(path, parts, "sd")
    check(lora, made)
    (alpha,) = lora.receipt.alphas
    assert alpha == pytest.approx(6.0) and reader.inspect(path).alphas == lora.receipt.alphas
    said = lora.receipt.line()
    assert case in ("diffusers", "no prefix", "peft's config") or "alpha 6 from" in said and "in the header" in said


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "Adapter_Model.SAFETENSORS"])
@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.unet.", "base_model.model.", ""])
def test_the_config_beside_a_file(prefix, name, pipe, parts, tmp_path):
    made, tensors = bare(pipe, 5.0)
    config(tmp_path, lora_alpha=5)
    path = writers.save(tmp_path / name, ({key.replace("unet.", prefix): tensor for key, tensor in tensors.items()}, {}))
    lora = reader.read(path, parts, "sd")
    check(lora, made)
    assert lora.receipt.alphas == {5.0: len(made)} and "alpha 5 from adapter_config.json beside it" in lora.receipt.line()


def test_patterns_and_rank_stabilised_scaling(pipe, parts, tmp_path):
    """alpha_pattern and rank_pattern fit the end of a name at a dot, the first that fits counts, "^" means the whole name."""
    made, tensors = bare(pipe, 2.0)
    first = made[0].path
    config(tmp_path, r=3, lora_alpha=4, use_rslora=True, rank_pattern={r"attn1\.to_(q|k)".replace(r"(q|k)", "q"): 2, "attn1.to_k": 2, "to_v": 2, "0": 2},
           alpha_pattern={f"^{first}": 1, "^attn1.to_k": 9, "to_k$": 8, "attn1.to_k": 7, "tn1.to_v": 9})
    lora = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, {})), parts, "sd")
    for update in made:
        alpha = 1 if update.path == first else 8 if update.path.endswith("to_k") else 4
        layer, dense = lora.factors["unet"][update.path], update.dense() * alpha / 2**0.5
        assert ((layer.up.flatten(1) @ layer.down.flatten(1)).reshape(dense.shape) - dense).abs().max() <= 1e-10 * dense.abs().max()


def test_patterns_are_regular_expressions(pipe, parts, tmp_path):
    """As PEFT reads them, in the config beside a file and in its header; the first that fits counts, whether it is a name or more."""
    made, tensors = bare(pipe, 2.0)
    patterns = {r".*\.down_blocks\.[01]\..*\.to_(q|k)": 8, r"down_blocks\.\d+\..*to_q": 16, "to_v": 4, r"attn1\.to_\w+": 1}
    ranks = {r"attn\d+\.to_(?:q|k|v|out\.0)": 2}

    def expected(path):
        return next((alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path)), 32)

    for beside in (True, False):
        if beside:
            config(tmp_path, r=64, lora_alpha=32, rank_pattern=ranks, alpha_pattern=patterns)
        else:
            (tmp_path / "adapter_config.json").unlink()
        said = {} if beside else {"lora_adapter_metadata": json.dumps({
            "unet.r": 64, "unet.lora_alpha": 32, "unet.rank_pattern": ranks, "unet.alpha_pattern": patterns})}
        lora = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, said)), parts, "sd")
        assert {path: layer.alpha for path, layer in lora.factors["unet"].items()} == {update.path: expected(update.path) for update in made}
        assert len(lora.receipt.alphas) >= 3
        for update in made:
            layer, dense = lora.factors["unet"][update.path], update.dense() * expected(update.path) / 2
            assert ((layer.up.flatten(1) @ layer.down.flatten(1)).reshape(dense.shape) - dense).abs().max() <= 1e-10 * dense.abs().max()


def test_patterns_fit_names_with_underscores(pipe, parts, tmp_path):
    made, _ = bare(pipe, 2.0)
    tensors = {key: tensor for key, tensor in writers.WRITERS["kohya"](pipe, made)[0].items() if not key.endswith("alpha")}
    config(tmp_path, lora_alpha=2, alpha_pattern={"attn1.to_k": 6})
    lora = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, {})), parts, "sd")
    assert {path.endswith("to_k"): layer.alpha for path, layer in lora.factors["unet"].items()} == {True: 6.0, False: 2.0}
    config(tmp_path, lora_alpha=2, alpha_pattern={r"attn\d\.to_(k|v)": 6})
    lora = reader.read(tmp_path / "a.safetensors", parts, "sd")
    assert {path.endswith(("to_k", "to_v")): layer.alpha for path, layer in lora.factors["unet"].items()} == {True: 6.0, False: 2.0}


def test_convolutions_of_lycoris_have_an_alpha_of_their_own(pipe, parts, tmp_path):
    made = [update for update in writers.updates(pipe, only="down_blocks.0.") if update.component == "unet"]
    tensors = {key: tensor for key, tensor in writers.WRITERS["kohya"](pipe, made)[0].items() if not key.endswith("alpha")}
    said = {"ss_network_alpha": "1", "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "4"})}
    lora = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, said)), parts, "sd")
    wide = {update.path for update in made if update.down.shape[2:] == (3, 3)}
    assert wide and {path for path, layer in lora.factors["unet"].items() if layer.alpha == 4.0} == wide
    assert set(lora.receipt.alphas) == {1.0, 4.0}


def test_tensors_come_first(pipe, parts, tmp_path):
    """As kohya writes them: alpha with every layer, and once more in the header."""
    made = [update for update in writers.updates(pipe, alphas=(1.0,)) if update.component == "unet"]
    for said, config_alpha, words in (({"ss_network_alpha": "1.0", "ss_network_dim": "2"}, 1, ""),
                                      ({"ss_network_alpha": "16"}, 4, "stored with a layer comes first"),
                                      ({"ss_network_alpha": "Dynamic", "lora_adapter_metadata": "[]"}, 1, "")):
        config(tmp_path, lora_alpha=config_alpha)
        lora = reader.read(writers.save(tmp_path / "a.safetensors", (writers.WRITERS["kohya"](pipe, made)[0], said)), parts, "sd")
        check(lora, made)
        assert lora.receipt.alpha_from == {scale.TENSORS: len(made)}
        assert (words in " ".join(lora.receipt.remarks)) if words else not lora.receipt.remarks
    assert lora.receipt.line().endswith("rank 2")


@pytest.mark.parametrize(("said", "beside", "alpha", "words"), [
    ({"lora_adapter_metadata": '{"unet.lora_alpha": 6}', "lora_alpha": "3"}, 4, 6, ("not 4 from adapter_config.json", "not 3 from lora_alpha")),
    ({"lora_alpha": "3"}, 6, 6, ("alpha 6 from adapter_config.json", "not 3 from lora_alpha in the header", "one number for all")),
    ({"ss_network_alpha": "3", "lora_alpha": "6"}, None, 6, ("not 3 from ss_network_alpha",)),
    ({"lora_alpha": "6"}, 6, 6, ("alpha 6 from adapter_config.json",)),
])
def test_who_wins_is_said(said, beside, alpha, words, pipe, parts, tmp_path):
    made, tensors = bare(pipe, float(alpha))
    if beside:
        config(tmp_path, lora_alpha=beside)
    lora = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, said)), parts, "sd")
    check(lora, made)
    assert all(part in lora.receipt.line() for part in words)
    assert ("not " in lora.receipt.line()) == any("not " in part for part in words)


@pytest.mark.parametrize(("said", "beside", "words"), [
    ({}, "not json", "not readable as JSON"),
    ({}, "[1]", "not a JSON object"),
    ({}, '{"lora_alpha": "many"}', "'many'.*not a number"),
    ({}, '{"lora_alpha": 8, "r": 16}', "rank 16 .*whose factors have rank 2"),
    ({}, '{"lora_alpha": 8, "r": 2, "rank_pattern": {"to_q": 4}}', "rank 4 .*whose factors have rank 2"),
    ({}, '{"lora_alpha": 8, "alpha_pattern": {"(a+": 3}}', "ends too early"),
    ({}, '{"lora_alpha": 8, "alpha_pattern": {"(?=a)b": 3}}', "not read"),
    ({}, '{"lora_alpha": 8, "alpha_pattern": [1]}', "not a JSON object"),
    ({}, '{"lora_alpha": 1e400}', "a number that is too large"),
    ({"network_alpha": "Dynamic"}, "", "'Dynamic'.*not a number"),
    ({"unet.lora_alpha": "16", "unet.r": "16"}, "", "rank 16"),
    ({"lora_alpha": "inf"}, "", "not a number"),
])
def test_what_cannot_be_read_is_refused(said, beside, words, pipe, parts, tmp_path):
    """Never taken for 1: the file is refused, in one sentence that names it."""
    _, tensors = bare(pipe, 2.0)
    if beside:
        (tmp_path / "adapter_config.json").write_text(beside)
    path = writers.save(tmp_path / "owl.safetensors", (tensors, said))
    for use in (lambda: reader.read(path, parts, "sd", allow_partial=True), lambda: reader.inspect(path)):
        with pytest.raises(Refused, match=rf"^owl\.safetensors: .*{words}"):
            use()
    assert reader.describe(path).ranks  # a listing does not compute


def test_whose_config_it_is(pipe, parts, tmp_path):
    """Of adapter_model.safetensors where that is there; of a file alone; among several it is said that it was not read."""
    _, tensors = bare(pipe, 2.0)
    config(tmp_path, lora_alpha=8)
    a = writers.save(tmp_path / "a.safetensors", (tensors, {}))
    assert reader.read(a, parts, "sd").receipt.alphas.keys() == {8.0}
    b = writers.save(tmp_path / "b.safetensors", (tensors, {}))
    for path in (a, b):
        receipt = reader.read(path, parts, "sd").receipt
        assert receipt.alphas.keys() == {2.0} and "was not read" in receipt.line()
    model = writers.save(tmp_path / "adapter_model.safetensors", (tensors, {}))
    assert reader.read(model, parts, "sd").receipt.alphas.keys() == {8.0}
    receipt = reader.read(a, parts, "sd").receipt
    assert receipt.alphas.keys() == {2.0} and not receipt.remarks
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "own.safetensors").symlink_to(model)
    assert reader.read(tmp_path / "links" / "own.safetensors", parts, "sd").receipt.alphas.keys() == {8.0}


def test_modules_of_which_nobody_states_an_alpha(pipe, parts, tmp_path):
    made = writers.updates(pipe, alphas=(2.0,))
    tensors = {key: tensor for key, tensor in writers.WRITERS["peft"](pipe, made)[0].items() if not key.endswith("alpha")}
    receipt = reader.read(writers.save(tmp_path / "a.safetensors", (tensors, {"unet.lora_alpha": "6"})), parts, "sd").receipt
    texts = sum(update.component == "text_encoder" for update in made)
    assert receipt.alphas == {6.0: len(made) - texts, 2.0: texts}
    assert f"alpha of {texts} modules is stated nowhere and taken as the rank" in receipt.remarks


def test_patterns_do_not_cost_modules_times_patterns(pipe, parts, tmp_path):
    """100,000 patterns for 5,000 modules: 5e8 comparisons would take minutes."""
    patterns = {f"down_blocks.{index}.nothing.to_q": 4 for index in range(100_000)}
    statement = scale._json("it", 1, json.dumps({"lora_alpha": 8, "alpha_pattern": patterns | {"to_q": 3}}))
    begun = time.perf_counter()
    assert {statement.alpha("unet", f"up_blocks.{index}.attn1.to_q", 2, False) for index in range(5_000)} == {3.0}
    assert time.perf_counter() - begun < 5


def test_mutants_are_caught(pipe, parts, tmp_path, monkeypatch):
    """Readers that are wrong in the ways readers are wrong."""
    made, tensors = bare(pipe, 6.0)
    path = writers.save(tmp_path / "a.safetensors", (tensors, {"alpha": "3"}))
    config(tmp_path, lora_alpha=6)
    statements = scale.statements
    mutants = {
        "the header's number first": lambda *given: tuple(reversed(statements(*given))),
        "the config not read": lambda *given: tuple(s for s in statements(*given) if s.order != scale.BESIDE),
        "nothing read": lambda *given: (),
    }
    for what, wrong in mutants.items():
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            patch.setattr(scale, "statements", wrong)
            check(reader.read(path, parts, "sd"), made)
            pytest.fail(f"not caught: {what}", pytrace=False)
    check(reader.read(path, parts, "sd"), made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_factors_are_kept_as_they_are_stored(dtype, pipe, parts, tmp_path):
    """A file in half precision takes in memory what its factors take on disk, and its alpha loses nothing."""
    made = [update for update in writers.updates(pipe, dtype=dtype, alphas=(0.3,)) if update.component == "unet"]
    lora = reader.read(writers.save(tmp_path / "a.safetensors", writers.WRITERS["kohya"](pipe, made)), parts, "sd")
    assert lora.nbytes == sum(update.down.nbytes + update.up.nbytes for update in made)
    for update in made:
        layer = lora.factors["unet"][update.path]
        assert (layer.stored_down.dtype, layer.up.dtype, layer.down.dtype) == (dtype, torch.float32, torch.float32)
        assert torch.equal(layer.down, update.down.float()) and torch.equal(layer.up, update.up.float() * (0.3 / 2))
