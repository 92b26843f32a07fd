"""What the catalogue costs: a library of generated files scanned, scanned again, searched by name and hash.

    python -m tests.bench.catalogue [--files 5000] [--folders 50] [--whole 20] [--json]

The files have headers as kohya's trainer writes them for SD 1.5 (792 tensors, training tags of 300 captions), the shapes of SD 1.5 at rank 16 and no
numbers (holes on the disk), one in three with the sidecars of ComfyUI-Lora-Manager and a picture. Names are looked up as `library.find` does
and as the catalogue does. `--whole` files of full size with random numbers are read whole: hashes and singular values.
"""

import argparse
import json
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from composition.loras import library
from composition.refusal import Refused
from retrieval.catalogue import Catalogue

RANK = 16
WIDTHS = (320, 640, 1280)
MEASURED = 30  # names of which the median is taken


def layers() -> dict[str, tuple[int, int]]:
    """Name to (inputs, outputs): 264 as of a LoRA of SD 1.5's UNet and text encoder in kohya's spelling."""
    shapes = {}
    for index in range(16):
        block, width = ("down", "up")[index % 2], WIDTHS[index // 2 % 3]
        path = f"lora_unet_{block}_blocks_{index // 4}_attentions_{index % 4}_transformer_blocks_0"
        for attention in ("attn1", "attn2"):
            for role in ("to_q", "to_k", "to_v", "to_out_0"):
                shapes[f"{path}_{attention}_{role}"] = (768 if attention == "attn2" and role in ("to_k", "to_v") else width, width)
        shapes |= {f"{path}_ff_net_0_proj": (width, 8 * width), f"{path}_ff_net_2": (4 * width, width), f"{path[:-23]}_proj_in": (width, width),
                   f"{path[:-23]}_proj_out": (width, width)}  # fmt: skip
    for index in range(12):
        path = f"lora_te_text_model_encoder_layers_{index}"
        shapes |= {f"{path}_self_attn_{role}": (768, 768) for role in ("q_proj", "k_proj", "v_proj", "out_proj")}
        shapes |= {f"{path}_mlp_fc1": (768, 3072), f"{path}_mlp_fc2": (3072, 768)}
    return shapes


LAYERS = layers()


def header(index: int) -> tuple[bytes, int]:
    """A header, its length before it, and the bytes of the numbers that follow."""
    table: dict[str, object] = {"__metadata__": {
        "ss_output_name": f"trained-{index}", "ss_base_model_version": "sd_v1", "ss_network_dim": str(RANK), "ss_network_alpha": str(RANK / 2),
        "ss_tag_frequency": json.dumps({f"10_{index}": {f"tag {tag} of {index}": tag % 50 + 1 for tag in range(300)}}),
        "ss_bucket_info": json.dumps({"buckets": {str(bucket): {"resolution": [512, 64 * bucket], "count": bucket} for bucket in range(40)}}),
    }}  # fmt: skip
    offset = 0
    for name, (inputs, outputs) in LAYERS.items():
        for end, shape in (("lora_down.weight", [RANK, inputs]), ("lora_up.weight", [outputs, RANK]), ("alpha", [])):
            size = 2
            for side in shape:
                size *= side
            table[f"{name}.{end}"] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text, offset


def generate(root: Path, count: int, folders: int) -> None:
    for index in range(count):
        path = root / f"folder {index % folders}" / f"lora {index}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        head, size = header(index)
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + size)
        if index % 3 == 0:
            document = {"model_name": f"Name {index}", "base_model": "SD 1.5", "tags": ["style"], "modelDescription": "<p>text</p>" * 100,
                        "civitai": {"trainedWords": [f"word {index}"], "images": [{"url": "https://example.com", "meta": {"prompt": "a" * 400}}] * 10}}
            path.with_name(f"lora {index}.metadata.json").write_text(json.dumps(document))
            path.with_name(f"lora {index}.preview.png").write_bytes(b"")
        os.utime(path, (10**9 + index, 10**9 + index))


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    try:
        call()
    except Refused:
        pass
    return time.perf_counter() - begun


def measure(count: int, folders: int, whole: int) -> dict[str, float]:
    seconds: dict[str, float] = {}
    with TemporaryDirectory() as home:
        root, catalogue = Path(home) / "loras", Catalogue(Path(home) / "catalogue.sqlite")
        generate(root, count, folders)
        processor = time.process_time()
        seconds["first scan, headers"] = timed(lambda: catalogue.scan([root]))
        seconds["  of it processor time"] = time.process_time() - processor
        seconds["scan again, nothing new"] = timed(lambda: catalogue.scan([root]))
        names = [f"lora {index * count // MEASURED}" for index in range(MEASURED)]
        time.sleep(2.2)  # folders that changed this moment are not believed
        for title, find in (("library", library.find), ("catalogue", catalogue.find)):
            find(names[0], "none", [root])
            seconds[f"a name, {title}"] = statistics.median(timed(lambda name=name, find=find: find(name, "none", [root])) for name in names)
        for title, find in (("catalogue", catalogue.find), ("library, first time", library.find)):
            seconds[f"a trainer's name, {title}"] = timed(lambda find=find: find(f"trained-{count - 1}", "none", [root]))
            seconds[f"a name that nothing has, {title.partition(',')[0]}"] = timed(lambda find=find: find("no such name", "none", [root]))
        seconds["all cards"] = timed(catalogue.cards)
        for index in range(whole):
            head, size = header(count + index)
            (root / "whole").mkdir(exist_ok=True)
            numbers = torch.randn(size // 2, generator=torch.Generator().manual_seed(index)).mul(0.01).half().numpy().tobytes()
            (root / "whole" / f"{index}.safetensors").write_bytes(head + numbers)
        catalogue.scan([root / "whole"])
        seconds[f"a file of {(len(head) + size) / 1e6:.0f} MB read whole"] = timed(lambda: catalogue.read([root / "whole"])) / max(whole, 1)
        seconds["a hash"] = timed(lambda: catalogue.by_hash("0123456789"))
        seconds["duplicates"] = timed(catalogue.duplicates)
        seconds["bytes of the catalogue a file"] = catalogue.file.stat().st_size / (count + whole)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--folders", type=int, default=50)
    parser.add_argument("--whole", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as `medley index` does
    rows = measure(options.files, options.folders, options.whole)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{options.files:,} files in {options.folders} folders, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for title, value in rows.items():
        print(f"{title:<44}{value:>10,.0f}" if "bytes" in title else f"{title:<44}{value:>12.4f} s")


if __name__ == "__main__":
    main()
