"""The command line as a user meets it, on a toy model in a folder."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from app.cli import program as cli
from composition import record
from tests import toys

ROOT = Path(__file__).parents[3]


@pytest.fixture
def make(medley, toy):
    """`medley generate "a fox"` on the toy with fox and owl, three steps; more arguments after it."""

    def call(*more: object, prompt: str = "a fox"):
        return medley("generate", prompt, "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox:0.8", "--lora", "owl",
                      "--steps", 3, *more)

    return call


def test_generate_writes_pictures_and_says_what_was_applied(make, tmp_path):
    said = make("--seed", 5, "--count", 2)
    assert said.code == 0, said.err
    assert "fox: applied" in said.out
    assert "owl: applied" in said.out
    assert "drawn" not in said.out
    first, second = (record.read(tmp_path / "pictures" / name) for name in ("0000.png", "0001.png"))
    assert (first.seed, second.seed, first.count) == (5, 6, 1)
    assert str(Path("pictures") / "0001.png") in said.out


def test_from_makes_the_same_bytes(make, medley, toy):
    assert make("--method", "switch", "--option", "tau=1", "--sampler", "euler-a", "--negative", "bad", "--count", 2).code == 0
    for index in range(2):
        said = medley("generate", "--from", f"pictures/000{index}.png", "--model", toy.model, "--lora-dir", toy.loras, "--out", f"again{index}")
        assert said.code == 0, said.err
        assert Path(f"again{index}/0000.png").read_bytes() == Path(f"pictures/000{index}.png").read_bytes()
    said = medley("generate", "--from", "pictures/0000.png", "--model", toy.model, "--seed", 99, "--lora-dir", toy.loras, "--out", "other")
    changed, before = record.read(Path("other/0000.png")), record.read(Path("pictures/0000.png"))
    assert changed.seed == 99
    assert (changed.options, changed.loras, changed.sampler) == (before.options, before.loras, before.sampler)
    assert Path("other/0000.png").read_bytes() != Path("pictures/0000.png").read_bytes()


def test_words_a_vae_and_a_request_file(make, medley, toy):
    """A textual inversion by its name in the prompt, another VAE, and both again from a request file and from the picture."""
    Path("words").mkdir()
    save_file({"emb_params": torch.ones(2, 24)}, "words/sks.safetensors")
    toys.sd(5).vae.save_pretrained("decoder")
    run = ("--vae", "decoder", "--seed", 4, "--lora-dir", "words")
    assert make(*run, "--save-request", "asked.json", prompt="a (fox:1.2) in embedding:sks").code == 0
    asked = record.read(Path("asked.json"))
    assert (asked.vae, asked.embeddings[0].word) == ("decoder", "embedding:sks")
    assert [lora.source for lora in asked.loras] == ["fox", "owl"] and asked.steps == 3
    again = ("--model", toy.model, "--lora-dir", toy.loras, "--lora-dir", "words")
    for index, source in enumerate(("asked.json", "pictures/0000.png")):
        said = medley("generate", "--from", source, *again)
        assert said.code == 2 and "VAE 'decoder'" in said.err
        said = medley("generate", "--from", source, *again, "--vae", "decoder", "--out", f"again{index}")
        assert said.code == 0 and "is not the file" not in said.err, said.err
        assert Path(f"again{index}/0000.png").read_bytes() == Path("pictures/0000.png").read_bytes()
    save_file({"emb_params": torch.ones(1, 24)}, "words/sks.safetensors")
    said = medley("generate", "--from", "asked.json", *again, "--vae", "", "--out", "own")
    assert said.code == 0 and record.read(Path("own/0000.png")).vae == ""
    said = medley("generate", "--from", "pictures/0000.png", *again, "--vae", "decoder", "--out", "other")
    assert "textual inversion embedding:sks is not the file it was made with" in said.err
    said = make("--embedding", "words/sks.safetensors:fox", "--out", "word")
    assert said.code == 0 and record.read(Path("word/0000.png")).embeddings[0].word == "fox"


def test_anchored_and_windows(make, medley, toy):
    """Recorded, said, kept by --from, and taken back."""
    said = make("--anchored", "--windows", "both", "--lora", "ink", "--seed", 3)
    assert said.code == 0, said.err
    assert said.out.count("fox is on from 0% to 70% of the steps, by its category") == 1 and said.out.count("ink is on in all steps: its category") == 1
    before = record.read(Path("pictures/0000.png"))
    assert before.anchored and before.windows == "both" and [lora.end for lora in before.loras] == [0.7, 0.7, 1.0]
    again = ("generate", "--from", "pictures/0000.png", "--model", toy.model, "--lora-dir", toy.loras)
    assert medley(*again, "--out", "again").code == 0
    assert Path("again/0000.png").read_bytes() == Path("pictures/0000.png").read_bytes()
    assert medley(*again, "--no-anchored", "--out", "other").code == 0
    assert record.read(Path("other/0000.png")) == replace(before, anchored=False)
    assert Path("other/0000.png").read_bytes() != Path("pictures/0000.png").read_bytes()
    said = make("--anchored", "--guidance", 1)
    assert "anchored guidance has no negative row to act on: guidance is off" in said.out.replace("\n", " ")


def test_from_says_when_a_lora_is_another_file(make, medley, toy, tmp_path):
    assert make().code == 0
    (tmp_path / "changed").mkdir()
    for seed, name in ((7, "fox"), (1, "owl")):
        toys.lora(toys.sd(blocks=(16, 32)), tmp_path / "changed" / f"{name}.safetensors", seed=seed, targets=("attn",), text=False)
    said = medley("generate", "--from", "pictures/0000.png", "--model", toy.model, "--lora-dir", tmp_path / "changed", "--out", "again")
    assert "LoRA fox is not the file" in said.err
    assert "picture will differ" in said.err
    assert "LoRA owl is not the file" in said.err
    assert "tensors are the same" in said.err  # only its metadata is gone


def test_a_drawn_seed_is_printed_and_makes_the_picture_again(make):
    said = make("--out", "a")
    seed = record.read(Path("a/0000.png")).seed
    assert f"--seed {seed}" in said.out
    assert make("--out", "b", "--seed", seed).code == 0
    assert Path("a/0000.png").read_bytes() == Path("b/0000.png").read_bytes()


def test_json(make):
    said = make("--json", "--seed", 3)
    answer = said.json
    assert answer["request"]["loras"][0] == answer["request"]["loras"][0] | {"source": "fox", "weight": 0.8}
    assert answer["pictures"][0]["file"] == str(Path("pictures") / "0000.png")
    assert answer["pictures"][0]["notes"]["evaluations"] > 0
    assert [one["name"] for one in answer["receipts"]] == ["fox", "owl"]


def test_triggers_are_missed_and_added_only_when_asked(make):
    said = make(prompt="a foxword")
    assert "none of owl's trigger words" in said.out
    assert record.read(Path("pictures/0000.png")).prompt == "a foxword"
    said = make("--triggers", prompt="a foxword")
    assert "prompt with trigger words: a foxword, owlword" in said.out
    assert "none of" not in said.out
    assert record.read(Path("pictures/0001.png")).prompt == "a foxword, owlword"


def test_a_picture_of_another_tool_needs_a_model(medley, toy, tmp_path):
    from tests.composition.record.test_png import _png

    path = _png(tmp_path / "x.png", parameters="a fox <lora:fox:0.5>\nSteps: 2, Seed: 3, CFG scale: 2, Model: dream")
    said = medley("generate", "--from", path, "--lora-dir", toy.loras)
    assert said.code == 2
    assert "dream" in said.err
    said = medley("generate", "--from", path, "--lora-dir", toy.loras, "--model", toy.model)
    assert said.code == 0, said.err
    assert record.read(Path("pictures/0000.png")).seed == 3


def test_compare(medley, toy):
    said = medley("compare", "a fox", "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox", "--lora", "owl",
                  "--steps", 2, "--seed", 4)
    assert said.code == 0, said.err
    names = {path.name for path in Path("pictures").glob("*.png")}
    assert {f"compare-0000-{way}.png" for way in ("prompt", "merge", "switch", "composite", "strip")} <= names
    seeds = {record.read(path).seed for path in Path("pictures").glob("*.png") if "strip" not in path.name}
    assert seeds == {4}
    assert record.read(Path("pictures/compare-0000-prompt.png")).loras == ()
    row = next(line for line in said.out.splitlines() if line.startswith("Composite")).split()
    assert row[2] == str(2 * int(next(line for line in said.out.splitlines() if line.startswith("Merge")).split()[2]))
    with Image.open("pictures/compare-0000-strip.png") as sheet:
        assert sheet.width > 4 * 256
    said = medley("compare", "--from", "pictures/compare-0000-switch.png", "--model", toy.model, "--methods", "switch,merge", "--lora-dir", toy.loras)
    assert said.code == 0, said.err
    assert Path("pictures/compare-0001-switch.png").read_bytes() == Path("pictures/compare-0000-switch.png").read_bytes()
    assert not Path("pictures/compare-0001-composite.png").exists()


def test_compare_gives_an_option_to_the_methods_that_have_it(medley, toy):
    common = ("a", "--model", toy.model, "--lora-dir", toy.loras, "--lora", "fox", "--steps", 1, "--seed", 1)
    assert medley("compare", *common, "--option", "tau=2", "--option", "reference=true").code == 0
    options = {way: record.read(Path(f"pictures/compare-0000-{way}.png")).options
               for way in ("merge", "switch", "composite", "prompt")}
    assert options == {"merge": {}, "switch": {"tau": 2, "reference": True}, "composite": {"reference": True}, "prompt": {}}
    assert medley("compare", *common, "--option", "nothing=2").code == 2


def test_loras_inspect_methods(medley, toy):
    listed = medley("loras", "--lora-dir", toy.loras)
    assert "foxword" in listed.out
    (fox,) = [one for one in medley("loras", "--lora-dir", toy.loras, "--json").json if one["name"] == "fox"]
    assert (fox["category"], fox["triggers"], fox["ranks"]) == ("character", ["foxword"], [4])
    told = medley("inspect", "fox", "--lora-dir", toy.loras, "--model", toy.model)
    assert "100%" in told.out
    alone = medley("inspect", toy.loras / "fox.safetensors", "--json").json
    assert alone["model"] == ""
    assert len(alone["sha256"]) == 64
    for word in ("merge", "switch", "composite", "--option tau=5", "arxiv.org/abs/2402.16843"):
        assert word in medley("methods").out


def test_a_list_reads_headers_unless_hashes_are_asked_for(medley, toy, tmp_path, monkeypatch):
    from composition.loras import reader

    alone = medley("inspect", toy.loras / "fox.safetensors", "--json").json
    monkeypatch.setattr(reader, "load_safely", lambda path: pytest.fail("a list read a whole file"))
    (fox,) = [row for row in medley("loras", "--lora-dir", toy.loras, "--json").json if row["name"] == "fox"]
    assert "sha256" not in fox and (fox["family"], fox["layout"], fox["tensors"]) == (alone["family"], alone["layout"], alone["tensors"])
    monkeypatch.undo()
    (fox,) = [row for row in medley("loras", "--lora-dir", toy.loras, "--json", "--hashes").json if row["name"] == "fox"]
    assert (fox["sha256"], fox["tensor_sha256"]) == (alone["sha256"], alone["tensor_sha256"])


def test_a_list_survives_any_file(medley, toy, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    data = (toy.loras / "fox.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]) | {"__metadata__": None}).encode()
    (folder / "null.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    (folder / "zeros.safetensors").write_bytes(b"\0" * 64)
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.safetensors")).write_bytes(data)
    assert medley("inspect", folder / "null.safetensors").code == 0
    assert medley("loras", "--lora-dir", folder).code == 0
    rows = {row["name"]: row for row in medley("loras", "--lora-dir", folder, "--json").json if row["path"].startswith("own")
            or str(folder) in row["path"]}  # fmt: skip
    assert {name: bool(row["error"]) for name, row in rows.items()} == {"null": False, "gone": True, "zeros": True, "\udcff": False}
    assert rows["gone"]["bytes"] is None and rows["null"]["ranks"] == [4]


def test_a_scale_beside_the_file_is_applied_and_said(medley, toy, tmp_path):
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((toy.loras / "fox.safetensors").read_bytes())
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert "alpha 8 from adapter_config.json beside it" in medley("inspect", folder / "adapter_model.safetensors").out
    said = medley("generate", "a foxword", "--model", toy.model, "--lora", folder / "adapter_model.safetensors", "--steps", 1, "--seed", 1)
    assert said.code == 0 and "alpha 8 from adapter_config.json beside it" in said.out
    (folder / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 8}))
    said = medley("generate", "a foxword", "--model", toy.model, "--lora", folder / "adapter_model.safetensors", "--steps", 1, "--seed", 1)
    assert said.code == 2 and "rank 64" in said.err


def test_a_broken_lora_is_listed_with_its_trouble(medley, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "broken.safetensors").write_bytes(b"\0" * 20)
    said = medley("loras", "--lora-dir", tmp_path / "own")
    assert said.code == 0
    assert "broken" in said.out


def test_a_file_cannot_write_to_the_terminal(medley, toy, tmp_path):
    (tmp_path / "own").mkdir()
    said = {"title": "\x1b[2Jgone", "trigger_words": "\x1b]0;title\x07word"}
    save_file(load_file(toy.loras / "fox.safetensors"), tmp_path / "own" / "bad.safetensors", metadata=said)
    for answer in (medley("loras", "--lora-dir", tmp_path / "own"), medley("inspect", tmp_path / "own" / "bad.safetensors")):
        assert answer.code == 0
        assert "word" in answer.out
        assert "\x1b]" not in answer.out
        assert "\x1b[2J" not in answer.out


def test_doctor_fails_when_what_ships_does_not_run(medley, monkeypatch):
    from composition import bundled
    from composition.backbones.loading import open as opening
    from composition.loras import library

    monkeypatch.setattr(bundled, "BUNDLES", {"gone": bundled.Bundle("gone/sd", "gone/loras", "gone/testbed.json", "gone/profiles")})
    monkeypatch.setattr(opening, "BUNDLES", bundled.BUNDLES)
    monkeypatch.setattr(library, "BUNDLES", bundled.BUNDLES)
    answer = medley("doctor")
    assert answer.code == 1
    assert "NOT WORKING" in answer.out


def test_the_users_own_folder_is_searched(medley, toy, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "loras").symlink_to(toy.loras)
    assert "foxword" in medley("loras").out


@pytest.mark.parametrize(("arguments", "said"), [
    ("generate", "prompt is needed"),
    ("generate a --lora foxx", "did you mean 'fox'"),
    ("generate a --lora fox,owl", "--lora fox --lora owl"),
    ("generate a --lora dragon", "'dragon' for this model, that one is made for pocket"),
    ('generate a --lora {"source":"fox","region":[0,0,64,64]}', "[left, top, right, bottom] in fractions of the picture"),
    ('generate a --lora {"source":"fox","region":"left"} --method regions', "[left, top, right, bottom] in fractions of the picture"),
    ("generate a --lora fox:20", "--lora fox:20"),
    ("generate a --lora fox:heavy", "is not a number"),
    ("generate a --method merg", "did you mean 'merge'"),
    ("generate a --sampler eular", "euler"),
    ("generate a --method switch --option tau=0", "between"),
    ("generate a --method switch --option tau=abc", "must be a whole number (given 'abc')"),
    ("generate a --steps 0", "steps"),
    ("generate a --steps many", "--steps"),
    ("generate a --guidance nan", "guidance"),
    ("generate a --size 33x32", "multiples"),
    ("generate a --size big", "--size"),
    ("generate a --lora-dir nowhere", "not a folder"),
    ("generate a --device warp", "device"),
    ("generate a --dtype int3", "dtype"),
    ("generate --from nowhere.png", "not there"),
    ("generate a --out taken", "not a folder"),
    ("generate a --out taken/in/it", "not a folder"),
    ("generate a --out a.png", "name a folder"),
    ("compare a --out taken", "not a folder"),
    ("generate a --nonsense", "--nonsense"),
    ("compare a --methods merge,swich", "did you mean 'switch'"),
    ("compare", "prompt is needed"),
    ("inspect nothing", "no LoRA"),
    ("inspect README.md", "no LoRA"),
    ("nonsense", "nonsense"),
])
def test_errors_are_one_line_and_code_2(arguments, said, medley, toy, tmp_path):
    (tmp_path / "taken").touch()
    words = arguments.split()
    if words[0] in ("generate", "compare") and "--from" not in words:
        words += ["--model", str(toy.model)] + (["--lora-dir", str(toy.loras)] if "--lora-dir" not in words else [])
    answer = medley(*words)
    assert answer.code == 2, answer
    assert said in answer.err
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("medley: ")
    assert answer.out == ""
    assert not Path("pictures").exists()


def test_a_model_that_is_not_there(medley):
    answer = medley("generate", "a", "--model", "pockt")
    assert answer.code == 2
    assert "pocket" in answer.err
    assert answer.err.count("\n") == 1


def test_what_nobody_foresaw_is_one_line_too(medley, monkeypatch):
    monkeypatch.setattr(cli.engines, "prepare", lambda model: 1 / 0)
    answer = medley("methods")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "ZeroDivisionError" in answer.err


def _process(*arguments: str, **more):
    return subprocess.Popen([sys.executable, "-m", "app.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, **more)


def test_help_answers_without_torch():
    code = ("import sys\nfrom app.cli import program as cli\nassert cli.run(lambda: cli.typer.main.get_command(cli.app).main(['--help'], "
            "standalone_mode=False)) == 0\nassert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)")
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout
    assert time.perf_counter() - begun < 5


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_with_130_and_leaves_nothing(toy, tmp_path):
    process = _process("generate", "a fox", "--model", str(toy.model), "--steps", "200", "--count", "50", "--out",
                       str(tmp_path / "out"), cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").glob("*.png")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip().splitlines()[-1] == "medley: cancelled"
    assert "Traceback" not in said
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    rows = [json.loads(line)["file_name"] for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert made == [*rows, "metadata.jsonl"]
    for name in rows:
        assert record.read(tmp_path / "out" / name).steps == 200
