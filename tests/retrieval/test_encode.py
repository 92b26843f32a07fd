"""The encoder: what its vectors do not depend on, in float64; what augmentations do to tokens; files of it."""

import json
from dataclasses import replace

import pytest
import torch

from composition import Refused
from composition.loras.kinds.lora import Factors
from retrieval.encode import SETTINGS, WEIGHTS, Encoder, Settings
from retrieval.probes import Updates, updates
from retrieval.sketch import Sketch, sketched
from retrieval.tokens import Tokens, layer, layers, tokens
from tests.retrieval.pool import SHAPES, TEXT, Pool


@pytest.fixture
def pool():
    return Pool(dtype=torch.float64)


def encoder(sketches, reads="sketches", **changes):
    torch.manual_seed(3)
    settings = Settings(layers(sketches), "pocket", "sd", "a judge", TEXT, TEXT, reads=reads.split()[-1], side=8, focus=3 * (reads == "sketches"), width=16, depth=2,
                        heads=4)  # fmt: skip
    return Encoder(replace(settings, **changes)).eval().double()


def items(reads, loras):
    return [sketched(lora) for lora in loras] if reads != "factors" else loras


def vectors(model, reads, loras):
    with torch.no_grad():
        return model(model.batch(items(reads, loras)))


def changed(lora, change):
    rng = torch.Generator().manual_seed(1)
    again = {}
    for name, factors in lora.items():
        down, up, rank = factors.down, factors.up, factors.rank
        turn = torch.randn(rank, rank, generator=rng, dtype=torch.float64) + 2 * torch.eye(rank, dtype=torch.float64)
        again[name] = {
            "basis": Factors(torch.linalg.inv(turn) @ down, up @ turn, None),
            "padding": Factors(torch.cat([down, 0 * down]), torch.cat([up, 0 * up], 1), None),
            "alpha": Factors(down, up * rank / 3, 3.0),
            "weight": Factors(down * 7, up, None),
            "order": factors, "unknown layer": factors,
        }[change]
    if change == "unknown layer":
        again["unet.conv_in"] = Factors(torch.ones(1, 4).double(), torch.ones(4, 1).double() * 100, None)
        again["silent"] = Factors(torch.ones(1, 4).double(), torch.zeros(4, 1).double(), None)
    return dict(reversed(again.items())) if change == "order" else again


@pytest.mark.parametrize("reads", ["sketches", "whole sketches", "factors"])
@pytest.mark.parametrize("change", ["basis", "padding", "alpha", "weight", "order", "unknown layer"])
def test_a_vector_depends_on_what_the_updates_are(pool, reads, change):
    loras = [pool.lora(pool.normal(8)) for _ in range(3)]
    model = encoder([sketched(lora) for lora in loras], reads)
    before, after = vectors(model, reads, loras), vectors(model, reads, [changed(lora, change) for lora in loras])
    torch.testing.assert_close(after, before, rtol=0, atol=1e-8)
    torch.testing.assert_close(before.norm(dim=1), torch.ones(3, dtype=torch.float64))
    assert (before @ before.T).fill_diagonal_(0).max() < 0.999


@pytest.mark.parametrize("reads", ["sketches", "factors"])
def test_a_lora_without_a_layer_is_one_whose_layer_does_nothing(pool, reads):
    lora = pool.lora(pool.normal(8))
    model = encoder([sketched(lora)], reads)
    name = list(lora)[1]
    silent = lora | {name: replace(lora[name], stored_up=torch.zeros_like(lora[name].stored_up))}
    without = {other: factors for other, factors in lora.items() if other != name}
    both = vectors(model, reads, [silent, without, lora])
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)
    assert (both[0] - both[2]).abs().max() > 1e-4


@pytest.mark.parametrize("reads", ["sketches", "factors"])
def test_a_lora_encoded_in_company_is_encoded_alone(pool, reads):
    loras = [pool.lora(pool.normal(8), extra=extra) for extra in (0, 1, 4)]
    loras[1] = dict(list(loras[1].items())[:3])
    model = encoder([sketched(lora) for lora in loras], reads)
    together = vectors(model, reads, loras)
    torch.testing.assert_close(torch.cat([vectors(model, reads, [lora]) for lora in loras]), together, rtol=0, atol=1e-12)
    assert model.encode(items(reads, loras)).dtype == torch.float32


def test_a_probes_answer_is_that_of_the_dense_update(pool):
    loras = [pool.lora(pool.normal(8), extra=extra) for extra in (1, 3)]
    model = encoder([sketched(lora) for lora in loras], "factors")
    batch = updates(loras, model.settings.layers)
    assert isinstance(batch, Updates) and model.probes is not None
    answers = model.probes(batch)
    for row, lora in enumerate(loras):
        for column, name in enumerate(model.settings.layers):
            dense = lora[name].up @ lora[name].down
            kind = list(model.probes.kinds).index(model.settings.layers[name].kind)
            inputs = model.probes.inputs[kind][list(model.probes.kinds.values())[kind].index(column)]
            expected = (inputs @ dense.T / dense.norm()) * len(dense) ** 0.5 @ model.probes.maps[kind]
            torch.testing.assert_close(answers[row, column], expected)


def test_a_sum_of_tokens_is_the_tokens_of_the_sum(pool):
    """Exactly its sketch and its vector of factors; its norm as the sketches estimate it, its entropies where the two have no direction in common."""
    eye = torch.eye(20, dtype=torch.float64)
    first = {name: Factors(eye[:3, :16] * torch.arange(1, 4)[:, None], eye[:, :3] * 2, None) for name in SHAPES}
    second = {name: Factors(eye[5:9, :16], eye[:, 5:9] * torch.arange(2, 6), None) for name in list(SHAPES)[:-1]}
    known = layers([sketched(first)])
    share = torch.tensor([0.3], dtype=torch.float64)
    sizes = [sketched(lora).norms.norm().item() for lora in (first, second)]
    weights = [0.3**0.5 / sizes[0], 0.7**0.5 / sizes[1]]
    total = {name: Factors(torch.cat([part[name].down for part in (first, second) if name in part]),
                           torch.cat([part[name].up * weight for part, weight in ((first, weights[0]), (second, weights[1])) if name in part], 1), None)
             for name in SHAPES}  # fmt: skip
    expected = tokens([sketched(total)], known)
    mixture = tokens([sketched(first)], known).mixed(tokens([sketched(second)], known), share)
    torch.testing.assert_close(mixture.units * mixture.logs.exp()[..., None], expected.units * expected.logs.exp()[..., None])
    torch.testing.assert_close(mixture.entropies, expected.entropies, rtol=1e-9, atol=1e-9)
    assert ((mixture.logs - expected.logs).abs() < 0.5).all() and torch.equal(mixture.present, expected.present)

    factors = updates([first], known).mixed(updates([second], known), share)
    for kind, places in factors.places.items():
        for column, index in enumerate(places):
            dense = factors.ups[kind][0, column] @ factors.downs[kind][0, column] * factors.figures.logs[0, index].exp()
            name = list(known)[index]
            torch.testing.assert_close(dense, total[name].up @ total[name].down)


def test_a_lora_alone_in_a_sum_stays_as_it_is(pool):
    sketches = [sketched(pool.lora(pool.normal(8))) for _ in range(2)]
    sketches[1] = Sketch(*(part[:3] for part in (sketches[1].layers, sketches[1].units, sketches[1].norms, sketches[1].shapes, sketches[1].entropies)))
    batch = tokens(sketches, layers(sketches))
    same = batch.mixed(batch[torch.tensor([1, 0])], torch.ones(2, dtype=torch.float64))
    assert torch.equal(same.present, batch.present)
    for name in ("units", "shares", "entropies"):
        torch.testing.assert_close(getattr(same, name), getattr(batch, name))


def test_layers_are_left_out_and_reweighted_at_random(pool):
    sketches = [sketched(pool.lora(pool.normal(8))) for _ in range(40)]
    batch = tokens(sketches, layers(sketches))
    rng = torch.Generator().manual_seed(0)
    thin = batch.thinned(0.5, rng)
    assert 0.35 < thin.present.float().mean() < 0.65 and thin.present.any(1).all() and not thin.units[~thin.present].any()
    assert batch.thinned(0.999, rng).present.any(1).all()
    blocks = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    weighted = batch.reweighted(blocks, 0.5, rng)
    factors = weighted.logs - batch.logs
    torch.testing.assert_close(factors[:, ::2], factors[:, 1::2])
    assert 0.4 < factors.std() < 0.6 and torch.equal(weighted.units, batch.units)


def test_layers_have_their_kind_and_block():
    name = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_out.0"
    assert layer(name, (640, 640)) == ("unet.up_blocks.attentions.transformer_blocks.attn1.to_out.0 640x640",
                                       "unet.up_blocks.1.attentions.2.transformer_blocks.0", (640, 640))  # fmt: skip
    assert layer("transformer.single_transformer_blocks.7.proj_mlp", (4, 2))[:2] == ("transformer.single_transformer_blocks.proj_mlp 4x2",
                                                                                    "transformer.single_transformer_blocks.7")
    assert layer("text_encoder.encoder.layers.11.mlp.fc1", (4, 2)).block == "text_encoder.encoder.layers.11"
    assert layer("unet.conv_in", (4, 2))[:2] == ("unet.conv_in 4x2", "unet")
    assert layer("unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2", (4, 2)).kind == "unet.mid_block.attentions.transformer_blocks.ff.net.2 4x2"


def test_loras_of_different_bases_are_not_taken_for_one(pool):
    sketches = [sketched(pool.lora(pool.normal(8))) for _ in range(2)]
    other = replace(sketches[1], shapes=sketches[1].shapes + 1)
    with pytest.raises(ValueError, match="different bases"):
        layers([sketches[0], other])
    model = encoder(sketches)
    assert model.coverage(sketches[0]) == 1.0 and model.coverage(other) == 0.0
    with pytest.raises(Refused, match="pocket"):
        model.encode([sketches[0], other])
    half = Sketch(*(part[:4] for part in (sketches[0].layers, sketches[0].units, sketches[0].norms, sketches[0].shapes, sketches[0].entropies)))
    foreign = replace(half, layers=tuple(f"x.{name}" for name in half.layers))
    joint = Sketch(half.layers + foreign.layers, *(torch.cat([getattr(half, name), getattr(foreign, name)]) for name in ("units", "norms", "shapes", "entropies")))
    assert model.coverage(joint) == pytest.approx(0.5)
    assert model.encode([]).shape == (0, TEXT)


def test_texts_begin_where_the_judge_puts_them(pool):
    model = encoder([sketched(pool.lora(pool.normal(8)))])
    texts = pool.normal(5, TEXT)
    torch.testing.assert_close(model.read(texts * 3), torch.nn.functional.normalize(texts, dim=-1))
    wider = encoder([sketched(pool.lora(pool.normal(8)))], dimension=TEXT + 4)
    assert wider.read(texts).shape == (5, TEXT + 4)


@pytest.mark.parametrize("reads", ["sketches", "factors"])
def test_an_encoder_comes_back_from_its_files(pool, reads, tmp_path):
    loras = [pool.lora(pool.normal(8)) for _ in range(2)]
    model = encoder([sketched(lora) for lora in loras], reads).float()
    model.save(tmp_path / "encoder", torch.float32)
    again = Encoder.open(tmp_path / "encoder")
    assert again.settings == model.settings and again.name.startswith("pocket ") and not any(weight.requires_grad for weight in again.parameters())
    assert torch.equal(again.encode(items(reads, loras)), model.encode(items(reads, loras)))
    model.save(tmp_path / "half")
    assert (Encoder.open(tmp_path / "half").encode(items(reads, loras)) * again.encode(items(reads, loras))).sum(1).min() > 0.999
    assert Encoder.open(tmp_path / "half").name != again.name


BROKEN = {
    "no json": "x", "a list": "[]", "no layers": {"layers": {}}, "a shape": {"layers": {"a": [1]}}, "huge": {"width": 10**9}, "negative": {"depth": -1},
    "heads": {"heads": 5}, "another width": {"width": 32}, "another depth": {"depth": 1}, "reads": {"reads": "minds"}, "version": {"sketch_version": 99},
    "unknown": {"more": 1}, "base": {"base": 3}, "fewer layers": {"layers": {"unet.conv_in": [2, 2]}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_encoder_is_refused(pool, case, tmp_path):
    encoder([sketched(pool.lora(pool.normal(8)))]).float().save(tmp_path)
    change = BROKEN[case]
    text = change if isinstance(change, str) else json.dumps(json.loads((tmp_path / SETTINGS).read_text()) | change)
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(Refused):
        Encoder.open(tmp_path)


def test_an_encoder_needs_both_its_files(pool, tmp_path):
    with pytest.raises(Refused, match="encoder.json"):
        Encoder.open(tmp_path)
    encoder([sketched(pool.lora(pool.normal(8)))]).float().save(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(Refused, match="damaged"):
        Encoder.open(tmp_path)


def test_tokens_keep_the_precision_of_sketches(pool):
    sketches = [sketched(pool.lora(pool.normal(8)))]
    assert isinstance(batch := tokens(sketches, layers(sketches)), Tokens) and batch.units.dtype == torch.float64
