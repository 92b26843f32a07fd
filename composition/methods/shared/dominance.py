"""Which LoRA dominates when: CMLoRA's order, refresh steps, rotation and weights (arXiv 2502.04923; Medley's reading of it)."""

from collections.abc import Collection, Mapping, Sequence

from composition.refusal import Refused

# A character first: in the ablation of 2402.16843 the first LoRA counts most, and a style first is the worst.
RANK = {"character": 0, "clothing": 1, "object": 2, "pose": 3, "other": 4, "": 4, "style": 5, "place": 6}
LOW = ("place",)  # categories of low frequency
CATEGORY = "category"  # the value of the option order that asks for the order by category
SLOW = (0.375, 0.875)  # the part of the steps in which neighbours are most alike: refreshed every third, else every second


def ordered(
    names: Sequence[str], categories: Mapping[str, str], order: str = "", low: str = "", *, known: Collection[str] = (),
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(high, low): the LoRAs by falling frequency, those of low frequency apart.

    order, low: names separated by commas, as a user or a profile pins them; "": by category, and so is order "category", unless a LoRA
    has that name. low "none": no LoRA is low. When all would be low, none is. known: more names that they may have
    without effect, as of LoRAs of weight 0. Raises Refused for a name that is not there.
    """
    by_category = sorted(names, key=lambda name: RANK.get(categories.get(name, ""), RANK["other"]))
    pinned = [] if order == CATEGORY and CATEGORY not in names else _listed(order, names, known, "order")
    whole = [*pinned, *(name for name in by_category if name not in pinned)]
    if low == "none":
        return tuple(whole), ()
    under = _listed(low, names, known, "low") or [name for name in whole if categories.get(name) in LOW]
    if len(under) == len(whole):
        return tuple(whole), ()
    return tuple(name for name in whole if name not in under), tuple(name for name in whole if name in under)


def _listed(text: str, names: Sequence[str], known: Collection[str], option: str) -> list[str]:
    listed = [part.strip() for part in text.split(",") if part.strip()]
    if strange := [name for name in listed if name not in names and name not in known]:
        raise Refused(f"option {option} of cmlora names {strange[0]!r}; this request has {', '.join(known or names) or 'no LoRA'}")
    return [name for name in dict.fromkeys(listed) if name in names]


def among(live: Collection[str], high: Sequence[str], low: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(high, low) of the LoRAs that are on; where only low ones are, they are the high."""
    high, low = (tuple(name for name in names if name in live) for names in (high, low))
    return (high, low) if high else (low, ())


def refreshes(steps: int, every: int = 0) -> tuple[int, ...]:
    """The steps at which another LoRA becomes dominant: every `every` steps; 0: every second, in the middle part every third."""
    if every:
        return tuple(range(0, steps, every))
    first, second = (int(share * steps) for share in SLOW)
    return tuple(sorted({*range(0, first, 2), *range(first, second, 3), *range(second, steps, 2)}))


def leader(high: Sequence[str], low: Sequence[str], turn: int, *, late: bool, low_only: bool = False) -> str:
    """The dominant LoRA after `turn` earlier refreshes: early, the high in turn; late, the low and the high but their first, in turn.

    low_only: late, the low alone.
    """
    if not late or not low:
        return high[turn % len(high)]
    later = list(low) if low_only else [*high, *low][1:]
    return later[turn % len(later)]


def coefficient(count: int, turn: int, *, decay: bool = True) -> float:
    """c: how much more the dominant LoRA weighs than another at refresh `turn`: N - 0.5 at first, less by 0.5^i at each, never under 1.

    At c = 1 all weigh the same: the method has come to rest at Composite.
    """
    return max(1.0, count - 0.5 - sum(0.5**i for i in range(1, turn + 1)) * decay)


def weights(names: Sequence[str], dominant: str, c: float) -> dict[str, float]:
    """u for the dominant LoRA and v for each other, with u + (N - 1) v = N, so that their mean keeps Composite's scale."""
    other = len(names) / (c + len(names) - 1)
    return {name: c * other if name == dominant else other for name in names}
