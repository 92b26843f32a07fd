"""One file never takes down a list: whatever lies in a folder of LoRAs, the listing names it with its reason and goes on."""

import json
import os
import re
import socket

import pytest
import torch
from rich.console import Console

from app.cli import tables
from composition.loras import library, reader
from composition.refusal import Refused
from tests.hostile import seeds


@pytest.fixture
def folder(tmp_path):
    """Good files a and z, and between them all that a folder may hold."""
    library_folder = tmp_path / "loras"
    library_folder.mkdir()
    for name in ("a", "z"):
        (library_folder / f"{name}.safetensors").write_bytes(seeds.lora())
    here = os.getcwd()
    os.mkfifo(library_folder / "pipe.safetensors")
    (library_folder / "folder.safetensors").mkdir()
    (library_folder / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (library_folder / "itself.safetensors").symlink_to("itself.safetensors")
    (library_folder / "zero.safetensors").symlink_to("/dev/zero")
    (library_folder / "empty.safetensors").write_bytes(b"")
    (library_folder / "deep.safetensors").write_bytes(seeds.framed(b'{"a":' + b"[" * 100_000, b""))
    (library_folder / os.fsdecode(b"\xff\xfe.safetensors")).write_bytes(b"no LoRA")
    (library_folder / "locked.safetensors").write_bytes(seeds.lora())
    (library_folder / "locked.safetensors").chmod(0)
    os.chdir(library_folder)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket.safetensors")
    finally:
        os.chdir(here)
    return library_folder


BROKEN = ("pipe", "folder", "dangling", "itself", "zero", "empty", "deep", "socket")
ODD = {  # lawful, and shown
    "null": None, "numbers": {"title": 1, "category": [], "trigger_words": {"a": 1}, "base": None},
    "markup": {"title": "[bold red]x[/]", "trigger_words": "[/red], [link=file:///etc/passwd]x[/link]", "category": "[b]", "base": "[blink]"},
    "escapes": {"title": "\x1b[2J", "trigger_words": "\x1b]0;owned\x07, \u202eowl", "base": "\x9b31m"},
}  # fmt: skip


def test_every_file_is_listed_with_its_reason(folder):
    for name, metadata in ODD.items():
        (folder / f"{name}.safetensors").write_bytes(seeds.safetensors(seeds.pair(), metadata))
    header = json.dumps({"__metadata__": None, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "null inside.safetensors").write_bytes(seeds.framed(header, bytes(4)))
    for hashes in (False, True):
        listed = {entry.path.stem: entry for entry in library.listing("none", [folder], hashes=hashes)}
        assert set(listed) == {path.stem for path in folder.iterdir()}
        for name in BROKEN:
            assert listed[name].receipt is None and listed[name].trouble and "Error" not in listed[name].trouble, name
        assert "pipe or a device" in listed["pipe"].trouble and "folder" in listed["folder"].trouble
        assert "link to a file that is not there" in listed["dangling"].trouble
        for name in ("a", "z", *ODD, "null inside"):
            assert listed[name].receipt is not None and not listed[name].trouble, listed[name].trouble


def test_the_table_shows_them_all_and_moves_no_cursor(folder, capsys):
    for name, metadata in ODD.items():
        (folder / f"{name}.safetensors").write_bytes(seeds.safetensors(seeds.pair(), metadata))
    console = Console(width=200, force_terminal=True, color_system=None)
    tables.loras(console, list(library.listing("none", [folder])), folder)
    tables.receipt(console, reader.describe(folder / "markup.safetensors"), "")
    tables.receipt(console, reader.describe(folder / "escapes.safetensors"), "")
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*BROKEN, *ODD, "a", "z"))
    assert "[/red]" in shown  # as text, not as markup
    assert all(letter.isprintable() or letter in "\n" for letter in shown.replace("\x1b[2m", "").replace("\x1b[0m", "").replace("\x1b[1m", "")
               .replace("\x1b[31m", ""))  # fmt: skip
    json.loads(tables.loras_json(list(library.listing("none", [folder], hashes=True))))


def test_a_folder_with_a_files_name_is_searched_too(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    (tmp_path / "x.safetensors" / "owl.safetensors").write_bytes(seeds.lora())
    assert [path.name for path in library.files("none", [tmp_path])] == ["owl.safetensors"]
    assert library.find("owl", "none", [tmp_path]).parent.name == "x.safetensors"


def test_the_name_of_a_good_file_is_found_among_bad_ones(folder):
    assert library.find("a", "none", [folder]).stem == "a"
    with pytest.raises(Refused, match=r"\d LoRAs are named 'owl-v1'"):  # by what the trainer wrote into both
        library.find("owl-v1", "none", [folder])
    with pytest.raises(Refused, match="no LoRA is named 'nobody'"):
        library.find("nobody", "none", [folder])


SUSPICIOUS = {
    "65504 in half precision": ({"lora_up.weight": torch.full((16, 2), 65504.0).half()}, "factors up to 65504"),
    "1e38": ({"lora_down.weight": torch.full((2, 16), 1e38)}, r"factors up to 1e\+38"),
    "alpha 1e38": ({"alpha": torch.tensor(1e38)}, r"alpha 1e\+38 at rank 2"),
    "a product": ({"lora_down.weight": torch.full((2, 16), 90.0), "lora_up.weight": torch.full((16, 2), 90.0)}, "updates up to 4050"),
}  # fmt: skip


@pytest.mark.parametrize("case", SUSPICIOUS)
def test_suspicious_numbers_are_noted_in_the_receipt(case, tmp_path):
    from tests.hostile.readers import BASE

    changed, words = SUSPICIOUS[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(seeds.lora(seeds.pair(**changed), {}))
    for receipt in (reader.inspect(path), reader.read(path, BASE, "sd").receipt):
        assert re.search("suspicious: " + words, receipt.line())
    path.write_bytes(seeds.lora(metadata={}))
    for receipt in (reader.inspect(path), reader.read(path, BASE, "sd").receipt):
        assert "suspicious" not in receipt.line()


@pytest.mark.parametrize("alpha", ["9" * 400, "1e400", "-inf", "nan", "1" + "0" * 5_000])
def test_an_alpha_that_is_no_number_is_refused(alpha, tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {name: tensor for name, tensor in seeds.pair().items() if not name.endswith("alpha")}
    for metadata in ({"lora_alpha": alpha}, {"lora_adapter_metadata": f'{{"lora_alpha": {alpha}}}'}):
        path.write_bytes(seeds.lora(tensors, metadata))
        with pytest.raises(Refused, match=r"^a\.safetensors: .*(not a number|digits|too large|NaN|Infinity|readable)"):
            reader.inspect(path)
