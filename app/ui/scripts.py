"""The scripts of the page's own components, each behind what all of them share."""

from pathlib import Path

HERE = Path(__file__).parent


def script(name: str) -> str:
    """The script of a component, as Gradio runs it when the component is there."""
    return "\n".join((HERE / f"{part}.js").read_text("utf-8") for part in ("dom", name))
