"""The catalogue: what a scan sees and keeps, whole files read once, lookups, several processes, and everything that can go wrong with its file."""

import multiprocessing
import os
import random
import shutil
import sqlite3
import threading
import time

import pytest
import torch

from composition.loras import reader
from composition.refusal import Cancelled, Refused
from retrieval import cards, headers, scanning, store
from retrieval.catalogue import Catalogue
from tests.hostile import seeds
from tests.retrieval.files import CIVITAI, OLD, aged, beside, lora


@pytest.fixture
def catalogue(tmp_path):
    return Catalogue(tmp_path / "home" / "catalogue.sqlite", pytest.fail)


@pytest.fixture
def lib(tmp_path):
    lora(tmp_path / "lib" / "owl.safetensors", 1, {"title": "Owl", "trigger_words": "an owl"})
    lora(tmp_path / "lib" / "birds" / "wren.safetensors", 2, {"ss_output_name": "wren-v2"})
    return tmp_path / "lib"


@pytest.fixture
def described(monkeypatch):
    """The files whose headers are read, and those read whole."""
    log = {"headers": [], "whole": []}
    monkeypatch.setattr(headers, "describe", lambda path, *rest, real=headers.describe: log["headers"].append(path.name) or real(path, *rest))
    monkeypatch.setattr(headers, "load", lambda path, real=headers.load: log["whole"].append(path.name) or real(path))
    return log


def names(catalogue):
    return [card.name for card in catalogue.cards()]


# what is on a card -----------------------------------------------------------------------------------------------------


def test_a_card_has_what_the_receipt_says(catalogue, lib):
    catalogue.scan([lib])
    card, receipt = catalogue.card(lib / "owl.safetensors"), reader.inspect(lib / "owl.safetensors")
    assert (card.title, card.words_of("header"), card.family, card.ranks, card.tensors) == ("Owl", ("an owl",), receipt.family, receipt.ranks, 5)
    assert card.sha256 == card.autov2 == "" and card.strength is None and card.coverage == {"unet": 2} and card.usable
    catalogue.read()
    card = catalogue.card(lib / "owl.safetensors")
    assert (card.sha256, card.tensor_sha256, card.data_sha256, card.alphas) == (receipt.sha256, receipt.tensor_sha256, receipt.data_sha256, receipt.alphas)
    assert card.autov2 == receipt.sha256[:10].upper() and card.strength > 0 and 1 <= card.effective_rank <= 2 and 0 < card.spike <= 1
    assert cards.read(card.path, card.text()) == card


@pytest.mark.parametrize(("tensors", "trouble"), [
    ({f"{seeds.Q}.lora_down.weight": torch.ones(2, 16), f"{seeds.Q}.lora_up.weight": torch.ones(16, 2), f"{seeds.Q}.oft_diag": torch.ones(16)}, "OFT as the first PEFT"),
    ({f"{seeds.Q}.hada_novelty": torch.ones(2, 2)}, "a part of a LoRA that is not known"), ({"model.weight": torch.ones(2, 2)}, "no LoRA file that is known"),
    ({f"{seeds.Q}.lora_down.weight": torch.ones(2, 16)}, "no pair of factors"),
    ({"controlnet_cond_embedding.conv_in.weight": torch.ones(2, 2)}, "is a ControlNet, which goes with a picture: --control a=PICTURE"),
    ({"img_in.lora_A.weight": torch.ones(2, 128), "img_in.lora_B.weight": torch.ones(2, 2), "double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(2)},
     "is a control LoRA"), ({f"transformer_blocks.0.attn.processor.q_loras.0.{end}.weight": torch.ones(2, 2) for end in ("down", "up")}, "--control a=PICTURE"),
])  # fmt: skip
def test_files_that_are_no_use_say_why_and_have_their_hashes(tensors, trouble, catalogue, tmp_path):
    lora(tmp_path / "lib" / "a.safetensors", tensors=tensors)
    assert [card.name for card in catalogue.scan([tmp_path / "lib"]).broken] == ["a"]
    catalogue.read()
    (card,) = catalogue.cards()
    assert trouble in card.trouble and card.tensor_sha256 and catalogue.by_hash(card.autov2) == [card]


def test_numbers_that_are_none_are_seen_when_the_file_is_read_whole(catalogue, tmp_path):
    lora(tmp_path / "lib" / "a.safetensors", tensors=seeds.pair(**{"lora_up.weight": torch.full((16, 2), float("nan"))}))
    assert not catalogue.scan([tmp_path / "lib"]).broken
    assert [card.name for card in catalogue.read().broken] == ["a"] and catalogue.read().files == 0, "once is enough"
    assert "NaN" in catalogue.cards()[0].trouble and [card.name for card in catalogue.scan([tmp_path / "lib"]).broken] == ["a"]


def test_a_disk_that_fails_once_is_no_verdict_on_the_file(catalogue, lib, monkeypatch):
    catalogue.scan([lib])
    monkeypatch.setattr("composition.loras.safetensors._tensor", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert catalogue.read()[:4] == (0, 0, 2, ())
    monkeypatch.undo()
    assert catalogue.read().files == 2 and all(card.sha256 and card.usable for card in catalogue.cards())


def test_numbers_of_files_may_have_64_bits(catalogue, lib, monkeypatch):
    real = os.stat
    monkeypatch.setattr(scanning.os, "stat", lambda path, **more: type("S", (), {
        "st_size": (of := real(path, **more)).st_size, "st_mtime_ns": of.st_mtime_ns, "st_ino": of.st_ino + 2**63, "st_mode": of.st_mode, "st_dev": of.st_dev,
        "st_ctime_ns": of.st_ctime_ns, "st_mtime": of.st_mtime})())  # fmt: skip
    assert catalogue.scan([lib]).added == 2 and catalogue.scan([lib]).changed == 0


def test_the_bundled_loras_are_in_it_too(catalogue):
    scan = catalogue.scan([], "pocket")
    assert scan.files >= 18 and not scan.broken
    card = next(card for card in catalogue.cards() if card.name == "dragon")
    assert card.words_of("header") == ("dragon",) and card.category == "character" and card.preview == "header"


# what changes ----------------------------------------------------------------------------------------------------------


def test_what_has_not_changed_is_not_read_again(catalogue, lib, described):
    assert catalogue.scan([lib])[:4] == (2, 2, 0, 0) and sorted(described["headers"]) == ["owl.safetensors", "wren.safetensors"]
    assert catalogue.read()[:1] == (2,)
    described["headers"].clear()
    assert catalogue.scan([lib])[:4] == (2, 0, 0, 0) and catalogue.read().files == 0 and described["headers"] == []
    lora(lib / "owl.safetensors", 3, {"title": "Other"}, OLD + 5)
    lora(lib / "new.safetensors", 4)
    os.remove(lib / "birds" / "wren.safetensors")
    assert catalogue.scan([lib])[:4] == (2, 1, 1, 1)
    assert names(catalogue) == ["new", "owl"] and catalogue.card(lib / "owl.safetensors").title == "Other"
    assert catalogue.card(lib / "owl.safetensors").sha256 == "", "hashes of what it was are gone"


@pytest.mark.parametrize("change", ["size", "time", "number"])
def test_each_part_of_a_files_state_counts(change, catalogue, lib):
    path = lib / "owl.safetensors"
    catalogue.scan([lib])
    if change == "number":  # another file in its place, of the same size and time
        other = lora(lib / "other", 1, {"title": "Elf", "trigger_words": "an owl"})
        os.replace(other, path)
    else:
        lora(path, 1, {"title": "Elf" if change == "time" else "Longer", "trigger_words": "an owl"}, OLD + (change == "time"))
    assert catalogue.scan([lib]).changed == 1 and catalogue.card(path).title in ("Elf", "Longer")


def test_a_sidecar_that_changes_alone_is_noticed(catalogue, lib):
    path = lib / "owl.safetensors"
    catalogue.scan([lib])
    catalogue.read()
    for change in (lambda: beside(path, ".civitai.info", CIVITAI), lambda: aged(path.with_name("owl.civitai.info"), OLD + 7),
                   lambda: shutil.copy(path, path.with_name("owl.preview.png")), lambda: os.remove(path.with_name("owl.civitai.info"))):  # fmt: skip
        change()
        assert catalogue.scan([lib])[1:4] == (0, 1, 0)
        assert catalogue.scan([lib])[1:4] == (0, 0, 0)
        card = catalogue.card(path)
        assert card.sha256 and card.strength, "what was read of the file stays"
        assert (card.base == "Illustrious") == path.with_name("owl.civitai.info").exists()
        assert any("another file" in remark for remark in card.remarks) == (card.base == "Illustrious"), "its sha256 is not the one that is stated"
    assert card.preview == str(path.with_name("owl.preview.png"))


def test_a_file_that_gets_another_name_keeps_its_hashes(catalogue, lib, described):
    catalogue.scan([lib])
    catalogue.read()
    before = catalogue.card(lib / "owl.safetensors")
    (lib / "far").mkdir()
    os.rename(lib / "owl.safetensors", lib / "far" / "renamed.safetensors")
    described["whole"].clear()
    assert catalogue.scan([lib])[1:4] == (1, 0, 1)
    card = catalogue.card(lib / "far" / "renamed.safetensors")
    assert (card.sha256, card.tensor_sha256, card.strength, card.title) == (before.sha256, before.tensor_sha256, before.strength, "Owl")
    assert catalogue.read().files == 0 and described["whole"] == []


def test_where_files_have_no_numbers_a_copy_is_another_file(catalogue, lib, monkeypatch):
    monkeypatch.setattr(scanning, "state", lambda path, real=scanning.state: (*real(path)[:2], 0))
    shutil.copy2(lib / "owl.safetensors", lib / "twin.safetensors")
    content = lora(lib / "liar.safetensors", 9, {"title": "Owl", "trigger_words": "an owl"})
    assert content.stat().st_size == (lib / "owl.safetensors").stat().st_size
    catalogue.scan([lib])
    catalogue.read()
    assert len({catalogue.card(lib / f"{name}.safetensors").sha256 for name in ("owl", "twin", "liar")}) == 2


def test_a_file_written_a_moment_ago_is_looked_at_again(catalogue, tmp_path):
    """Two changes within the time that the file system tells apart leave the same state."""
    now = time.time_ns()
    path = lora(tmp_path / "lib" / "a.safetensors", 1, {"title": "One"}, now)
    catalogue.scan([tmp_path / "lib"])
    with path.open("r+b") as file:
        file.write(seeds.safetensors({}, None)[:0])
        data = path.read_bytes().replace(b"One", b"Two")
        file.write(data)
    aged(path, now)
    scan = catalogue.scan([tmp_path / "lib"])
    assert catalogue.cards()[0].title == "Two" and scan.changed == 0


def test_a_file_that_changes_while_it_is_read_is_left_for_the_next_scan(catalogue, lib, monkeypatch):
    catalogue.scan([lib])
    monkeypatch.setattr(headers, "load", lambda path, real=headers.load: (real(path), aged(path, OLD + 99))[0])
    reading = catalogue.read()
    assert (reading.files, reading.left) == (0, 2) and not any(card.sha256 for card in catalogue.cards())
    monkeypatch.undo()
    assert catalogue.scan([lib]).changed == 2 and catalogue.read().files == 2


def test_clocks_that_are_set_make_it_slower_not_wrong(catalogue, lib, monkeypatch, described):
    real = time.time_ns
    for offset in (-86_400 * 10**9, 86_400 * 365 * 10**9):
        monkeypatch.setattr(time, "time_ns", lambda offset=offset: real() + offset)
        lora(lib / "owl.safetensors", 3, {"title": f"at {offset}"}, real() + offset)
        catalogue.scan([lib])
        assert catalogue.card(lib / "owl.safetensors").title == f"at {offset}"
    aged(lib / "owl.safetensors", real() + 10**18)  # far in the future, once
    catalogue.scan([lib])
    described["headers"].clear()
    catalogue.scan([lib])
    assert described["headers"] == []


def test_folders_that_are_away_keep_their_cards(catalogue, lib, tmp_path):
    other = lora(tmp_path / "disk" / "far.safetensors")
    catalogue.scan([lib, other.parent])
    os.rename(tmp_path / "disk", tmp_path / "unplugged")
    scan = catalogue.scan([lib, other.parent])
    assert scan.absent == (other.parent,) and scan.removed == 0 and "far" in names(catalogue)
    catalogue.scan([lib])
    assert "far" in names(catalogue), "another folder's files are nobody's business"
    (tmp_path / "disk").mkdir()
    assert catalogue.scan([other.parent]).removed == 1 and "far" not in names(catalogue)


def test_names_that_are_no_text(catalogue, tmp_path):
    folder = tmp_path / "lib"
    odd = [os.fsdecode(b"\xff\xfe"), "new\nline", "\u202eevil", "é" * 100, "quote'\"; DROP TABLE files; --", "%s", "<b>", "☃"]
    for index, name in enumerate(odd):
        path = lora(folder / name / f"{name}.safetensors", index)
        beside(path, ".civitai.info", CIVITAI)
        shutil.copy(path, path.with_name(f"{path.stem}.preview.png"))
    assert catalogue.scan([folder])[:4] == (8, 8, 0, 0) and catalogue.read().files == 8 and catalogue.scan([folder])[:4] == (8, 0, 0, 0)
    for name in odd:
        card = catalogue.card(folder / name / f"{name}.safetensors")
        assert card.sha256 and card.base == "Illustrious" and os.path.samefile(card.preview, card.path.with_name(f"{card.path.stem}.preview.png"))
        assert catalogue.find(name, "none", [folder]) == card.path


# stopping --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cancel", "error"])
def test_a_scan_and_a_reading_that_stop_go_on_later(how, catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.catalogue.BATCH", 4)
    folder = tmp_path / "lib"
    for index in range(10):
        lora(folder / f"{index}.safetensors", index)
    cancel = threading.Event()

    def stop(card, number, count):
        assert count >= 4
        if number == 6:
            cancel.set() if how == "cancel" else 1 / 0

    with pytest.raises(Cancelled if how == "cancel" else ZeroDivisionError):
        catalogue.scan([folder], on_file=stop, cancel=cancel)
    done = len(catalogue.cards())
    assert done == (6 if how == "cancel" else 5)
    cancel.clear()
    assert catalogue.scan([folder])[:3] == (10, 10 - done, 0)
    with pytest.raises(Cancelled if how == "cancel" else ZeroDivisionError):
        catalogue.read(on_file=stop, cancel=cancel)
    assert sum(bool(card.sha256) for card in catalogue.cards()) == 6
    assert catalogue.read().files == 4 and catalogue.read().files == 0


def test_whoever_reads_whole_files_gets_them_while_they_are_in_memory(catalogue, lib, tmp_path):
    calls = []
    lora(tmp_path / "more" / "bad.safetensors", tensors={"x": torch.ones(1)})
    catalogue.scan([lib, tmp_path / "more"])
    catalogue.read([lib / "birds"], on_read=lambda card, raw, factors: calls.append((card.name, card.sha256 == raw.sha256, len(factors))))
    assert calls == [("wren", True, 2)]
    catalogue.read(on_read=lambda card, raw, factors: calls.append((card.name, len(raw.tensors), len(factors))))
    assert calls[1:] == [("owl", 5, 2)], "no file that is no use"
    catalogue.read(again=True, on_read=lambda card, raw, factors: calls.append(card.name))
    assert sorted(calls[2:]) == ["owl", "wren"]


# lookups ---------------------------------------------------------------------------------------------------------------


def test_files_by_any_of_their_hashes(catalogue, lib):
    shutil.copy(lib / "owl.safetensors", lib / "copy.safetensors")
    lora(lib / "renamed.safetensors", 1, {"title": "the same tensors"})
    catalogue.scan([lib])
    catalogue.read()
    owl = catalogue.card(lib / "owl.safetensors")
    group = ["copy", "owl", "renamed"]
    assert [card.name for card in catalogue.by_hash(owl.autov2)] == [card.name for card in catalogue.by_hash(f" {owl.sha256} ")] == ["copy", "owl"]
    assert [card.name for card in catalogue.by_hash(f"0x{owl.tensor_sha256}")] == [card.name for card in catalogue.of(owl.tensor_sha256)] == group
    assert [card.name for card in catalogue.by_hash(owl.data_sha256[:12])] == group
    assert [[card.name for card in several] for several in catalogue.duplicates()] == [group]
    assert catalogue.by_hash("0" * 64) == catalogue.of("") == []
    for digits in ("", "abcde", "xyzxyzxyz", "'; DROP TABLE files; --", "a" * 65, "%", "a\0bcdefgh"):
        with pytest.raises(Refused, match="is no hash"):
            catalogue.by_hash(digits)


def test_names_of_one_file_are_no_duplicates(catalogue, lib):
    os.link(lib / "owl.safetensors", lib / "hard.safetensors")
    os.symlink(lib / "owl.safetensors", lib / "soft.safetensors")
    catalogue.scan([lib])
    assert catalogue.read().files == 4
    assert catalogue.duplicates() == [] and len(catalogue.of(catalogue.card(lib / "owl.safetensors").tensor_sha256)) == 3


# the file itself -------------------------------------------------------------------------------------------------------


def damaged(whole: bytes, kind: str, rng: random.Random) -> bytes:
    held = bytearray(whole)
    if kind == "middle":
        held[2000:32_000] = rng.randbytes(30_000)
    elif kind == "stretch":
        at = rng.randrange(len(held))
        held[at:at + 3000] = rng.randbytes(len(held[at:at + 3000]))
    elif kind == "scattered":
        for _ in range(rng.choice((1, 20, 500))):
            held[rng.randrange(100, len(held))] = rng.randrange(256)
    elif kind == "cut":
        del held[rng.randrange(1, len(held)):]
    else:
        held[:] = b"not a database at all" * 100
    return bytes(held)


@pytest.mark.parametrize("kind", ["middle", "stretch", "scattered", "cut", "other"])
def test_a_damaged_file_is_set_aside_and_made_anew(catalogue, lib, kind):
    """Whatever the damage: at most one refusal, which says so, and all cards are there again; what was damaged is kept."""
    catalogue.scan([lib])
    whole, before, aside = catalogue.file.read_bytes(), names(catalogue), 0
    for seed in range(30):
        for old in catalogue.file.parent.iterdir():
            old.unlink()
        catalogue.file.write_bytes(damaged(whole, kind, random.Random(f"{kind} {seed}")))
        sentences, refusals = [], []
        again = Catalogue(catalogue.file, sentences.append)
        for attempt in (again.scan, again.scan, lambda folders, at=again: at.cards()):
            try:
                attempt([lib])
            except Refused as error:
                refusals.append(str(error))
        assert len(refusals) <= 1 and all("set aside" in sentence for sentence in refusals), (seed, refusals)
        again.scan([lib])
        assert names(again) == before, seed
        assert all("is damaged" in sentence and "renamed" in sentence for sentence in sentences)
        assert len(list(catalogue.file.parent.glob("*.damaged-*"))) == len(sentences)
        aside += bool(sentences)
    assert aside >= {"middle": 30, "stretch": 10, "scattered": 10, "cut": 20, "other": 30}[kind]


def test_a_table_that_is_missing_is_damage_too(catalogue, lib):
    catalogue.scan([lib])
    with sqlite3.connect(catalogue.file) as db:
        db.execute("DROP TABLE files")
    again = Catalogue(catalogue.file)
    with pytest.raises(Refused, match="was damaged and has been set aside"):
        again.cards()
    assert again.scan([lib]).added == 2


def test_a_card_that_cannot_be_read_is_none(catalogue, lib):
    catalogue.scan([lib])
    with sqlite3.connect(catalogue.file) as db:
        db.executemany("UPDATE files SET card = ? WHERE instr(path, ?)", [("{", b"owl"), ('{"future": 1}', b"wren")])
    db.close()
    assert catalogue.cards() == []


def test_cards_of_another_form_are_made_anew(catalogue, lib, monkeypatch, described):
    catalogue.scan([lib])
    catalogue.read()
    monkeypatch.setattr(cards, "FORM", cards.FORM + 1)
    described["whole"].clear()
    assert catalogue.scan([lib])[:4] == (2, 0, 0, 0) and len(described["headers"]) == 6 and described["whole"] == []
    assert all(card.sha256 for card in catalogue.cards())


def test_a_newer_file_is_left_alone(catalogue, lib):
    catalogue.scan([lib])
    with sqlite3.connect(catalogue.file) as db:
        db.execute(f"PRAGMA user_version = {len(store.MIGRATIONS) + 1}")
    db.close()
    data = catalogue.file.read_bytes()
    for call in (lambda: catalogue.scan([lib]), catalogue.cards, catalogue.read):
        with pytest.raises(Refused, match="newer Medley"):
            call()
    assert catalogue.file.read_bytes() == data
    assert catalogue.find("owl", "none", [lib]) == lib / "owl.safetensors", "names do not need it"


def test_an_older_file_is_migrated_step_by_step(catalogue, lib, monkeypatch):
    catalogue.scan([lib])
    monkeypatch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, "ALTER TABLE files ADD COLUMN more TEXT DEFAULT 'x'; CREATE TABLE extra (a)",
                                              lambda db: db.execute("INSERT INTO extra VALUES (7)")))
    assert len(Catalogue(catalogue.file).cards()) == 2
    with sqlite3.connect(catalogue.file) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (3,) and db.execute("SELECT a FROM extra").fetchall() == [(7,)]
    db.close()
    monkeypatch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, "CREATE TABLE half (a); CREATE TABLE files (a)"))
    with pytest.raises(Refused):
        Catalogue(catalogue.file).cards()
    with sqlite3.connect(catalogue.file) as db:
        assert db.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == [], "a step that fails leaves nothing"
    db.close()


def test_a_full_disk_costs_what_was_not_written_yet(catalogue, tmp_path, monkeypatch):
    monkeypatch.setattr("retrieval.catalogue.BATCH", 3)
    folder = tmp_path / "lib"
    for index in range(40):
        lora(folder / f"{index:02}.safetensors", index, {"ss_training_comment": "x" * 1500})
    catalogue.scan([tmp_path / "nothing"])
    real = catalogue._store._current

    def small(check=False):
        db = real()
        db.execute("PRAGMA max_page_count = 40")
        return db

    monkeypatch.setattr(catalogue._store, "_current", small)
    with pytest.raises(Refused, match="disk is full"):
        catalogue.scan([folder])
    kept = len(catalogue.cards())
    assert 0 < kept < 40
    monkeypatch.undo()
    assert catalogue.scan([folder])[:3] == (40, 40 - kept, 0)


@pytest.mark.parametrize("what", ["a file", "a folder"])
def test_a_place_where_it_cannot_be_made(what, tmp_path, lib):
    (tmp_path / "x").write_text("a file")
    (tmp_path / "d").mkdir()
    for file in (tmp_path / "x" / "catalogue.sqlite", tmp_path / "d"):
        with pytest.raises(Refused, match=r"the catalogue .* cannot be"):
            Catalogue(file).scan([lib])
        assert Catalogue(file).find("owl", "none", [lib]) == lib / "owl.safetensors"


def test_another_process_that_writes_is_waited_for_and_then_named(catalogue, lib, monkeypatch):
    catalogue.scan([lib])
    monkeypatch.setattr(store, "BUSY", 0.2)
    other = sqlite3.connect(catalogue.file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Refused, match="in use by another process"):
        catalogue.cards()
    assert catalogue.find("wren-v2", "none", [lib]).stem == "wren", "names wait for nobody's catalogue"
    other.rollback()
    other.close()
    assert len(catalogue.cards()) == 2


def _scans(file, folder, times):
    for _ in range(times):
        Catalogue(file).scan([folder])
        Catalogue(file).read()


def test_two_processes_scan_the_same_folder_at_once(catalogue, tmp_path):
    folder = tmp_path / "lib"
    for index in range(30):
        lora(folder / str(index % 7) / f"{index}.safetensors", index)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_scans, args=(catalogue.file, folder, 2)) for _ in range(2)]
    for process in processes:
        process.start()
    for index in range(30, 40):
        lora(folder / "late" / f"{index}.safetensors", index)
        os.remove(folder / str((index - 30) % 7) / f"{index - 30}.safetensors")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    catalogue.scan([folder])
    catalogue.read()
    assert sorted(map(int, names(catalogue))) == list(range(10, 40)) and all(card.sha256 for card in catalogue.cards())


def test_a_scan_forgets_no_file_that_another_process_has_just_seen(catalogue, lib, monkeypatch):
    catalogue.scan([lib])

    def slow(known, real=scanning.look):
        rows = list(real(known))
        lora(lib / "late.safetensors")  # comes, and is seen by another, after this walk
        monkeypatch.undo()
        Catalogue(catalogue.file).scan([lib])
        return iter(rows)

    monkeypatch.setattr(scanning, "look", slow)
    assert catalogue.scan([lib]).removed == 0 and "late" in names(catalogue)
