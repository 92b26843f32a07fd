"""The door for files and JSON of others: what passes is what the json module reads; what does not says why, at once."""

import json
import os
import random
import time
from pathlib import Path

import pytest

from composition import untrusted
from composition.untrusted import Unreadable
from tests.hostile.values import BAD, ODD, ODDLY_TYPED, TEXTS

GOOD = [json.dumps(text) for text in TEXTS.values() if "\0" not in text] + [value.decode() for value in ODDLY_TYPED.values()] + [
    '{"a": {"b": [1, 2.5, -3e-7, true, null, "\\"[{"]}}', "[" * 64 + "]" * 64, '"' + "[" * 1000 + '"', '{"\\\\": "\\\\\\""}', " 1 ", '"\\ud83e\\udd89"']


@pytest.mark.parametrize("text", GOOD)
def test_good_json_is_read_as_the_json_module_reads_it(text):
    assert untrusted.parse(text) == json.loads(text) == untrusted.parse(text.encode())
    assert untrusted.parse(b"\xef\xbb\xbf" + text.encode()) == json.loads(text)


@pytest.mark.parametrize("name", BAD | ODD)
def test_bad_json_is_refused_wherever_it_stands(name):
    value = (BAD | ODD)[name]
    for text in (value, b"[" + value + b", 1]", b'{"a": ' + value + b"}"):
        begun = time.process_time()
        with pytest.raises(Unreadable) as refused:
            untrusted.parse(text)
        assert time.process_time() - begun < 1.5
        assert len(str(refused.value)) < 200 and str(refused.value).isprintable()
    if name in ODD:
        assert untrusted.parse(value, odd_letters=True) == json.loads(value)


def test_sizes_are_bounded():
    with pytest.raises(Unreadable, match="at most 10 are read"):
        untrusted.parse("[1, 2, 3, 4]", most=10)
    with pytest.raises(Unreadable, match="key 'a' twice"):
        untrusted.parse('[{"a": 1, "b": 2, "a": 1}]')
    with pytest.raises(Unreadable, match="65|over 64 deep"):
        untrusted.parse("[" * 65 + "]" * 65)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "good").write_bytes(b"[1]")
    (tmp_path / "to good").symlink_to("good")
    assert untrusted.parse_file(tmp_path / "good") == untrusted.parse_file(tmp_path / "to good") == [1]
    begun = time.perf_counter()
    for name, words in {"pipe": "a pipe or a device", "link": "a link to a file that is not there", "loop": "cannot be opened", "gone": "is not there",
                        ".": "is a folder", "a\0b": "cannot be opened", "x" * 5000: "cannot be opened"}.items():  # fmt: skip
        with pytest.raises(Unreadable, match=words):
            untrusted.read(tmp_path / name)
    with pytest.raises(Unreadable, match="has 3 bytes; at most 2"):
        untrusted.read(tmp_path / "good", 2)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(Unreadable, match="a pipe or a device"):
            untrusted.read(Path(device))
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("name", BAD)
def test_tables_of_others_are_refused_by_the_name_of_their_file(name, tmp_path):
    from app.evaluation import testbed, wording
    from composition.profiles.store import ProfileStore
    from composition.refusal import Refused
    from retrieval import judge

    store = ProfileStore(tmp_path)
    digest = "0" * 64
    for file, read in {f"none-{digest[:20]}.json": lambda path: store.frequency(digest, "none"), "presence.json": judge.read_thresholds,
                       "confusion.json": wording._confusion, "my_lora_info.json": lambda path: testbed.read(str(path))}.items():  # fmt: skip
        path = tmp_path / file
        for content in (BAD[name], b'{"phrases": ["a"], "rows": ' + BAD[name] + b"}", b'[{"a": 1}]', b'{"phrases": 1, "rows": 2}', b"null"):
            path.write_bytes(content)
            with pytest.raises(Refused) as refused:
                read(path)
            assert file in str(refused.value) and len(str(refused.value)) < 900


PIECES = [b'"', b'\\', b'\\"', b"[", b"]", b"{", b"}", b",", b":", b"1", b"9" * 300, b"9" * 301, b"a", b" ", b'"x"', b'"9"', b"\xff", b"\n", b'"[[[{"', b"-1.5e3"]


@pytest.mark.parametrize("seed", range(8))
def test_the_quick_look_decides_as_the_long_one(seed, monkeypatch):
    """Texts of random pieces, and nested ones around the limits: what the quick look passes the count of tokens passes too."""
    dice = random.Random(seed)
    texts = [b"".join(dice.choices(PIECES, k=dice.randrange(60))) for _ in range(1500)]
    for depth in (62, 63, 64, 65, 66, 130):
        kinds = dice.choices(((b"[", b"]"), (b'{"a":', b"}")), k=depth)
        texts.append(b"".join(start for start, _ in kinds) + b"1" + b"".join(end for _, end in reversed(kinds)))
    monkeypatch.setattr(untrusted, "MAX_TOKENS", 40)

    def verdict(text):
        try:
            return untrusted._bounded(text)
        except Unreadable as error:
            return str(error)

    quick = [verdict(text) for text in texts]
    monkeypatch.setattr(untrusted, "SHORT", -1)
    assert quick == [verdict(text) for text in texts]
    assert any(quick) and not all(quick)
