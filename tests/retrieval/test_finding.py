"""The catalogue as the resolver of names: the very answers and refusals of library.find, without its walks, and never a stale one."""

import os
import random
import shutil
import threading
import time

import pytest

from composition.loras import folders, library
from composition.refusal import Refused
from retrieval.catalogue import Catalogue
from tests.hostile import seeds
from tests.retrieval.files import OLD, lora

STEMS = ("owl", "wren", "coon", "OWL", "v1.5 owl", "hooty", "", ".", "a,b", "é")
PARTS = ("birds", "old", "x.safetensors", "deep")
ENDINGS = (".safetensors", ".safetensors", ".safetensors", ".SafeTensors", ".txt", "")
ALIASES = ("hooty", "owl", "nobody", "", "birds")


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """As if everything had been there for an hour, so that walks are believed at once; between changes the clock of the file system must tick."""
    monkeypatch.setattr(folders, "time", type("Later", (), {"time_ns": staticmethod(lambda: time.time_ns() + 3600 * 10**9),
                                                            "monotonic": staticmethod(time.monotonic)}))


@pytest.fixture
def walks(monkeypatch):
    log = []
    monkeypatch.setattr(folders, "walk", lambda places, real=folders.walk: log.extend(places[:1] if "assets" not in str(places) else ()) or real(places))
    return log


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue(tmp_path / "home" / "catalogue.sqlite")


def answer(find, *arguments, **more):
    try:
        return find(*arguments, **more)
    except Refused as error:
        return str(error)


class Tree:
    """A folder that changes at random."""

    def __init__(self, root, seed):
        self.root, self.dice = root, random.Random(seed)
        root.mkdir()

    def folder(self):
        every = [self.root, *(path for path in self.root.rglob("*") if path.is_dir())]
        return self.dice.choice(every)

    def change(self):
        time.sleep(0.012)  # a tick of the file system's clock
        here, stem, ending = self.folder(), self.dice.choice(STEMS), self.dice.choice(ENDINGS)
        others = [path for path in self.root.rglob("*") if path.is_symlink() or not path.is_dir()]
        kind = self.dice.choice(("file", "file", "file", "folder", "remove", "remove tree", "rename", "move", "link", "link file", "dangling", "again", "condition"))
        try:
            if kind in ("file", "condition"):
                data = seeds.condition({}) if kind == "condition" else seeds.safetensors(seeds.pair(), {"ss_output_name": self.dice.choice(ALIASES)})
                (here / f"{stem}{ending}").write_bytes(self.dice.choice((data, data, b"broken")))
            elif kind == "folder":
                (here / self.dice.choice(PARTS)).mkdir(exist_ok=True)
            elif kind == "remove" and others:
                self.dice.choice(others).unlink()
            elif kind == "remove tree" and here != self.root and self.dice.random() < 0.3:
                here.unlink() if here.is_symlink() else shutil.rmtree(here)
            elif kind == "rename" and others:
                path = self.dice.choice(others)
                path.rename(path.with_name(f"{stem}.safetensors"))
            elif kind == "move" and here != self.root:
                here.rename(self.folder() / self.dice.choice(PARTS))
            elif kind == "link":
                (here / f"to {self.dice.choice(PARTS)}").symlink_to(self.folder(), target_is_directory=True)
            elif kind == "link file" and others:
                (here / f"{stem}.safetensors").symlink_to(self.dice.choice(others))
            elif kind == "dangling":
                (here / f"{self.dice.choice(PARTS)}").symlink_to(self.root / self.dice.choice(PARTS))
            elif kind == "again" and others:  # another content under the same name, the same size and time
                path = self.dice.choice(others)
                data, stat = path.read_bytes(), path.stat()
                path.unlink()
                path.write_bytes(data.replace(b"hooty", b"nobod"))
                os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + self.dice.choice((0, 1))))
        except OSError:
            pass  # what cannot be done to this tree

    def source(self):
        stem = self.dice.choice((*STEMS, *ALIASES, "none", "birds/owl", "../owl", "birds\\owl", "./owl", "to birds/owl"))
        stem = "/".join([*self.dice.choices(PARTS, k=self.dice.choice((0, 0, 1, 2))), stem])
        stem += self.dice.choice(("", "", ".safetensors", ".SAFETENSORS"))
        return str(self.root / stem) if self.dice.random() < 0.2 else stem


@pytest.mark.parametrize("seed", range(4))
def test_the_catalogue_answers_as_the_library_does(seed, catalogue, walks, tmp_path, monkeypatch):
    tree = Tree(tmp_path / "lib", seed)
    monkeypatch.chdir(tmp_path)
    finds, mine = 0, 0
    for step in range(45):
        tree.change()
        if step % 12 == 7:
            catalogue.scan([tree.root])
        named = [tree.root] if step % 3 else [tree.root.relative_to(tmp_path), tree.root / "birds"]
        for _ in range(4):
            source, conditions = tree.source(), tree.dice.random() < 0.1
            before = len(walks)
            got = answer(catalogue.find, source, "none", named, conditions=conditions)
            if not isinstance(got, str):  # a refusal looks at everything again
                mine, finds = mine + len(walks) - before, finds + 1
            assert got == answer(library.find, source, "none", named, conditions=conditions), (seed, step, source)
    assert mine < finds


def test_folders_are_walked_once_for_many_names(catalogue, walks, tmp_path, monkeypatch):
    for index in range(30):
        lora(tmp_path / "lib" / str(index % 5) / f"{index}.safetensors", index)
    scans = []
    monkeypatch.setattr(os, "scandir", lambda path, real=os.scandir: scans.append(path) or real(path))
    for index in range(30):
        assert catalogue.find(str(index), "none", [tmp_path / "lib"]).stem == str(index)
    assert len(walks) == 1 and len(scans) == 6


def test_a_name_that_nothing_has_is_looked_for_on_the_disk(catalogue, walks, tmp_path):
    lora(tmp_path / "lib" / "owl.safetensors")
    for _ in range(3):
        with pytest.raises(Refused, match="did you mean 'owl'"):
            catalogue.find("owll", "none", [tmp_path / "lib"])
        walks.append("refused")
    assert walks[0] != "refused" and ("refused", "refused") not in zip(walks, walks[1:], strict=False), "each time anew"


@pytest.mark.parametrize("change", ["added", "deleted", "replaced by a folder", "moved", "linked", "target of a link", "folder made", "folder gone"])
def test_no_answer_is_stale(change, catalogue, tmp_path):
    lib = tmp_path / "lib"
    owl = lora(lib / "birds" / "owl.safetensors")
    far = tmp_path / "far"
    (lib / "later").symlink_to(far)  # to nothing yet
    assert catalogue.find("owl", "none", [lib]) == owl
    time.sleep(0.012)
    {"added": lambda: lora(lib / "owl.safetensors"), "deleted": owl.unlink, "replaced by a folder": lambda: (owl.unlink(), owl.mkdir(), lora(owl / "x.safetensors")),
     "moved": lambda: owl.rename(lib / "owl.safetensors"), "linked": lambda: (lib / "same.safetensors").symlink_to(owl),
     "target of a link": lambda: lora(far / "owl.safetensors"), "folder made": lambda: lora(lib / "new" / "deep" / "owl.safetensors"),
     "folder gone": lambda: shutil.rmtree(lib / "birds")}[change]()  # fmt: skip
    for source in ("owl", "same", "x", "new/deep/owl", "later/owl"):
        assert answer(catalogue.find, source, "none", [lib]) == answer(library.find, source, "none", [lib])


def test_a_change_in_the_same_tick_of_the_clock_is_seen(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "time", time)
    lib = tmp_path / "lib"
    for index in range(50):
        lora(lib / f"{index}.safetensors")
        assert catalogue.find(str(index), "none", [lib]).stem == str(index)
        (lib / f"{index}.safetensors").unlink()
        with pytest.raises(Refused):
            catalogue.find(str(index), "none", [lib])


def test_a_walk_is_not_believed_for_ever(catalogue, walks, tmp_path, monkeypatch):
    lora(tmp_path / "lib" / "owl.safetensors")
    catalogue.find("owl", "none", [tmp_path / "lib"])
    monkeypatch.setattr(folders, "BELIEVED", -1.0)
    catalogue.find("owl", "none", [tmp_path / "lib"])
    assert len(walks) == 2


def test_trainers_names_come_from_the_last_scan(catalogue, tmp_path, monkeypatch):
    lib = tmp_path / "lib"
    for index in range(5):
        lora(lib / f"{index}.safetensors", metadata={"ss_output_name": f"name {index}"})
    catalogue.scan([lib])
    headers = []
    monkeypatch.setattr(library, "load_header", lambda path, real=library.load_header: headers.append(path.stem) or real(path))
    assert catalogue.find("name 3", "none", [lib]).stem == "3" and headers == []
    lora(lib / "3.safetensors", metadata={"ss_output_name": "other 3"}, age=OLD + 1)  # replaced since
    lora(lib / "9.safetensors", metadata={"ss_output_name": "name 3"})  # new since
    assert catalogue.find("name 3", "none", [lib]).stem == "9" and catalogue.find("other 3", "none", [lib]).stem == "3"
    assert sorted(set(headers)) == ["3", "9"]


def test_many_threads_find_at_once(catalogue, tmp_path):
    lib = tmp_path / "lib"
    for index in range(20):
        lora(lib / f"{index}.safetensors", index, {"ss_output_name": f"n{index}"})
    catalogue.scan([lib])
    wrong = []

    def work(offset):
        for index in range(40):
            name = (index * 7 + offset) % 20
            for source in (str(name), f"n{name}"):
                if answer(catalogue.find, source, "none", [lib, tmp_path / str(index % 3)]) != lib / f"{name}.safetensors":
                    wrong.append(source)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_thousands_of_names_do_not_fill_a_refusal(tmp_path):
    (tmp_path / "lib").mkdir()
    for index in range(3000):
        (tmp_path / "lib" / f"{index:04}.safetensors").touch()
    with pytest.raises(Refused, match=r"0039 and 2,960 more") as refused:
        library.find("zzz", "none", [tmp_path / "lib"])
    assert len(str(refused.value)) < 500
