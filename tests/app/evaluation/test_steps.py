"""Several numbers of steps in one report: each as it is by itself, with the same noise."""

import json

from app.evaluation import tuning
from tests.app.evaluation.conftest import rows


def test_a_table_for_each_number_of_steps_is_that_of_a_run_of_its_own(evaluate, witness, monkeypatch, tmp_path):
    witness("foxword, red fur", "owlword", "ink drawing")
    monkeypatch.setattr(tuning, "FACTORS", (0.5, 1.0))
    plain = ("--methods", "merge,composite", "--seeds", 1, "--tune", "merge", "--references", 0, "--limit", 1)
    assert evaluate(*plain, "--steps", 3, "--report", "one").code == 0
    said = evaluate(*plain, "--steps", "1,3", "--report", "both")
    assert said.code == 0, said.err
    one, both = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "both"))
    assert both["steps"] == [1, 3] and one["steps"] == [] and both["groups"] == one["groups"] == 1
    for metric in ("clipscore", "concept", "evaluations"):
        assert both["metrics"][metric]["3 steps"] == one["metrics"][metric]["all"]
        assert both["metrics"][metric]["1 steps"] != one["metrics"][metric]["all"]
    assert [(each["size"], each["steps"]) for each in both["tuned"]] == [(2, 1), (2, 3)] and both["tuned"][1]["factor"] == one["tuned"][0]["factor"]
    scored = rows(tmp_path / "both")
    assert len(scored) == 2 * 4  # numbers of steps, variants
    seeds = {(row["group"], row["number"]): {other["seed"] for other in scored if (other["group"], other["number"]) == (row["group"], row["number"])}
             for row in scored}  # fmt: skip
    assert all(len(each) == 1 for each in seeds.values())
    assert {row["request"]["steps"] for row in scored if row["variant"] == "merge"} == {1, 3}
    assert "1 steps" in said.out and "3 steps" in said.out
    page = (tmp_path / "both/index.html").read_text()
    assert "Against the number of steps" in page and "<summary>3 steps</summary>" in page
