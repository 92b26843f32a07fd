"""The header of a trained LoRA file: what the library shows of it, and what the modelspec standard asks for.

github.com/Stability-AI/ModelSpec, version 1.0.1. It holds no path of the user's machine and no time: the same
training gives the same bytes.
"""

from pathlib import PurePath

from composition.backbones.base import Backbone
from composition.loras.family import text_width
from composition.training.plan import Schedule

_ARCHITECTURES = {768: "stable-diffusion-v1", 2048: "stable-diffusion-xl-v1-base"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def header(
    backbone: Backbone, base: str, plan: Schedule, *, title: str, category: str, trigger: str, pictures: int,
    size: tuple[int, int], software: str,
) -> dict[str, str]:
    """Names and values of the header. base: the model as the user named it; size: (width, height) in pixels."""
    fields = {
        **described(backbone, base, title=title, category=category, trigger=trigger),
        "modelspec.resolution": f"{size[0]}x{size[1]}",
        "steps": str(plan.steps), "rank": str(plan.rank), "rate": f"{plan.rate:g}", "pictures": str(pictures),
        "software": software,
    }  # fmt: skip
    return {name: value for name, value in fields.items() if value}


def described(backbone: Backbone, base: str, *, title: str, category: str, trigger: str) -> dict[str, str]:
    """The names and values of any LoRA's header; "" for what is not known."""
    kind = str(backbone.scheduler.config.get("prediction_type", ""))  # a flow has none
    return {
        "title": title, "category": category, "trigger_words": trigger, "base": plain_name(base),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture(backbone, base)}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": _PREDICTIONS.get(kind, kind),
    }  # fmt: skip


def architecture(backbone: Backbone, base: str) -> str:
    """The base in the words of modelspec; a bundled or unknown one by its own name."""
    if backbone.family == "flux":
        return "flux-1-dev" if getattr(backbone.denoiser.config, "guidance_embeds", False) else plain_name(base)
    width = text_width(backbone.components)
    if width == 1024:
        return f"stable-diffusion-v2-{'768-v' if backbone.scheduler.config.prediction_type == 'v_prediction' else '512'}"
    return _ARCHITECTURES.get(width, plain_name(base))


def plain_name(base: str) -> str:
    """A bundled name or hub id as it is; of a path on this machine the last part alone."""
    path = PurePath(base.replace("\\", "/"))
    local = path.is_absolute() or len(path.parts) > 2 or base.startswith((".", "~")) or path.suffix == ".safetensors"
    return path.name.removesuffix(".safetensors") if local or ":" in base else base
