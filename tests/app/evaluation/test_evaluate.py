"""`medley evaluate` on a toy: the grid, pairs, resuming after any stop, bad input, exit codes, the files of the report."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from composition import Refused, record
from retrieval.judge import Judge
from tests.app.evaluation.conftest import rows

TIMES = ("seconds",)


def test_the_grid(evaluate, tmp_path):
    """Every variant answers every set and seed with the same noise; the prompt alone is there unasked."""
    said = evaluate("--methods", "merge,composite", "--seeds", 2, "--tune", "none", "--report", "r")
    assert said.code == 0, said.err
    found = rows(tmp_path / "r")
    variants = {row["variant"] for row in found}
    assert variants == {"none", "merge", "composite", "composite@equal"}
    for variant in variants:
        mine = {(row["group"], row["number"]): row for row in found if row["variant"] == variant}
        assert set(mine) == {(group, number) for group in ("fox+ink", "owl+ink") for number in (0, 1)}
        for key, row in mine.items():
            (seed,) = {other["seed"] for other in found if (other["group"], other["number"]) == key}
            assert row["seed"] == seed
            made = record.read(tmp_path / "r" / row["picture"])
            assert (made.seed, made.prompt) == (seed, row["prompt"])
            assert [lora.source for lora in made.loras] == ([] if variant == "none" else row["group"].split("+"))
            assert made.steps == (1 if variant == "composite@equal" else 2)
    cost = {row["variant"]: row["evaluations"] for row in found}
    assert cost["composite"] == 2 * cost["merge"] == 2 * cost["none"] and cost["composite@equal"] <= cost["none"]
    assert {row["prompt"] for row in found} == {"foxword, red fur, ink drawing", "owlword, ink drawing"}
    assert "Prompt only" in said.out and "index.html" in said.out
    summary = json.loads((tmp_path / "r/summary.json").read_text())
    assert summary["metrics"]["clipscore"]["all"]["means"]["merge"]["groups"] == 2
    assert len(summary["metrics"]["clipscore"]["all"]["pairs"]) == 6
    assert summary["resamples"] == 200


def test_a_bundled_testbed_is_asked_of_its_own_model(medley, tmp_path):
    said = medley("evaluate", "--testbed", "pocket-flux", "--methods", "merge", "--loras", 1, "--sets", 1, "--seeds", 1, "--steps", 2, "--tune", "none",
                  "--references", 0, "--report", "r")
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "r/summary.json").read_text())["model"] == "pocket-flux"


def test_scores_are_the_judges(evaluate, tmp_path):
    assert evaluate("--methods", "merge", "--seeds", 1, "--tune", "none", "--report", "r").code == 0
    judge = Judge.open("pocket")
    for row in rows(tmp_path / "r"):
        picture = Image.open(tmp_path / "r" / row["picture"])
        cosine = judge.cosine([picture], [row["text"], *(concept["phrase"] for concept in row["concepts"])])[0]
        assert row["clipscore"] == pytest.approx(max(0.0, 100 * float(cosine[0])), abs=1e-3)
        assert [c["score"] for c in row["concepts"]] == pytest.approx((100 * cosine[1:]).tolist(), abs=1e-3)
        assert row["concept_min"] == min(c["score"] for c in row["concepts"])
        (ink,) = [c for c in row["concepts"] if c["phrase"] == "ink drawing"]
        assert ink["present"] == bool(cosine[1 + row["concepts"].index(ink)] >= judge.thresholds["ink drawing"].score)
        assert row["presence"] is None and row["leakage"] is None  # "foxword" has no threshold, and there are few pictures
        alone = [Image.open(path) for path in (tmp_path / "r/pictures").glob("*.png")
                 if (made := record.read(path)).prompt == "ink drawing" and len(made.loras) == 1]
        assert ink["clip_i"] == pytest.approx(100 * float((judge.see(alone) @ judge.see([picture])[0]).mean()), abs=1e-3)


def test_the_same_command_again_makes_nothing_and_says_the_same(evaluate, tmp_path):
    arguments = ("--methods", "merge,switch", "--seeds", 1, "--report", "r")
    assert evaluate(*arguments).code == 0
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "r/pictures").glob("*.png")}
    first, log = rows(tmp_path / "r"), (tmp_path / "r/made.jsonl").read_text()
    assert evaluate(*arguments).code == 0
    assert rows(tmp_path / "r") == first and (tmp_path / "r/made.jsonl").read_text() == log
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "r/pictures").glob("*.png")} == before


def test_more_methods_and_seeds_use_what_is_there(evaluate, tmp_path):
    assert evaluate("--methods", "merge", "--seeds", 1, "--tune", "none", "--report", "r").code == 0
    first = {row["id"]: row["clipscore"] for row in rows(tmp_path / "r")}
    assert evaluate("--methods", "merge,switch", "--seeds", 2, "--tune", "none", "--report", "r").code == 0
    second = {row["id"]: row["clipscore"] for row in rows(tmp_path / "r")}
    assert first.items() <= second.items() and len(second) == 12


def test_another_lora_file_of_the_same_name_is_made_anew(evaluate, toy, tmp_path):
    """The id is of the file's bytes."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(toy.loras, tmp_path / "loras")
    again = ("--methods", "merge", "--seeds", 1, "--tune", "none", "--report", "r")

    assert "2 LoRAs are named" in evaluate(*again, "--lora-dir", tmp_path / "loras").err  # both folders hold a fox: said, not guessed
    tensors = load_file(tmp_path / "loras/fox.safetensors")
    (tmp_path / "bed").mkdir()
    save_file({key: value * 2 for key, value in tensors.items()}, tmp_path / "bed/vixen.safetensors")
    bed = {"character": [{"id": "vixen", "trigger": ["foxword"]}], "style": [{"id": "ink", "trigger": ["ink drawing"]}]}
    (tmp_path / "vixen.json").write_text(json.dumps(bed))
    call = ("--lora-dir", tmp_path / "bed", *again)
    assert evaluate(*call, source=("--testbed", tmp_path / "vixen.json")).code == 0
    first = {row["variant"]: row["id"] for row in rows(tmp_path / "r")}
    save_file({key: value * 3 for key, value in tensors.items()}, tmp_path / "bed/vixen.safetensors")
    assert evaluate(*call, source=("--testbed", tmp_path / "vixen.json")).code == 0
    second = {row["variant"]: row["id"] for row in rows(tmp_path / "r")}
    assert first["merge"] != second["merge"] and first["none"] == second["none"]


@pytest.mark.slow
def test_killed_and_resumed_it_comes_to_the_same_numbers(evaluate, toy, bed, tmp_path):
    """kill -9 in the middle of the making, with half a line and half a picture left behind; then the same command."""
    whole = ("--methods", "merge,composite", "--seeds", 2, "--tune", "merge")
    assert evaluate(*whole, "--report", "whole").code == 0
    call = [sys.executable, "-m", "app.cli", "evaluate", "--testbed", bed, "--model", toy.model, "--lora-dir", toy.loras, "--steps", "2",
            "--loras", "2", "--resamples", "200", "--references", "1", "--report", tmp_path / "cut", *map(str, whole)]
    process = subprocess.Popen(list(map(str, call)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[3],
                               env=os.environ | {"MEDLEY_HOME": str(tmp_path / "home")})
    pictures, until = tmp_path / "cut/pictures", time.monotonic() + 120
    while len(list(pictures.glob("*.png")) if pictures.is_dir() else ()) < 18:
        assert process.poll() is None and time.monotonic() < until, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(pictures.glob("*.png")))
    assert 18 <= made < len(list((tmp_path / "whole/pictures").glob("*.png"))) and not (tmp_path / "cut/index.html").exists()
    with (tmp_path / "cut/made.jsonl").open("a") as file:
        file.write('{"id": "half a li')
    (pictures / ".0123456789abcdef.png.tmp").write_bytes(b"\x89PNG")
    assert evaluate(*whole, "--report", "cut").code == 0
    assert rows(tmp_path / "cut", *TIMES) == rows(tmp_path / "whole", *TIMES)
    assert not list(pictures.glob(".*.tmp"))
    strip = lambda name: {key: value for key, value in json.loads((tmp_path / name / "summary.json").read_text())["metrics"].items()  # noqa: E731
                          if key not in TIMES}
    assert strip("cut") == strip("whole")


def test_merges_weight_is_tuned_on_other_noise(evaluate, tmp_path):
    assert evaluate("--methods", "merge,switch", "--seeds", 1, "--report", "r").code == 0
    (tuned,) = json.loads((tmp_path / "r/summary.json").read_text())["tuned"]
    assert tuned["method"] == "merge" and str(tuned["factor"]) in {f"{float(name):g}" if "." in name else f"{name}.0" for name in tuned["tried"]}
    best = max(tuned["tried"].values(), key=lambda one: (one["presence"], one["clipscore"]))
    assert tuned["tried"][f"{tuned['factor']:g}"] == best
    evaluated = {row["seed"] for row in rows(tmp_path / "r")}
    pilots = [record.read(path) for path in (tmp_path / "r/pictures").glob("*.png")]
    tried = [request for request in pilots if request.seed not in evaluated and len(request.loras) == 2]
    assert {request.loras[0].weight for request in tried} == {0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2}
    for row in rows(tmp_path / "r"):
        weights = [lora["weight"] for lora in row["request"]["loras"]]
        assert weights == {"none": [], "merge": [tuned["factor"]] * 2, "switch": [1.0] * 2}[row["variant"]]


def test_a_manifest_of_requests_is_made_by_their_own_methods(evaluate, tmp_path):
    lines = [{"prompt": "foxword in a field", "seed": 3, "method": "switch", "loras": [{"source": "fox"}], "steps": 2},
             {"prompt": "plain", "seed": 4, "steps": 1}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = evaluate("--report", "r", source=("m.jsonl",))
    assert said.code == 0, said.err
    found = {(row["variant"], row["group"]): row for row in rows(tmp_path / "r")}
    assert set(found) == {("none", "foxword in a field"), ("switch", "foxword in a field"), ("none", "plain")}
    assert [c["phrase"] for c in found["switch", "foxword in a field"]["concepts"]] == ["a foxword"]  # from the file's own trigger


def test_a_folder_of_pictures_is_scored_without_a_model(medley, tmp_path, monkeypatch):
    """No model is opened, nothing is made: any pictures, two makers, paired by turn."""
    from composition import Engine

    monkeypatch.setattr(Engine, "open", lambda *a, **k: pytest.fail("a model was opened"))
    (tmp_path / "mine").mkdir()
    lines = []
    for number, (colour, maker) in enumerate((c, m) for c in ("red", "blue", "green") for m in ("one", "two")):
        shade = colour if maker == "one" else "white"
        Image.new("RGB", (40, 32), shade).save(tmp_path / f"mine/{number}.png")
        lines.append({"file_name": f"{number}.png", "text": f"a fox on a {colour} background", "method": maker,
                      "concepts": ["a fox", f"on a {colour} background"]})
    (tmp_path / "mine/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    said = medley("evaluate", "mine", "--report", "r")
    assert said.code == 0, said.err
    found = rows(tmp_path / "r")
    assert [row["variant"] for row in found] == ["one", "two"] * 3
    place = {variant: sum(row["concepts"][1]["present"] for row in found if row["variant"] == variant) for variant in ("one", "two")}
    assert place["one"] > place["two"]  # the judge sees which background is there
    assert all(row["request"] is None and row["seconds"] is None for row in found)
    assert (tmp_path / "r" / found[0]["picture"]).resolve() == tmp_path / "mine/0.png"
    (pair,) = json.loads((tmp_path / "r/summary.json").read_text())["metrics"]["clipscore"]["all"]["pairs"]
    assert pair["difference"]["pictures"] == 3


def test_what_generate_wrote_is_a_manifest(medley, toy, tmp_path):
    assert medley("generate", "foxword and more", "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox", "--steps", 2,
                  "--seed", 1, "--count", 2).code == 0
    said = medley("evaluate", "pictures", "--model", toy.model, "--lora-dir", toy.loras, "--references", 0, "--report", "r")
    assert said.code == 0, said.err
    assert [(row["variant"], row["number"], row["concepts"][0]["name"]) for row in rows(tmp_path / "r")] == [("merge", 1, "fox"), ("merge", 2, "fox")]


def test_bad_lines_are_listed_the_rest_is_scored_and_the_exit_code_says_so(medley, toy, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    lines = [{"file_name": "a.png", "text": "a fox"}, {"file_name": "gone.png", "text": "a fox"}, {"file_name": "b.png", "text": "a fox"},
             {"prompt": "x", "loras": [{"source": "wolff"}]}]
    (tmp_path / "m.jsonl").write_text("\n".join([json.dumps(lines[0]), "{", *map(json.dumps, lines[1:])]))
    said = medley("evaluate", "m.jsonl", "--model", toy.model, "--lora-dir", toy.loras, "--report", "r")
    assert said.code == 3
    for words in ("line 2: not readable as JSON", "line 3: the picture 'gone.png' is missing", "line 4:", "b.png is no readable picture",
                  "line 5: no LoRA is named 'wolff'"):
        assert words in said.err, said.err
    assert len(rows(tmp_path / "r")) == 1
    assert "gone.png" in (tmp_path / "r/index.html").read_text()


def test_a_lora_the_testbed_names_in_vain_takes_its_sets_with_it(evaluate, tmp_path):
    bed = {"character": [{"id": "fox", "trigger": ["foxword"]}, {"id": "wolf", "trigger": ["wolfword"]}],
           "style": [{"id": "ink", "trigger": ["ink drawing"]}]}
    (tmp_path / "bed.json").write_text(json.dumps(bed))
    said = evaluate("--methods", "merge", "--seeds", 1, "--tune", "none", "--report", "r", source=("--testbed", "bed.json"))
    assert said.code == 3 and "LoRA wolf: no LoRA is named 'wolf'" in said.err
    assert {row["group"] for row in rows(tmp_path / "r")} == {"fox+ink"}


def test_a_lora_that_does_not_fit_is_left_out_and_the_rest_is_made(evaluate, toy, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "more").mkdir()
    save_file({"unet.nowhere.lora_A.weight": torch.zeros(4, 8), "unet.nowhere.lora_B.weight": torch.zeros(8, 4)}, tmp_path / "more/odd.safetensors")
    bed = {"character": [{"id": "fox", "trigger": ["foxword"]}, {"id": "odd", "trigger": ["odd"]}], "style": [{"id": "ink", "trigger": ["ink drawing"]}]}
    (tmp_path / "bed.json").write_text(json.dumps(bed))
    said = evaluate("--methods", "merge", "--seeds", 1, "--tune", "none", "--lora-dir", tmp_path / "more", "--report", "r",
                    source=("--testbed", "bed.json"))
    assert said.code == 3 and "odd" in said.err
    assert {(row["variant"], row["group"]) for row in rows(tmp_path / "r")} == {("none", "fox+ink"), ("merge", "fox+ink"), ("none", "odd+ink")}


def test_fail_below(evaluate):
    grid = ("--methods", "merge", "--seeds", 1, "--tune", "none", "--report", "r")
    assert evaluate(*grid, "--fail-below", "clipscore=-1", "--fail-below", "merge:concept=-100").code == 0
    said = evaluate(*grid, "--fail-below", "clipscore=99")
    assert said.code == 1 and "clipscore of Merge is" in said.err and "below 99" in said.err
    assert evaluate(*grid, "--fail-below", "presence=0.1").code == 1  # not known is not reached
    for wrong in ("clip=3", "clipscore", "clipscore=x", "leakage=0.1"):
        said = evaluate(*grid, "--fail-below", wrong)
        assert said.code == 2 and "--fail-below" in said.err


@pytest.mark.parametrize("arguments, says", [
    ((), "--testbed"), (("m.jsonl", "--testbed", "pocket"), "either"), (("--testbed", "nowhere.json"), "nowhere.json"),
    (("--testbed", "pocket", "--methods", "mergee"), "merge"), (("--testbed", "pocket", "--loras", "x"), "--loras"),
    (("--testbed", "pocket", "--sets", "few"), "--sets"), (("--testbed", "pocket", "--scale", "7"), "--scale"),
    (("--testbed", "pocket", "--judge", "no-such-judge"), "no-such-judge"), (("--testbed", "pocket", "--mllm", "localhost"), "address"),
    (("--testbed", "pocket", "--mllm", "http://localhost:1/v1"), "--mllm-model"), (("--testbed", "pocket", "--loras", "7"), "1 to 5"),
    (("none.jsonl",), "none.jsonl"), (("--testbed", "pocket", "--option", "tau=3", "--methods", "merge"), "tau"),
])  # fmt: skip
def test_bad_flags_are_refused_before_anything_is_made(medley, tmp_path, arguments, says):
    said = medley("evaluate", *arguments, "--report", "r")
    assert said.code == 2 and says in said.err, said.err
    assert not (tmp_path / "r/pictures").exists()


@pytest.mark.parametrize("judge, offline", [("pocket", "1"), ("ViT-B-32:openai", None)])
def test_the_network_is_closed_unless_a_judge_from_elsewhere_is_named(medley, monkeypatch, tmp_path, judge, offline):
    seen = []

    def opened(name, device="cpu"):
        seen.append(os.environ.get("HF_HUB_OFFLINE"))
        raise Refused("enough")

    monkeypatch.setattr(Judge, "open", opened)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a fox"}))
    assert "enough" in medley("evaluate", "m.jsonl", "--judge", judge).err
    assert seen == [offline]


@pytest.mark.parametrize("flags", [(), ("--device", "cuda:1")])
def test_the_judge_is_where_the_engine_is(medley, monkeypatch, tmp_path, flags):
    from composition.backbones.loading import placement

    asked, opened = [], []

    def choose(device=None, *_, **__):
        asked.append(device)
        return placement.Placement(torch.device("cuda:1"), torch.float16, "none", "")

    def judge(name, device="cpu"):
        opened.append(device)
        raise Refused("enough")

    monkeypatch.setattr(placement, "choose", choose)
    monkeypatch.setattr(Judge, "open", judge)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a fox"}))
    assert "enough" in medley("evaluate", "m.jsonl", *flags).err
    assert asked == [flags[1] if flags else None] and opened == ["cuda:1"]


def test_steps_and_guidance_are_the_models_own(medley, bed, monkeypatch, toy, tmp_path):
    """As generate has them: nothing is said, and the model's defaults are used, recorded and compared at equal evaluations."""
    from composition.backbones.unet import UNetBackbone

    monkeypatch.setattr(UNetBackbone, "defaults", property(lambda self: (4, 3.5)))
    arguments = ("--testbed", bed, "--model", toy.model, "--lora-dir", toy.loras, "--loras", "2", "--sets", 1,
                 "--resamples", 200, "--references", 1, "--methods", "merge,composite", "--seeds", 1, "--report", "r")
    said = medley("evaluate", *arguments)
    assert said.code == 0, said.err
    settings = {row["variant"]: (row["request"]["steps"], row["request"]["guidance"]) for row in rows(tmp_path / "r")}
    assert settings == {"none": (4, 3.5), "merge": (4, 3.5), "composite": (4, 3.5), "composite@equal": (2, 3.5)}
    requests = [record.read(path) for path in (tmp_path / "r/pictures").glob("*.png")]
    assert {request.guidance for request in requests} == {3.5} and {request.steps for request in requests} == {4, 2}
    assert '"steps": 4' in json.loads((tmp_path / "r/summary.json").read_text())["settings"]


def test_csv_and_page(evaluate, tmp_path):
    assert evaluate("--methods", "merge,composite", "--seeds", 1, "--tune", "none", "--report", "r").code == 0
    found, table = rows(tmp_path / "r"), list(csv.DictReader((tmp_path / "r/scores.csv").open()))
    assert len(table) == len(found) and {row["id"] for row in table} == {row["id"] for row in found}
    assert float(table[0]["clipscore"]) == found[0]["clipscore"]
    assert table[-1]["concept1"] == "owl" and float(table[-1]["concept2_score"]) == found[-1]["concepts"][1]["score"]

    class Links(HTMLParser):
        found: list = []  # noqa: RUF012

        def handle_starttag(self, tag, attributes):
            self.found += [value for name, value in attributes if name in ("src", "href")]

    links = Links()
    links.feed((tmp_path / "r/index.html").read_text())
    assert links.found and all(link.startswith(("data:image/webp", "#")) for link in links.found)  # one file, nothing fetched


def test_text_of_files_cannot_run(medley, tmp_path):
    """A prompt with markup, and one that a spreadsheet would compute."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    evil = '=1+1</script><img src=x onerror="alert(1)">'
    (tmp_path / "m.jsonl").write_text(json.dumps({"file_name": "a.png", "text": evil, "concepts": [evil], "method": "<b>m</b>"}))
    assert medley("evaluate", "m.jsonl", "--report", "r").code == 0
    page = (tmp_path / "r/index.html").read_text()
    assert "<img src=x" not in page and "<b>m</b>" not in page and page.count("</script>") == 2
    (row,) = csv.DictReader((tmp_path / "r/scores.csv").open())
    assert row["prompt"] == f"'{evil}"


def test_a_judge_without_thresholds_sets_them_on_the_pictures_of_other_cases(medley, tmp_path):
    """Twenty red and forty blue pictures: "red" is found in nearly all of the one and 5 % of the other."""
    import shutil

    import assets

    clip = Path(assets.__path__[0]) / "pocket128/clip"
    (tmp_path / "judge").mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(clip / name, tmp_path / "judge" / name)
    lines = []
    generator = torch.Generator().manual_seed(0)
    for n in range(60):
        red = n % 3 == 0
        base = torch.tensor([220, 40, 40] if red else [40, 80, 220])
        pixels = (base + 10 * torch.randn(32, 32, 3, generator=generator)).clamp(0, 255).byte()
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{n}.png")
        colour = "red" if red else "blue"
        lines.append({"file_name": f"{n}.png", "text": f"on a {colour} background {n}", "concepts": [f"on a {colour} background"]})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert medley("evaluate", "m.jsonl", "--judge", tmp_path / "judge", "--report", "r").code == 0
    red = [row["presence"] for row in rows(tmp_path / "r") if "red" in row["text"]]
    blue = [row["presence"] for row in rows(tmp_path / "r") if "blue" in row["text"]]
    assert sum(red) / len(red) >= 0.9 and blue == [None] * 40  # 20 pictures without blue are too few to set its threshold
    assert "set on this evaluation" in json.loads((tmp_path / "r/summary.json").read_text())["judge"]["presence"]
