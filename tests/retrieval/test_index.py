"""The index: both engines give the same hits, whatever is missing; rows are written, replaced, deleted; text of others stays data."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from composition import Refused
from retrieval.fusion import fuse
from retrieval.index import Index
from retrieval.rows import SPACES, Filter, Row
from retrieval.words import parse
from tests.retrieval import plain_search
from tests.retrieval.random_rows import documents, rows, unit

HOSTILE = [
    "it's", "\\", "\\'", "' OR '1'='1", "\\' OR 1=1 --", "'; DROP TABLE loras; --", "''", "\"", "%", "_", "nul\0", "line\nbreak", "☃", "", " ",
    "\udcff", "${x}", "/* */", "a,b", "null",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(rows, the index in memory, the same through LanceDB's own indices, built when half of the rows were there)."""
    folder, some = tmp_path_factory.mktemp("index"), rows(300, seed=7)
    index, large = Index(folder), Index(folder, exact_rows=0)
    index.upsert(some[:150])
    large.optimise()
    index.upsert([replace(row, words="outdated") for row in some[100:200]])
    index.upsert(some[100:])
    index.upsert([Row("gone")])
    index.delete(["gone", "never there"])
    large.optimise()
    return some, index, large


QUERIES = [
    ((), "dragon neon", Filter()),
    (("weight",), "", Filter()),
    (SPACES, "owl in a castel", Filter()),
    (("weight", "text"), "watercolor", Filter(family="flux")),
    (("behaviour",), '"neon city"', Filter(licence="MIT")),
    ((), '"astl" owl', Filter(category="it's \"odd\" \\")),
    (("text",), '"v1.0" "c++"', Filter()),
    (SPACES, "pokemon anime", Filter(family=("sd", "sdxl"), category="style")),
    (SPACES, "dragon", Filter(name="lora17")),
    (SPACES, "dragon", Filter(name=())),
]


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_lancedb_equals_exact_equals_plain_python(both, query):
    some, index, large = both
    spaces, text, where = query
    rng = np.random.default_rng(len(text))
    vectors = {space: unit(rng) for space in spaces}
    hits, same = index.search(vectors, text, where, k=1000), large.search(vectors, text, where, k=1000)
    assert [hit.id for hit in hits] == [hit.id for hit in same]
    for hit, other in zip(hits, same, strict=True):
        assert hit.ranks == other.ranks and hit.score == other.score and hit.scores == pytest.approx(other.scores, rel=1e-5)
    parsed = parse(text)
    terms = index._current().vocabulary.close(parsed.terms)
    keep = lambda row: all(getattr(row, name) in values for name, values in where.wanted().items())  # noqa: E731
    expected = plain_search.search(some, documents(some), vectors, terms, parsed.phrases, keep)
    assert {hit.id: hit.score for hit in hits} == pytest.approx({name: score for name, (score, *_) in expected.items()})


def test_the_best_few_are_the_first_of_more(both):
    _, index, large = both
    vectors = {space: unit(np.random.default_rng(3)) for space in SPACES}
    more = index.search(vectors, "night forest", k=100)
    for engine in (index, large):
        few = engine.search(vectors, "night forest", k=5)
        assert [(hit.id, hit.ranks) for hit in few] == [(hit.id, hit.ranks) for hit in more[:5]]


def test_a_filter_is_applied_before_the_search(tmp_path):
    """A thousand better rows of another family do not push the only allowed one out."""
    query = unit(np.random.default_rng(0))
    better = [Row(f"{number:04d}", family="sd", words="owl owl owl", weight=query) for number in range(1000)]
    index = Index(tmp_path)
    index.upsert([*better, Row("wanted", family="flux", words="an owl among much else", weight=-query)])
    large = Index(tmp_path, exact_rows=0)
    for engine in (index, large):
        hits = engine.search({"weight": query}, "owl", Filter(family="flux"), k=1)
        assert [(hit.id, hit.ranks) for hit in hits] == [("wanted", {"weight": 1, "words": 1})]
    large.optimise()
    assert [hit.id for hit in large.search({"weight": query}, "owl", Filter(family="flux"), k=1)] == ["wanted"]
    assert index.search(text='"owl among"', vectors={"weight": query}, k=3)[0].id == "wanted" and len(index.search(text='"owl among"')) == 1


def test_rows_are_kept_as_they_were(tmp_path):
    index, some = Index(tmp_path), rows(20, seed=1)
    some[3] = replace(some[3], files=("/a\udcff/ü.safetensors", "/b"), strength=None, triggers=("one", "two"))
    index.upsert(some)
    got = index.get([row.id for row in some] + ["absent"])
    assert list(got) == [row.id for row in some]
    for row in some:
        for name in Row.__dataclass_fields__:
            assert np.array_equal(getattr(got[row.id], name), getattr(row, name)), name


@pytest.mark.parametrize("exact_rows", [0, 10_000])
def test_what_was_written_is_found_at_once_and_what_was_deleted_is_not(tmp_path, exact_rows):
    index, reader, rng = Index(tmp_path, exact_rows=exact_rows), Index(tmp_path, exact_rows=exact_rows), np.random.default_rng(0)
    vector = unit(rng)
    for engine in (index, reader):
        assert engine.search({"weight": vector}, "owl") == [] and engine.count() == 0
    index.upsert([Row("a", words="owl", family="sd"), Row("b", words="fox", weight=vector)])
    for engine in (index, reader):
        assert [hit.id for hit in engine.search(text="owl")] == ["a"]
        assert [hit.id for hit in engine.search({"weight": vector})] == ["b"]
    index.optimise()
    index.upsert([Row("a", words="fox", family="flux")])
    for engine in (index, reader):
        assert engine.search(text="owl", fuzzy=False) == [] and {hit.id for hit in engine.search(text="fox")} == {"a", "b"}
        assert engine.count(Filter(family="flux")) == 1 and engine.count() == 2
    index.delete(["b"])
    for engine in (index, reader):
        assert engine.search({"weight": vector}) == [] and [hit.id for hit in engine.search(text="fox")] == ["a"] and not engine.get(["b"])


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_text_of_others_is_data(hostile_index, text):
    index, large = hostile_index
    place = HOSTILE.index(text)
    for engine in (index, large):
        for field in ("family", "category", "licence", "name"):
            hits = engine.search(text="common", where=Filter(**{field: text}))
            assert [hit.id for hit in hits] == [f"id{place}"], field
        if text.strip('" ') and '"' not in text:
            assert f"id{place}" in {hit.id for hit in engine.search(text=f'"{text}"')}
        engine.search(text=text)
    assert index.count(Filter(name=text)) == 1


@pytest.fixture(scope="module")
def hostile_index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    index = Index(folder)
    index.upsert([Row(f"id{place}", words=f"common {text}", family=text, category=text, licence=text, name=text) for place, text in enumerate(HOSTILE)])
    return index, Index(folder, exact_rows=0)


def test_hostile_ids_delete_only_themselves(tmp_path):
    index, ids = Index(tmp_path), [text for text in HOSTILE if text and text != "\udcff"]
    index.upsert([Row(name) for name in ids])
    for name in ids[:-1]:
        index.delete([name])
        assert not index.get([name]) and index.get([ids[-1]])
    assert index.count() == 1


def test_bad_rows_are_refused_and_nothing_of_their_batch_is_written(tmp_path):
    index, vector = Index(tmp_path), unit(np.random.default_rng(0))
    index.upsert([Row("a", weight=vector)])
    for bad, reason in [
        (Row(""), "has no hash"), (Row("a\udcff"), "is no hash"), (Row("b", weight=vector[:12] / np.linalg.norm(vector[:12])), "another encoder"),
        (Row("b", text=vector * 2), "length 2"), (Row("b", text=vector * np.nan), "length nan"), (Row("b", text=0 * vector), "length 0"),
        (Row("b", text=vector[None]), "shape"),
    ]:  # fmt: skip
        with pytest.raises(Refused, match=reason):
            index.upsert([Row("c"), bad])
    with pytest.raises(Refused, match="given twice"):
        index.upsert([Row("d"), Row("d")])
    assert index.count() == 1 and index.held_encoders() == {"weight": ""}
    for query, reason in [({"weight": vector[:4] / np.linalg.norm(vector[:4])}, "another encoder"), ({"colour": vector}, "no evidence 'colour'")]:
        with pytest.raises(Refused, match=reason):
            index.search(query)


def test_vectors_of_another_encoder_are_not_mixed(tmp_path):
    vector = unit(np.random.default_rng(0))
    first, second = Index(tmp_path, encoders={"weight": "encoder 1"}), Index(tmp_path, encoders={"weight": "encoder 2"})
    first.upsert([Row("a", weight=vector, words="owl")])
    assert second.held_encoders() == {"weight": "encoder 1"}
    for call in (lambda: second.search({"weight": vector}), lambda: second.upsert([Row("b", weight=vector)])):
        with pytest.raises(Refused, match="were made by encoder 1, not by encoder 2"):
            call()
    assert [hit.id for hit in second.search(text="owl")] == ["a"]
    second.forget("weight")
    wide = unit(np.random.default_rng(1), 32)
    second.upsert([Row("b", weight=wide)])
    assert [hit.id for hit in second.search({"weight": wide})] == ["b"] and second.get(["a"])["a"].weight is None
    with pytest.raises(Refused):
        first.search({"weight": vector})


@pytest.mark.parametrize("exact_rows", [0, 10_000])
def test_all_vectors_of_a_space(both, exact_rows):
    some, index, large = both
    ids, vectors = (large if exact_rows == 0 else index).vectors("text")
    expected = {row.id: row.text for row in some if row.text is not None}
    assert index.ids() == sorted(row.id for row in some)
    assert index.ids(Filter(family="sd")) == sorted(row.id for row in some if row.family == "sd")
    assert set(ids) == set(expected) and all(np.array_equal(expected[name], vector) for name, vector in zip(ids, vectors, strict=True))


def test_threads_search_while_one_writes(tmp_path):
    index, vector, troubles = Index(tmp_path), unit(np.random.default_rng(0)), []
    index.upsert([Row("first", words="owl", weight=vector)])
    done = threading.Event()

    def search():
        while not done.is_set():
            try:
                assert index.search({"weight": vector}, "owl")[0].id == "first"
            except BaseException as error:
                troubles.append(error)
                return

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(8):
        index.upsert([Row(f"row{number}", words="fox")])
        index.optimise()
    done.set()
    for thread in threads:
        thread.join()
    assert not troubles and index.count() == 9


def add_at_once(folder, ids):
    """Two writers add the same new ids, each at the same time. Returns the number of rows there are then."""
    writers = [Index(folder), Index(folder)]
    for name in ids:
        start = threading.Barrier(2)
        threads = [threading.Thread(target=lambda index=index: (start.wait(), index.upsert([Row(name, words="owl")]))) for index in writers]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return writers[0].count()


def test_two_who_add_the_same_row_at_once_add_it_once(tmp_path):
    assert add_at_once(tmp_path, "abcde") == 5


def test_mutant_a_filter_lost_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.indexed.allowed", lambda where, query: "true")
    with pytest.raises(AssertionError):
        test_a_filter_is_applied_before_the_search(tmp_path)


def test_mutant_a_share_lost_in_fusion_is_seen(both, monkeypatch):
    monkeypatch.setattr("retrieval.index.fuse", lambda orders, k: fuse({name: orders[name] for name in orders if name != "words"}, k))
    with pytest.raises(AssertionError):
        test_lancedb_equals_exact_equals_plain_python(both, QUERIES[2])
