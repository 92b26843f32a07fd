"""A job as the page shows it: where it stands, its picture, its receipt. Every word of a file or a user is escaped."""

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from app import remarks
from app.concepts import Verdict
from app.cost import spoken
from app.drawing import gate_map, overlay
from app.jobs import Job
from app.ui.cards import Card, data_url
from composition import Request, Result

Link = Callable[[Path], str]
CRISP = 256  # pixels: a picture whose longer side is not over this is enlarged without blur


def empty(words: str = "Your picture appears here.") -> str:
    return f'<div class="stage empty"><span>{escape(words)}</span></div>'


def refusal(words: str) -> str:
    words = re.sub(r"with binds, as in \{.*?\}", "under “belongs to”", words)  # a row of the page has a field for it
    return f'<p class="status error" role="alert">{escape(words[:1].upper() + words[1:])}</p>'


def status(job: Job, before: int) -> str:
    """One line on where a job stands, with a bar while it runs."""
    if job.state == "failed":
        return refusal(job.error)
    words = {
        "waiting": f"Waiting: {before} before this one." if before else "Next.",
        "running": _running(job),
        "cancelled": "Cancelled.",
        "done": f"Done in {job.seconds:.1f} s.",
    }[job.state]
    bar = ""
    if job.state == "running":
        bar = f'<progress aria-label="steps done" max="{max(job.steps, 1)}" value="{job.step}"></progress>'
    return f'<div class="status {job.state}" role="status"><span>{escape(words)}</span>{bar}</div>'


def _running(job: Job) -> str:
    if job.stop.is_set():
        return "Stopping before the next evaluation."
    if not job.steps:
        return "Preparing."
    left = job.seconds / job.step * (job.steps - job.step) if job.step else 0.0
    return f"Step {job.step} of {job.steps}, {job.seconds:.0f} s" + (f", about {spoken(left)} left" if left >= 1 else "")


def stage(job: Job, link: Link) -> str:
    """The picture: the file itself when it is done, a preview while it is made, else nothing. link: where a file is served."""
    if job.result is not None and job.path is not None:
        return _picture(link(job.path), job.result.images[0].size, job.request.prompt or "picture without a prompt", "final")
    if job.state in ("waiting", "running"):
        if job.preview is not None:
            return preview(job.preview)
        return empty("In line." if job.state == "waiting" else "A first sight of it comes soon.")
    return empty("Cancelled: nothing was kept." if job.state == "cancelled" else "No picture was made.")


def line(words: str, lacking: Sequence[str] = ()) -> str:
    """A line on what was done, and on what could not be."""
    notes = "".join(f"<li>{escape(each)}</li>" for each in lacking)
    return f'<div class="status done" role="status"><span>{escape(words)}</span>' + (f'<ul class="lacking">{notes}</ul>' if notes else "") + "</div>"


def finished(address: str, request: Request) -> str:
    """A picture that is served at an address already."""
    return _picture(address, request.size or (CRISP, CRISP), request.prompt or "picture without a prompt", "final")


def preview(image: Image.Image) -> str:
    return _picture(data_url(image.convert("RGB")), image.size, "preview of the picture in the making", "preview")


def _picture(source: str, size: tuple[int, int], about: str, kind: str) -> str:
    crisp = " crisp" if max(size) <= CRISP else ""
    return (f'<div class="stage"><img id="picture" class="{kind}{crisp}" src="{escape(source)}" alt="{escape(about)}" '
            f'width="{size[0]}" height="{size[1]}"></div>')


def verdict_list(verdicts: Sequence[Verdict]) -> str:
    """What the judge finds, a chip for each concept; "" where nothing is judged."""
    chips = "".join(f'<li class="{_standing(each)}" title="{escape(_looked_for(each))}">'
                    f'{escape(each.text())}</li>' for each in verdicts)
    return f'<ul class="verdicts" aria-label="what the judge finds">{chips}</ul>' if chips else ""


def _standing(verdict: Verdict) -> str:
    return "unknown" if verdict.present is None else "found" if verdict.present else "lost" if verdict.lost else "absent"


def _looked_for(verdict: Verdict) -> str:
    return f"looked for: {verdict.phrase}" if verdict.phrase else "the judge does not know its trigger words"


def report(result: Result, path: Path, link: Link, verdicts: Sequence[Verdict] = ()) -> str:
    """What the picture is made of: facts, what the judge finds, one receipt per LoRA, what the user should know, which LoRA was dominant when, where
    each concept is, where the file is."""
    request, image = result.request, result.images[0]
    facts = {
        "Seed": str(request.seed), "Method": request.method, "Steps": str(request.steps),
        "Evaluations": f"{result.notes.get('evaluations', 0):.1f}".removesuffix(".0"), "Seconds": f"{sum(result.seconds.values()):.1f}",
        "Size": f"{image.width} x {image.height}",
    }
    pairs = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    receipts = "".join(f"<li>{escape(receipt.line())}</li>" for receipt in (*result.receipts, *result.condition_receipts.values()))
    receipts += "".join(f'<li class="control">{escape(line)}</li>' for line in remarks.controls(request))
    notes = {name: value for name, value in result.notes.items() if name != "missing triggers"}  # `hint` says those
    remarked = "".join(f'<li class="remark">{escape(line)}</li>' for line in remarks.remarks(notes))
    lines = remarks.timeline(result.notes)
    timeline = f'<pre class="timeline" aria-label="who led when">{escape(chr(10).join(lines))}</pre>' if lines else ""
    tiles = "".join(f'<figure><img src="{data_url(tile)}" alt="{escape(f"{name}: {what}")}"><figcaption>{escape(name)}<br>{escape(what)}'
                    f'</figcaption></figure>' for tile, name, what in overlay.drawn(image, result.notes))
    masks = f'<div class="places" aria-label="where each concept is">{tiles}</div>' if tiles else ""
    gates = gate_map.heat_map(result.notes)
    masks += f'<div class="places"><img class="gates" src="{data_url(gates)}" alt="the gate of each LoRA by layer and step"></div>' if gates else ""
    return (f'<div class="report"><dl>{pairs}</dl>{verdict_list(verdicts)}<ul class="receipts" aria-label="receipts">{receipts}{remarked}</ul>{timeline}{masks}'
            f'<p class="file"><a id="download" href="{escape(link(path))}" download="{escape(path.name)}">Download</a> '
            f'<span>{escape(str(path.absolute()))}</span></p></div>')


def hint(lacking: Sequence[Card]) -> str:
    """Which LoRAs have no trigger word in the prompt, "" when all have."""
    if not lacking:
        return ""
    each = ", ".join(f"{card.title} ({' or '.join(card.triggers[:3])})" for card in lacking)
    return f'<p class="hint">the prompt has no trigger word of {escape(each)}.</p>'
