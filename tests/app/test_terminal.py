"""What reaches the terminal: no control of a stranger, whoever prints it; a reader that goes; letters an encoding lacks; short errors."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file

from app.terminal import Terminal, printable
from composition import Refused

ROOT = Path(__file__).parents[2]
# Colour, title of the window, C1's CSI, bell, backspace, return, bidi override and isolate, zero width, tags, DEL.
HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\x08\r\u202egnp.\u2066x\u200b\U000e0041\x7f"
ACTING = {*map(chr, range(9)), *map(chr, range(11, 32)), *map(chr, range(0x7F, 0xA0)), *"\u200b\u202e\u2066\U000e0041"}


def _terminal(**more) -> Terminal:
    return Terminal(file=io.StringIO(), width=300, **more)


def _written(terminal: Terminal) -> str:
    return terminal.file.getvalue()


@pytest.mark.parametrize("shape", ["text", "str", "table", "panel", "progress", "document"])
def test_nothing_that_is_printed_acts_on_the_terminal(shape):
    console = _terminal()
    if shape == "text":
        console.print(Text(HOSTILE))
    elif shape == "str":
        console.print(f"{HOSTILE}[bold]:smile:")
        assert "[bold]:smile:" in _written(console)
    elif shape == "table":
        rows = Table("name")
        rows.add_row(HOSTILE)
        console.print(rows)
    elif shape == "panel":
        console.print(Panel(HOSTILE, title=Text(HOSTILE), expand=False))
    elif shape == "progress":
        with Progress(TextColumn("{task.description}", markup=False), console=console) as bar:
            bar.add_task(HOSTILE)
    else:
        console.document(json.dumps(HOSTILE, ensure_ascii=False))
        assert json.loads(_written(console)) == HOSTILE
    assert not ACTING & set(_written(console))
    assert "red" in _written(console)


def test_our_own_colours_stay():
    console = _terminal(force_terminal=True, color_system="standard")
    console.print(Text("warning\x1b[0m", style="yellow"))
    assert _written(console) == "\x1b[33mwarning?[0m\x1b[0m\n"


def test_one_line_stays_one_line():
    assert printable("word\nmedley: all is well\ttrust me") == "word medley: all is well trust me"
    assert printable("café 狐 🦊 👩\u200d🚀 نص") == "café 狐 🦊 👩\u200d🚀 نص"


def test_every_word_of_the_program_goes_through_the_one_writer():
    """No print, no typer.echo, no other Console and no write to a standard stream in what people run."""
    strays = []
    for path in [*(ROOT / "app").rglob("*.py"), *(ROOT / "composition").rglob("*.py"), *(ROOT / "retrieval").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("print", "Console", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write", "rich.print", "click.echo"):
                    strays.append(f"{path.name}: {called}")
    assert strays == ["terminal.py: print"]


def test_what_files_say_reaches_no_command_raw(medley, toy, tmp_path):
    (tmp_path / "own").mkdir()
    metadata = {name: f"{name} {HOSTILE}" for name in ("title", "trigger_words", "author", "description", "version", "base", "license", "tags",
                                                   "modelspec.title", "modelspec.author", "modelspec.architecture", "ss_output_name",
                                                   "ss_base_model_version", "notes")}  # fmt: skip
    save_file(load_file(toy.loras / "fox.safetensors"), tmp_path / "own" / "a\x1b[31m\u202eb.safetensors", metadata=metadata)
    (file,) = (tmp_path / "own").iterdir()
    common = ("--model", toy.model, "--lora-dir", "own", "--steps", 1, "--seed", 1)
    for words in (("loras", "--lora-dir", "own"), ("loras", "--lora-dir", "own", "--json"), ("inspect", file), ("inspect", file, "--model", toy.model),
                  ("inspect", file, "--json"), ("generate", f"a {HOSTILE}", "--lora", file, "--triggers", *common),
                  ("generate", f"a {HOSTILE}", "--lora", f"x{HOSTILE}", *common),
                  ("compare", f"a {HOSTILE}", "--lora", file, "--methods", "merge", *common)):
        answer = medley(*words)
        assert not ACTING & set(answer.out + answer.err), words


# a reader that goes, an encoding that lacks letters ---------------------------------------------------------------------------


def _shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], cwd=cwd, capture_output=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PY": sys.executable} | environment)


@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize("words", ["loras --json", "--help"])
def test_a_reader_that_goes_is_no_error(tmp_path, words):
    """The reader is gone before the first word, which head -1 only may be."""
    done = _shell(f"{{ sleep 0.3; $PY -m app.cli {words}; }} | true", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_a_latin_1_terminal_costs_no_picture(toy, tmp_path):
    """Latin-1 has no fox."""
    line = f'$PY -m app.cli generate "狐 🦊 fox" --model "{toy.model}" --lora "{toy.loras}/fox.safetensors" --steps 1 --count 2'
    done = _shell(line, tmp_path, PYTHONIOENCODING="latin-1", LANG="C", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, b"") and len(list((tmp_path / "pictures").glob("*.png"))) == 2


@pytest.mark.skipif(os.name != "posix", reason="a pipe")
def test_when_nobody_reads_the_work_goes_on_without_words(toy, medley, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        gone = Terminal(file=stream)
        monkeypatch.setattr("app.cli.program.out", gone)
        answer = medley("generate", "a fox", "--model", toy.model, "--lora", f"{toy.loras}/fox.safetensors", "--steps", 1, "--count", 2)
        gone.document("{}")
    assert (answer.code, answer.err, len(list(Path("pictures").glob("*.png")))) == (0, "", 2)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_json_is_json_in_every_encoding(encoding):
    raw = io.BytesIO()
    console = Terminal(file=io.TextIOWrapper(raw, encoding=encoding))
    value = {"fox": "é狐🦊\x1b\x9b\u202e", "name": "\udcff"}
    console.document(json.dumps(value, ensure_ascii=False))
    assert json.loads(raw.getvalue().decode(encoding)) == value


# errors quote little -----------------------------------------------------------------------------------------------------------

LONG = "x" * 5000
WORDS = "many words " * 500


@pytest.mark.parametrize("long", [LONG, WORDS], ids=["letters", "words"])
@pytest.mark.parametrize("words", [
    "generate a --lora {}", "generate a --lora {}:0.5", "generate a --lora fox:{}", 'generate a --lora {{"source":"{}","weight":99}}',
    'generate a --lora {{"source":"fox","region":"{}"}} --method regions', "generate a --method {}", "generate a --sampler {}", "generate a --size {}",
    "generate a --option {}", "generate a --option tau={} --method switch", "generate a --model {}", "generate a --from {}", "generate a --out taken/{}",
    "generate a --lora-dir {}", "generate a --device {}", "generate a --dtype {}", "generate a --steps {}", "generate a --{}", "generate a b{}",
    "compare a --methods {}", "inspect {}", "batch {}", "evaluate {}", "evaluate --testbed {}", "evaluate --testbed pocket --methods {}", "{}",
    "evaluate --testbed pocket --fail-below {}", "generate a<lora:{}>", "generate a<lora:fox:{}>", "pull {}", "train concept --images {} --trigger a",
])  # fmt: skip
def test_an_error_quotes_at_most_200_letters(medley, toy, tmp_path, words, long):
    (tmp_path / "taken").touch()
    arguments = [word.format(long) for word in words.split(" ")]
    if words.startswith(("generate", "compare")):
        arguments += [*([] if "--model" in words else ["--model", str(toy.model)]), *([] if "--lora-dir" in words else ["--lora-dir", str(toy.loras)])]
    answer = medley(*arguments)
    assert answer.code == 2 and answer.err.count("\n") == 1
    assert long[:202] not in answer.err and len(answer.err) < 1500, answer.err
    assert answer.err.strip() != "medley:"


def test_a_long_prompt_is_refused_without_repeating_it(medley):
    answer = medley("generate", "fox " * 6000)
    assert answer.code == 2 and len(answer.err) < 600 and "20000" in answer.err


def test_the_cut_leaves_sentences_alone():
    plain = "no LoRA's 'x' " + "and so on " * 60 + "the user's 'y'"
    assert str(Refused(plain)) == plain
    assert len(str(Refused(f"a file {'/long' * 200}.png is not there"))) < 240 and str(Refused("/long" * 200 + ".png")).endswith(".png")
