"""A comparison as the page shows it: a tile for every way of making the picture, with what it cost and what the judge finds in it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import product

from app.concepts import Verdict
from app.ui.job_view import CRISP, verdict_list
from composition import Refused, Request, methods

MOST = 48  # pictures of one comparison
ALSO = {"none": "Without LoRAs", "each": "Each LoRA alone"}


@dataclass(frozen=True)
class Way:
    """One way of making a picture. title: what differs from the others."""

    title: str
    request: Request


@dataclass
class Tile:
    """What became of it. address: of its picture, "" before it is there. state: where it stands, or why there is none."""

    way: Way
    state: str = "waiting"
    failed: bool = False
    address: str = ""
    size: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    evaluations: float = 0.0
    verdicts: Sequence[Verdict] = field(default_factory=tuple)


def ways(request: Request, names: Sequence[str], seeds: int, factors: Sequence[float] = (1.0,), also: Sequence[str] = ()) -> list[Way]:
    """Every way, seed by seed: without LoRAs, each LoRA alone, and all of them by each method at each factor on their weights. The request's options are of
    its own method. Raises Refused for too many."""
    columns = [Way(ALSO["none"], replace(request, loras=(), method="merge", options={}))] if "none" in also else []
    if "each" in also:
        columns += [Way(f"{name} alone", replace(request, loras=[lora], method="merge", options={})) for name, lora in zip(request.names, request.loras, strict=True)]
    for name, factor in product(names, factors or (1.0,)):
        method = methods.find(name)
        options = request.options if name == request.method else {}
        columns.append(Way(method.title + (f" at {factor:g}" if len(factors) > 1 else ""), replace(
            request, method=name, options=options, loras=[lora.scaled(factor) for lora in request.loras])))
    if not columns:
        raise Refused("nothing to compare: choose a method")
    if len(columns) * seeds > MOST:
        raise Refused(f"{len(columns)} ways at {seeds} seeds are {len(columns) * seeds} pictures; a comparison has {MOST} at most")
    return [Way(way.title, replace(way.request, seed=(request.seed + turn) % 2**64, count=1)) for turn in range(seeds) for way in columns]


def factors(text: str) -> list[float]:
    """Numbers between commas or spaces; 1 for nothing. Raises Refused."""
    try:
        read = [float(word) for word in (text or "").replace(",", " ").split()]
    except ValueError:
        raise Refused(f"weights {text[:60]!r}: write numbers between commas, as in 0.6, 1") from None
    if any(not -3 <= number <= 3 for number in read) or len(read) > 6:
        raise Refused("weights: at most six numbers, each from -3 to 3")
    return list(dict.fromkeys(read)) or [1.0]


def grid(tiles: Sequence[Tile]) -> str:
    """All of them, a row for each seed; in one flow where there is one way, or one seed."""
    seeds = list(dict.fromkeys(tile.way.request.seed for tile in tiles))
    columns = len(tiles) // max(1, len(seeds))
    shape = "flow" if columns == 1 or len(seeds) == 1 else "table"
    body = "".join(_tile(tile) for tile in tiles)
    return f'<div class="tiles {shape}" style="--columns: {columns}">{body}</div>' if tiles else ""


def _tile(tile: Tile) -> str:
    request = tile.way.request
    title = f'<figcaption><strong>{escape(tile.way.title)}</strong> <small>seed {request.seed}</small></figcaption>'
    if not tile.address:
        return f'<figure class="tile {"failed" if tile.failed else "coming"}"><div class="blank"><span>{escape(tile.state)}</span></div>{title}</figure>'
    crisp = ' class="crisp"' if max(tile.size) <= CRISP else ""
    lost = [each.lora for each in tile.verdicts if each.lost]
    about = f"{tile.way.title}, seed {request.seed}: {request.prompt}"
    return (f'<figure class="tile{" lost" * bool(lost)}"><a href="{escape(tile.address)}" target="_blank" rel="noopener"><img{crisp} src="{escape(tile.address)}" alt="{escape(about)}"></a>{title}'
            f'<p class="cost">{tile.seconds:.1f} s, {f"{tile.evaluations:.1f}".removesuffix(".0")} evaluations</p>{verdict_list(tile.verdicts)}'
            f'{_lost(lost)}<button type="button" class="use" data-use="{escape(tile.address)}" aria-label="{escape(f"Use {tile.way.title}, seed {request.seed}")}">Use this</button></figure>')


def _lost(names: Sequence[str]) -> str:
    return f'<p class="gone">Lost: {escape(", ".join(names))}</p>' if names else ""
