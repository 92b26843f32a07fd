"""Maps to masks: threshold, closing, overlap, shares, regions."""

import numpy as np
import pytest
import torch
from PIL import Image

from composition import Lora, Refused
from composition.hooks import masks


def test_claimed_is_any_token_over_its_own_maximum():
    maps = torch.tensor([[[[1.0, 0.3], [0.5, 0.0]], [[0.1, 0.2], [0.05, 0.09]]]])  # one picture, two tokens
    assert masks.claimed(maps, 0.4).tolist() == [[[1, 1], [1, 1]]]
    assert masks.claimed(maps[:, :1], 0.4).tolist() == [[[1, 0], [1, 0]]]
    assert masks.claimed(maps[:, 1:], 0.4).tolist() == [[[1, 1], [0, 1]]]


def test_10_a_constant_map_gives_no_nan():
    flat = torch.full((1, 2, 4, 4), 0.3)
    assert masks.normalised(flat).eq(0).all() and masks.claimed(flat, 0.4).eq(1).all()
    assert masks.claimed(torch.zeros(1, 1, 4, 4), 0.4).eq(0).all()


@pytest.mark.parametrize("size", [(4, 6), (2, 3), (1, 2)])
def test_changes_are_the_positive_rows_difference_to_the_base(size):
    """By loops over places and channels, on a picture of 4 x 6 places; what the negative row does is nothing to it."""
    values = torch.randn(3, 2, 2, 5, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # N R B C H W
    found = masks.changes(values, size)
    assert found.shape == (2, 2, *size)
    tall, wide = 4 // size[0], 6 // size[1]
    for b, k, y, x in np.ndindex(*found.shape):
        inside = []
        for i, j in np.ndindex(tall, wide):
            apart = values[k + 1, 1, b, :, y * tall + i, x * wide + j] - values[0, 1, b, :, y * tall + i, x * wide + j]
            inside.append(float(sum(float(c) ** 2 for c in apart) / 5) ** 0.5)
        assert float(found[b, k, y, x]) == pytest.approx(sum(inside) / len(inside), rel=1e-12)
    other = values.clone()
    other[:, 0] += 1
    assert masks.changes(other, size).equal(found)


def test_a_place_is_led_by_whose_strength_stands_out_there_however_strong_it_is():
    """Two spots of equal shape, one concept ten times as strong as the other, which never is the larger of the two."""
    strength = torch.full((1, 2, 4, 8), 1.0)
    strength[0, 0, 1:3, 1:3], strength[0, 1, 1:3, 5:7] = 1.2, 1.2
    strength[0, 0] *= 10
    found = masks.leading(masks.standing(strength))
    assert found.sum(1).eq(1).all(), "somebody leads everywhere, and nobody beside him"
    assert found[0, 0, 1:3, 1:3].eq(1).all() and found[0, 1, 1:3, 5:7].eq(1).all()
    assert masks.standing(torch.full((1, 1, 4, 4), 3.0)).eq(0).all()


def test_closed_fills_a_hole_and_keeps_what_is_apart():
    ring = torch.zeros(1, 1, 7, 7)
    ring[0, 0, 1:4, 1:4] = 1
    ring[0, 0, 2, 2] = 0
    closed = masks.closed(ring)
    assert closed[0, 0, 2, 2] == 1 and closed.sum() == 9
    corner = torch.zeros(1, 1, 4, 4)
    corner[..., :2, :2] = 1
    assert masks.closed(closed).equal(closed) and masks.closed(corner).equal(corner)


@pytest.mark.parametrize("soft", [0.0, 1.5])
@pytest.mark.parametrize("size", [(8, 8), (20, 12), (3, 5), (4, 4)])
def test_11_shares_part_every_place(size, soft):
    generator = torch.Generator().manual_seed(1)
    found = (torch.rand(2, 3, 4, 4, generator=generator) > 0.6).float()
    shares = masks.shares(masks.resized(found, size, soft=soft))
    assert shares.shape == (2, 4, *size) and (shares >= 0).all()
    assert torch.allclose(shares.sum(1), torch.ones(2, *size))
    if not soft and size == (4, 4):
        nobody = found.sum(1) == 0
        assert nobody.any() and shares[:, 0][nobody].eq(1).all() and shares[:, 0][~nobody].eq(0).all()
        both = found[:, 0].bool() & found[:, 1].bool() & ~found[:, 2].bool()
        assert both.any() and shares[:, 1][both].eq(0.5).all() and shares[:, 2][both].eq(0.5).all()


def test_grown_on_every_side():
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 0, 2] = 1
    assert masks.grown(point, 1)[0, 0].sum() == 6 and masks.grown(point, 1)[0, 0, :2, 1:4].eq(1).all()


def test_parted_gives_a_place_to_the_strongest():
    found = torch.tensor([[[[1.0, 1.0, 0.0]], [[1.0, 1.0, 1.0]]]])
    strength = torch.tensor([[[[0.9, 0.2, 0.9]], [[0.1, 0.8, 0.1]]]])
    assert masks.parted(found, strength).tolist() == [[[[1, 0, 0]], [[0, 1, 1]]]]


def test_equal_claims_share_a_place_whatever_their_order():
    strength = torch.tensor([0.7, 0.7 + 1e-12, 0.6, 0.7]).view(1, 4, 1, 1)
    claims = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 4, 1, 1)
    assert masks.parted(claims, strength).flatten().tolist() == [1, 1, 0, 0]
    assert masks.parted(claims.flip(1), strength.flip(1)).flatten().tolist() == [0, 0, 1, 1]
    assert masks.shares(masks.parted(claims, strength)).flatten().tolist() == [0, 0.5, 0.5, 0, 0]
    outside = torch.full((1, 2, 1, 1), -torch.inf)
    assert not masks.leading(outside).any() and masks.leading(outside.index_fill(1, torch.tensor(1), torch.inf)).flatten().tolist() == [0, 1]


def test_a_box_covers_places_in_part():
    mask = masks.region(Lora("a", region=(0.0, 0.25, 0.375, 1.0)), (4, 4))
    assert torch.allclose(mask, torch.tensor([0.0, 1, 1, 1])[:, None] * torch.tensor([1, 0.5, 0, 0])[None])
    assert masks.region(Lora("a", region=(0, 0, 1, 1)), (3, 5)).eq(1).all()
    thin = masks.region(Lora("a", region=(0.5, 0.0, 0.51, 1.0)), (4, 4))
    assert thin.sum(1).allclose(torch.full((4,), 0.04))  # 0.01 of the width is 0.04 of a quarter


def test_a_mask_image_of_any_size(tmp_path):
    grey = np.zeros((30, 50), np.uint8)
    grey[:, 25:] = 255
    Image.fromarray(grey).save(tmp_path / "mask.png")
    mask = masks.region(Lora("a", region=str(tmp_path / "mask.png")), (6, 10))
    assert mask[:, :5].eq(0).all() and mask[:, 5:].eq(1).all()


def test_a_mask_image_that_is_none_is_refused(tmp_path):
    (tmp_path / "no.png").write_text("no picture")
    for path in (tmp_path / "no.png", tmp_path / "missing.png", tmp_path):
        with pytest.raises(Refused, match="no picture that can be read"):
            masks.region(Lora("a", region=str(path)), (4, 4))


def test_blur_keeps_the_whole_and_the_even():
    point = torch.zeros(1, 1, 15, 15)
    point[0, 0, 7, 7] = 1.0
    soft = masks.blurred(point, 1.0)
    assert soft.sum() == pytest.approx(1.0, abs=1e-5) and soft.max() < 0.2 and soft.equal(soft.flip(-1))
    assert masks.blurred(torch.ones(1, 2, 5, 5), 2.0).allclose(torch.ones(1, 2, 5, 5))
