"""Models on the hub: fetched into its own cache as far as they are not there yet, safetensors only.

What is cached opens without the network; the hub's errors are told in the user's words.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, hf_hub_download, list_repo_files, login
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from composition.refusal import Refused


class Facts(NamedTuple):
    """What the hub says of a model. licence: its name. link: where it is to be read. gated: it must be accepted there first.

    size: bytes that a download fetches.
    """

    repository: str
    licence: str
    link: str
    gated: bool
    size: int


def facts(repository: str) -> Facts:
    """Ask the hub about a model; its page can be read without a token even when its files cannot. Raises Refused."""
    with plainly(repository):
        info = HfApi().model_info(repository, files_metadata=True)
    card = info.card_data
    named = str(getattr(card, "license_name", None) or getattr(card, "license", None) or "not stated")
    link = str(getattr(card, "license_link", None) or "")
    if link and "://" not in link:
        link = f"https://huggingface.co/{repository}/blob/main/{link}"
    parts = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    half = variant(parts)
    fetched = sum(size for name, size in parts.items() if "/" in name and (
        name.endswith(".safetensors") and (half is None) == (".fp16." not in name) or name.endswith((".json", ".txt", ".model"))))
    return Facts(repository, named, link or f"https://huggingface.co/{repository}", bool(info.gated), fetched)


def allowed(repository: str, token: str | None = None) -> bool:
    """Whether the files of a model may be fetched with this token (None: the one that is kept, if any). Raises Refused."""
    try:
        HfApi().auth_check(repository, token=token)
    except GatedRepoError:
        return False
    except Exception:
        with plainly(repository):
            raise
    return True


def keep(token: str) -> None:
    """Keep the user's token where huggingface_hub keeps it. Raises Refused for one the hub does not know."""
    try:
        login(token=token, add_to_git_credential=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"the hub does not take this token ({reason}): make one at https://huggingface.co/settings/tokens") from None


def index(repository: str) -> Path:
    """The model_index.json of a hub id, from the cache or the hub."""
    with plainly(repository):
        return Path(hf_hub_download(repository, "model_index.json"))


def download(repository: str) -> Path:
    """The folder of a hub id in the hub's own cache, fetched as far as it is not there yet. Never a pickle."""
    folder = index(repository).parent
    with plainly(repository):
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
def plainly(repository: str) -> Iterator[None]:
    """The hub's errors in the user's words."""
    try:
        yield
    except GatedRepoError:
        raise Refused(f"{repository} asks for its licence to be accepted: do so on huggingface.co/{repository}, then fetch it with "
                      f"medley pull {repository}, which asks for your token (or set HF_TOKEN, or use hf auth login)") from None
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
