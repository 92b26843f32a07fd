"""From a LoRA file to its vector: where the seconds go.

    python -m tests.bench.encode [--families flux,sdxl] [--megabytes 150] [--rounds 5] [--threads N]

Random half-precision LoRAs of every linear in the transformer blocks of FLUX.1 and SDXL, at the rank that comes nearest to the size; the file is
cached after the first round, which is not counted. `read` is safe reading: bytes, three hashes, every value looked at; `place` finds the layers;
`sketch` computes projections, norms and singular values; `encode` runs an encoder with random weights. Medians and the fastest round of all parts;
`cpu` is the processor time of a whole round, which says what a quiet machine would take where others work on this one.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from composition.backbones.loading import skeleton
from composition.loras import layers as layer_map
from composition.loras import reader
from composition.loras.safetensors import load_safely
from retrieval.linear import LinearEncoder, LinearSettings
from retrieval.ridge import DIRECTIONS, Reading
from retrieval.sketch import Sketch, named, sketched
from retrieval.tokens import layers

PARTS = ("read", "place", "sketch", "encode")


def write(path: Path, component: str, module: torch.nn.Module, megabytes: float) -> int:
    """A LoRA of about that size; returns its rank."""
    shapes = {name: layer_map.shape(layer)[:2] for name, layer in layer_map.layers(module).items() if "transformer_blocks" in name}
    rank = max(1, round(megabytes * 1e6 / 2 / sum(map(sum, shapes.values()))))
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, inputs) in shapes.items():
        tensors[f"{component}.{name}.lora_A.weight"] = (torch.randn(rank, inputs, generator=rng) / 50).half()
        tensors[f"{component}.{name}.lora_B.weight"] = (torch.randn(out, rank, generator=rng) / 50).half()
    save_file(tensors, path)
    return rank


def random_encoder(sketch: Sketch, family: str) -> LinearEncoder:
    """One that reads every layer of this sketch."""
    rng = torch.Generator().manual_seed(0)
    settings = LinearSettings({name: layer.shape for name, layer in layers([sketch]).items()}, family, family, "", 0, "sketches")
    maps = {name: torch.randn(sketch.side**2, DIRECTIONS, generator=rng) for name in settings.layers}
    return LinearEncoder(settings, dict.fromkeys(maps, Reading(None, None)), maps, torch.randn(DIRECTIONS, 512, generator=rng), torch.zeros(512))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="flux,sdxl")
    parser.add_argument("--megabytes", type=float, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads of torch, {options.rounds} rounds; seconds, median (fastest)")
    print(f"{'':22}" + "".join(f"{part:>16}" for part in (*PARTS, "all", "cpu")))
    with tempfile.TemporaryDirectory() as folder:
        for family in options.families.split(","):
            components = skeleton.of_family(family)
            component = next(iter(components))
            path = Path(folder) / f"{family}.safetensors"
            rank = write(path, component, components[component], options.megabytes)
            encoder, rows = None, []
            for _ in range(options.rounds + 1):
                stamps, start = [time.perf_counter()], time.process_time()
                raw = load_safely(path)
                stamps.append(time.perf_counter())
                lora = reader.read(path, components, family, raw=raw)
                stamps.append(time.perf_counter())
                sketch = sketched(named(lora.factors))
                stamps.append(time.perf_counter())
                encoder = encoder or random_encoder(sketch, family)
                encoder.encode([sketch])
                stamps.append(time.perf_counter())
                spans = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
                rows.append((*spans, stamps[-1] - stamps[0], time.process_time() - start))
                del raw, lora
            columns = zip(*rows[1:], strict=True)
            label = f"{family} {path.stat().st_size / 1e6:.0f} MB, rank {rank}"
            print(f"{label:22}" + "".join(f"{statistics.median(column):9.3f} ({min(column):.2f})" for column in columns), flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
