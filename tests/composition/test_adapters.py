"""Adapters: hooks once, files once, sessions that give everything back, folds that are exact, gates that recompute."""

import gc
import json
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from composition import Lora
from composition.adapters import Adapters
from composition.adapters import adapters as module
from composition.adapters.stack import Stack
from composition.loop import Step
from tests import toys

STEP = Step(0, 4, torch.tensor(300), torch.zeros(2, 4, 16, 16, dtype=torch.float64))


@pytest.fixture
def pipe():
    return toys.sd(dtype=torch.float64)


@pytest.fixture
def held(pipe):
    from composition.backbones.unet import UNetBackbone

    backbone = UNetBackbone(pipe, "sd")
    return Adapters(backbone.components, family="sd", block=backbone.block)


@pytest.fixture
def sources(pipe, tmp_path):
    return [(name, Lora(name), toys.lora(pipe, tmp_path / f"{name}.safetensors", seed=seed))
            for seed, name in enumerate(("one", "two"))]


def forward(pipe, rows=2, seed=5):
    rng = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, 16, 16, generator=rng, dtype=torch.float64)
    text = torch.randn(rows, 7, pipe.unet.config.cross_attention_dim, generator=rng, dtype=torch.float64)
    return pipe.unet(sample, 300, encoder_hidden_states=text).sample


@torch.no_grad()
def test_a_session_changes_the_output_and_gives_it_back(pipe, held, sources):
    plain = forward(pipe)
    with held.session(sources) as receipts:
        assert [r.applied == r.tensors for r in receipts] == [True, True]
        assert torch.equal(forward(pipe), plain), "gates begin closed"
        held.use({"one": 1.0})
        one = forward(pipe)
        held.use({"one": 1.0, "two": 0.5})
        both = forward(pipe)
        assert not torch.allclose(one, plain) and not torch.allclose(both, one)
    assert torch.equal(forward(pipe), plain)


def test_a_session_ends_even_when_its_body_fails(pipe, held, sources):
    with pytest.raises(ZeroDivisionError), held.session(sources):
        held.use({"one": 1.0})
        raise ZeroDivisionError
    assert held.names == ()


def test_names_that_are_not_there_are_an_error(held, sources):
    with held.session(sources), pytest.raises(KeyError, match="three"):
        held.use({"three": 1.0})


def test_a_file_is_read_once_while_it_is_the_same(pipe, held, sources, monkeypatch, tmp_path):
    read, honest = [], module.reader.read
    monkeypatch.setattr(module.reader, "read", lambda path, *a, **k: read.append(path) or honest(path, *a, **k))
    path = sources[0][2]
    for _ in range(3):
        held.load(path, Lora("one"))
    assert len(read) == 1
    toys.lora(pipe, path, seed=9, rank=2)  # replaced on disk: its factors must not be the old ones
    assert held.load(path, Lora("one")).ranks == {2: held.load(path, Lora("one")).ranks[2]}
    assert len(read) == 2


def test_every_receipt_is_of_the_file_that_was_named(pipe, held, sources, tmp_path):
    """A copy and a link of a file share its factors in memory, and keep their own names and paths."""
    path = sources[0][2]
    copy, link = tmp_path / "copy.safetensors", tmp_path / "link.safetensors"
    copy.write_bytes(path.read_bytes())
    link.symlink_to(path)
    for _ in range(2):
        for name, file in (("one", path), ("copy", copy), ("link", link), ("one", path)):
            receipt = held.load(file, Lora(name))
            assert (receipt.name, receipt.path) == (name, str(file))
        with held.session([("copy", Lora("copy"), copy), ("link", Lora("link"), link)]) as receipts:
            assert [(receipt.name, receipt.path) for receipt in receipts] == [("copy", str(copy)), ("link", str(link))]
    assert len(held._held.files) == 1


def test_files_of_equal_bytes_and_different_configs_are_different(pipe, held, tmp_path):
    """The scale may lie beside a file (PEFT): the file with alpha 8 is not the one with alpha 4, nor the one before it was changed."""
    for folder, alpha in (("a", 4), ("b", 8)):
        (tmp_path / folder).mkdir()
        path = toys.lora(pipe, tmp_path / folder / "adapter_model.safetensors", rank=4)
        (path.parent / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": alpha}))
        assert set(held.load(path, Lora(folder)).alphas) == {float(alpha)}
    for folder, alpha in (("a", 4), ("b", 8)):
        assert set(held.load(tmp_path / folder / "adapter_model.safetensors", Lora(folder)).alphas) == {float(alpha)}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    assert set(held.load(tmp_path / "a" / "adapter_model.safetensors", Lora("a")).alphas) == {16.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_memory_follows_bytes(pipe, tmp_path, dtype):
    """Files are kept in as much memory as they may have, in the numbers they are stored in, those used longest ago let go of first."""
    from composition.backbones.unet import UNetBackbone

    backbone, paths = UNetBackbone(pipe, "sd"), []
    for seed in range(5):
        path = toys.lora(pipe, tmp_path / f"{seed}.safetensors", seed=seed, layout="kohya", alpha=1.0)
        save_file({key: value.to(dtype) for key, value in load_file(path).items()}, path)
        paths.append(path)
    size = sum(value.nbytes for key, value in load_file(paths[0]).items() if not key.endswith("alpha"))
    held = Adapters(backbone.components, family="sd", block=backbone.block, kept_bytes=3 * size)
    for path in paths[:3]:
        held.load(path, Lora(path.stem))
    assert sum(file.nbytes for file in held._held.files.values()) == 3 * size
    gone = [weakref.ref(factors.stored_up) for file in list(held._held.files.values())[1:2] for factors in file.factors["unet"].values()]
    assert gone and all(reference() is not None for reference in gone)
    held.load(paths[0], Lora("0"))  # used again, so the second is the oldest now
    held.load(paths[3], Lora("3"))
    assert [file.receipt.name for file in held._held.files.values()] == ["2", "0", "3"] and len(held._held.stamps) == 3
    gc.collect()
    assert all(reference() is None for reference in gone)
    small = Adapters(backbone.components, family="sd", block=backbone.block, kept_bytes=size - 1)
    assert small.load(paths[0], Lora("0")).coverage == 1.0 and not small._held.files and not small._held.stamps
    held.close()
    small.close()


@torch.no_grad()
def test_a_fold_is_the_live_sum_and_leaves_no_trace(pipe, held, sources):
    weights = {"one": 0.8, "two": -0.4}
    before = {name: (value.data_ptr(), value.clone()) for name, value in pipe.unet.named_parameters()}
    plain = forward(pipe)
    with held.session(sources):
        held.use(weights)
        live = forward(pipe)
        assert held.foldable
        with held.folded(weights):
            held.use(weights)
            torch.testing.assert_close(forward(pipe), live, rtol=0, atol=1e-11)
            with pytest.raises(RuntimeError, match="fold"):
                held.use({"one": 0.8})
            for door in (held.rows([weights] * 2), held.regional(weights, {}), held.combined(lambda *_: None, weights, STEP)):
                with pytest.raises(RuntimeError, match="folded"), door:
                    pass
        assert torch.equal(forward(pipe), live), "after the fold the gates are what they were"
    assert torch.equal(forward(pipe), plain)
    for name, value in pipe.unet.named_parameters():
        assert value.data_ptr() == before[name][0] and torch.equal(value, before[name][1]), name


def test_a_fold_that_fails_half_way_is_undone(pipe, held, sources, monkeypatch):
    before = [value.clone() for value in pipe.unet.parameters()]
    with held.session(sources):
        calls, honest = [], Stack.delta

        def failing(self, *given):
            calls.append(1)
            if len(calls) == 9:
                raise MemoryError("no room for the ninth")
            return honest(self, *given)

        monkeypatch.setattr(Stack, "delta", failing)
        with pytest.raises(MemoryError), held.folded({"one": 1.0}):
            pass
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.unet.parameters(), strict=True))


@torch.no_grad()
def test_blocks_scale_only_their_own(pipe, held, sources):
    """blocks={"down": 0, "up": 0, "": 0} leaves the middle; {"down.1": 0} alone closes that block."""
    name, _, path = sources[0]

    def out(blocks):
        with held.session([(name, Lora(name, blocks=blocks), path)]):
            held.use({name: 1.0})
            seen = {}
            hooks = [m.register_forward_hook(lambda m, a, o, k=k: seen.__setitem__(k, m.stack is not None and float(
                m.stack.gates.values.dense[0, m.stack.block, 0]))) for k, m in pipe.unet.named_modules() if hasattr(m, "stack")]
            forward(pipe)
            for hook in hooks:
                hook.remove()
            return {k: v for k, v in seen.items() if v is not False}

    gates = out({"down": 0.25, "down.1": 0.5, "mid": 2.0})
    assert {v for k, v in gates.items() if k.startswith("down_blocks.0")} == {0.25}
    assert {v for k, v in gates.items() if k.startswith("down_blocks.1")} == {0.5}
    assert {v for k, v in gates.items() if k.startswith("mid_block")} == {2.0}
    assert {v for k, v in gates.items() if k.startswith("up_blocks")} == {1.0}


@torch.no_grad()
def test_text_encoders_have_gates_of_their_own(pipe, held, sources):
    def read():
        return pipe.encode_prompt("the fox", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]

    plain = read()
    with held.session(sources):
        assert held.touches("one", "text_encoder")
        held.use({"one": 1.0})
        assert torch.equal(read(), plain), "the denoiser's gates are not the text encoder's"
        held.use_text({"one": 1.0})
        assert not torch.allclose(read(), plain)
        held.use_text({})
        assert torch.equal(read(), plain)


def test_checkpointing_recomputes_with_the_gates_of_the_forward(pipe, held):
    """Gradients with and without checkpointing are equal, although the gates are closed before the backward pass."""
    layers = [path for path, m in pipe.unet.named_modules() if path.endswith(("to_q", "to_v"))]

    def gradients(checkpointed):
        if checkpointed:
            pipe.unet.enable_gradient_checkpointing(gradient_checkpointing_func=held.checkpoint)
        pipe.unet.train()
        rng = torch.Generator().manual_seed(1)
        with held.training(["a", "b"], 2, {"unet": layers}) as trained:
            trained.leaf.data.normal_(generator=rng)
            with held.rows([{"a": 1.0}, {"b": 0.5}]):
                loss = forward(pipe).square().sum()
            loss.backward()
            grads = list(trained.leaf.grad)
        pipe.unet.disable_gradient_checkpointing()
        pipe.unet.eval()
        return grads

    plain, checked = gradients(False), gradients(True)
    assert plain and all(float(g.abs().max()) > 0 for g in plain)
    for a, b in zip(plain, checked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@torch.no_grad()
def test_a_lora_turned_on_after_compile_is_seen(pipe, held, sources, shapes_unchecked):
    """torch skips hook guards, so the hook is there before any compile; gates and stacks are read at run time."""
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    compiled = torch.compile(block, backend="eager")
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, block.attn1.to_q.in_features, generator=rng, dtype=torch.float64)
    text = torch.randn(2, 7, pipe.unet.config.cross_attention_dim, generator=rng, dtype=torch.float64)

    def call(model):
        return model(x, encoder_hidden_states=text)

    plain = call(compiled)
    torch.testing.assert_close(plain, call(block))
    with held.session(sources):
        for weights in ({"one": 1.0}, {"one": 0.5, "two": 1.0}, {"two": 0.3}, {}):
            held.use(weights)
            torch.testing.assert_close(call(compiled), call(block))
            assert torch.allclose(call(compiled), plain) == (not weights)
        with held.rows([{"one": 1.0}, {"two": 1.0}]):
            torch.testing.assert_close(call(compiled), call(block))
    torch.testing.assert_close(call(compiled), plain)


def test_no_weight_becomes_trainable(pipe, held, sources):
    with held.session(sources):
        held.use({"one": 1.0})
        assert not any(p.requires_grad for p in pipe.unet.parameters())
        out = forward(pipe)
        assert not out.requires_grad


def test_closing_takes_the_hooks_off(pipe):
    counts = [len(m._forward_hooks) for m in pipe.unet.modules()]
    Adapters({"unet": pipe.unet}, family="sd", block=lambda _: "").close()
    assert [len(m._forward_hooks) for m in pipe.unet.modules()] == counts


def test_engines_on_one_device_share_a_lock(pipe):
    from composition import Engine
    from composition.backbones.unet import UNetBackbone

    first, second = (Engine(UNetBackbone(pipe, "sd"), "toy") for _ in range(2))
    assert first._lock is second._lock
    taken = threading.Event()

    def take():
        with second.exclusive():
            taken.set()

    with first.exclusive(), first.exclusive():  # the thread that has it may ask again
        thread = threading.Thread(target=take)
        thread.start()
        assert not taken.wait(0.05)
    thread.join(1)
    with first.group(), first.exclusive():
        pass
    assert taken.is_set()
