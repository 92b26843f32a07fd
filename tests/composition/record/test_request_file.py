"""A request as a JSON file: what is saved is read back, without the paths of this machine, and what is no request is refused."""

import pytest
from PIL import Image

from composition import Condition, Embedding, Lora, Refused, Request, pictures, record

PICTURE = pictures.as_text(Image.new("RGB", (8, 8), "red"), "a.png")
WHOLE = Request(prompt="a (fox:1.2) 🦊", negative="[dull]", loras=[Lora("fox", weight=0.5, binds="a fox"), Lora("ink", triggers=("ink",))], seed=2**64 - 1,
                conditions=[Condition("canny", PICTURE)], embeddings=[Embedding("words", "sks")], vae="org/vae", size=(64, 32), options={"tau": 3}, method="switch")


@pytest.mark.parametrize("request_", [Request(prompt="a"), WHOLE])
def test_what_is_saved_is_read_back(request_, tmp_path):
    path = record.save_request(request_, tmp_path / "new" / "a.json")
    assert record.read(path) == request_
    assert "\n  " in path.read_text(encoding="utf-8") and "🦊" in path.read_text(encoding="utf-8") or request_ is not WHOLE
    with pytest.raises(Refused, match="not overwritten"):
        record.save_request(request_, path)


def test_paths_stay_here_unless_they_are_asked_for(tmp_path):
    asked = Request(prompt="a", loras=[Lora("/home/me/fox.safetensors")], embeddings=[Embedding("/home/me/sks.safetensors", "w")], model="/home/me/model",
                    vae="/home/me/vae.safetensors")
    short = record.read(record.save_request(asked, tmp_path / "a.json"))
    assert (short.loras[0].source, short.embeddings[0], short.model, short.vae) == ("fox", Embedding("sks", "w"), "model/", "vae.safetensors")
    assert record.read(record.save_request(asked, tmp_path / "b.json", keep_paths=True)) == asked
    assert record.by_name(asked).embeddings[0].source == "sks"


def test_a_request_within_another_document_is_read(tmp_path):
    for number, text in enumerate(('{"request": {"prompt": "a fox", "seed": 3}}', '{"file_name": "0.png", "request": "{\\"prompt\\": \\"a fox\\", \\"seed\\": 3}"}')):
        (tmp_path / f"{number}.json").write_text(text)
        assert record.read(tmp_path / f"{number}.json") == Request(prompt="a fox", seed=3)


@pytest.mark.parametrize(("text", "said"), [
    ('{"prompt": "a", "sede": 3, "steps": 0}', "sede.*steps|steps.*sede"), ("[]", "list, not a request"), ("{", "JSON"), ('{"seed": 1}', "prompt"), ('{"request": 3}', "not a request"),
    ('{"prompt": "a", "schema_version": 99}', "newer Medley"), ("[" * 100_000, "deep|JSON"), ('{"prompt": "a", "embeddings": [{"source": ""}]}', "source"),
])  # fmt: skip
def test_what_is_no_request_is_refused(text, said, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Refused, match=said):
        record.read(tmp_path / "a.json")
    with pytest.raises(Refused, match=r"end in \.json"):
        record.save_request(Request(prompt="a"), tmp_path / "a.txt")


def test_what_a_picture_was_made_with_is_compared_by_hash():
    before = record.Record(Request(prompt="a"), notes={"vae": "a" * 64, "embeddings": {"sks": {"sha256": "b" * 64}, "other": 3}})
    now = {"vae": "c" * 64, "embeddings": {"sks": {"sha256": "d" * 64}}}
    lines = record.differences(before, {}, {}, notes=now)
    assert [line.split(" is not")[0] for line in lines] == ["textual inversion sks", "the VAE"] and "aaaaaaaaaaaa" in lines[1]
    assert record.differences(before, {}, {}, notes=before.notes) == []
