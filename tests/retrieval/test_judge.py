"""Scores: thresholds keep their false positives, the judge opens as open-clip does and says no in plain words."""

import pytest
import torch
from PIL import Image

from composition import Refused
from retrieval.judge import Judge, Threshold, read_thresholds, threshold, write_thresholds


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_a_threshold_lets_no_more_pass_than_said(share):
    generator = torch.Generator().manual_seed(0)
    without, with_it = torch.randn(400, generator=generator), torch.randn(300, generator=generator) + 2
    found = threshold(without, with_it, share)
    assert share - 0.01 < found.false_positives <= share + 1e-6
    assert found.recall == pytest.approx((with_it >= found.score).float().mean().item())
    lower = torch.nextafter(torch.tensor(found.score), torch.tensor(-9.0))
    assert ((without >= lower).float().mean() > share) or share == 0.0


def test_equal_scores_do_not_slip_through():
    found = threshold(torch.tensor([0.1] * 90 + [0.5] * 10), torch.tensor([0.5, 0.6]))
    assert found.false_positives == 0 and found.recall == 0.5


def test_thresholds_come_back_as_they_were(tmp_path):
    table = {"a fox": Threshold(0.1234567890123, 0.5, 0.05), "on the moon": Threshold(-0.25, 1.0, 0.0)}
    write_thresholds(tmp_path / "t.json", table)
    assert read_thresholds(tmp_path / "t.json") == table


@pytest.mark.parametrize("names", [["open_clip_pytorch_model.bin"], ["weights.pt"], ["open_clip_pytorch_model.bin", "model.safetensors"]])
def test_a_folder_whose_weights_would_be_unpickled_is_refused_unread(tmp_path, names, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(Refused, match="may run code"):
        Judge.open(str(tmp_path))


def test_an_unknown_model_is_refused_in_plain_words():
    with pytest.raises(Refused, match="no-such-model"):
        Judge.open("no-such-model")
    with pytest.raises(Refused, match="did you mean.*'ViT-B-32'"):
        Judge.open("ViTB-32:openai")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32:", "ViT-B-32:openay"])
def test_a_model_without_weights_is_refused_not_scored_at_random(name):
    """open-clip would make one with random weights."""
    with pytest.raises(Refused, match="say which weights.*openai"):
        Judge.open(name)


class Recording(torch.nn.Module):
    """Stands for a model: refuses what is not where its weights are, and answers with ones."""

    context_length = 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def encode_image(self, batch):
        assert batch.device == self.weight.device, f"pictures on {batch.device}, weights on {self.weight.device}"
        return torch.ones(len(batch), 3)

    encode_text = encode_image


def test_what_is_asked_goes_where_the_model_is():
    """Also when it was moved after the judge was made; answers are on the CPU."""
    model = Recording()
    judge = Judge(model, lambda picture: torch.zeros(3, 8, 8), lambda texts: torch.zeros(len(texts), 4, dtype=torch.long))
    for device in ("cpu", "meta"):
        model.to(device)
        assert judge.device == torch.device(device)
        assert judge.cosine([Image.new("RGB", (8, 8))], [f"a fox on {device}"]).device.type == "cpu"


def test_presence_needs_a_threshold():
    judge = Judge(torch.nn.Linear(1, 1), None, None, {"a fox": Threshold(0.0, 1.0, 0.05)})
    with pytest.raises(Refused, match="a zebra"):
        judge.present([], ["a fox", "a zebra"])
