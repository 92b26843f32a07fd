"""Single-file checkpoints, as Civitai has them: Stable Diffusion 1.x and 2.x and SDXL in the SGM layout.

The kind is read off the header's names and shapes. UNet and VAE are converted by diffusers' `from_single_file`, with
the configurations of the public models that lie in configs/ beside this file, so that nothing is fetched; the text
encoders are renamed here, and CLIP's tokenizer comes from clip_words.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from composition.backbones.loading import clip_tokenizer
from composition.refusal import Refused

Kind = Literal["sd15", "sd2", "sdxl"]
Header = Mapping[str, tuple[int, ...]]
CONFIGS = Path(__file__).parent / "configs"
OPENS = "Stable Diffusion 1.x and 2.x, and SDXL"

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = {"sd15": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP = {"sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
REFINER = "conditioner.embedders.0.model."
NAMES = {"sd15": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "SDXL"}

# What people have in place of a checkpoint: part of a tensor's name, and what to tell them.
_NOT_A_MODEL = (
    (("lora_down", "lora_up", ".lora_A.", ".lora_B.", "hada_w1", "lokr_w1", ".lora.down"),
     "a LoRA, not a model: give it as a LoRA, and a model it was made for"),
    (("double_blocks.", "single_blocks.", "joint_blocks.", "single_transformer_blocks."),
     "a FLUX or SD3 model, which opens from its diffusers folder or hub id (a file of FLUX's transformer alone, with --denoiser)"),
    (("control_model.", "controlnet_cond_embedding.", "input_hint_block."), "a ControlNet, not a model"),
    (("motion_modules.", "time_stack."), "a video model, which is not supported"),
    (("emb_params", "string_to_param", "clip_l.emb"), "a textual-inversion embedding, not a model"),
    (("down_blocks.", "text_model.encoder."), "one component of a diffusers folder: give the folder that holds "
                                              "model_index.json"),
)


def header(path: Path) -> tuple[Header, dict[str, str]]:
    """Names and shapes of the tensors in a file, and its metadata; no tensor is read. Raises Refused if damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{path.name} is no readable safetensors file ({reason}): download it again") from None


def kind(shapes: Header, name: str = "the file") -> Kind:
    """Which model a checkpoint holds, by its names and shapes alone. Raises Refused for everything else."""
    if not any(key.startswith(UNET) for key in shapes) or any("lora" in key for key in shapes):
        for parts, what in _NOT_A_MODEL:
            if any(part in key for key in shapes for part in parts):
                raise Refused(f"{name} is {what}")
        if any(key.startswith((VAE, "encoder.down.", "decoder.up.")) for key in shapes):
            raise Refused(f"{name} is a VAE, not a whole model")
        raise Refused(f"{name} is not a checkpoint of a known kind: Medley opens {OPENS}, in one .safetensors file")
    for parts, what in _NOT_A_MODEL:
        if any(key.startswith(UNET) and part in key for key in shapes for part in parts):
            raise Refused(f"{name} is {what}")
    has = {prefix: any(key.startswith(prefix) for key in shapes)
           for prefix in (VAE, REFINER, *CLIP.values(), *OPEN_CLIP.values())}
    if has[REFINER]:
        raise Refused(f"{name} is the SDXL refiner, which only finishes other pictures: give an SDXL base model")
    reads = shapes.get(f"{UNET}input_blocks.0.0.weight", (0, 0))[1]
    writes = shapes.get(f"{UNET}out.2.weight", (0,))[0]
    if reads != writes:
        what = {9: "an inpainting", 8: "an image-editing (pix2pix)", 5: "a depth-guided"}.get(reads, "an unusual")
        raise Refused(f"{name} is {what} model ({reads} input channels in place of {writes}): give the plain "
                      "text-to-image version")
    which: Kind | None = ("sdxl" if has[OPEN_CLIP["sdxl"]] and has[CLIP["sdxl"]] else
                          "sd2" if has[OPEN_CLIP["sd2"]] else "sd15" if has[CLIP["sd15"]] else None)
    if which is None:
        raise Refused(f"{name} holds a UNet without its text encoder: give the full checkpoint")
    if not has[VAE]:
        raise Refused(f"{name} holds no VAE ({VAE}...): give the version of this checkpoint with its VAE baked in")
    return which


def load(
    path: Path, dtype: torch.dtype, *, config: Path | None = None,
    tokenizer: Callable[[str], CLIPTokenizer] = clip_tokenizer.tokenizer,
) -> DiffusionPipeline:
    """The stock pipeline of a checkpoint file, in `dtype`, on the CPU, without touching the network.

    config: a folder laid out like configs/sd15 in place of the shipped one. tokenizer: pad token to tokenizer.
    Raises Refused when the file is of another kind, incomplete, or not of the shapes its kind has.
    """
    shapes, metadata = header(path)
    which = kind(shapes, path.name)
    words = {"tokenizer": tokenizer("!" if which == "sd2" else clip_tokenizer.END)}
    if which == "sdxl":
        words["tokenizer_2"] = tokenizer("!")
    folder = config or CONFIGS / which
    tensors = _tensors(path, which)
    parts: dict[str, Any] = {}
    models: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    name = ""
    try:
        for name, cls in models.items():
            parts[name] = cls.from_single_file(
                tensors, config=str(folder), subfolder=name, dtype=dtype, local_files_only=True
            )
        for name, cls, weights in _text_encoders(tensors, which):
            parts[name] = _text_encoder(cls, folder / name, weights, dtype)
            if any(weight.is_meta for weight in parts[name].parameters()):
                raise NotImplementedError
    except NotImplementedError:  # what torch says, too, to a weight that was never filled
        raise Refused(f"{path.name} is incomplete: weights of its {name} are missing. Download it again, or get the "
                      "full version") from None
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{path.name} looks like {NAMES[which]} but its {name} does not fit ({reason}): a "
                      "distilled or altered model opens only as a diffusers folder") from None
    index: Any = DiffusionPipeline.load_config(str(folder))
    scheduler = getattr(diffusers, index["scheduler"][1])
    noise = scheduler.load_config(str(folder), subfolder="scheduler")
    noise.update(prediction(which, shapes, metadata, parts["unet"]))
    if which == "sd2" and noise["prediction_type"] == "epsilon" and config is None:
        parts["unet"].register_to_config(sample_size=64)  # the 512 px models
    options = {key: value for key, value in index.items() if isinstance(value, bool)}
    if which != "sdxl":
        options |= {"safety_checker": None, "feature_extractor": None}
    elif "force_zeros_for_empty_prompt" in options:
        options["add_watermarker"] = False
    return getattr(diffusers, index["_class_name"])(
        **parts, **words, scheduler=scheduler.from_config(noise), **options
    )


def prediction(which: Kind, shapes: Header, metadata: Mapping[str, str], unet: nn.Module) -> dict[str, Any]:
    """What the UNet predicts, as scheduler settings: as the file states it, else what its kind does.

    SD2.x has both, with the same names and shapes, so there the UNet itself is run to see.
    """
    stated = metadata.get("modelspec.prediction_type", "").lower()
    if "v_pred" in shapes or stated in ("v", "v_prediction", "v-prediction"):
        free_of_signal = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in shapes else {}
        return {"prediction_type": "v_prediction", **free_of_signal}
    if which != "sd2" or stated in ("epsilon", "eps"):
        return {"prediction_type": "epsilon"}
    return {"prediction_type": "epsilon" if predicts_noise(unet) else "v_prediction"}


@torch.no_grad()
def predicts_noise(unet: Any) -> bool:
    """True if the UNet returns noise when given noise. At the last time step there is little else in a latent: a UNet
    that predicts epsilon answers with its input, one that predicts v with the picture it imagines."""
    weight = next(unet.parameters())
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    prompt = torch.zeros(1, 77, width)
    answer = unet(noise.to(weight), 999, prompt.to(weight), return_dict=False)[0].float()
    return bool(torch.corrcoef(torch.stack([noise.flatten(), answer.flatten()]))[0, 1] > 0.5)


def _tensors(path: Path, which: Kind) -> dict[str, Tensor]:
    """The tensors of the parts that are used: neither a second set of averaged weights nor training leftovers."""
    wanted = (UNET, VAE, CLIP.get(which, "\0"), OPEN_CLIP.get(which, "\0"))
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys()) if name.startswith(wanted)}


def _text_encoders(
    tensors: Mapping[str, Tensor], which: Kind
) -> Iterator[tuple[str, type[nn.Module], dict[str, Tensor]]]:
    """Per text encoder of the kind: its name in the pipeline, its class, its weights under transformers' names."""
    if which in CLIP:
        yield "text_encoder", CLIPTextModel, _from_clip(tensors, CLIP[which])
    if which == "sd2":
        yield "text_encoder", CLIPTextModel, _from_open_clip(tensors, OPEN_CLIP[which])
    if which == "sdxl":
        yield "text_encoder_2", CLIPTextModelWithProjection, _from_open_clip(tensors, OPEN_CLIP[which])


def _text_encoder(cls: Any, folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """transformers' model with these weights, whichever prefix its version gives to names; what lacks stays meta."""
    with init_empty_weights():
        model = cls(CLIPTextConfig.from_pretrained(str(folder), local_files_only=True))
    own = {name.removeprefix("text_model."): name for name in model.state_dict()}
    known = {own[name]: weight.to(dtype) for name, weight in weights.items() if name in own}
    model.load_state_dict(known, strict=False, assign=True)
    return model.eval()


def _from_clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """CLIP as transformers names it, with or without "text_model." (files of either age are about)."""
    return {key.removeprefix(prefix).removeprefix("text_model."): weight
            for key, weight in tensors.items() if key.startswith(prefix)}


_OPEN_CLIP_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYERS = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
                     "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def _from_open_clip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """OpenCLIP's text model under transformers' names: q, k and v apart, the projection as a linear layer's weight."""
    weights: dict[str, Tensor] = {}
    for key, weight in tensors.items():
        name = key.removeprefix(prefix)
        if name == key:
            continue
        if name in _OPEN_CLIP_NAMES:
            weights[_OPEN_CLIP_NAMES[name]] = weight
        elif name == "text_projection":
            weights["text_projection.weight"] = weight.T.contiguous()
        elif name.startswith("transformer.resblocks."):
            layer, _, tail = name.removeprefix("transformer.resblocks.").partition(".")
            if tail.startswith("attn.in_proj_"):
                for part, piece in zip("qkv", weight.chunk(3), strict=True):
                    weights[f"encoder.layers.{layer}.self_attn.{part}_proj.{tail[13:]}"] = piece.contiguous()
            else:
                inner, _, end = tail.rpartition(".")
                weights[f"encoder.layers.{layer}.{_OPEN_CLIP_LAYERS.get(inner, inner)}.{end}"] = weight
    return weights
