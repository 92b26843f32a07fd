"""Scenes drawn ahead are those drawn when asked for; the art stage and parcels."""

import json
import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from assets.recipe import art, parcel
from assets.recipe.drawing import Pool, Stock, drawn_ahead, each
from assets.recipe.previews import describe

CPU = torch.device("cpu")


def numbers(first, count):
    return np.arange(first, first + count, dtype=np.int16)[:, None].repeat(3, 1), np.arange(first, first + count, dtype=np.uint8)


def taken(stock, chunks):
    parts = []
    while len(parts) < chunks:
        if (part := stock.take(CPU)) is None:
            time.sleep(0.01)
        else:
            parts.append(part)
    return torch.cat([part[0][:, 0] for part in parts]).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stock_is_read_in_order(workers):
    stock, other = Stock(numbers, first=5, chunk=4, slots=2), Stock(numbers, chunk=2, chunks=3, slots=3)
    with drawn_ahead([other, stock], workers):
        assert taken(stock, 6) == list(range(5, 29))
        assert taken(other, 3) == list(range(6)) and other.take(CPU) is None


def test_a_stock_that_was_sent_to_another_process_is_the_same():
    stock = Stock(numbers, chunk=2, chunks=3, slots=3)
    with drawn_ahead([stock], 1):
        sent = pickle.loads(pickle.dumps(stock))
        assert taken(sent, 3) == list(range(6)) == taken(stock, 3)


def test_what_a_worker_cannot_draw_is_said(capfd):
    with drawn_ahead([stock := Stock(lambda first, count: numbers(first, 1 if count == 1 else 1 / 0), chunk=2)], 1):
        with pytest.raises(RuntimeError, match="stopped"):
            taken(stock, 1)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_pool_holds_what_enters_and_lets_the_oldest_go():
    pool = Pool(Stock(numbers, chunk=4), CPU, limit=8, enter=lambda a, b: (a.float(), b), seen=1)
    batches = pool.batches(4)
    for _ in range(5):
        values, same = next(batches)
        assert values.dtype == torch.float32 and torch.equal(values[:, 0], same.float())
    assert pool.count > 8 and pool.rows[1].min() >= pool.count - 8


def test_each_keeps_the_order_and_raises_what_was_raised():
    assert each(lambda i: i * i, range(7), 3) == [i * i for i in range(7)]
    with pytest.raises(ZeroDivisionError):
        each(lambda i: 1 / (i - 2), range(4), 2)


def test_a_parcel_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(parcel, "PART", 30_000)
    source, target, out = (tmp_path / name for name in ("source", "target", "out"))
    (source / "deep").mkdir(parents=True)
    target.mkdir()
    save_file({"a": torch.randn(300, 99).half()}, source / "deep/a.safetensors")
    (source / "odd").write_bytes(b"one")
    parts = parcel.pack(source, [source / "odd", source / "deep/a.safetensors"], target, "both")
    assert len(parts) == 2 and all(part.stat().st_size <= 30_000 for part in parts)
    parcel.unpack(target, "both", out)
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in ("odd", "deep/a.safetensors"))


def test_art_is_rendered_from_the_packages(tmp_path):
    pytest.importorskip("resvg_py")
    code, drawing = art.own()[0], '<rect x="2" y="2" width="12" height="12" fill="#f00"/>'
    for package in art.VECTOR.values():
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "chars.json").write_text(json.dumps({f"{code}-fe0f": "red"}))
        (tmp_path / package / "icons.json").write_text(json.dumps({"icons": {"square": {"body": drawing}}, "aliases": {"red": {"parent": "square"}},
                                                                   "height": 16}))  # fmt: skip
    names, rendered = tmp_path / art.NAMES, tmp_path / art.RENDERED
    names.parent.mkdir(parents=True)
    names.write_text(json.dumps([{"hexcode": code.upper(), "group": 3}]))
    rendered.mkdir(parents=True)
    Image.new("RGBA", (256, 256), (0, 255, 0, 255)).save(rendered / f"{code}.webp")
    art.make(tmp_path, tmp_path / "made", 64)
    for vendor, colour in (("noto", (255, 0, 0)), ("fluent", (0, 255, 0))):
        picture = Image.open(tmp_path / "made" / art.ART[vendor].format(code)).convert("RGBA")
        assert picture.size == (80, 80) and picture.getpixel((40, 40))[3] == 255
        assert np.abs(np.subtract(picture.getpixel((40, 40))[:3], colour)).max() < 8


def test_a_header_is_described_and_the_tensors_stay(tmp_path):
    from safetensors import safe_open

    file, value = tmp_path / "a.safetensors", torch.randn(3, 5)
    save_file({"a": value}, file, metadata={"title": "A", "b": "c"})
    describe(file, {"preview": "häh"})
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"b": "c", "preview": "häh", "title": "A"} and torch.equal(opened.get_tensor("a"), value)
