"""Suggestions from files that say nothing: Pocket's LoRAs under numbers for names, without metadata, found by their weights, their behaviour, and both.

``python -m tests.bench.suggest``: asks for the LoRAs of some prompts by weights alone, then draws 10 pictures of 8 steps with each (about 80 core-seconds for all)
and asks again.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from app.lora_library import Library

PROMPTS = {  # the bundled LoRAs that each calls for
    "a dragon in a neon city": {"dragon", "neon"}, "a raccoon and an owl in the forest": {"raccoon", "owl"},
    "a fox with a top hat, ink drawing": {"top_hat", "ink"}, "a wolf on the moon": {"wolf", "moon"}, "a unicorn riding a bicycle": {"unicorn", "bicycle"},
    "a hedgehog in the autumn wood": {"hedgehog", "autumn"}, "a rose": {"rose"}, "pixel art of a castle": {"pixel"}, "a scarf and sunglasses": {"scarf", "sunglasses"},
    "candy land": {"candy"}, "an umbrella in the rain": {"umbrella"}, "a submarine under the sea": set(), "a robot in the snow": set(),
    "a lion and a penguin in the desert": set(), "a castle at sunset": set(),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.suggest", description=__doc__)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ["MEDLEY_HOME"] = str(Path(place) / "home")
        import torch
        from safetensors.torch import load_file, save_file

        from app.cli.index import measuring
        from app.lora_library import Library
        from composition import bundled

        torch.set_num_threads(1)
        loras = bundled.path("pocket128/loras")
        names = sorted(path.stem for path in loras.glob("*.safetensors"))
        random.Random(3).shuffle(names)
        folder = Path(place) / "nameless"
        folder.mkdir()
        for number, name in enumerate(names):  # a little stronger, so that they are not the bundled ones by their hashes
            save_file({key: value * 1.001 for key, value in load_file(loras / f"{name}.safetensors").items()}, folder / f"{number:02d}.safetensors")
        bundled.BUNDLES["pocket"] = replace(bundled.BUNDLES["pocket"], loras="", profiles="nothing")  # the bundled ones say what they are
        library, begun = Library("pocket", [folder]), time.process_time()
        library.scan()
        library.read()
        print(library.write(), f"in {time.process_time() - begun:.1f} core-seconds")
        asked("weights", library, names)
        begun = time.process_time()
        print(library.write(measure=measuring(library)), f"in {time.process_time() - begun:.0f} core-seconds")
        asked("weights and behaviour", library, names)
        library.index.forget("weight")
        asked("behaviour", library, names)


def asked(evidence: str, library: "Library", names: Sequence[str]) -> None:
    right = wrong = missed = 0
    for prompt, wanted in PROMPTS.items():
        suggestions = library.suggest(prompt)
        named = {names[int(each.candidate.name)] for each in suggestions}
        right, wrong, missed = right + len(named & wanted), wrong + len(named - wanted), missed + len(wanted - named)
        print(f"{prompt}: " + (", ".join(f"{names[int(each.candidate.name)]} for {each.phrase!r} ({each.score:.1f})" for each in suggestions) or "none"))
    print(f"by {evidence}: {right} of {right + missed} LoRAs that the prompts call for, {wrong} others", flush=True)


if __name__ == "__main__":
    main()
