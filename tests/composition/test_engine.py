"""The engine's doors and promises: what it refuses, what it notes, schedules, groups, samplers, one generator a picture."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from composition import Condition, Engine, Lora, Refused, Request
from composition.backbones.unet import UNetBackbone
from tests import toys
from tests.composition import laws


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    pipe = toys.sd(dtype=torch.float64)
    for seed, name in enumerate(("fox", "owl")):
        toys.lora(pipe, folder / f"{name}.safetensors", seed=seed)
    return Engine(UNetBackbone(pipe, "sd"), "toy", folders=[folder])


@pytest.mark.parametrize("changes, words", [
    ({"method": "merg"}, "did you mean 'merge'"),
    ({"loras": [Lora("foxx")]}, "did you mean 'fox'"),
    ({"method": "switch", "options": {"tua": 3}}, "did you mean 'tau'"),
    ({"method": "switch", "options": {"tau": 0}}, "between 1 and"),
    ({"method": "switch", "options": {"tau": "often"}}, "tau"),
    ({"sampler": "eulr"}, "euler"),
    ({"size": (33, 32)}, "multiples of 2"),
    ({"conditions": [Condition("canny", "edges.png")]}, "condition"),
])
def test_refused_at_the_door(engine, changes, words):
    """Nothing is changed, and the words say what was expected."""
    before = laws.fingerprint(engine)
    with pytest.raises(Refused, match=words):
        engine.run(replace(laws.request("merge"), **changes))
    assert laws.fingerprint(engine) == before


@pytest.mark.parametrize("fields, words", [
    ({"steps": 0}, "steps"), ({"guidance": float("nan")}, "guidance"), ({"seed": -1}, "seed"), ({"count": 0}, "count"),
    ({"size": (4, 64)}, "size"), ({"size": (100_000, 100_000)}, "pixels"), ({"schema_version": 99}, "newer Medley"),
    ({"loras": [{"source": "x", "weight": "inf"}]}, "finite"), ({"loras": [{"source": "x", "start": 0.9, "end": 0.2}]}, "before"),
    ({"loras": [{"source": "x", "wieght": 1}]}, "wieght"), ({"loras": [{"source": "x", "region": (0.5, 0, 0.2, 1)}]}, "x0 < x1"),
])
def test_a_request_is_validated_once_when_built(fields, words):
    with pytest.raises(ValueError, match=words):
        Request(**({"prompt": "a fox"} | fields))


def test_a_request_survives_json():
    asked = Request("a fox", loras=[Lora("fox", 0.5, blocks={"down": 0.5}, region=(0, 0, 0.5, 1)), Lora("fox", start=0.2)],
                    method="switch", options={"tau": 3}, size=(64, 32), count=3, seed=2**62)
    assert Request.read(asked.json()) == asked
    assert asked.names == ("fox", "fox#2")
    assert [asked.alone(i).seed for i in range(3)] == list(asked.seeds)
    with pytest.raises(Refused, match="not a request"):
        Request.read('{"prompt": 3}')


def test_what_a_user_should_know_is_noted(engine):
    long = "the fox, " * 501
    result = engine.run(laws.request("merge", Lora("fox", triggers=("zorro",)), Lora("owl", binds="the owl"), prompt=long,
                                     sampler="ddim"))
    assert result.notes["missing triggers"] == {"fox": ["zorro"]}
    assert "fox" in result.notes["prompt cut"]
    assert result.notes["not read by this method"] == {"owl": "binds and region"}
    assert result.notes["evaluations"] == laws.STEPS
    assert result.request.model == "toy" and [r.name for r in result.receipts] == ["fox", "owl"]
    fine = engine.run(laws.request("merge", Lora("fox", triggers=("FOX",))))
    assert "missing triggers" not in fine.notes and "prompt cut" not in fine.notes


def test_a_trigger_inside_another_word_is_missing(engine):
    lora = Lora("owl", triggers=("owl",))
    assert engine.run(laws.request("merge", lora, prompt="a bowl of owls")).notes["missing triggers"] == {"owl": ["owl"]}
    assert "missing triggers" not in engine.run(laws.request("merge", lora, prompt="an Owl")).notes


def test_of_a_lora_of_weight_zero_nothing_is_said(engine):
    asleep = Lora("owl", weight=0.0, triggers=("zorro",), binds="the owl")
    notes = engine.run(laws.request("merge", Lora("fox", triggers=("fox",)), asleep)).notes
    assert "missing triggers" not in notes and "not read by this method" not in notes


def test_files_are_inspected_one_request_at_a_time(engine):
    """The files in memory are changed by whoever has the device, and by nobody else meanwhile."""
    done, threads = threading.Event(), []
    with engine._lock:
        threads.append(threading.Thread(target=lambda: (engine.inspect("fox"), done.set())))
        threads[0].start()
        assert not done.wait(0.3)
    assert done.wait(30)
    threads[0].join()


@pytest.mark.parametrize("method, evaluations", [("merge", 1), ("switch", 1), ("composite", 2)])
def test_cost_is_counted(engine, method, evaluations):
    result = engine.run(laws.request(method, Lora("fox"), Lora("owl"), sampler="ddim"))
    assert result.notes["evaluations"] == evaluations * laws.STEPS
    assert {"load", "denoise", "decode"} <= set(result.seconds)


def test_switch_tells_who_led(engine):
    """tau = 2 over 7 steps: fox fox owl owl fox fox owl; the authors' version gives the first three steps."""
    paper = engine.run(laws.request("switch", Lora("fox"), Lora("owl"), options={"tau": 2}, sampler="ddim", steps=7))
    assert paper.notes["leaders"] == ["fox", "fox", "owl", "owl", "fox", "fox", "owl"]
    code = engine.run(laws.request("switch", Lora("fox"), Lora("owl"), options={"tau": 2, "reference": True}, sampler="ddim", steps=7))
    assert code.notes["leaders"] == ["fox", "fox", "fox", "owl", "owl", "fox", "fox"]


def test_start_and_end_open_and_close_a_lora(engine):
    """A LoRA that ends before the first step's turn is none at all; one that covers all steps is the plain one."""
    plain = laws.latents(engine, laws.request("merge"))
    whole = laws.latents(engine, laws.request("merge", Lora("fox"), sampler="ddim"))
    never = laws.request("merge", Lora("fox", start=0.99, end=1.0))
    laws.same(laws.latents(engine, never), plain)
    late = laws.latents(engine, laws.request("merge", Lora("fox", start=0.5), sampler="ddim"))
    laws.differ(late, whole)
    laws.differ(late, laws.latents(engine, laws.request("merge", sampler="ddim")))


def test_a_group_keeps_the_fold_and_gives_it_back(engine, monkeypatch):
    """Requests of one LoRA set fold once; another set folds anew; after the group the weights are the originals."""
    before = laws.fingerprint(engine)
    folds, honest = [], type(engine.adapters).folded
    monkeypatch.setattr(type(engine.adapters), "folded", lambda self, w, *keep: folds.append(dict(w)) or honest(self, w, *keep))
    asked = laws.request("merge", Lora("fox"))
    alone = engine.run(asked).images[0].tobytes()
    folds.clear()
    with engine.group():
        pictures = [engine.run(replace(asked, seed=seed)).images[0].tobytes() for seed in (11, 12, 11)]
        assert len(folds) == 1 and pictures[0] == pictures[2] == alone != pictures[1]
        engine.run(laws.request("merge", Lora("owl")))
        engine.run(laws.request("composite", Lora("owl")))
        assert [list(f) for f in folds] == [["fox"], ["owl"]]
    assert laws.fingerprint(engine) == before


def test_a_group_survives_a_request_that_is_refused(engine):
    before = laws.fingerprint(engine)
    with engine.group():
        first = engine.run(laws.request("merge", Lora("fox"))).images[0].tobytes()
        with pytest.raises(Refused):
            engine.run(laws.request("merge", Lora("nobody")))
        assert engine.run(laws.request("merge", Lora("fox"))).images[0].tobytes() == first
    assert laws.fingerprint(engine) == before


def test_text_weight_is_its_own(engine):
    """text_weight 0 leaves the prompt's reading alone and keeps the denoiser's LoRA."""
    both = laws.latents(engine, laws.request("merge", Lora("fox")))
    deaf = laws.latents(engine, laws.request("merge", Lora("fox", text_weight=0.0)))
    silent = laws.latents(engine, laws.request("merge", Lora("fox", weight=0.0, text_weight=1.0)))
    laws.differ(both, deaf)
    laws.differ(deaf, laws.latents(engine, laws.request("merge")))
    assert torch.isfinite(silent).all()


def test_guidance_off_asks_for_one_row(engine, monkeypatch):
    rows, honest = [], UNetBackbone.denoise
    monkeypatch.setattr(UNetBackbone, "denoise", lambda self, x, t, c: rows.append(c.rows) or honest(self, x, t, c))
    engine.run(laws.request("merge", Lora("fox"), guidance=1.0))
    assert set(rows) == {1}


def test_sizes_other_than_the_models_own(engine):
    image = engine.run(laws.request("composite", Lora("fox"), Lora("owl"), size=(48, 24))).images[0]
    assert image.size == (48, 24)


def test_unknown_names_list_what_there_is(engine, tmp_path):
    with pytest.raises(Refused, match="folder"):
        engine.find(str(tmp_path))
    (tmp_path / "x.ckpt").write_bytes(b"0")
    with pytest.raises(Refused, match="safetensors"):
        engine.find(str(tmp_path / "x.ckpt"))
    assert [path.stem for path in engine.loras()] == ["fox", "owl"]


def test_every_layer_has_an_axis_and_a_block():
    """On the toy of SD1.5's shape: keys and values of the prompt lie on text, time embeddings nowhere, the rest on grids
    whose size is that of the activation that passes through."""
    pipe = toys.sd()
    backbone = UNetBackbone(pipe, "sd")
    seen = {}

    def watch(path):
        return lambda module, args, out: seen.__setitem__(path, out.shape)

    hooks = [m.register_forward_hook(watch(p)) for p, m in pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        pipe.unet(torch.zeros(1, 4, 16, 16), 1, encoder_hidden_states=torch.zeros(1, 5, 24))
    for hook in hooks:
        hook.remove()
    for path, shape in seen.items():
        axis = backbone.axis(path)
        side = 16 // 2**axis.level
        if axis.kind == "text":
            assert shape[1] == 5, path
        elif axis.kind == "none":
            assert len(shape) == 2, path
        else:
            assert (shape[1] == side * side) if len(shape) == 3 else (shape[-1] == side), (path, axis, shape)
    assert {backbone.block(path) for path in seen} >= {"down.0", "mid", "up.2", ""}


@pytest.mark.parametrize("method", ["merge", "composite"])
def test_a_file_replaced_in_mid_run_changes_nothing_of_it(tmp_path, method):
    """Another file, half of one, none: the picture is that of what was read, which the receipt names; the next run reads what is there then."""
    pipe, file = toys.sd(dtype=torch.float64), tmp_path / "fox.safetensors"
    fox, owl = (toys.lora(pipe, tmp_path / name, seed=seed).read_bytes() for seed, name in enumerate(("a.safetensors", "b.safetensors")))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").unlink()
    file.write_bytes(fox)
    engine = Engine(UNetBackbone(pipe, "sd"), "toy", folders=[tmp_path])
    before, asked = laws.fingerprint(engine), laws.request(method, Lora("fox"))
    whole = engine.run(asked)
    file.write_bytes(owl)
    other = engine.run(asked)
    assert other.images[0].tobytes() != whole.images[0].tobytes() and other.receipts[0].sha256 != whole.receipts[0].sha256
    for content, then in ((owl, other), (fox[: len(fox) // 2], None), (None, None)):
        file.write_bytes(fox)

        def swap(*_, content=content):
            file.write_bytes(content) if content is not None else file.unlink(missing_ok=True)

        during = engine.run(asked, on_step=swap)
        assert during.images[0].tobytes() == whole.images[0].tobytes() and during.receipts[0].sha256 == whole.receipts[0].sha256
        if then is None:
            with pytest.raises(Refused, match="fox"):
                engine.run(asked)
        else:
            assert engine.run(asked).images[0].tobytes() == then.images[0].tobytes()
    assert laws.fingerprint(engine) == before
