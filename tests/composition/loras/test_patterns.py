"""Regular expressions of settings: they fit what `re` says that they fit, and no expression takes long."""

import random
import re
import time

import pytest

from composition.loras.patterns import MAX_EXPRESSIONS, Expression, Patterns

WRITTEN = (r"attn\d*\.to_(q|k)", r"down_blocks\.[01]\..*\.to_q", r".*attn1.*", r"(a|b)*a(a|b){3}", r"a{0,2}b", r"x+?y*", r"^down\..*q$", r"[^.]+\.q",
           r"a{2}", r"a{2,}", r"(ab|c)?d", r"", r"a|b|", r"(a*)*b", r"(a|aa)+", r"a{0}b", r"\w+", r"(?:q|k)\d{1,2}", r"[a-c_]\.q\$?")


def expression(rng: random.Random, depth: int = 3) -> str:
    kind = rng.random()
    if depth == 0 or kind < 0.35:
        return rng.choice(["a", "b", r"\.", "[ab]", "[^a]", ".", "q", r"\d", r"\w", "c"])
    if kind < 0.6:
        return expression(rng, depth - 1) + expression(rng, depth - 1)
    if kind < 0.75:
        return f"({expression(rng, depth - 1)}|{expression(rng, depth - 1)})"
    return f"({expression(rng, depth - 1)})" + rng.choice(["*", "+", "?", "{1,2}", "{0,1}", "{2}", "{1,}"])


def test_as_peft_matches_them():
    """PEFT: `re.match(rf"(.*\\.)?({key})$", name)`."""
    rng = random.Random(0)
    for pattern in (*WRITTEN, *(expression(rng) for _ in range(300))):
        ours, theirs = Expression(pattern), re.compile(rf"(.*\.)?({pattern})$")
        names = ["", "down_blocks.0.attentions.0.attn1.to_q", "down.0.q", "mid.q", "a.b", "attn2.to_k", "down_blocks.2.x.to_q"]
        for name in (*names, *("".join(rng.choice("ab.qc1_") for _ in range(rng.randrange(9))) for _ in range(60))):
            assert ours.fits(name) == bool(theirs.match(name)), (pattern, name)


@pytest.mark.parametrize("pattern", ["(a", "a)", "*a", "a**", "[a", "(?=a)", "(?P<n>a)", r"\1", "a{x}", "a{3,1}", "a{1000}", "[]", "a^b", "a$b", "a" * 600,
                                     "((a{100}){100}){100}", r"a{2}{3}"])
def test_what_is_not_read_is_refused(pattern):
    with pytest.raises(ValueError):
        Expression(pattern)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*(a|a)*(a|a)*c", "(.*a){150}", "(a|b)*a(a|b){90}"])
def test_no_expression_takes_long(pattern):
    """These take `re` longer than anyone waits; here they are read, or refused when they cost too much."""
    rng, begun = random.Random(0), time.perf_counter()
    one = Expression(pattern, work=2_000_000)
    try:
        for _ in range(300):
            one.fits("".join(rng.choice("ab") for _ in range(400)))
    except ValueError as error:
        assert "too long" in str(error)
    assert time.perf_counter() - begun < 10


def test_too_many_are_refused():
    assert Patterns({f"a{index}+": index for index in range(MAX_EXPRESSIONS)}).find("x.a7") == 7
    with pytest.raises(ValueError, match="at most"):
        Patterns({f"a{index}+": index for index in range(MAX_EXPRESSIONS + 1)})


def test_names_and_expressions_in_their_order():
    assert Patterns({"to_q": 1, "to_.": 2}).find("a.to_q") == 1
    assert Patterns({"to_.": 2, "to_q": 1}).find("a.to_q") == 2
    assert Patterns({r"x\.to_(q|k)": 2}).find("a_x_to_q") == 2
    assert Patterns({r"x\.to_(q|k)": 2}).find("a.y.to_q") is None
