"""LoRA files by the names that people and other tools use."""

import os

import pytest
import torch
from safetensors.torch import save_file

from composition.loras import folders, library
from composition.refusal import Refused
from composition.request import Lora


def lora(path, **said):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.zeros(1)}, path, metadata=said or None)
    return path


@pytest.fixture
def lib(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lora(tmp_path / "lib" / "animals" / "coon.safetensors")
    lora(tmp_path / "lib" / "N.SAFETENSORS")
    lora(tmp_path / "lib" / "v1.5 owl.SafeTensors", ss_output_name="hooty")
    return tmp_path / "lib"


@pytest.mark.parametrize("source", [
    "coon", "animals/coon", "animals\\coon", "animals/coon.safetensors", "animals\\coon.safetensors", "coon.safetensors", "coon.SAFETENSORS",
    "lib/animals/coon", "lib\\animals\\coon", "lib/animals/coon.safetensors", "lib\\animals\\coon.safetensors", "./lib/animals/coon",
    "./animals/coon", "ABSOLUTE/animals/coon",
])
def test_spellings_of_a_file_in_a_folder(source, lib):
    found = library.find(source.replace("ABSOLUTE", str(lib)), "none", [lib])
    assert found.samefile(lib / "animals" / "coon.safetensors")


@pytest.mark.parametrize("source", ["N", "N.safetensors", "N.SAFETENSORS", "lib/N.SAFETENSORS", "lib/N", "lib/N.safetensors"])
def test_the_ending_in_any_case(source, lib):
    assert library.find(source, "none", [lib]).samefile(lib / "N.SAFETENSORS")
    assert Lora("lib/N.SAFETENSORS").name == "N"


def test_a_dot_in_a_name_and_the_trainers_name(lib):
    owl = lib / "v1.5 owl.SafeTensors"
    assert library.find("v1.5 owl", "none", [lib]) == library.find("hooty", "none", [lib]) == owl
    named = lora(lib / "hooty.safetensors")
    assert library.find("hooty", "none", [lib]) == named, "a file of that name comes first"
    named.unlink()
    lora(lib / "other.safetensors", ss_output_name="hooty")
    with pytest.raises(Refused, match="2 LoRAs are named 'hooty'"):
        library.find("hooty", "none", [lib])
    (lib / "broken.safetensors").write_bytes(b"\0")
    with pytest.raises(Refused, match="no LoRA is named 'hoot'"):
        library.find("hoot", "none", [lib])


def test_a_name_in_two_folders_needs_the_folder(lib):
    other = lora(lib / "birds" / "coon.safetensors")
    with pytest.raises(Refused, match="2 LoRAs are named 'coon'"):
        library.find("coon", "none", [lib])
    assert library.find("birds/coon", "none", [lib]) == other
    deep = lora(lib / "old" / "birds" / "coon.safetensors")
    assert library.find("birds/coon", "none", [lib]) == other, "the whole name comes before the end of a longer one"
    assert library.find("old/birds/coon", "none", [lib]) == deep


@pytest.mark.parametrize("source", ["../outside", "animals/../../outside", "coo", "imals/coon", "", ".", "/", "animals/", "a\0b", "x" * 5000, "x" * 5000 + ".safetensors"])
def test_what_is_no_name(source, lib):
    lora(lib.parent / "outside.safetensors")
    os.chdir(lib / "animals")
    with pytest.raises(Refused) as refused:
        library.find(source, "none", [lib])
    assert len(str(refused.value)) < 500


def test_linked_folders_are_searched_and_each_file_is_there_once(lib, tmp_path):
    far = lora(tmp_path / "disk" / "more" / "owly.safetensors")
    (lib / "a link").symlink_to(far.parent)
    (lib / "again").symlink_to(far.parent)
    (lib / "animals" / "up").symlink_to(lib)
    (lib / "loop").symlink_to("..")  # to the folder above, which holds lib and disk
    (lib / "nowhere").symlink_to(tmp_path / "gone")
    names = [path.stem for path in library.files("none", [lib, lib / "animals", tmp_path / "gone", lib])]
    assert sorted(names) == ["N", "coon", "owly", "v1.5 owl"]
    assert lib / "animals" / "coon.safetensors" in library.files("none", [lib]), "by its own path, not through a link"
    for source in ("owly", "a link/owly", "again/owly", "again\\owly.safetensors"):
        assert library.find(source, "none", [lib]).samefile(far)
    (lib / "same.safetensors").symlink_to(far)
    (lib / "animals" / "same.safetensors").symlink_to(far)
    assert library.find("same", "none", [lib]).samefile(far), "two links to one file are no doubt"


def test_a_link_to_a_whole_disk_is_refused(lib, tmp_path, monkeypatch):
    for index in range(30):
        (tmp_path / "disk" / str(index)).mkdir(parents=True)
    (lib / "disk").symlink_to(tmp_path / "disk")
    assert library.files("none", [lib])
    monkeypatch.setattr(folders, "MAX_FOLDERS", 20)
    with pytest.raises(Refused, match="over 20 folders"):
        library.files("none", [lib])
