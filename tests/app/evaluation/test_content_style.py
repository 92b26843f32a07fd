"""The harmonic mean of content and style: of each picture, against the standard library's, and where there are both."""

import statistics

import numpy as np
import pytest

from app.evaluation import content_style


def concept(category, score, present=None, clip_i=None):
    return {"name": category, "category": category, "score": score, "present": present, "clip_i": clip_i}


def test_the_harmonic_mean_of_a_picture_is_that_of_its_contents_and_its_styles_means():
    picture = [concept("character", 30.0, True, 70.0), concept("clothing", 20.0, False, 60.0), concept("object", 16.0, True, 65.0),
               concept("place", 99.0, True, 99.0), concept("style", 11.0, True, 40.0)]  # fmt: skip
    scores = content_style.scores(picture)
    assert scores == {"harmonic_presence": pytest.approx(statistics.harmonic_mean([2 / 3, 1])),
                      "harmonic_clip_t": pytest.approx(statistics.harmonic_mean([22, 11])),
                      "harmonic_clip_i": pytest.approx(statistics.harmonic_mean([65, 40]))}  # fmt: skip


@pytest.mark.parametrize("first, second", [(0.73, 0.59), (1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (31.5, 0.25)])
def test_against_the_standard_library(first, second):
    value = content_style.harmonic(first, second)
    assert value == pytest.approx(statistics.harmonic_mean([first, second])) == pytest.approx(content_style.harmonic(second, first))
    assert min(first, second) - 1e-12 <= value <= (first + second) / 2 + 1e-12


def test_what_disagrees_with_the_phrase_has_none_of_it():
    """A cosine may be negative; a harmonic mean of it would mean nothing."""
    assert content_style.scores([concept("character", 30.0), concept("style", -4.0)])["harmonic_clip_t"] == 0


@pytest.mark.parametrize("picture", [
    [], [concept("character", 30.0, True, 50.0)], [concept("style", 30.0, True, 50.0)], [concept("place", 1.0, True, 1.0), concept("style", 1.0, True, 1.0)],
])  # fmt: skip
def test_without_both_there_is_none(picture):
    assert set(content_style.scores(picture).values()) == {None}
    rows = [{"variant": "merge", "group": "a", "concepts": picture, **content_style.scores(picture)}]
    assert content_style.section({"all": rows}, ["merge"], resamples=100, seed=0) is None


def test_what_is_not_known_is_left_out_and_the_rest_is_there():
    scores = content_style.scores([concept("character", 30.0, None, 50.0), concept("style", 30.0, True, None)])
    assert scores == {"harmonic_presence": None, "harmonic_clip_t": 30.0, "harmonic_clip_i": None}


def test_the_table_has_means_over_pictures_of_both_and_is_at_most_the_harmonic_mean_of_the_averages():
    rng = np.random.default_rng(1)
    rows = []
    for number in range(40):
        picture = [concept("character", rng.uniform(5, 40), rng.random() < 0.7), *([concept("style", rng.uniform(5, 40), rng.random() < 0.6)] * (number % 4 > 0))]
        rows.append({"variant": "merge", "group": f"g{number // 2}", "concepts": picture, **content_style.scores(picture)})
    cells = content_style.section({"all": rows}, ["none", "merge"], resamples=200, seed=0).parts["all"]["merge"]
    both = [row for row in rows if len(row["concepts"]) == 2]
    assert set(cells) == {f"{side}_{measure}" for side in ("content", "style", "harmonic") for measure in ("presence", "clip_t")}
    for measure, key in (("presence", "present"), ("clip_t", "score")):
        content, style = ([float(row["concepts"][place][key]) for row in both] for place in (0, 1))
        assert cells[f"content_{measure}"].mean == pytest.approx(np.mean(content)) and cells[f"style_{measure}"].mean == pytest.approx(np.mean(style))
        hand = [statistics.harmonic_mean(pair) for pair in zip(content, style, strict=True)]
        interval = cells[f"harmonic_{measure}"]
        assert interval.mean == pytest.approx(np.mean(hand)) and (interval.pictures, interval.low < interval.mean < interval.high) == (30, True)
        assert interval.mean <= statistics.harmonic_mean([np.mean(content), np.mean(style)]) + 1e-12


def test_it_stands_in_the_report_of_sets_with_a_style(evaluate, witness, tmp_path):
    """And of those alone: sets of one have no table."""
    import json

    witness("foxword, red fur", "owlword", "ink drawing")
    plain = ("--methods", "merge", "--seeds", 1, "--tune", "none")
    said = evaluate(*plain, "--report", "both", loras="1,2")
    assert said.code == 0 and "Content and style" in said.out, said.err
    document = json.loads((tmp_path / "both/summary.json").read_text())
    (section,) = document["sections"]
    assert set(section["parts"]) == {"all", "2"} and section["parts"]["all"] == section["parts"]["2"]
    assert document["metrics"]["harmonic_presence"]["all"]["means"]["merge"] == section["parts"]["all"]["merge"]["harmonic_presence"]
    assert "harmonic_clip_i" in section["parts"]["all"]["merge"]
    said = evaluate(*plain, "--report", "one", loras="1")
    page = (tmp_path / "one/index.html").read_text()
    assert "Content and style" not in said.out + page and "Harmonic" not in said.out + page
