"""`medley pull`, with the hub played by a stand-in: the licence is shown, a token asked for, and nothing fetched without it."""

from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import GatedRepoError
from rich.console import Console

from app.cli import pull
from composition import Refused
from composition.backbones.loading import catalog, hub
from composition.backbones.loading import open as opening


class Hub:
    """Answers for one gated or open repository; keeps what was asked of it."""

    def __init__(self, monkeypatch, tmp_path, *, gated, good="hf_good"):
        self.gated, self.good, self.kept, self.fetched = gated, good, [], []
        (tmp_path / "model").mkdir()
        (tmp_path / "model/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        monkeypatch.setattr(hub, "HfApi", lambda: self)
        monkeypatch.setattr(hub, "login", lambda token, **_: self.kept.append(token))
        monkeypatch.setattr(hub, "download", lambda name: self.fetched.append(name) or tmp_path / "model")
        self.said = Console(record=True, width=400)

    def model_info(self, repository, files_metadata):
        files = {"flux1-dev.safetensors": 24_000_000_000, "transformer/a.safetensors": 23_000_000_000, "ae.safetensors": 9, "README.md": 4,
                 "text_encoder_2/b.safetensors": 9_000_000_000, "transformer/config.json": 300}
        return SimpleNamespace(gated="auto" if self.gated else False, siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in files.items()],
                               card_data=SimpleNamespace(license="other", license_name="flux-1-dev-non-commercial-license", license_link="LICENSE.md"))

    def auth_check(self, repository, token=None):
        if self.gated and (token or (self.kept or [None])[-1]) != self.good:
            raise GatedRepoError("closed", response=httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co")))

    def text(self):
        return self.said.export_text()


def test_an_open_model_is_fetched_and_its_licence_shown(monkeypatch, tmp_path):
    there = Hub(monkeypatch, tmp_path, gated=False)
    assert pull.pull("flux-dev", there.said, None) == str(tmp_path / "model")
    assert there.fetched == ["black-forest-labs/FLUX.1-dev"]
    text = there.text()
    assert "32.0 GB, licence flux-1-dev-non-commercial-license" in text  # the parts of the folder, not the single file beside it
    assert "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md" in text
    assert "--model flux-dev" in text


def test_a_gated_one_asks_for_the_token_in_plain_words(monkeypatch, tmp_path):
    there, asked = Hub(monkeypatch, tmp_path, gated=True), []
    pull.pull("flux-dev", there.said, lambda words: asked.append(words) or " hf_good ")
    assert there.kept == ["hf_good"] and there.fetched and len(asked) == 1 and "Token" in asked[0]
    text = there.text()
    assert text.index("licence flux-1") < text.index("accept it there") and "settings/tokens" in text and "hf_good" not in text
    pull.pull("flux-dev", there.said, None)  # the token is kept: nobody is asked again


@pytest.mark.parametrize(("answer", "words"), [("", "no token was given"), ("hf_bad", "still closed")])
def test_nothing_is_fetched_without_a_token_that_opens_it(answer, words, monkeypatch, tmp_path):
    there = Hub(monkeypatch, tmp_path, gated=True)
    with pytest.raises(Refused, match=words):
        pull.pull("flux-dev", there.said, lambda _: answer)
    assert not there.fetched and not there.kept


def test_where_nobody_can_be_asked_it_says_what_to_do(monkeypatch, tmp_path):
    there = Hub(monkeypatch, tmp_path, gated=True)
    with pytest.raises(Refused, match="accept it there.*HF_TOKEN"):
        pull.pull("black-forest-labs/FLUX.1-dev", there.said, None)
    assert not there.fetched


def test_what_is_here_already_or_nowhere_is_told(monkeypatch, tmp_path):
    there = Hub(monkeypatch, tmp_path, gated=False)
    with pytest.raises(Refused, match="on this machine already"):
        pull.pull("pocket", there.said, None)
    with pytest.raises(Refused, match="there is no model 'fluxdev': did you mean flux-dev"):
        pull.pull("fluxdev", there.said, None)
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    with pytest.raises(Refused, match="not supported yet"):
        pull.pull("org/other", there.said, None)


def test_short_names_stand_for_hub_ids():
    for name, known in catalog.KNOWN.items():
        found = opening.find(name)
        assert (found.kind, found.source) == ("hub", known.repository)
