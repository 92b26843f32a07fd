"""Another autoencoder in place of the model's own: from a folder, a file in either layout, a whole checkpoint; refused where it does not fit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from composition import Engine, Refused, Request, backbones
from composition.backbones.loading import vae
from tests import toys
from tests.composition.backbones.test_single_file import _vae

ASKED = Request(prompt="a fox", steps=1, size=(16, 16), seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy model on the disk, and beside it another one's autoencoder: as a folder, as files in both layouts, in a checkpoint."""
    root = tmp_path_factory.mktemp("vaes")
    toys.sd(0).save_pretrained(root / "model")
    other = toys.sd(1).vae
    other.save_pretrained(root / "folder")
    toys.sd(1).save_pretrained(root / "whole")
    save_file(dict(other.state_dict()), root / "plain.safetensors")
    original = {name: tensor.contiguous() for name, tensor in _vae(other).items()}
    save_file({name.removeprefix("first_stage_model."): tensor for name, tensor in original.items()}, root / "original.safetensors")
    save_file(original | {"model.diffusion_model.out.2.weight": torch.zeros(1)}, root / "checkpoint.safetensors")
    return root


@pytest.mark.parametrize("name", ["folder", "whole", "plain.safetensors", "original.safetensors", "checkpoint.safetensors"])
def test_it_decodes_in_place_of_the_models_own(name, folder):
    pipe = toys.sd(0)
    sha256 = vae.replaced(pipe, str(folder / name), torch.float32)
    expected = toys.sd(1).vae.state_dict()
    assert len(sha256) == 64 and pipe.vae.dtype == torch.float32 and not any(weight.requires_grad for weight in pipe.vae.parameters())
    assert all(torch.equal(weight, expected[key]) for key, weight in pipe.vae.state_dict().items())


def test_an_engine_is_opened_with_it_and_says_so(folder):
    own, other = (Engine.open(str(folder / "model"), device="cpu", vae=vae) for vae in (None, str(folder / "folder")))
    first, second = own.run(ASKED), other.run(ASKED)
    assert first.images[0].tobytes() != second.images[0].tobytes()
    assert first.request.vae == "" and "vae" not in first.notes and '"vae"' not in first.request.json()
    assert second.request.vae == str(folder / "folder") and len(second.notes["vae"]) == 64
    swapped = Engine(backbones.of(toys.sd(0), "sd"), "toy")
    swapped.backbone.pipeline.vae = toys.sd(1).vae
    assert swapped.run(ASKED).images[0].tobytes() == second.images[0].tobytes()


def test_what_does_not_fit_is_refused(folder, tmp_path):
    for changes in ({"scaling_factor": 0.13025}, {"shift_factor": 0.1159}):
        target = tmp_path / next(iter(changes))
        shutil.copytree(folder / "folder", target)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text('{"_class_name": "AutoencoderTiny"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "tiny" / "diffusion_pytorch_model.safetensors")
    tensors = dict(toys.sd(1).vae.state_dict())
    save_file(tensors | {"decoder.conv_in.weight": torch.zeros(16, 16, 3, 3)}, tmp_path / "wide.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "decoder" in name}, tmp_path / "half.safetensors")
    save_file(tensors | {"decoder.conv_in.bias": torch.full((16,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "vae.pt").write_bytes(b"\x80\x02")
    for source, said in ((tmp_path / "scaling_factor", "another family: its scaling_factor is 0.13025"), (tmp_path / "shift_factor", "shift_factor"),
                         (tmp_path / "tiny", "no AutoencoderKL"), (tmp_path / "wide.safetensors", "16x16x3x3"), (tmp_path / "half.safetensors", "missing"),
                         (tmp_path / "nan.safetensors", "NaN"), (tmp_path / "vae.pt", "pickle"), (tmp_path, "no folder of an autoencoder"),
                         ("nothing", "there is no VAE 'nothing'")):  # fmt: skip
        pipe = toys.sd(0)
        own = pipe.vae
        with pytest.raises(Refused, match=said):
            vae.replaced(pipe, str(source), torch.float32)
        assert pipe.vae is own
