"""`medley train concept` as a user meets it: pictures in, a LoRA out that generate finds; what is refused, and how."""

import base64
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from safetensors import safe_open

from app.train import lessons_of
from composition import Refused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def zogs(tmp_path) -> Path:
    """Five pictures of a green ring."""
    folder = tmp_path / "zogs"
    folder.mkdir()
    for index in range(5):
        picture = Image.new("RGB", (90, 80), (250 - 20 * index, 240, 230))
        ImageDraw.Draw(picture).ellipse((20 + 3 * index, 10, 60 + 3 * index, 60), outline="green", width=9)
        picture.save(folder / f"{index}.png")
    return folder


@pytest.fixture
def train(medley, toy, zogs):
    """`medley train concept` of the green rings on the toy, four steps; more arguments after it."""

    def call(*more: object, images: Path = zogs, trigger: str = "zog"):
        return medley("train", "concept", "--images", images, "--trigger", trigger, "--model", toy.model, "--steps", 4,
                      "--batch", 2, "--preview-every", 0, *more)

    return call


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_five_pictures_on_pocket_and_generate_finds_the_lora(medley, zogs, tmp_path):
    said = medley("train", "concept", "--images", zogs, "--trigger", "zog", "--category", "character", "--title", "A Zog",
                  "--steps", 3, "--batch", 2, "--rank", 2, "--preview-every", 2)
    assert said.code == 0, said.err
    folder = tmp_path / "home" / "loras"
    assert "5 pictures, no captions" in said.out
    assert "3 steps of 2 pictures" in said.out
    assert "step 3 of 3, loss" in said.err
    assert "zog: applied" in said.out and "ignored" not in said.out
    assert 'medley generate "a zog in the snow" --lora zog' in said.out
    assert sorted(path.name for path in (folder / "zog-previews").iterdir()) == ["00000.png", "00002.png", "00003.png"]
    assert not list(folder.glob("*.training")) and not list(folder.glob("*.part"))
    told = metadata(folder / "zog.safetensors")
    assert (told["title"], told["category"], told["trigger_words"], told["base"]) == ("A Zog", "character", "zog", "pocket")
    assert told["modelspec.architecture"] == "pocket/lora"
    assert (told["rank"], told["steps"], told["pictures"]) == ("2", "3", "5")
    assert str(tmp_path) not in "".join(told.values())
    with Image.open(io.BytesIO(base64.b64decode(told["preview"], validate=True))) as preview:
        assert preview.format == "PNG" and max(preview.size) <= 128
    said = medley("generate", "a zog", "--lora", "zog", "--steps", 2, "--seed", 1)
    assert said.code == 0, said.err
    assert "zog: applied" in said.out and "trigger" not in said.out
    (found,) = [one for one in medley("loras", "--json").json if one["name"] == "zog"]
    assert found["triggers"] == ["zog"]


def test_nothing_is_overwritten(train, medley, zogs, tmp_path):
    assert train().code == 0
    file = tmp_path / "home/loras/zog.safetensors"
    before = file.read_bytes()
    said = train()
    assert said.code == 2
    assert "--name" in said.err and str(file) in said.err
    assert file.read_bytes() == before
    said = train("--out", "elsewhere")  # --lora zog would then mean two files
    assert said.code == 2
    assert "named 'zog' already" in said.err
    said = medley("train", "concept", "--images", zogs, "--trigger", "raccoon", "--steps", 1)
    assert said.code == 2
    assert "raccoon.safetensors" in said.err and "--name" in said.err


def test_the_same_training_gives_the_same_bytes(train, tmp_path):
    for name in ("a", "b"):
        assert train("--out", name, "--name", "zog").code == 0
    assert (tmp_path / "a/zog.safetensors").read_bytes() == (tmp_path / "b/zog.safetensors").read_bytes()


def test_several_at_once_are_each_as_if_alone(train, zogs, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for index in range(2):
        Image.new("RGB", (40, 40), (200, 10 * index, 10)).save(other / f"{index}.png")
        (other / f"{index}.txt").write_text("a red wall")
    said = train("--images", other, "--trigger", "redly", "--category", "object", "--category", "style", "--out", "both",
                 "--dtype", "float32")
    assert said.code == 0, said.err
    assert "'redly' was put at the end of 2 of 2 captions" in said.out
    assert metadata(tmp_path / "both/redly.safetensors")["category"] == "style"
    assert train("--out", "alone", "--dtype", "float32").code == 0
    both, alone = tmp_path / "both/zog.safetensors", tmp_path / "alone/zog.safetensors"
    with safe_open(both, "pt") as a, safe_open(alone, "pt") as b:
        for key in a.keys():  # noqa: SIM118
            one, other = a.get_tensor(key).float(), b.get_tensor(key).float()
            assert (one - other).norm() < 0.02 * one.norm() + 1e-7


def test_ctrl_c_keeps_what_was_learned_and_the_same_command_goes_on(toy, zogs, tmp_path):
    words = [sys.executable, "-m", "app.cli", "train", "concept", "--images", zogs, "--trigger", "zog", "--model", toy.model,
             "--batch", 2, "--steps", 40, "--preview-every", 0, "--dtype", "float32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen:
        return subprocess.Popen([*map(str, words), "--out", str(tmp_path / out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                                text=True, env=environment | {"MEDLEY_HOME": str(tmp_path / "home")})  # fmt: skip

    running = start("a")
    for line in running.stderr:
        if line.startswith("step 8"):
            running.send_signal(signal.SIGINT)
            break
    said = running.stderr.read()
    assert running.wait(300) == 130
    assert "stopped at step" in said and "same command" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["zog.training"]
    again = start("a")
    out, err = again.communicate(timeout=600)
    assert again.returncode == 0, err
    assert "going on from step" in out
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["zog.safetensors"]
    whole = start("b")
    assert whole.communicate(timeout=600) and whole.returncode == 0
    assert (tmp_path / "a/zog.safetensors").read_bytes() == (tmp_path / "b/zog.safetensors").read_bytes()


def test_the_device_is_the_trainers_alone(train, monkeypatch):
    """A request of another thread waits while adapters are in training."""
    from composition import engine
    from composition.training import concept

    honest, had = concept.train, []

    def watched(backbone, *args, **kwargs):
        lock = engine._LOCKS[str(backbone.device)]
        other = threading.Thread(target=lambda: had.append(lock.acquire(blocking=False)))
        other.start()
        other.join()
        return honest(backbone, *args, **kwargs)

    monkeypatch.setattr(concept, "train", watched)
    said = train()
    assert said.code == 0, said.err
    assert had == [False]


def test_a_checkpoint_of_other_flags_is_not_continued(train, tmp_path):
    (tmp_path / "home/loras").mkdir(parents=True)
    (tmp_path / "home/loras/zog.training").write_bytes(b"something else")
    said = train()
    assert said.code == 2
    assert "zog.training" in said.err and "delete it" in said.err


@pytest.mark.parametrize(("more", "words"), [
    (("--rank", 0), "rank"), (("--rate", 0), "rate"), (("--targets", "everything"), "attention, feed_forward"),
    (("--category", "animal"), "character, clothing"), (("--name", "../zog"), "--name"), (("--name", "a", "--name", "b"), "--name"),
    (("--dtype", "float16"), "float32 or bfloat16"), (("--seed", -1), "--seed"), (("--images", "more"), "2 --images and 1"),
    (("--nonsense",), "--nonsense"), (("--out", "zogs/0.png"), "not a folder"), (("--device", "abacus"), "abacus"),
    (("--preview-every", -2), "--preview-every"), (("--title", "a", "--title", "b"), "--title")])
def test_a_wrong_flag_is_one_line_that_names_it(train, more, words, tmp_path):
    said = train(*more)
    assert said.code == 2
    assert words in said.err
    assert said.err.startswith("medley: ") and said.err.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_wrong_pictures_are_refused_before_the_model_is_opened(train, medley, zogs, tmp_path):
    assert "no folder nowhere" in train(images=Path("nowhere")).err
    (zogs / "lost.txt").write_text("a zog")
    assert "lost.txt is a caption without a picture" in train().err
    (zogs / "lost.txt").unlink()
    (zogs / "4.png").write_bytes(b"no picture")
    said = train("--model", "no-such-model")
    assert said.code == 2 and "4.png cannot be read" in said.err
    assert "has no letter" in train(trigger="?!").err
    assert "--images my-cat --trigger mycat" in medley("train", "concept").err


def test_names_come_from_triggers():
    (lesson,) = lessons_of([Path("x")], [" My  Cat "], [], [], [])
    assert (lesson.trigger, lesson.name, lesson.title, lesson.category) == ("My Cat", "my-cat", "My Cat", "object")
    with pytest.raises(Refused, match="same name"):
        lessons_of([Path("x"), Path("y")], ["my cat", "my-cat"], [], [], [])
    with pytest.raises(Refused, match="--name"):
        lessons_of([Path("x")], ["a:b"], ["a:b"], [], [])


def test_the_page_of_help_needs_no_torch():
    code = "import sys; from app import cli; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert said.stdout.strip() == "False"
