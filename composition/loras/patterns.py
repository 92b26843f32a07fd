"""Regular expressions of a LoRA's settings, matched to names of layers as PEFT does, in time that no file can stretch.

PEFT takes a key of alpha_pattern or rank_pattern for a regular expression of the end of a layer's name, from a dot on: `(.*\\.)?(key)$`. A
file from a stranger must not choose what `re` does with that, since its time can grow exponentially. So an expression becomes a set of
positions with what may follow each (Glushkov's automaton), and a name is read once, letter by letter, whatever the expression is.

Read are letters, ".", escapes (\\d \\w \\s and their opposites), classes, groups, |, *, +, ?, {m,n}, ^ at the beginning and $ at the end. Look-arounds,
back-references and flags are not.
"""

import math
from collections.abc import Callable
from typing import Any

MAX_LETTERS = 500  # of an expression, and of a name from its end
MAX_POSITIONS = 600
MAX_EXPRESSIONS = 64  # patterns of a setting that are more than names
MAX_WORK = 20_000_000  # letters read and positions visited, over all names and expressions of a file

_Letter = Callable[[str], bool]
_Fragment = tuple[bool, frozenset[int], frozenset[int]]  # whether it may be empty, its first and its last positions
_START = -1  # in a state: the expression may begin here
_ESCAPES: dict[str, _Letter] = {
    "d": str.isdecimal, "w": lambda letter: letter.isalnum() or letter == "_", "s": str.isspace,
    "D": lambda letter: not letter.isdecimal(), "W": lambda letter: not (letter.isalnum() or letter == "_"),
    "S": lambda letter: not letter.isspace(),
}


class Patterns:
    """alpha_pattern or rank_pattern of one setting: what each pattern says, in order. Most are names of layers, which are looked up.

    Raises ValueError for what cannot be read.
    """

    def __init__(self, patterns: object) -> None:
        if not isinstance(patterns, dict):
            raise ValueError("it is not a JSON object")
        self._names: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[int, str, Any]] = []
        self._read: dict[tuple[str, str], Expression] = {}
        for order, (pattern, value) in enumerate(patterns.items()):
            end = pattern.removesuffix("$").replace("\\.", ".")
            if len(end) > MAX_LETTERS:
                raise ValueError(f"{pattern[:80]!r} is longer than the name of a layer")
            words = end.removeprefix("^").split(".")
            if all(word and all(letter.isalnum() or letter in "_-" for letter in word) for word in words):
                for spelling in (end, end.replace(".", "_")):
                    self._names.setdefault(spelling, (order, value))
            else:
                self._others.append((order, pattern, value))
        if len(self._others) > MAX_EXPRESSIONS:
            raise ValueError(f"it has {len(self._others):,} regular expressions; at most {MAX_EXPRESSIONS} are read")

    def find(self, module: str) -> Any:
        """What the first pattern that fits a module's name says; None where none does. Raises ValueError for an expression that is not read."""
        joint = "." if "." in module else "_"  # kohya's names have underscores for dots
        order, value = self._named(module, joint) if self._names else (math.inf, None)
        for place, pattern, stated in self._others:
            if place > order:
                break
            try:
                if (pattern, joint) not in self._read:
                    self._read[pattern, joint] = Expression(pattern, joint, MAX_WORK // len(self._others))
                if self._read[pattern, joint].fits(module):
                    return stated
            except ValueError as error:
                raise ValueError(f"{pattern[:80]!r}: {error}") from None
        return value

    def _named(self, module: str, joint: str) -> tuple[float, Any]:
        parts = module[-MAX_LETTERS:].split(joint)  # no pattern is longer, whatever the name is
        if len(module) > MAX_LETTERS:
            parts = parts[1:]
        ends = ["^" + module, *(joint.join(parts[index:]) for index in range(len(parts)))]
        return min((self._names[end] for end in ends if end in self._names), default=(math.inf, None), key=lambda row: row[0])


class Expression:
    """One expression. joint: what stands between the words of a name, "." or "_"; where it is "_", an escaped dot means that. work: what it
    may cost, over all names.

    Raises ValueError for what is not read.
    """

    def __init__(self, text: str, joint: str = ".", work: int = MAX_WORK) -> None:
        if len(text) > MAX_LETTERS:
            raise ValueError("it is too long")
        self._joint = joint
        self._whole = text.startswith("^")
        self._text = text.removeprefix("^")
        if self._text.endswith("$") and not self._text.endswith("\\$"):
            self._text = self._text[:-1]
        self._at = 0
        self._letters: list[_Letter] = []
        self._follow: list[set[int]] = []
        self._empty, self._first, self._last = self._either()
        if self._at < len(self._text):
            raise ValueError("a bracket is closed that was not opened")
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._left = work

    def fits(self, name: str) -> bool:
        """Whether it fits the end of a name from a joint on, or all of it. Raises ValueError when that takes too long."""
        state = frozenset((_START,))
        for index, letter in enumerate(name[-MAX_LETTERS:]):
            self._spend(1)
            if not state and self._whole:
                return False
            if index == 0 and len(name) > MAX_LETTERS:
                state = frozenset()
            if (after := self._steps.get((state, letter))) is None:
                after = self._steps[state, letter] = self._after(state, letter)
            state = after
        return bool(state & self._last) or self._empty and _START in state

    def _after(self, state: frozenset[int], letter: str) -> frozenset[int]:
        near: set[int] = set()
        for position in state:
            near |= self._first if position == _START else self._follow[position]
        self._spend(sum(len(self._first if position == _START else self._follow[position]) for position in state) + len(near))
        begins = (_START,) if letter == self._joint and not self._whole else ()
        return frozenset((*(position for position in near if self._letters[position](letter)), *begins))

    def _spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise ValueError("it takes too long")

    # reading -------------------------------------------------------------------------------------------------------

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise ValueError("it ends too early")
        self._at += 1
        return self._text[self._at - 1]

    def _either(self) -> _Fragment:
        empty, first, last = self._sequence()
        while self._peek() == "|":
            self._at += 1
            other = self._sequence()
            empty, first, last = empty or other[0], first | other[1], last | other[2]
        return empty, first, last

    def _sequence(self) -> _Fragment:
        whole: _Fragment = True, frozenset(), frozenset()
        while self._peek() not in ("", "|", ")"):
            whole = self._joined(whole, self._repeated())
        return whole

    def _joined(self, left: _Fragment, right: _Fragment) -> _Fragment:
        for position in left[2]:
            self._follow[position] |= right[1]
        first = left[1] | right[1] if left[0] else left[1]
        return left[0] and right[0], first, right[2] | left[2] if right[0] else right[2]

    def _repeated(self) -> _Fragment:
        begin = self._at
        part = self._atom()
        least, most = self._count()
        if (least, most) == (1, 1):
            return part
        end, copies = self._at, [part]
        for _ in range(max(least, most or 0, 1) - 1):  # a copy of what is repeated for each time
            self._at = begin
            copies.append(self._atom())
        self._at = end
        if most is None:
            for position in copies[-1][2]:
                self._follow[position] |= copies[-1][1]
        whole: _Fragment = True, frozenset(), frozenset()
        for index, (empty, first, last) in enumerate(copies if most != 0 else []):
            whole = self._joined(whole, (empty or index >= least, first, last))
        return whole

    def _count(self) -> tuple[int, int | None]:
        """How often, (1, 1) where nothing is stated; None for any number."""
        sign = self._peek()
        if not sign or sign not in "*+?{":
            return 1, 1
        self._at += 1
        bounds: tuple[int, int | None] = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(sign, (1, 1))
        if sign == "{":
            least, comma, most = self._until("}").partition(",")
            if not least.isdecimal() or len(least) > 3 or len(most) > 3 or most and not most.isdecimal():
                raise ValueError("{m,n} holds no numbers")
            bounds = int(least), (int(most) if most else None) if comma else int(least)
            if bounds[1] is not None and bounds[1] < bounds[0]:
                raise ValueError("{m,n} holds no numbers in order")
        if self._peek() == "?":
            self._at += 1  # as few as possible: the same names
        if self._peek() and self._peek() in "*+{":
            raise ValueError("a repetition is repeated")
        return bounds

    def _atom(self) -> _Fragment:
        letter = self._next()
        if letter == "(":
            if self._text.startswith("?:", self._at):
                self._at += 2
            inner = self._either()
            if self._next() != ")":
                raise ValueError("a bracket is not closed")
            return inner
        if letter in "?*+{^$":
            raise ValueError(f"{letter} is not read there")
        if letter == "[":
            return self._position(self._class())
        if letter == ".":
            return self._position(lambda _: True)
        return self._position(self._escape() if letter == "\\" else self._same(letter))

    def _position(self, letter: _Letter) -> _Fragment:
        if len(self._letters) >= MAX_POSITIONS:
            raise ValueError("it is too long")
        self._letters.append(letter)
        self._follow.append(set())
        here = frozenset((len(self._letters) - 1,))
        return False, here, here

    def _escape(self) -> _Letter:
        letter = self._next()
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        if letter.isalnum():
            raise ValueError(f"\\{letter} is not read")
        return self._same(self._joint if letter == "." else letter)

    @staticmethod
    def _same(letter: str) -> _Letter:
        return lambda other: other == letter

    def _class(self) -> _Letter:
        text = self._until("]")
        negated, text = text.startswith("^"), text.removeprefix("^")
        if not text or "\\" in text or "[" in text:
            raise ValueError("a class of letters is not read")
        pairs: list[tuple[str, str]] = []
        while text:
            ranged = len(text) > 2 and text[1] == "-"
            pairs.append((text[0], text[2] if ranged else text[0]))
            text = text[3 if ranged else 1 :]
        return lambda letter: any(low <= letter <= high for low, high in pairs) != negated

    def _until(self, end: str) -> str:
        begin, stop = self._at, self._text.find(end, self._at + 1)
        if stop < 0:
            raise ValueError(f"{end} is missing")
        self._at = stop + 1
        return self._text[begin:stop]
