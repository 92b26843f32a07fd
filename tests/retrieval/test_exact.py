"""Exact search: all of it against plain Python, and the half-precision first pass against comparing everything."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retrieval.exact import TIED, Exact, cosines
from retrieval.fusion import fuse
from retrieval.rows import SPACES, Filter, Row
from retrieval.schema import sizes, to_arrow
from retrieval.words import parse
from tests.retrieval import plain_search
from tests.retrieval.random_rows import WIDTH, documents, rows, unit

WIDTHS = dict.fromkeys(SPACES, WIDTH)


def exact(some):
    return Exact(to_arrow(some, WIDTHS))


CASES = {
    "words": ((), "dragon in the neon rain", Filter()),
    "a vector": (("weight",), "", Filter()),
    "all": (SPACES, "watercolours of an owl", Filter()),
    "filtered": (("behaviour", "text"), "pokemon", Filter(family="sd", category=("style", "it's \"odd\" \\"))),
    "phrase": (("weight",), '"neon city" rain', Filter()),
    "part of a word": (("weight",), '"RAGO"', Filter(family=("sd", "flux"))),
    "signs": ((), '"c++"', Filter()),
    "two phrases": ((), '"owl" "v1.0"', Filter()),
    "nothing allowed": (("weight",), "dragon", Filter(family=())),
    "nothing wanted": ((), "", Filter()),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_exact_equals_plain_python(case, seed):
    spaces, text, where = CASES[case]
    some, rng = rows(60, seed), np.random.default_rng(seed + 100)
    vectors, query = {space: unit(rng) for space in spaces}, parse(text)
    hits = fuse(exact(some).search(vectors, query, where, depth=1000), 1000)
    keep = lambda row: all(getattr(row, name) in values for name, values in where.wanted().items())  # noqa: E731
    expected = plain_search.search(some, documents(some), vectors, query.terms, query.phrases, keep)
    assert {hit.id for hit in hits} == set(expected)
    for hit in hits:
        score, ranks, scores = expected[hit.id]
        assert hit.score == pytest.approx(score, abs=1e-12) and hit.ranks == ranks
        assert hit.scores == pytest.approx(scores, abs=2e-6)
    assert hits == sorted(hits, key=lambda hit: (-hit.score, hit.id))


@pytest.mark.parametrize("spread", [1.0, 0.02, 0.0], ids=["scattered", "nearly alike", "alike"])
def test_the_first_pass_in_half_precision_loses_none_of_the_best(spread):
    rng = np.random.default_rng(0)
    vectors = (rng.standard_normal(256) + 0 * rng.standard_normal((3000, 256))) + spread * rng.standard_normal((3000, 256))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    some = [Row(f"{place:05d}", weight=vector.astype(np.float32)) for place, vector in enumerate(vectors)]
    index = Exact(to_arrow(some, {"weight": 256}))
    for _ in range(5):
        query = vectors[rng.integers(3000)].astype(np.float32) + 0.1 * unit(rng, 256)
        query /= np.linalg.norm(query)
        all_scores = cosines(vectors, query)
        order = sorted(range(3000), key=lambda place: (-all_scores[place], place))[:100]
        hits = index.search({"weight": query}, parse(""), Filter(), 100)["weight"]
        assert [int(name) for name, _ in hits[:100]] == order
        assert [score for _, score in hits[:100]] == all_scores[order].tolist()


def test_rows_that_tie_for_the_last_place_are_all_ranked_up_to_a_bound():
    alike = [Row(f"{number:04d}", words="owl") for number in range(500)]
    for depth, expected in ((100, 500), (20, 20 * TIED), (1, TIED)):
        hits = Exact(to_arrow(alike, {})).search({}, parse("owl"), Filter(), depth)["words"]
        assert [name for name, _ in hits] == [row.id for row in alike[:expected]]


def test_the_order_of_rows_does_not_matter():
    some, rng = rows(80, 5), np.random.default_rng(5)
    vectors = {space: unit(rng) for space in SPACES}
    search = lambda some: fuse(exact(some).search(vectors, parse("owl castle"), Filter(), 10), 50)  # noqa: E731
    assert search(some) == search(some[::-1]) == search(sorted(some, key=lambda row: row.id))


def test_an_empty_index_and_a_missing_space():
    assert exact([]).search({"weight": unit(np.random.default_rng(0))}, parse('owl "x"'), Filter(family="sd"), 10) == {"weight": [], "words": []}
    table = to_arrow(rows(5), {})
    assert sizes(table.schema) == {} and Exact(table).search({"text": np.ones(1)}, parse(""), Filter(), 5) == {"text": []}


def test_vectors_gives_those_there_are_with_their_ids():
    some = rows(30, 2)
    ids, vectors = exact(some).vectors("behaviour")
    expected = {row.id: row.behaviour for row in some if row.behaviour is not None}
    assert ids == sorted(expected) and np.array_equal(vectors, np.stack([expected[name] for name in ids]))
    assert Exact(to_arrow(some, {})).vectors("text")[0] == []


def test_torch_keeps_its_threads():
    """The search computes on one core a space; whoever draws pictures in the same process still has all of them."""
    code = (
        "import threading, numpy as np, torch; torch.set_num_threads(3)\n"
        "from retrieval.exact import Exact; from retrieval.rows import Filter, SPACES; from retrieval.words import parse\n"
        "from tests.retrieval.random_rows import rows, unit; from retrieval.schema import to_arrow\n"
        "index = Exact(to_arrow(rows(300), dict.fromkeys(SPACES, 16)))\n"
        "index.search({space: unit(np.random.default_rng(0)) for space in SPACES}, parse(''), Filter(), 5)\n"
        "threads = [torch.get_num_threads()]\n"
        "new = threading.Thread(target=lambda: threads.append((torch.ones(9).sum(), torch.get_num_threads())[1])); new.start(); new.join()\n"
        "assert threads == [3, 3], threads"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mutant_without_slack_loses_some(monkeypatch):
    monkeypatch.setattr("retrieval.exact.SLACK", -0.01)
    with pytest.raises(AssertionError):
        test_the_first_pass_in_half_precision_loses_none_of_the_best(1.0)
