"""A form for every method's options, and back; cards from untrusted headers."""

import base64
import io
import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import gradio as gr
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from app.ui import forms
from app.ui.cards import cards, lacking, with_words
from composition import Refused, methods
from composition.methods import Method


def form(method):
    with gr.Blocks():
        return forms.form(method)


@pytest.mark.parametrize("name", methods.all())
def test_every_methods_form_at_its_defaults_says_nothing(name):
    method = methods.find(name)
    made = form(method)
    assert len(made) == len(fields(method.options))
    assert forms.options(method, [part.value for part in made]) == {}
    for part, item in zip(made, fields(method.options), strict=True):
        assert part.info == item.metadata["help"]
        assert part.elem_id == f"option-{name}-{item.name}"


@pytest.mark.parametrize("name", methods.all())
def test_every_option_that_is_changed_comes_back(name):
    method = methods.find(name)
    values = [part.value for part in form(method)]
    for place, item in enumerate(fields(method.options)):
        low, high = item.metadata.get("ge"), item.metadata.get("le")
        default = values[place]
        if isinstance(default, bool):
            other = not default
        elif isinstance(default, int | float):
            other = next(value for value in (high, low) if value is not None and value != default)
        else:
            continue
        assert forms.options(method, [*values[:place], other, *values[place + 1:]]) == {item.name: other}


@dataclass(frozen=True)
class Options:
    yes: bool = field(default=True, metadata={"help": "h"})
    few: int = field(default=3, metadata={"ge": 1, "le": 9})
    many: int = field(default=5, metadata={"ge": 1, "le": 1000})
    share: float = field(default=0.25, metadata={"ge": 0.0, "le": 1.0})
    odd: float = field(default=1 / 3, metadata={"ge": 0.0, "le": 1.0})
    free: float = 2.5
    word: str = "soft"
    kind: Literal["mean", "max"] = "mean"
    maybe: int | None = None
    each: tuple[float, ...] = (1.0, 2.0)
    table: dict[str, float] = field(default_factory=dict)


ANY = Method("any", "Any", "", lambda run, options: None, Options)  # type: ignore[arg-type, return-value]


def test_what_a_field_becomes():
    made = form(ANY)
    assert [type(part) for part in made] == [
        gr.Checkbox, gr.Slider, gr.Number, gr.Slider, gr.Number, gr.Number, gr.Textbox, gr.Dropdown, gr.Textbox, gr.Textbox,
        gr.Textbox]
    assert (made[1].minimum, made[1].maximum, made[1].step) == (1, 9, 1)
    assert made[3].step == pytest.approx(0.01)
    assert made[7].choices == [("mean", "mean"), ("max", "max")]
    assert forms.options(ANY, [part.value for part in made]) == {}


def test_answers_become_the_options_types():
    answers = [False, 4.0, 7, 1, 0.5, 3, "", "max", "6", "[1, 3]", '{"a": 1}']
    read = forms.options(ANY, answers)
    assert read == {"yes": False, "few": 4, "many": 7, "share": 1.0, "odd": 0.5, "free": 3.0, "word": "", "kind": "max",
                    "maybe": 6, "each": [1, 3], "table": {"a": 1}}
    assert type(read["few"]) is int and type(read["share"]) is float
    ANY.read(read)


@pytest.mark.parametrize(("place", "answer", "said"), [
    (1, 99, "must lie between"), (2, None, "option many is empty"), (1, 2.5, "few"), (7, "min", "kind"), (9, "1, 2", "not JSON"), (8, "six", "not a number"),
])
def test_a_wrong_answer_is_refused(place, answer, said):
    answers = [part.value for part in form(ANY)]
    answers[place] = answer
    with pytest.raises(Refused, match=said):
        forms.options(ANY, answers)


# cards ------------------------------------------------------------------------------------------------------------------


def lora(path: Path, **said: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({"x": torch.zeros(1)}, path, metadata=said)
    return path


def png(size=(300, 200), format="PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, format=format)
    return base64.b64encode(file.getvalue()).decode()


def test_cards_are_in_the_order_of_categories_and_names(tmp_path):
    files = [lora(tmp_path / "z.safetensors"), lora(tmp_path / "ink.safetensors", category="style", title="Ink"),
             lora(tmp_path / "b.safetensors", category="character", title="Owl", trigger_words="owl, bird"),
             lora(tmp_path / "c.safetensors", category="character", title="fox")]
    found = cards([*files, files[0]])
    assert list(found) == ["c", "b", "ink", "z"]
    assert (found["b"].title, found["b"].triggers, found["b"].source) == ("Owl", ("owl", "bird"), "b")
    assert found["z"].title == "z"


def test_files_of_one_name_are_told_apart_and_no_path_is_shown(tmp_path):
    files = [lora(tmp_path / folder / "owl.safetensors") for folder in "ab"]
    found = cards(files)
    assert [card.source for card in found.values()] == [str(file) for file in files]
    assert list(found) == ["owl (a)", "owl (b)"]
    assert all(str(tmp_path) not in str(card.shown()) for card in found.values())


def test_a_changed_file_is_read_again(tmp_path):
    path = lora(tmp_path / "a.safetensors", title="One")
    assert cards([path])["a"].title == "One"
    lora(path, title="Another")
    assert cards([path])["a"].title == "Another"


def test_a_preview_is_made_anew_and_small(tmp_path):
    found = cards([lora(tmp_path / "a.safetensors", preview=png())])["a"].preview
    kind, data = found.split(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.format == "PNG" and max(image.size) <= 128
    assert data != png()


@pytest.mark.parametrize("preview", [
    "no base64 !", base64.b64encode(b"no picture").decode(), "data:image/png;base64," + png(), png((4000, 4000)),
    png(format="BMP"), png()[:100], "A" * 3_000_000, "é",
])
def test_a_preview_that_cannot_be_trusted_is_left_out(tmp_path, preview):
    assert cards([lora(tmp_path / "a.safetensors", preview=preview)])["a"].preview == ""


def test_a_broken_file_says_so(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 20)
    found = cards([tmp_path / "a.safetensors", tmp_path / "gone.safetensors"])
    assert found["a"].trouble and found["gone"].trouble


def test_trigger_words_are_missed_and_added(tmp_path):
    fox, ink, mute = cards([lora(tmp_path / "a.safetensors", title="1", trigger_words="Fox, red fox"),
                            lora(tmp_path / "b.safetensors", title="2", trigger_words="ink drawing"),
                            lora(tmp_path / "c.safetensors", title="3")]).values()
    assert lacking("a fox", [fox, ink, mute]) == [ink]
    assert with_words("a fox, ", ["ink drawing", "FOX"]) == "a fox, ink drawing"
    assert with_words("", ["a", "b"]) == "a, b"
    assert lacking("a pink drawing of boxes", [fox, ink, mute]) == [fox, ink]
    assert with_words("a bowl", ["owl", "bowl"]) == "a bowl, owl"


def test_no_file_takes_the_others_down(tmp_path):
    """Unusual headers are read, and whatever else lies there is a card with its reason; names that are no text are sent as text."""
    header = b'{"__metadata__":null,"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    lora(tmp_path / "b.safetensors", title="B")
    os.mkfifo(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").symlink_to(tmp_path / "nowhere")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors"))
    lora(tmp_path / "e.safetensors").rename(odd)
    found = cards([*sorted(tmp_path.glob("[a-d].safetensors")), odd])
    assert {key: bool(card.trouble) for key, card in found.items()} == {"?": False, "a": False, "b": False, "c": True, "d": True}
    json.dumps([card.shown() for card in found.values()], ensure_ascii=False).encode()
