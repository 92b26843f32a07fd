"""Every input of the corpus is accepted or refused in plain words, in bounded time and memory; what must be refused is."""

import pytest

from tests.hostile import corpus, kinds, mutate, run, worker
from tests.hostile.corpus import Case

PARTS = 4  # of the corpus, one of which every run takes: the next one takes as long
LEAST = 1_500


def test_the_corpus_is_large_and_has_every_reader():
    cases = corpus.cases()
    assert len(cases) >= LEAST and len(cases[::PARTS]) >= LEAST
    assert {case.reader for case in cases[::PARTS]} >= {"lora", "infotext", "manifest", "record", "request", "picture", "config"}
    assert sum(case.refused for case in cases) >= LEAST


def test_no_input_of_the_corpus_surprises():
    tally = run.corpus(0, len(corpus.cases()), PARTS)
    assert tally.inputs == len(corpus.cases()[::PARTS])
    assert not tally.troubles, run.summary(tally.troubles)


def test_a_minute_of_the_fuzzer_in_small():
    tally = run.fuzz(15, 6)
    assert tally.inputs >= 50 and set(tally.counts) == set(mutate.FUZZED)
    assert not tally.troubles, run.summary(tally.troubles)


def test_twenty_seconds_of_the_kinds_of_update():
    tally = run.fuzz(20, 18, readers=("kinds",))
    assert tally.inputs >= 100 and set(tally.counts) == {"kinds"}
    assert not tally.troubles, run.summary(tally.troubles)


def test_every_kind_has_its_bad_files():
    """Each is refused whichever kinds are read, for its module is the only one."""
    names = [name for name, _ in kinds.bad()]
    assert len(names) == len(set(names)) > 250 and all(sum(name.startswith(kind) for name in names) >= 5 for kind in kinds.KINDS)
    assert len(list(kinds.disguised())) > 20 and len(list(kinds.settings())) > 60


def test_mutations_follow_from_seed_and_number():
    assert [mutate.case(3, index) for index in range(20)] == [mutate.case(3, index) for index in range(20)]
    assert len({mutate.case(3, index).content for index in range(140)}) > 120


@pytest.mark.parametrize(("misread", "kind"), [
    (lambda path: 1 / 0, "unexpected"), (lambda path: b"x" * (300 * 2**20) and None, "too large"),
    (lambda path: [index for index in iter(int, 1)], "too long"), (lambda path: path.read_text(), "unexpected"),
], ids=["crash", "memory", "hang", "accepted"])  # fmt: skip
def test_mutant_reader_is_caught(misread, kind, tmp_path, monkeypatch):
    """A reader that crashes, hangs, takes memory, or takes what must be refused, is seen."""
    monkeypatch.setitem(worker.READERS, "request", worker.READERS["request"]._replace(read=misread))
    monkeypatch.setattr(worker, "SECONDS", 0.5)
    with worker.alarmed():
        assert worker.outcome(Case("request", "x", b"{", refused=True), tmp_path / "0")["outcome"] == kind
