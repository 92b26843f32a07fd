"""`medley pull`: fetch a model from the hub, its licence first; for a gated one the token is asked for in plain words."""

import sys
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from app import engines
from composition import Refused
from composition.backbones.loading import catalog


def pull(name: str, out: Console, ask: Callable[[str], str] | None) -> str:
    """Fetch the model and return its folder. ask: prompts the user for a token; None where there is no terminal.

    Raises Refused when it cannot be fetched: unknown, unreachable, its licence not accepted, no token.
    """
    repository = catalog.repository(name)
    engines.prepare(repository if "/" in repository else "-/-")
    from composition.backbones.loading import hub
    from composition.backbones.loading import open as opening

    if opening.find(repository).kind != "hub":
        raise Refused(f"{name} is on this machine already: use it with --model {name}")
    facts = hub.facts(repository)
    out.print(Text(f"{repository}: {facts.size / 1e9:.1f} GB, licence {facts.licence} ({facts.link})"))
    if facts.gated and not hub.allowed(repository):
        instructions = (f"{repository} requires you to accept its licence: open https://huggingface.co/{repository}, accept it there, and create a "
                "read token at https://huggingface.co/settings/tokens")
        if ask is None:
            raise Refused(f"{instructions}; then set HF_TOKEN, or run this command in a terminal, where it asks for the token")
        out.print(Text(f"{instructions}."))
        token = ask("Token (it is not shown, and kept as hf auth login keeps it): ").strip()
        if not token:
            raise Refused("no token was given; nothing was fetched")
        if not hub.allowed(repository, token):
            raise Refused(f"with this token {repository} is still closed: accept its licence at https://huggingface.co/{repository} with the "
                          "account that the token belongs to")
        hub.keep(token)
    folder = hub.download(repository)
    opening.family(opening.Location("folder", name, folder))  # Refused when it is of no supported family
    out.print(Text(f"fetched; use it with --model {name}"))
    return str(folder)


def asker() -> Callable[[str], str] | None:
    """Asks in the terminal without showing what is typed; None where there is none."""
    from getpass import getpass

    return getpass if sys.stdin is not None and sys.stdin.isatty() else None
