"""`--from`: what the record of a picture, or a request file, may choose. Names; and files of this machine or a download only when that was allowed."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from app import engines
from app.terminal import err, printable
from composition import Condition, Refused, Request, record
from composition.backbones.loading import catalog
from composition.bundled import BUNDLES

if TYPE_CHECKING:
    from composition import Engine


def start(picture: Path | None, model: str | None, allow_paths: bool, allow_download: bool, vae: str | None = None) -> record.Record | None:
    """The record that --from names, its remarks said. Raises Refused when it does not say which model to use, and when that, or its VAE, is a file of
    this machine or must be fetched, and neither was allowed. vae: what --vae says in its place."""
    if picture is None:
        engines.prepare(model or "pocket")
        return None
    original = record.details(picture)
    original = original if allow_paths else replace(original, request=record.by_name(original.request))
    for remark in original.remarks:
        err.print(Text(printable(f"{picture}: {remark}"), style="yellow"))
    if not original.ours and not model:
        raise Refused(f"{picture} was made by another tool, with its model {original.model or '(not named)'!r}: say with --model "
                      "which one to use here")
    if not model:
        _may_open(picture, original.request.model, allow_paths, allow_download)
    if original.request.vae and vae is None:
        _may_use(picture, original.request.vae, allow_paths, allow_download)
    engines.prepare(model or original.request.model)
    return original


def _may_use(picture: Path, vae: str, allow_paths: bool, allow_download: bool) -> None:
    """Refuse the VAE of somebody's record where it is a path that was not allowed, or may be fetched without being asked for."""
    here = Path(vae).expanduser().exists()
    if not allow_paths and (here or record.is_path(vae)):
        raise Refused(f"{picture} was made with the VAE {vae!r}, a file or folder of its maker: say with --vae where it is here, or --vae \"\" for the "
                      "model's own")
    if not here and not allow_download:
        raise Refused(f"{picture} was made with the VAE {vae!r} of the hub: give --allow-download, or --vae with the one to use (\"\" for the model's own)")


def _may_open(picture: Path, model: str, allow_paths: bool, allow_download: bool) -> None:
    """Refuse the model of somebody's record where it is a path that was not allowed, or would be fetched without being asked for."""
    here = model not in BUNDLES and model not in catalog.KNOWN and Path(model).expanduser().exists()
    if (here or record.is_path(model)) and not allow_paths:
        raise Refused(f"{picture} was made with {model!r}, a file or folder of its maker: say with --model where it is here")
    if model in BUNDLES or here or allow_download:
        return
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: a part that the cache lacks is not fetched either
    from huggingface_hub import try_to_load_from_cache

    repository = catalog.repository(model)
    if "/" in repository and not isinstance(try_to_load_from_cache(repository, "model_index.json"), str):
        raise Refused(f"{picture} was made with {model!r}, which is not on this machine: give --allow-download to fetch it from the hub, or "
                      "another --model")


def located(request: Request, original: record.Record | None, engine: "Engine", *, strict: bool) -> Request:
    """The request with the LoRAs of a record original. strict: in the folders of LoRAs alone."""
    if original is None:
        return request
    request = record.located(request, original, engine.loras(), engine.find)
    if strict:
        _in_folders(request, [each for each in request.conditions if each in original.request.conditions], engine)  # the others are by --control
    return request


def _in_folders(request: Request, conditions: Sequence[Condition], engine: "Engine") -> None:
    """Refuse a LoRA or one of these conditions of somebody's record whose name leads to a file outside the folders of LoRAs, as to one in the current
    folder."""
    known = {os.path.realpath(path) for path in engine.loras()}
    for lora in request.loras:
        if os.path.realpath(path := engine.find(lora.source)) not in known:
            raise Refused(f"the record's LoRA {lora.name!r} would be {path}, which lies in no folder of LoRAs: give --allow-paths, or that file "
                          "with --lora")
    for embedding in request.embeddings:
        if os.path.realpath(path := engine.find(embedding.source)) not in known:
            raise Refused(f"the record's textual inversion {embedding.name!r} would be {path}, which lies in no folder of LoRAs: give --allow-paths, or "
                          "that file with --embedding")
    known = {os.path.realpath(each.path) for each in engine.conditions()}
    for condition in conditions:
        if os.path.realpath(path := engine.find_condition(condition.source)) not in known:
            raise Refused(f"the record's condition {condition.name!r} would be {path}, which lies in no folder of LoRAs: give --allow-paths, or that "
                          "file with --control")
