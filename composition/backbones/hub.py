"""Models on the hub: fetched into its own cache as far as they are not there yet, safetensors only.

What is cached opens without the network; the hub's errors are told in the user's words.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from composition.request import Refused


def index(repository: str) -> Path:
    """The model_index.json of a hub id, from the cache or the hub."""
    with _plainly(repository):
        return Path(hf_hub_download(repository, "model_index.json"))


def download(repository: str) -> Path:
    """The folder of a hub id in the hub's own cache, fetched as far as it is not there yet. Never a pickle."""
    folder = index(repository).parent
    with _plainly(repository):
        try:
            names: Iterable[str] = list_repo_files(repository)
        except GatedRepoError:
            raise
        except Exception:  # whatever keeps it from the hub
            names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
        return Path(DiffusionPipeline.download(
            repository, use_safetensors=True, variant=variant(names), safety_checker=None, feature_extractor=None
        ))


@contextmanager
def _plainly(repository: str) -> Iterator[None]:
    """The hub's errors in the user's words."""
    try:
        yield
    except GatedRepoError:
        raise Refused(f"{repository} asks for its licence to be accepted: do so on huggingface.co/{repository}, then "
                      "log in with hf auth login (or set HF_TOKEN)") from None
    except RepositoryNotFoundError:
        raise Refused(f"there is no model {repository!r} on the hub, or it is private: check its spelling, or "
                      "log in with hf auth login (or set HF_TOKEN)") from None
    except LocalEntryNotFoundError:
        raise Refused(f"{repository} is not on this machine and the hub cannot be reached: connect to the network (and "
                      "unset HF_HUB_OFFLINE), or give the path of a model folder or file") from None
    except EntryNotFoundError:
        raise Refused(f"{repository} is on the hub but is no diffusers model (it has no model_index.json): if it is "
                      "a LoRA give it as one, if it holds a checkpoint download that file and name it") from None
    except Refused:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"{repository} could not be fetched from the hub ({reason}): check the network, or "
                      "give the path of a model folder or file") from None


def variant(names: Iterable[str]) -> str | None:
    """"fp16" when the denoiser's weights are there in that variant only, by the files' names; None for the plain ones."""
    weights = [name for name in names if name.startswith(("unet/", "transformer/")) and name.endswith(".safetensors")]
    half = [name for name in weights if ".fp16" in name]
    plain = [name for name in weights if not re.search(r"\.(fp16|non_ema)\b", name)]
    return "fp16" if half and not plain else None
