"""Quantised bases on the kinds a processor can compute: torchao's int8 and fp8, and GGUF files. LoRAs act on what they answer."""

import importlib.util

import pytest
import torch

from composition import Engine, Lora, Refused, Request
from composition.backbones.loading import quantize as quantization
from tests import toys
from tests.composition import laws


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a toy FLUX, and a LoRA of it."""
    root = tmp_path_factory.mktemp("quantized")
    pipe = toys.flux()
    pipe.save_pretrained(root / "model")
    return root / "model", toys.lora(pipe, root / "fox.safetensors", seed=1, text=False)


def gguf_of(folder, to, kind):
    """The transformer of a model folder as GGUF, written by its authors' own library."""
    import gguf
    from safetensors.torch import load_file

    kind = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(str(to), "flux")
    for name, value in load_file(folder / "transformer/diffusion_pytorch_model.safetensors").items():
        array = value.float().numpy()
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def opened(kind, model, tmp_path):
    pytest.importorskip("gguf" if kind.startswith("Q") else "torchao")
    if kind.startswith("Q"):
        return Engine.open(str(model[0]), device="cpu", denoiser=str(gguf_of(model[0], tmp_path / "a.gguf", kind)))
    return Engine.open(str(model[0]), device="cpu", quantize=kind)


def asked(*loras, **changes):
    return Request("the fox", loras=loras, steps=4, guidance=3.0, seed=5, **changes)


@pytest.mark.parametrize("kind", ["int8", "fp8", "Q8_0", "Q4_0"])
def test_it_is_the_model_but_for_rounding_and_a_lora_acts_on_it(kind, model, tmp_path):
    folder, file = model
    with Engine.open(str(folder), device="cpu") as whole, opened(kind, model, tmp_path) as packed:
        layer = packed.backbone.denoiser.transformer_blocks[0].attn.to_q
        assert type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter  # it is quantized
        assert packed.dtype == torch.float32
        plain, near = (laws.latents(engine, asked()) for engine in (whole, packed))
        assert 1e-6 < laws.apart(near, plain) < 0.5
        with_lora, near_lora = (laws.latents(engine, asked(Lora(str(file)))) for engine in (whole, packed))
        laws.differ(near_lora, near)
        assert laws.apart(near_lora, with_lora) < 0.5 * laws.apart(with_lora, plain) + laws.apart(near, plain)
        assert packed.inspect(str(file)).coverage == 1.0


@pytest.mark.parametrize("kind", ["int8", "Q8_0"])
def test_a_layer_answers_its_own_output_and_the_dense_update(kind, model, tmp_path):
    """Exact: whatever the base answers, the LoRA's own product is added to it; nothing is written into packed weights."""
    folder, file = model
    with opened(kind, model, tmp_path) as packed:
        layer = packed.backbone.denoiser.single_transformer_blocks[1].proj_mlp
        x = torch.randn(3, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
        with packed.adapters.session([("fox", Lora(str(file)), file)]), torch.no_grad():
            assert not packed.adapters.foldable
            factors = packed.adapters._read(file, Lora(str(file)), False).factors["transformer"]["single_transformer_blocks.1.proj_mlp"]
            bare = layer(x)
            packed.adapters.use({"fox": 0.7})
            torch.testing.assert_close(layer(x), bare + 0.7 * x @ (factors.up @ factors.down).T, rtol=1e-4, atol=1e-5)
            packed.adapters.use({})
            assert torch.equal(layer(x), bare)


def test_every_method_runs_on_a_quantised_base(model):
    from composition import methods

    pytest.importorskip("torchao")
    folder, file = model
    other = toys.lora(toys.flux(), folder.parent / "owl.safetensors", seed=2, text=False)
    loras = laws.loras_of([file, other])
    with Engine.open(str(folder), device="cpu", quantize="int8") as engine:
        for name in methods.all():
            request = Request("the fox and the owl", loras=loras, steps=2, method=name, options=laws.LIGHT.get(name, {}), seed=1)
            assert engine.run(request).images[0].size == (32, 32), name


def test_refusals_say_what_to_do(model, tmp_path, monkeypatch):
    folder, file = model
    for kind, words in (("nf4", "needs a CUDA device, this one is cpu: use int8 or fp8"), ("q3", "it is one of nf4")):
        monkeypatch.setattr(quantization, "find_spec", lambda name: True)
        with pytest.raises(Refused, match=words):
            Engine.open(str(folder), device="cpu", quantize=kind)
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="pip install torchao"):
        Engine.open(str(folder), device="cpu", quantize="int8")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(Refused, match="pip install gguf"):
        Engine.open(str(folder), device="cpu", denoiser=str(tmp_path / "a.gguf"))
    monkeypatch.setattr(quantization, "find_spec", importlib.util.find_spec)
    with pytest.raises(Refused, match="is not a .gguf or .safetensors file"):
        Engine.open(str(folder), device="cpu", denoiser="nothing.bin")
    with pytest.raises(Refused, match="does not fit"):
        Engine.open(str(folder), device="cpu", denoiser=str(file))
    with pytest.raises(Refused, match="for FLUX and SD3"):
        Engine.open("pocket", device="cpu", denoiser=str(file))
    with pytest.raises(Refused, match="does not fit"):
        pytest.importorskip("gguf")
        Engine.open(str(folder), device="cpu", denoiser=str(tmp_path / "a.gguf"))


def test_a_denoiser_in_a_file_of_its_own(model, tmp_path):
    """A safetensors file of the transformer alone, in diffusers' names: the same picture."""
    from safetensors.torch import load_file, save_file

    folder, _ = model
    tensors = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    save_file(tensors, tmp_path / "own.safetensors")
    with Engine.open(str(folder), device="cpu") as a, Engine.open(str(folder), device="cpu", denoiser=str(tmp_path / "own.safetensors")) as b:
        assert a.run(asked()).images[0].tobytes() == b.run(asked()).images[0].tobytes()
    save_file({name: value for name, value in tensors.items() if "proj_out" not in name}, tmp_path / "part.safetensors")
    with pytest.raises(Refused, match="does not fit|incomplete"):
        Engine.open(str(folder), device="cpu", denoiser=str(tmp_path / "part.safetensors"))
