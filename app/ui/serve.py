"""The page on this machine alone: 127.0.0.1, no other host's name, no telemetry, no history, no file but the pictures."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from app.jobs import Jobs
from composition import Refused, Result, record

if TYPE_CHECKING:
    from composition import Engine

HOST = "127.0.0.1"
FIRST, PORTS = 7860, 100


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
def opened(engine: "Engine", folder: Path, number: int, *, browse: bool = False) -> Iterator[str]:
    """The page of this engine, served until the context ends; yields its address. Pictures go to `folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from app.ui.page import HERE, Page

    def keep(result: Result) -> Path:
        return record.save(result, folder)

    look = gr.themes.Default(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # the machine's own: nothing is fetched
    with Jobs(engine, keep) as jobs:
        page = Page(engine, jobs).blocks
        try:
            _, address, _ = page.launch(
                server_name=HOST, server_port=number, prevent_thread_lock=True, quiet=True, share=False, inbrowser=browse,
                run_history=False, footer_links=[], ssr_mode=False, mcp_server=False, enable_monitoring=False, pwa=False,
                allowed_paths=[str(folder.absolute())], max_file_size="1kb", theme=look,
                css_paths=[HERE / "page.css"],
                app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None,  # and no name that is bent to 127.0.0.1
                            "middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]})
            yield address
        finally:
            jobs.close()
            page.close(verbose=False)


def serve(engine: "Engine", folder: Path, number: int, say: Callable[[str], object], *, browse: bool = False) -> None:
    """Serve the page until Ctrl-C."""
    try:
        with opened(engine, folder, number, browse=browse) as address:
            say(address)
            threading.Event().wait()
    except KeyboardInterrupt:
        return
