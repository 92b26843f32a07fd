"""Every regular expression of Medley takes time linear in the text, whatever the text is: no short text may hold a reader up."""

import ast
import importlib
import pkgutil
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import app
import composition
import retrieval

SHORT, LONG = 2_000, 8_000  # letters
FLOOR = 0.01  # seconds under which a ratio says nothing
MOST = 9.0  # times longer for four times the letters; quadratic is 16


def patterns() -> dict[str, tuple[re.Pattern[Any], str]]:
    """Every compiled pattern that a module of ours has, in tables too, and those in calls of re's functions; with what it is used for, "" for all."""
    known: dict[str, tuple[re.Pattern[Any], str]] = {}
    for room in (composition, retrieval, app):
        for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
            if module.name.endswith("__main__") or module.name.startswith("app.ui"):  # the page has none, and takes long to import
                continue
            loaded = importlib.import_module(module.name)
            for name, value in vars(loaded).items():
                known |= {f"{module.name}.{name}{where}": (pattern, "") for where, pattern in _inside(value)}
            known |= {f"{module.name}, line {line}": (pattern, use) for line, use, pattern in _in_calls(loaded.__file__)}
    return known


def _in_calls(file: str | None) -> Iterator[tuple[int, str, re.Pattern[Any]]]:
    """Patterns that stand in calls of re's functions."""
    for node in ast.walk(ast.parse(Path(file or "").read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "re":
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str | bytes):
                if node.func.attr != "compile":
                    yield node.lineno, node.func.attr, re.compile(node.args[0].value)


def _inside(value: Any) -> Iterator[tuple[str, re.Pattern[Any]]]:
    if isinstance(value, re.Pattern):
        yield "", value
    elif isinstance(value, tuple | list):
        for index, part in enumerate(value):
            yield from ((f"[{index}]{where}", pattern) for where, pattern in _inside(part))


def adversarial(pattern: str) -> list[str]:
    """Pieces to repeat: what the pattern itself is made of, and what often follows in vain."""
    literals = [word for word in re.split(r"[\\^$.|?*+()\[\]{}]|\\[wdsWDSbB]", pattern) if word]
    pieces = {*literals, *(first + second for first in literals[:6] for second in literals[:6]), "a", "0", " ", "_", ".", ":", "<", '"', "\\", '\\"',
              "(", "[", "{", ",", "0.", "a_", "a.", "a:", "<a", "\n", "-", "/", "__", "=", "data:", ".lora_", "<lora:", "\u0130"}  # fmt: skip
    return sorted(pieces)


def seconds(pattern: re.Pattern[Any], text: str, use: str = "") -> float:
    subject = text.encode() if isinstance(pattern.pattern, bytes) else text
    best = 9.0
    for _ in range(3):
        begun = time.perf_counter()
        if use not in ("match", "fullmatch"):
            sum(1 for _ in pattern.finditer(subject))
        if use != "fullmatch":
            pattern.match(subject)
        pattern.fullmatch(subject)
        best = min(best, time.perf_counter() - begun)
        if best < FLOOR or best > 100 * FLOOR:
            break
    return best


def slow(pattern: re.Pattern[Any], use: str = "") -> list[tuple[str, float, float]]:
    """The pieces on which it takes far more than four times as long for four times as many."""
    source = pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode()
    lines = []
    for piece in adversarial(source):
        long = seconds(pattern, piece * (LONG // len(piece)) + "\0", use)
        if long >= FLOOR:
            short = seconds(pattern, piece * (SHORT // len(piece)) + "\0", use)
            if long > MOST * short:
                lines.append((piece, short, long))
    return lines


def test_every_pattern_is_linear():
    known = patterns()
    assert len(known) >= 60 and {"composition.loras.keys._ROLES[0][0]", "composition.prompt_syntax._TAG"} <= known.keys()
    assert {name: lines for name, (pattern, use) in known.items() if (lines := slow(pattern, use))} == {}


@pytest.mark.parametrize("mutant", [r"(a|aa)+$", r"\s+x", r'"(?:[^"\\]|\\.)*"x', r"<[^>]*>$"])
def test_mutant_patterns_are_caught(mutant):
    global LONG, SHORT
    if mutant == r"(a|aa)+$":
        LONG, SHORT, kept = 28, 20, (LONG, SHORT)
        try:
            assert slow(re.compile(mutant))
        finally:
            LONG, SHORT = kept
    else:
        assert slow(re.compile(mutant))
