"""Annotators that need a network: registered by name with what must be installed for each and under which licence; none ships.

depth runs a model of transformers from this machine's cache of the hub; nothing is fetched here. softedge, pose and segmentation are for packages
that offer one as an entry point of the group "medley.annotators": a function from a picture to a picture of the same size, both mode "RGB".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from PIL import Image

from composition.refusal import Refused

GROUP = "medley.annotators"
DEPTH = "depth-anything/Depth-Anything-V2-Small-hf"
DRAWN = "or draw it with another program and give it as it is (annotator \"\")"

Make = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class Plugin:
    """about: what it draws. make: raises Refused where something is missing. extra: what that is. licence: of code and weights."""

    about: str
    make: Make
    extra: str
    licence: str


def offered(name: str) -> Make | None:
    """The annotator that an installed package offers under this name; None without one."""
    for entry in entry_points(group=GROUP, name=name):
        return entry.load()
    return None


def depth(picture: Image.Image) -> Image.Image:
    """How near everything is, the nearest white, by Depth Anything V2 Small. Raises Refused where its weights are not on this machine."""
    if make := offered("depth"):
        return _checked("depth", make, picture)
    import torch

    processor, model = _depth_model(_folder(DEPTH))
    with torch.no_grad():
        outputs = model(**processor(images=picture, return_tensors="pt"))
    near = processor.post_process_depth_estimation(outputs, target_sizes=[picture.size[::-1]])[0]["predicted_depth"].numpy()
    low, high = float(near.min()), float(near.max())
    grey = (near - low) / (high - low) if high > low else np.zeros_like(near)
    return Image.fromarray(np.rint(255.0 * grey).astype(np.uint8)).convert("RGB")


def _folder(repository: str) -> str:
    """Where the hub's cache has a model. Raises Refused where it has not."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return snapshot_download(repository, local_files_only=True)
    except LocalEntryNotFoundError:
        raise Refused(f"annotator depth needs {repository}, which is not on this machine: fetch it with hf download {repository} "
                      f"({PLUGINS['depth'].licence}), {DRAWN}") from None


@lru_cache(maxsize=1)
def _depth_model(folder: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return processor, AutoModelForDepthEstimation.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="float32").eval()
    except (OSError, ValueError) as error:
        raise Refused(f"annotator depth: the model in {folder} cannot be opened ({error}); fetch it again with hf download") from None


def _by_package(name: str, picture: Image.Image) -> Image.Image:
    """What the annotator of a package makes. Raises Refused where no package offers one."""
    if make := offered(name):
        return _checked(name, make, picture)
    plugin = PLUGINS[name]
    raise Refused(f"annotator {name} needs a network, and none comes with Medley: install {plugin.extra} ({plugin.licence}), {DRAWN}")


def _checked(name: str, make: Make, picture: Image.Image) -> Image.Image:
    drawn = make(picture)
    if not isinstance(drawn, Image.Image):
        raise Refused(f"the package that offers annotator {name} made no picture but a {type(drawn).__name__}: report it to its author")
    return drawn.convert("RGB").resize(picture.size) if drawn.size != picture.size else drawn.convert("RGB")


def _package(name: str, about: str, licence: str) -> Plugin:
    return Plugin(about, partial(_by_package, name), f"a package that offers {name} to {GROUP}", licence)


PLUGINS: dict[str, Plugin] = {
    "depth": Plugin("how near everything is, the nearest white", depth, f"hf download {DEPTH}",
                    "weights Apache-2.0; the larger ones of that family are CC-BY-NC-4.0"),
    "softedge": _package("softedge", "soft edges as a network sees them", "HED as controlnet_aux has it is Apache-2.0, PiDiNet is for research only"),
    "pose": _package("pose", "the joints of people, as OpenPose draws them", "ViTPose and rtmlib are Apache-2.0; OpenPose is not for commercial use"),
    "segmentation": _package("segmentation", "a colour for each kind of thing, of ADE20K's palette",
                             "look at the card of each model: SegFormer's weights are not for commercial use"),
}
