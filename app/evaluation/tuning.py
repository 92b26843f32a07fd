"""The factor on every LoRA's weight that is best for a method: tried on pictures of other sets with other noise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from app.evaluation.cases import Case
from app.evaluation.generate import Picture
from app.evaluation.variants import Row, Variants

if TYPE_CHECKING:
    from app.evaluation.scoring import Scorer

FACTORS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)


def rows(variants: Variants, name: str, pilots: Sequence[Case]) -> list[Row]:
    """The pictures to try."""
    return [variants.row(case, name, factor) for factor in FACTORS for case in pilots]


def best(pictures: Sequence[Picture], scorer: "Scorer", weight: float) -> tuple[float, dict[str, Any]]:
    """The factor with the highest presence (where it is known) and CLIPScore, and what was tried. weight: of every LoRA before."""
    scores = scorer.score(pictures, scorer.see(pictures), {})
    tried = {}
    for factor in FACTORS:
        mine = [row for index, row in scores.items() if _factor(pictures[index], weight) == factor]
        if mine:
            presences = [row["presence"] for row in mine if row["presence"] is not None]
            tried[factor] = (sum(presences) / len(mine), sum(row["clipscore"] for row in mine) / len(mine))
    factor = max(tried, key=lambda factor: tried[factor], default=1.0)
    return factor, {f"{factor:g}": {"presence": round(presence, 4), "clipscore": round(clipscore, 3)} for factor, (presence, clipscore) in tried.items()}


def _factor(picture: Picture, weight: float) -> float:
    """The factor of a pilot, from its first LoRA."""
    case, request = picture.row.case, picture.request
    assert case.request and request
    ratio = request.loras[0].weight / case.request.loras[0].weight if weight else 1.0
    return min(FACTORS, key=lambda factor: abs(factor - ratio))
