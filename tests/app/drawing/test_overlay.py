"""Where each concept is: drawn from the notes, saved by --masks, shown in the page's report."""

import numpy as np
from PIL import Image

from app.drawing import overlay
from app.ui import job_view
from composition import record

LEFT = [[255, 0], [255, 0]]


def test_a_mask_darkens_what_is_outside_and_a_map_colours_what_is_looked_at():
    picture = Image.new("RGB", (64, 64), (100, 150, 200))
    tiles = overlay.drawn(picture, {"masks": {"fox": {"map": LEFT, "mask": LEFT}}})
    assert [(name, what) for _, name, what in tiles] == [("fox", "where it is looked at"), ("fox", "its place")]
    changed = overlay.drawn(picture, {"clora": {"maps": "change"}, "masks": {"fox": {"map": LEFT, "mask": LEFT}}})
    assert [what for *_, what in changed] == ["what it changes", "its place"]
    heat, mask = (np.asarray(tile).astype(int) for tile, *_ in tiles)
    assert mask.shape == (256, 256, 3) and (mask[:, :120] == (100, 150, 200)).all() and (mask[:, 136:] < (30, 40, 55)).all()
    assert heat[128, 10, 0] > heat[128, 10, 2] + 100 and np.ptp(heat[128, 250]) < 3  # orange on the left, grey on the right
    assert overlay.drawn(picture, {}) == [] and overlay.sheet(picture, {"masks": {}}) is None
    assert len(overlay.drawn(picture, {"masks": {"fox": {"mask": LEFT}}})) == 1  # regions have no map


def test_masks_are_saved_beside_the_picture(medley, toy, tmp_path):
    bound = ["--lora", '{"source": "fox", "binds": "the fox"}', "--lora", '{"source": "owl", "region": [0, 0, 0.5, 1], "binds": "an owl"}']
    common = ["--model", toy.model, "--lora-dir", toy.loras, "--steps", 2, "--seed", 1]
    said = medley("generate", "the fox and an owl", *bound, *common, "--method", "clora-fast", "--masks")
    assert said.code == 0, said.err
    sheet = Image.open(tmp_path / "pictures/0000-masks.png")
    assert sheet.width > 4 * 256
    kept = record.details(tmp_path / "pictures/0000.png")
    assert kept.request.loras[1].region == (0.0, 0.0, 0.5, 1.0) and kept.request.loras[0].binds == "the fox"
    assert set(kept.notes["masks"]) == {"fox", "owl"}
    assert all(row == [255] * (len(row) // 2) + [0] * (len(row) // 2) for row in kept.notes["masks"]["owl"]["mask"])
    again = medley("generate", "--from", "pictures/0000.png", "--model", toy.model, "--lora-dir", toy.loras, "--out", "again")
    assert again.code == 0 and (tmp_path / "again/0000.png").read_bytes() == (tmp_path / "pictures/0000.png").read_bytes()
    assert "pictures/0000-masks.png  where each LoRA acts" in said.out and "on everywhere" not in said.out
    styled = medley("generate", "the fox and an owl, ink", *bound, "--lora", '{"source": "ink", "category": "style"}', *common, "--method", "regions", "--masks", "--out", "styled")
    assert styled.code == 0 and "on everywhere: fox, ink" in styled.out
    lost = medley("generate", "the fox", *bound[:2], *common, "--method", "regions", "--masks")
    assert lost.code == 0 and "no LoRA has a region, so method regions is the same as merge" in lost.out and "no masks" not in lost.out
    plain = medley("generate", "the fox", *bound[:2], *common, "--masks")
    assert plain.code == 0 and "no masks: method merge" in plain.out and not (tmp_path / "pictures/0002-masks.png").exists()


def test_words_that_are_not_there_are_refused_before_anything_is_made(medley, toy, tmp_path):
    said = medley("generate", "a hill", "--lora", '{"source": "fox", "binds": "the fox"}', "--model", toy.model, "--lora-dir", toy.loras,
                  "--steps", 2, "--method", "clora")
    assert said.code == 2 and "bound to 'the fox', which the prompt does not contain" in said.err
    assert not list((tmp_path / "pictures").glob("*.png"))


def test_the_page_shows_them(medley, toy, tmp_path):
    from composition import Engine, Lora, Request

    asked = Request("the fox and an owl", model=str(toy.model), method="clora-fast", steps=2,
                    loras=[Lora(str(toy.loras / "fox.safetensors"), binds="the fox"), Lora(str(toy.loras / "owl.safetensors"), binds="an owl")])
    with Engine.open(str(toy.model), device="cpu") as engine:
        result = engine.run(asked)
    told = job_view.report(result, tmp_path / "a.png", lambda path: f"/pictures/{path.name}")
    assert told.count("<figure>") == 4 and 'alt="fox: its place"' in told and "data:image/png;base64," in told
