"""Tiny stock pipelines with random weights, and LoRA files for them: what every test of the engine runs on.

Built in code from seeds, offline, in a fraction of a second. The weights mean nothing; the shapes, classes and names
are those of the real families. Imports nothing of Medley, so that a reference made with a toy is a second opinion.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

START, END = "<|startoftext|>", "<|endoftext|>"
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
MERGES = ("f o", "fo x</w>", "o w", "ow l</w>", "a n", "an d</w>", "t h", "th e</w>", "i n</w>", "o n</w>")
Pipe = TypeVar("Pipe", StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline, FluxPipeline)
Target = Literal["attn", "ff", "proj", "conv", "time"]
T5_TOKENS = 24


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer of 524 tokens: every text encodes, the words of MERGES are one token each."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = letters + [f"{letter}</w>" for letter in letters] + [merge.replace(" ", "") for merge in MERGES]
    vocab = {word: index for index, word in enumerate([*words, START, END])}
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    return CLIPTokenizer(vocab=vocab, merges=pairs, pad_token=pad, model_max_length=77)


def _text_config(words: CLIPTokenizer, width: int, projection: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=projection, hidden_act=act,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that spells ASCII; the words of MERGES are one token each."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["▁fox", "▁owl", "▁and", "▁the", "▁in", "▁on", "▁moon"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((w, -2.0) for w in words), *((c, -6.0) for c in letters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=T5_TOKENS)


def _t5(words: T5Tokenizer, width: int) -> T5EncoderModel:
    return T5EncoderModel(T5Config(
        vocab_size=len(words), d_model=width, d_kv=width // 2, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def _autoencoder(scaling: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32,
        scaling_factor=scaling,
    )


def _liven(unet: nn.Module, gain: float = 3.0) -> None:
    """Make the prompt matter: random weights read it too faintly."""
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2" in name and name.endswith(("to_v.weight", "to_out.0.weight")):
                weight.mul_(gain)


def sd(seed: int = 0, dtype: torch.dtype = torch.float32, blocks: tuple[int, ...] = (16, 32, 32)) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 in small: three levels or as many as `blocks`, the last without attention, conv proj_in, PNDM, 32 px pictures."""
    attention = len(blocks) - 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = tokenizer()
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=blocks, layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",) * attention + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention,
            cross_attention_dim=24, attention_head_dim=2,
        )
        _liven(unet)
        text = CLIPTextModel(_text_config(words, 24, 24, "quick_gelu"))
        vae = _autoencoder(0.18215)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=words, unet=unet, feature_extractor=None, safety_checker=None,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        requires_safety_checker=False,
    )
    return _ready(pipe, dtype)


def sdxl(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    """SDXL in small: two levels, linear proj_in, two text encoders, size and crop in the time embedding, Euler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words, words_2 = tokenizer(), tokenizer(pad="!")
        unet = UNet2DConditionModel(
            sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=40, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
        _liven(unet)
        text = CLIPTextModel(_text_config(words, 16, 16, "quick_gelu"))
        text_2 = CLIPTextModelWithProjection(_text_config(words_2, 24, 24, "gelu"))
        vae = _autoencoder(0.13025)
    pipe = StableDiffusionXLPipeline(
        vae=vae, text_encoder=text, text_encoder_2=text_2, tokenizer=words, tokenizer_2=words_2, unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True, add_watermarker=False,
    )
    return _ready(pipe, dtype)


def flux(seed: int = 0, dtype: torch.dtype = torch.float32, distilled: bool = False, layers: int = 2) -> FluxPipeline:
    """FLUX.1 in small: two double and two single blocks, or as many as `layers`, packed latents, dynamic shift, T5 beside CLIP, 32 px pictures.

    distilled: with a guidance embedding, as FLUX.1-dev; without, guidance is a second row.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words, words_2 = tokenizer(), t5_tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=distilled, axes_dims_rope=(4, 6, 6))
        text = CLIPTextModel(_text_config(words, 16, 16, "quick_gelu"))
        text_2 = _t5(words_2, 24)
        vae = _autoencoder(0.3611)
    vae.register_to_config(shift_factor=0.1159)
    pipe = FluxPipeline(
        vae=vae, text_encoder=text, tokenizer=words, text_encoder_2=text_2, tokenizer_2=words_2, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256))
    return _ready(pipe, dtype)


def flux_distilled(seed: int = 0, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    return flux(seed, dtype, distilled=True)


def sd3(seed: int = 0, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """SD3.5 in small: three joint blocks, the first with a second attention of the picture alone, three text encoders."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words, words_2, words_3 = tokenizer(), tokenizer(), t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=48, caption_projection_dim=32, pooled_projection_dim=40, pos_embed_max_size=24, qk_norm="rms_norm",
            dual_attention_layers=(0,))
        text = CLIPTextModelWithProjection(_text_config(words, 16, 16, "quick_gelu"))
        text_2 = CLIPTextModelWithProjection(_text_config(words_2, 24, 24, "gelu"))
        text_3 = _t5(words_3, 48)
        vae = _autoencoder(1.5305)
    vae.register_to_config(shift_factor=0.0609)
    pipe = StableDiffusion3Pipeline(
        vae=vae, text_encoder=text, tokenizer=words, text_encoder_2=text_2, tokenizer_2=words_2, text_encoder_3=text_3,
        tokenizer_3=words_3, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    return _ready(pipe, dtype)


def controlnet(pipe, seed: int = 0, channels: Sequence[int] = (8, 8)) -> ControlNetModel:
    """A ControlNet for a toy of Stable Diffusion or SDXL, with the attention of its UNet, nothing in it zero.

    channels: of what reads the picture, which halves its sides between them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=tuple(channels), load_weights_from_unet=False)
        for weight in net.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.1)
    return nn.Module.to(net.eval().requires_grad_(False), pipe.unet.dtype)


def write_controlnet(net: ControlNetModel, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """As one file in diffusers' layout."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), path, metadata=metadata)
    return path


def control_lora(pipe, path: Path, layout: Literal["diffusers", "bfl"] = "diffusers", seed: int = 0, rank: int = 4, inputs: int = 2) -> Path:
    """A control LoRA for a toy of FLUX, with biases and norms, in either layout with the same weights; none is zero.

    inputs: how many times the latents' numbers its input projection reads.
    """
    rng, tensors = torch.Generator().manual_seed(seed), {}
    both = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    modules: dict[str, tuple[str, tuple[str, ...]]] = {"img_in": ("", ("x_embedder",)), "txt_in": ("", ("context_embedder",))}
    norms = {}
    for index in range(len(pipe.transformer.transformer_blocks)):
        ours, theirs = f"transformer_blocks.{index}.", f"double_blocks.{index}."
        for side, fused, end in (("img", both[0], ""), ("txt", both[1], "added_")):
            modules[f"{theirs}{side}_attn.qkv"] = ours, fused
            norms |= {f"{theirs}{side}_attn.norm.{name}_norm.scale": f"{ours}attn.norm_{end}{name[0]}.weight" for name in ("query", "key")}
        modules |= {f"{theirs}img_attn.proj": (ours, ("attn.to_out.0",)), f"{theirs}txt_attn.proj": (ours, ("attn.to_add_out",)),
                    f"{theirs}img_mlp.0": (ours, ("ff.net.0.proj",)), f"{theirs}img_mod.lin": (ours, ("norm1.linear",))}  # fmt: skip
    for index in range(len(pipe.transformer.single_transformer_blocks)):
        ours, theirs = f"single_transformer_blocks.{index}.", f"single_blocks.{index}."
        modules |= {f"{theirs}linear1": (ours, (*both[0], "proj_mlp")), f"{theirs}linear2": (ours, ("proj_out",))}
        norms |= {f"{theirs}norm.{name}_norm.scale": f"{ours}attn.norm_{name[0]}.weight" for name in ("query", "key")}
    for name, (block, fused) in modules.items():
        layers = [pipe.transformer.get_submodule(block + part) for part in fused]
        down = torch.randn(rank, layers[0].in_features * (inputs if name == "img_in" else 1), generator=rng) * 0.1
        up = torch.randn(sum(layer.out_features for layer in layers), rank, generator=rng) * (1.0 if name == "img_in" else 0.1)
        bias = torch.randn(up.shape[0], generator=rng) * 0.05
        if layout == "bfl":
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}
            continue
        sizes = [layer.out_features for layer in layers]
        for part, share, shift in zip(fused, up.split(sizes), bias.split(sizes), strict=True):
            key = f"transformer.{block}{part}"
            tensors |= {f"{key}.lora_A.weight": down.clone(), f"{key}.lora_B.weight": share.clone(), f"{key}.lora_B.bias": shift.clone()}
    for theirs, ours in norms.items():
        weight = 1 + 0.3 * torch.randn(pipe.transformer.config.attention_head_dim, generator=rng)
        tensors[theirs if layout == "bfl" else f"transformer.{ours}"] = weight
    save_file(tensors, path)
    return path


def denoiser(pipe) -> tuple[str, nn.Module]:
    """The name and the module of what a pipe denoises with."""
    name = "transformer" if hasattr(pipe, "transformer") else "unet"
    return name, getattr(pipe, name)


def _ready(pipe: Pipe, dtype: torch.dtype) -> Pipe:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part.eval().requires_grad_(False), dtype)  # the model's own `to` warns, of nothing
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _kind(path: str, module: nn.Module) -> Target | None:
    """Which of the targets a module of the UNet belongs to."""
    if not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    if ".attn1." in path or ".attn2." in path or ".attn." in path:
        return "attn"
    if ".ff.net." in path or ".ff_context.net." in path or path.endswith("proj_mlp"):
        return "ff"
    if path.endswith(("proj_in", "proj_out")):
        return "proj"
    if path.endswith((".conv1", ".conv2", ".conv_shortcut")) or ".downsamplers." in path or ".upsamplers." in path:
        return "conv"
    if path.endswith(("time_emb_proj", ".linear")) or "_embedding." in path or "time_text_embed." in path:
        return "time"
    return None


def _modules(pipe, targets: Sequence[Target], text: bool) -> Iterator[tuple[str, str, nn.Module]]:
    """(component, path in the component, module) of everything a LoRA of these targets trains, in a fixed order."""
    component, model = denoiser(pipe)
    for path, module in model.named_modules():
        if _kind(path, module) in targets:
            yield component, path, module
    for name in ("text_encoder", "text_encoder_2") if text else ():
        for path, module in getattr(pipe, name, nn.Module()).named_modules():
            if isinstance(module, nn.Linear) and ".layers." in path:
                yield name, path, module


def _factors(module: nn.Module, rank: int, share: float, scale: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """down (rank, in, ...) and up (out, rank, ...) such that share * up @ down is `scale` times the weight's size."""
    weight = module.get_parameter("weight").detach().float()
    down = torch.randn(rank, *weight.shape[1:], generator=rng)
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=rng)
    update = share * up.flatten(1) @ down.flatten(1)
    return down, up * (scale * weight.square().mean().sqrt() / update.square().mean().sqrt())


def _sgm(path: str, layers: int) -> str:
    """A diffusers UNet path under the name that SGM (and so kohya, for SDXL) gives it."""
    part, *rest = path.split(".")
    inner = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "norm1": "in_layers.0",
             "norm2": "out_layers.0", "conv_shortcut": "skip_connection"}
    whole = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    if path in whole:
        return whole[path]
    if part == "mid_block":
        kind, index, tail = rest[0], int(rest[1]), rest[2:]
        block = "middle_block." + ("1" if kind == "attentions" else str(2 * index))
    else:
        level, kind, index, tail = int(rest[0]), rest[1], int(rest[2]), rest[3:]
        start = level * (layers + 1)
        if part == "down_blocks":
            number, tail = (start + layers + 1, ["op"]) if kind == "downsamplers" else (start + index + 1, tail)
            block = f"input_blocks.{number}.{int(kind == 'attentions')}"
        elif kind == "upsamplers":
            block = f"output_blocks.{start + layers}."  # its place depends on whether the level has attention
        else:
            block = f"output_blocks.{start + index}.{int(kind == 'attentions')}"
    return ".".join([block, *([inner[tail[0]]] if kind == "resnets" else tail)])


def sgm_path(pipe, path: str) -> str:
    """The SGM name of a module of this pipe's UNet, by its diffusers path."""
    name = _sgm(path, pipe.unet.config["layers_per_block"])
    if ".upsamplers." in path:
        level = pipe.unet.up_blocks[int(path.split(".")[1])]
        name = name.replace("..", f".{2 if hasattr(level, 'attentions') else 1}.")
    return name


def lora(
    pipe, path: str | Path, *, seed: int = 0, rank: int = 4, alpha: float | None = None,
    targets: Sequence[Target] = ("attn", "ff", "proj", "conv"), text: bool = True,
    layout: Literal["diffusers", "kohya"] = "diffusers", scale: float = 0.3, dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random LoRA of `pipe` as safetensors, with no factor zero: its update is `scale` times each weight.

    layout "diffusers" is what `save_lora_weights` writes (alpha, if given, in the metadata), "kohya" what sd-scripts
    writes (diffusers paths for SD, SGM paths for SDXL; an alpha tensor per module, `rank` if not given).
    """
    rng = torch.Generator().manual_seed(seed)
    xl = hasattr(pipe, "text_encoder_2")
    share = (alpha or rank) / rank  # an alpha of 0 switches the update off and leaves the factors as without it
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    paths: dict[str, list[str]] = {}
    for component, name, module in _modules(pipe, targets, text):
        down, up = (factor.to(dtype) for factor in _factors(module, rank, share, scale, rng))
        whole = component in ("unet", "transformer")
        if not whole and not name.startswith("text_model."):
            name = f"text_model.{name}"
        paths.setdefault(component, []).append(name if whole else name.split(".layers.")[1][2:])
        if layout == "diffusers":
            tensors[f"{component}.{name}.lora_A.weight"], tensors[f"{component}.{name}.lora_B.weight"] = down, up
        else:
            if component == "unet":
                prefix, name = "lora_unet", sgm_path(pipe, name) if xl else name
            else:
                prefix = "lora_te" + ("" if not xl else "2" if component.endswith("_2") else "1")
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(float(rank if alpha is None else alpha), dtype=dtype)
    if layout == "diffusers" and alpha is not None:
        configs = {f"{component}.{key}": value for component, names in paths.items() for key, value in
                   {"r": rank, "lora_alpha": alpha, "target_modules": sorted(set(names))}.items()}
        metadata["lora_adapter_metadata"] = json.dumps(configs)
    path = Path(path)
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def condition(transformer: nn.Module, path: Path, seed: int = 0, rank: int = 2, scale: float = 0.05, **settings: object) -> Path:
    """A condition LoRA of this FLUX transformer in EasyControl's layout, random; settings become its header (kind, size, annotator, ...)."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    roles = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj"}
    for name, module in transformer.named_modules():
        block, inside, layer = name.partition(".attn.")
        if inside and layer in roles and isinstance(module, nn.Linear):
            width = module.out_features if roles[layer] == "proj" else module.in_features  # proj acts on the layer's output
            for role, shape in (("down", (rank, width)), ("up", (module.out_features, rank))):
                tensors[f"{block}.attn.processor.{roles[layer]}_loras.0.{role}.weight"] = scale * torch.randn(shape, generator=rng)
    save_file(tensors, path, metadata={f"condition.{name}": str(value) for name, value in settings.items()})
    return path


def difference(a: Tensor, b: Tensor) -> float:
    """How far two pictures or latents lie apart, in units of the first one's spread."""
    return math.sqrt(float((a.double() - b.double()).square().mean())) / float(a.double().std())
