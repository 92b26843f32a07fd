"""`medley train gates` from the command line to a picture with its gates."""

import json

from composition.methods.shared import gating


def test_gates_are_learned_and_used(medley, toy, tmp_path):
    flags = ["--model", toy.model, "--pictures", 1, "--pairs", 1, "--steps", 3, "--rows", 2, "--out", tmp_path / "out"]
    files = sorted(str(path) for path in toy.loras.glob("*.safetensors"))[:3]
    done = medley("train", "gates", *files, *flags, "--kind", "rank")
    assert done.code == 0, done.err
    made = tmp_path / "out/gates.safetensors"
    assert gating.read(made).design.kind == "rank" and str(made) in done.out.replace("\n", "")
    again = medley("train", "gates", *files, *flags)
    assert again.code == 2 and "gates" in again.err, "a file is not written over"
    drawn = medley("generate", "a fox", *(part for file in files[:2] for part in ("--lora", json.dumps({"source": file}))), "--model", toy.model, "--steps", 2,
                   "--method", "autolora", "--option", f"gates={made}", "--masks")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "pictures/0000-gates.png").is_file()


def test_what_cannot_be_learned_from_is_refused(medley, toy, tmp_path):
    files = sorted(str(path) for path in toy.loras.glob("*.safetensors"))
    few = medley("train", "gates", files[0], "--model", toy.model, "--out", tmp_path / "out")
    assert few.code == 2 and "two LoRAs or more" in few.err
    kind = medley("train", "gates", "--kind", "soft", "--model", toy.model)
    assert kind.code == 2 and "choose layer, rank or element" in kind.err
