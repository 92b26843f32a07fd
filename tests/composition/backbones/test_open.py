"""Opening a model: what a name means, what is refused and in which words, one dtype, no network, no pickle."""

import json
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.utils import logging
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from composition.backbones.loading import hub
from composition.backbones.loading import open as opening
from composition.refusal import Refused
from tests import toys

MAKE = {"sd": toys.sd, "sdxl": toys.sdxl}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> a folder as diffusers saves it."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MAKE.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in MAKE}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the sd folder that a test may spoil."""
    return Path(shutil.copytree(folders["sd"], tmp_path / "copy"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_folder_opens_in_one_dtype_offline(folders, name: str, dtype: torch.dtype, offline: None) -> None:
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    location = opening.find(str(folders[name]))
    assert location == opening.Location("folder", str(folders[name]), folders[name])
    assert opening.family(location) == name
    pipe = opening.load(location, dtype)
    assert opening.family(pipe) == name
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
            assert {tensor.dtype for tensor in tensors} == {dtype}, part
            assert not module.training and not any(weight.requires_grad for weight in module.parameters())
    assert pipe.components.get("safety_checker") is None
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, level)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_a_half_text_encoder_beside_a_float_unet_becomes_one_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    pipe = toys.sd()
    nn.Module.to(pipe.text_encoder, stored)
    pipe.text_encoder.config.dtype = stored
    pipe.save_pretrained(tmp_path / "mixed")
    opened = opening.load(opening.find(str(tmp_path / "mixed")), torch.float32)
    assert opened.text_encoder.dtype == opened.unet.dtype == torch.float32
    assert torch.isfinite(opened("a fox", num_inference_steps=1, output_type="latent").images).all()


def test_opened_it_draws_what_the_original_draws(folders, offline: None) -> None:
    for name, make in MAKE.items():
        opened = opening.load(opening.find(str(folders[name])), torch.float32)
        pictures = [pipe("a fox", num_inference_steps=2, generator=torch.Generator().manual_seed(1),
                         output_type="latent").images for pipe in (make(), opened)]
        assert torch.equal(*pictures)


def test_only_the_fp16_variant_is_there(tmp_path: Path, offline: None) -> None:
    toys.sd(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert not list((tmp_path / "half/unet").glob("*model.safetensors"))
    assert opening.load(opening.find(str(tmp_path / "half")), torch.float32).unet.dtype == torch.float32


@pytest.mark.parametrize(("names", "expected"), [
    (["unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"], None),
    (["unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"], "fp16"),
    (["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"], "fp16"),
    (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"], "fp16"),
    (["unet/diffusion_pytorch_model-00001-of-00002.safetensors"], None),
    ([], None),
])
def test_variant(names: list[str], expected: str | None) -> None:
    assert hub.variant(names) == expected


# ---------------------------------------------------------------- what a name means


def test_a_bundled_name(monkeypatch: pytest.MonkeyPatch, folders, tmp_path: Path) -> None:
    """Found in the package "assets", wherever that is installed, and before a folder of that name."""
    package = tmp_path / "site" / "assets"
    shutil.copytree(folders["sd"], package / "pocket128" / "sd")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for module in [name for name in sys.modules if name == "assets" or name.startswith("assets.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pocket").mkdir()
    location = opening.find("pocket")
    assert location.kind == "folder" and location.path == package / "pocket128" / "sd"
    assert opening.family(location) == "sd"
    shutil.rmtree(package / "pocket128")
    with pytest.raises(Refused, match="is not in this installation"):
        opening.find("pocket")
    for module in [name for name in sys.modules if name == "assets"]:
        monkeypatch.delitem(sys.modules, module)


def test_hub_ids_are_recognised_without_the_network(offline: None) -> None:
    for source in ("org/name", "stabilityai/stable-diffusion-xl-base-1.0"):
        assert opening.find(source) == opening.Location("hub", source)


@pytest.mark.parametrize(("source", "words"), [
    ("pockt", "did you mean pocket"),
    ("nothing like it", "there is no model 'nothing like it': A model is a bundled name"),
    ("../models/absent", "there is no model"),
    ("/models/absent/deep", "there is no model"),
    ("models/absent.safetensors", "there is no model"),
    ("model.ckpt", "is a pickle file: opening it can run code"),
    ("folder/model.PT", "is a pickle file"),
    ("https://huggingface.co/org/name", "give org/name"),
    ("https://example.org/model.safetensors", "download the file"),
])
def test_names_that_mean_nothing(source: str, words: str, offline: None) -> None:
    with pytest.raises(Refused, match=words):
        opening.find(source)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    for name, words in (("notes.txt", "not a .safetensors file"), ("model.gguf", "not a .safetensors file"),
                        ("model.bin", "pickle")):
        (tmp_path / name).write_text("x")
        with pytest.raises(Refused, match=words):
            opening.find(str(tmp_path / name))
    lora = toys.lora(toys.sd(), tmp_path / "owl.safetensors")
    with pytest.raises(Refused, match="owl.safetensors is a LoRA, not a model: give it as a LoRA"):
        opening.find(str(lora))


@pytest.mark.parametrize(("files", "words"), [
    ({}, "is an empty folder"),
    ({"pytorch_lora_weights.safetensors": ""}, "folder of a LoRA"),
    ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "folder of a LoRA"),
    ({"config.json": "{}"}, "one component of a model"),
    ({"dream.safetensors": ""}, "name one of them, such as dream.safetensors"),
    ({"one/model_index.json": "{}"}, "give one in it"),
    ({"modular_model_index.json": "{}"}, "modular pipeline"),
    ({"readme.md": ""}, "holds no model_index.json"),
    ({"model_index.json": "not json"}, "damaged model_index.json"),
    ({"model_index.json": "[]"}, "damaged model_index.json"),
    ({"model_index.json": '{"_class_name": "QwenImagePipeline"}'},
     "QwenImagePipeline, not supported yet by this version: it opens Stable Diffusion 1.x to 3.5, SDXL and FLUX.1"),
    ({"model_index.json": '{"_class_name": "FluxKontextPipeline"}'}, "not supported yet"),
    ({"model_index.json": '{"_class_name": "StableDiffusionInpaintPipeline"}'}, "starts from a picture"),
    ({"model_index.json": '{"_class_name": "StableDiffusionXLImg2ImgPipeline"}'}, "starts from a picture"),
    ({"model_index.json": '{"_class_name": ["mine", "Pipe"]}'}, "run code of its own"),
    ({"model_index.json": '{"_class_name": "StableDiffusionPipeline", "unet": ["my_unet", "UNet"]}'}, "its own"),
])
def test_folders_that_are_no_models(files: dict[str, str], words: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / "given" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "given" / name).write_text(text)
    (tmp_path / "given").mkdir(exist_ok=True)
    with pytest.raises(Refused, match=words):
        opening.find(str(tmp_path / "given"))


def test_another_pipeline_is_no_family() -> None:
    with pytest.raises(Refused, match="not supported yet"):
        opening.family(diffusers.DDPMPipeline(None, None))  # type: ignore[arg-type]


# ---------------------------------------------------------------- weights that are missing, wrong or dangerous


@pytest.mark.parametrize(("component", "file"), [
    ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"),
])
def test_weights_must_be_whole_and_safetensors(copy: Path, component: str, file: str) -> None:
    path = copy / component / f"{file}.safetensors"
    weights = load_file(path)
    location = opening.find(str(copy))

    key = next(name for name in weights if name.endswith("weight"))
    save_file({name: weight for name, weight in weights.items() if name != key}, path, {"format": "pt"})
    with pytest.raises(Refused, match=f"incomplete: 1 tensors of its {component} are missing"):
        opening.load(location, torch.float32)

    save_file({**weights, key: torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(Refused, match="cannot be opened"):
        opening.load(location, torch.float32)

    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(Refused, match="cannot be opened"):
        opening.load(location, torch.float32)

    path.unlink()
    torch.save(weights, path.with_name("pytorch_model.bin" if component == "text_encoder" else f"{file}.bin"))
    with pytest.raises(Refused, match="holds pickle files"):
        opening.load(location, torch.float32)


def test_an_inpainting_unet_in_a_plain_folder(tmp_path: Path) -> None:
    pipe = toys.sd()
    config = {key: value for key, value in pipe.unet.config.items() if not key.startswith("_")} | {"in_channels": 9}
    pipe.unet = diffusers.UNet2DConditionModel.from_config(config)
    pipe.save_pretrained(tmp_path / "paint")
    with pytest.raises(Refused, match="inpainting or editing model"):
        opening.load(opening.find(str(tmp_path / "paint")), torch.float32)


# ---------------------------------------------------------------- the hub


def _error(kind: type[Exception]) -> Exception:
    if issubclass(kind, huggingface_hub.errors.HfHubHTTPError):
        return kind("no", response=SimpleNamespace(headers={}, request=None))
    return kind("no")


@pytest.mark.parametrize(("kind", "words"), [
    (GatedRepoError, "licence to be accepted"),
    (RepositoryNotFoundError, "there is no model 'org/name' on the hub, or it is private"),
    (EntryNotFoundError, "is no diffusers model"),
    (LocalEntryNotFoundError, "the hub cannot be reached"),
    (ConnectionError, "check the network"),
    (ValueError, "check the network"),
])
def test_the_hubs_errors_say_what_to_do(kind, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise _error(kind)

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    for ask in (lambda place: opening.load(place, torch.float32), opening.family):
        with pytest.raises(Refused, match=words) as caught:
            ask(opening.find("org/name"))
        assert "\n" not in str(caught.value)


def test_what_is_cached_opens_offline_and_what_is_not_is_refused(
    folders, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folders["sd"], cache / "models--org--cached" / "snapshots" / commit)
    (cache / "models--org--cached" / "refs").mkdir()
    (cache / "models--org--cached" / "refs" / "main").write_text(commit)
    pipe = opening.load(opening.find("org/cached"), torch.float32)
    assert opening.family(pipe) == "sd"
    with pytest.raises(Refused, match="org/absent is not on this machine and the hub cannot be reached"):
        opening.load(opening.find("org/absent"), torch.float32)


def test_a_hub_model_of_another_kind_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_: str(tmp_path / "model_index.json"))
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the weights were asked for"))
    with pytest.raises(Refused, match="org/flux is a QwenImagePipeline, not supported yet"):
        opening.load(opening.find("org/flux"), torch.float32)
