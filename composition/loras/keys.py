"""Keys of LoRA files: which part of which layer a key means, in every spelling in use.

    diffusers         unet.<path>.lora_A.weight, .lora_A.<adapter>.weight, .lora.down.weight,
                      .lora_linear_layer.down.weight, any of them below base_model.model.
    processors        <path>.attn1.processor.to_q_lora.down.weight (first diffusers attention processors)
    kohya             lora_unet_<path with underscores>.lora_down.weight, lora_te_, lora_te1_, lora_te2_, .alpha
    kohya-sgm         the same with the names of the original code: lora_unet_input_blocks_1_1_...
    lycoris           lycoris_<path with underscores>, which says nothing of the component
    comfyui           diffusion_model.input_blocks.1.1... or model.diffusion_model...., text_encoders.clip_l.transformer....
    bfl               double_blocks.0.img_attn.qkv... or the same below diffusion_model., FLUX's and SD3's own names
    xlabs             double_blocks.0.processor.qkv_lora1.down.weight
    onetrainer        lora_transformer_<path with underscores>.lora_down.weight
    omi               unet., transformer., clip_l., clip_g., t5. with the names of the original code, img_attn.qkv.0 for its q
    first-generation  unet:12:down, text_encoder:3:up: layers by number only

What torch leaves in names when a model is compiled or spread over devices (_orig_mod, module) is passed over in all of them.

Nothing here knows a base: `keymap` finds the layer a module name means. What the parts of a module make together is for `kinds`. A part that is
not known blocks its whole module: half of an update is another update.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from composition.loras.fused import TRANSFORMER

OFT = "OFT as the first PEFT or LyCORIS wrote it (oft_r, oft_diag) is not supported: the file does not say how it rotates"
BIAS = "a LoRA with a bias before its ranks is not supported"
FULL = "whole weights in place of the base's are not supported, only differences (diff, diff_b, w_norm, b_norm)"
TOKEN = "learned tokens (textual inversion) are not supported yet"
TWICE = "written twice for the same layer"
PART = "a part of a LoRA that is not known"
CONDITION = "of a condition LoRA, which goes with a picture: --control NAME=PICTURE"
UNKNOWN = "not a LoRA tensor that is known"


class Key(NamedTuple):
    """One raw key. role: down, up, alpha, lokr_w1 and so on (`kinds.read`); "whole" blocks its module and "beside" only itself, both for `reason`."""

    component: str
    module: str
    role: str
    layout: str
    reason: str = ""


@dataclass(frozen=True)
class Module:
    """All keys of one module. keys: role to raw key. blocked: why none of them can be applied, or "".

    module is the name without its prefix and without the words of the layout: dotted, with underscores for kohya's,
    or "#12" in first-generation files. component is "" when the name does not say.
    """

    component: str
    module: str
    layout: str
    keys: Mapping[str, str]
    blocked: str = ""
    blocking: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.keys.values(), *self.blocking)


_ROLES = tuple((re.compile(pattern), role, reason) for pattern, role, reason in (
    (r"(?:\.lora_A(?:\.[^.]+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight$|\.lora_(?:A|down)$", "down", ""),
    (r"(?:\.lora_B(?:\.[^.]+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight$|\.lora_(?:B|up)$", "up", ""),
    (r"\.processor\.(?:[qkv]|proj)_loras\.\d{1,4}\.(?:down|up)\.weight$", "beside", CONDITION),
    (r"(?:[._]lora|\.lora_linear_layer)?\.alpha$", "alpha", ""),
    (r"\.dora_scale$", "dora_scale", ""),
    (r"[._]lora_magnitude_vector(?:\.[^.]+){0,2}$", "magnitude", ""),
    (r"\.lora_mid\.weight$", "mid", ""),
    (r"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))$", r"\1", ""),
    (r"\.(oft_blocks(?:\.\d{1,2})?|rescale|on_input|diff|diff_b|w_norm|b_norm)$", r"\1", ""),
    (r"\.oft_R(?:\.[^.]+)?\.weight$", "oft_R", ""),
    (r"\.oft_R(?:\.[^.]+)?\.scaled_oft$", "scaled_oft", ""),
    (r"\.(a1|a2|b1|b2|bm)\.weight$", r"\1", ""),
    (r"\.oft_\w+(?:\.[^.]+){0,2}$", "whole", OFT),
    (r"(?:\.lora_B(?:\.[^.]+)?|\.lora_up)\.bias$", "up_bias", ""),
    (r"(?:\.lora_A(?:\.[^.]+)?|\.lora_down)\.bias$", "whole", BIAS),
    (r"\.(?:set_weight|bias)$", "beside", FULL),
    (r"\.lora_\w+(?:\.[^.]+){0,2}$|\.(?:hada|lokr)_\w+$|\.scalar$", "whole", PART),
    (r"\.weight$", "weight", FULL),
))
_BESIDE = {"weight": "on_input"}  # role to the one without which it is no part of an update
_TOKENS = re.compile(r"\A<.*>$|bundle_emb\.|(?:emb_params|clip_[lg])$")
_NUMBERED = re.compile(r"(unet|text_encoder):(\d{1,5}):(up|down)$")
_PREFIXES = (
    ("lora_unet_", "unet", "kohya"),
    ("lora_te1_", "text_encoder", "kohya"),
    ("lora_te2_", "text_encoder_2", "kohya"),
    ("lora_te3_", "text_encoder_3", "kohya"),
    ("lora_te_", "text_encoder", "kohya"),
    ("lora_transformer_", "transformer", "onetrainer"),
    ("oft_unet_", "unet", "kohya"),
    ("lycoris_", "", "lycoris"),
    ("unet.", "unet", "diffusers"),
    ("text_encoder.", "text_encoder", "diffusers"),
    ("text_encoder_2.", "text_encoder_2", "diffusers"),
    ("text_encoder_3.", "text_encoder_3", "diffusers"),
    ("transformer.", "transformer", "diffusers"),
    ("diffusion_model.", "unet", "comfyui"),
    ("model.diffusion_model.", "unet", "comfyui"),
    ("text_encoders.clip_l.transformer.", "text_encoder", "comfyui"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", "comfyui"),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", "comfyui"),
    ("clip_l.transformer.", "text_encoder", "comfyui"),
    ("clip_g.transformer.", "text_encoder_2", "comfyui"),
    ("t5xxl.transformer.", "text_encoder_3", "comfyui"),
    ("clip_l.", "text_encoder", "omi"),
    ("clip_g.", "text_encoder_2", "omi"),
    ("t5.", "text_encoder_3", "omi"),
)
_BARE = (
    (re.compile(r"(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)(?:[._]|$)"), "unet"),
    (re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb)[._]\d"), "unet"),
    (re.compile(r"(?:text_model|encoder[._]layers)[._]"), "text_encoder"),
    (re.compile(r"encoder[._]block[._]\d"), "text_encoder_3"),
)
_SGM = re.compile(r"(?:input_blocks|middle_block|output_blocks|time_embed|label_emb)[._]\d|out[._]2$")
_AUTHORED = re.compile(r"(?:double|single|joint)_blocks\.\d")
_UNDERSCORED = ("kohya", "onetrainer", "lycoris")
_WRAPPERS = re.compile(r"(?:(?:base_model\.model|module)\.|_orig_mod[._])+")  # of PEFT and torch, before the name of a layer
_XLABS = re.compile(r"(?:diffusion_model\.)?(double|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight$")
_OURS = re.compile(r"(?:single_)?transformer_blocks\.|time_text_embed|norm_out|proj_out|pos_embed")  # diffusers' own names
_SIDES = {"1": "img_attn", "2": "txt_attn"}


@lru_cache(maxsize=16_384)  # thousands of files of a library have the same few thousand keys
def understand(key: str) -> Key:
    """One raw key, parsed. An unknown key has role "beside" and its reason."""
    if numbered := _NUMBERED.match(key):
        return Key(numbered[1], f"#{int(numbered[2])}", numbered[3], "first-generation")
    if _TOKENS.match(key):
        return Key("", key, "beside", "", TOKEN)
    if match := _XLABS.match(key):
        kind, block, what, side, role = match.groups()
        inner = f"{_SIDES[side]}.{what}" if side else {"qkv": "qkv", "proj": "linear2"}[what]
        return Key("transformer", f"{kind}_blocks.{block}.{inner}", role, "xlabs")
    for pattern, role, reason in _ROLES:
        if match := pattern.search(key):
            component, module, layout = _locate(key[: match.start()])
            return Key(component, module, match.expand(role), layout, reason)
    return Key("", key, "beside", "", UNKNOWN)


def _locate(name: str) -> tuple[str, str, str]:
    """(component, module, layout) of a key without its role."""
    name = _unwrapped(name)
    prefix, component, layout = next((row for row in _PREFIXES if name.startswith(row[0])), ("", "", "diffusers"))
    name = _unwrapped(name.removeprefix(prefix))
    if not component:
        component = next((component for pattern, component in _BARE if pattern.match(name)), "")
    if component in ("unet", "") and TRANSFORMER.match(name):
        component = "transformer"
        layout = layout if layout in _UNDERSCORED or _OURS.match(name) else "bfl"
    if layout in _UNDERSCORED:
        return component, name, "kohya-sgm" if layout == "kohya" and component == "unet" and _SGM.match(name) else layout
    if prefix in ("unet.", "transformer.") and (_AUTHORED.match(name) or _SGM.match(name)):
        layout = "omi"
    if ".processor." in name:
        layout, name = "processors", name.replace(".processor.", ".")
    name = re.sub(r"\.to_out$", ".to_out.0", name)
    if component.startswith("text_encoder"):
        name = re.sub(r"\.self_attn\.to_(q|k|v|out)(?:\.0)?$", r".self_attn.\1_proj", name)
    return component, name, layout


def _unwrapped(name: str) -> str:
    return name[match.end() :] if (match := _WRAPPERS.match(name)) else name


def modules(keys: Iterable[str]) -> tuple[list[Module], dict[str, list[str]]]:
    """The keys of a file by module, and reason to those left out one by one. Every key is in exactly one place."""
    roles: dict[tuple[str, str], dict[str, str]] = {}
    blocking: dict[tuple[str, str], dict[str, str]] = {}
    layouts: dict[tuple[str, str], str] = {}
    ignored: dict[str, list[str]] = {}
    for raw in sorted(keys):
        key = understand(raw)
        place = (key.component, key.module)
        if key.role == "beside":
            ignored.setdefault(key.reason, []).append(raw)
            continue
        layouts.setdefault(place, key.layout)
        if key.role == "whole":
            blocking.setdefault(place, {})[raw] = key.reason
        elif key.role in roles.setdefault(place, {}):
            blocking.setdefault(place, {})[raw] = TWICE
        else:
            roles[place][key.role] = raw
    grouped = []
    for place, layout in layouts.items():
        mine, blocked = roles.get(place, {}), blocking.get(place, {})
        for role in [role for role, other in _BESIDE.items() if role in mine and other not in mine]:
            ignored.setdefault(FULL, []).append(mine.pop(role))
        if not mine and not blocked:
            continue
        reason = next(iter(blocked.values()), "")
        grouped.append(Module(*place, layout, mine, reason, tuple(blocked)))
    return grouped, ignored
