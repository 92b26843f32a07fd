"""The page on this machine alone: 127.0.0.1, no other host's name, no telemetry, no history, no file but the
pictures made here, no setting of the user's for Gradio."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from app.cost import LONGEST, Meter
from app.jobs import Jobs
from app.ui.door import Door, Presence
from app.ui.drops import Drops
from app.ui.gallery import Gallery
from composition import Refused, Result, record

if TYPE_CHECKING:
    from composition import Engine

HOST = "127.0.0.1"
FIRST, PORTS = 7860, 100
ROOM = 64  # pictures that may wait


def port(wanted: int | None) -> int:
    """The wanted port, or the first free one from 7860. Raises Refused when it is taken."""
    if wanted is not None:
        if trouble := _trouble(wanted):
            raise Refused(f"port {wanted} cannot be used ({trouble}): give another --port, or none for the first free one")
        return wanted
    for number in range(FIRST, FIRST + PORTS):
        if not _trouble(number):
            return number
    raise Refused(f"no port from {FIRST} to {FIRST + PORTS - 1} is free: give one with --port")


def _trouble(number: int) -> str:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")
        try:
            probe.bind((HOST, number))
        except OSError as error:
            return error.strerror or str(error)
    return ""


@contextmanager
def environment() -> Iterator[None]:
    """The environment without the user's GRADIO_* variables, which switch on parts of Gradio, when it is imported or when it is launched:
    sharing, another address, other folders, a proxy, an MCP server, reloading."""
    before = {name: os.environ.pop(name) for name in tuple(os.environ) if name.upper().startswith("GRADIO_")}
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        yield
    finally:
        del os.environ["GRADIO_ANALYTICS_ENABLED"]
        os.environ.update(before)


@contextmanager
def opened(engine: "Engine", folder: Path, number: int, *, browse: bool = False, longest: float = LONGEST) -> Iterator[str]:
    """The page of this engine, served until the context ends; yields its address. Pictures go to `folder`.

    longest: seconds that a picture may take.
    """
    gallery, presence, drops = Gallery(), Presence(), Drops(engine)

    def keep(result: Result) -> Path:
        return gallery.add(record.save(result, folder))

    with environment(), Jobs(engine, keep, room=ROOM, meter=Meter(longest)) as jobs:
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from app.ui.page import Page
        from app.ui.scripts import HERE

        look = gr.themes.Default(
            primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg",
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # the machine's own: nothing is fetched
        page = Page(engine, jobs, gallery, presence, drops, folder).blocks
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=number, prevent_thread_lock=True, quiet=True, share=False, inbrowser=browse,
                run_history=False, footer_links=[], ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
                max_threads=2 * ROOM, max_file_size="1kb", theme=look, css_paths=[HERE / "page.css"],
                app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None,  # and no name that is bent to 127.0.0.1
                            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                                           Middleware(Door, gallery=gallery, presence=presence, drops=drops)]})  # fmt: skip
            yield address
        finally:
            jobs.close()
            page.close(verbose=False)
            drops.close()
            gallery.forget_archives()


def serve(engine: "Engine", folder: Path, number: int, say: Callable[[str], object], *, browse: bool = False,
          longest: float = LONGEST) -> None:
    """Serve the page until Ctrl-C."""
    try:
        with opened(engine, folder, number, browse=browse, longest=longest) as address:
            say(address)
            threading.Event().wait()
    except KeyboardInterrupt:
        return
