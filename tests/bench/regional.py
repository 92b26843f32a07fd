"""What places cost at FLUX.1's true width, random weights: time and memory of one evaluation with K LoRAs, each at its place.

    python -m tests.bench.regional [--sizes 2,3] [--pixels 1024] [--tokens 512] [--double 1] [--single 2] [--rounds 2] [--device cpu] [--dtype float32]

Blocks are alike, so a few of FLUX.1's 19 double and 38 single ones (twice as many single as double, as here) tell the whole's ratio. Merge is
the same LoRAs everywhere. Places read K + 1 prompts, one after the other, under a bias on attention; both are asked in turn in the same rounds.
Memory is over the weights: on a GPU what PyTorch allocated at most, on a processor the resident set's peak.
"""

import argparse
import statistics
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
from diffusers import FluxTransformer2DModel

from composition import Lora, Request
from composition.adapters import Adapters
from composition.backbones.flux import FluxBackbone
from composition.loop import Conditioning, Step
from composition.run import Pass, Run
from tests.bench.clora import WORDS, Resident
from tests.bench.cmlora import ATTENTION, lora

# Every attention projection, and the single blocks' feed-forward.
ENDS = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", ".proj_mlp", ".proj_out")


@contextmanager
def memory(device):
    """The peak of a block in MiB over what there was, in a list."""
    found = []
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        torch.cuda.synchronize()
        found.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    else:
        with Resident() as resident:
            yield found
        found.append(resident.extra)


def measured(transformer, given, count, folder):
    """Print Merge's and the regional evaluation's time and memory with this many LoRAs."""
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    backbone = FluxBackbone(SimpleNamespace(transformer=transformer, scheduler=None, _execution_device=device))
    adapters = Adapters({"transformer": transformer}, family="flux", block=backbone.block, axis=backbone.axis)
    names = WORDS[:count]
    files = [lora(transformer, folder / f"{name}.safetensors", k, "transformer", ENDS) for k, name in enumerate(names)]
    loras = [Lora(name, binds=name) for name in names]
    request = Request(" and ".join(names), loras=loras, method="clora-fast", guidance=3.5)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with adapters.session(list(zip(names, loras, files, strict=True))):
        run = Run(backbone, adapters, request, SimpleNamespace(), [])
        conds = [Conditioning({"text": drawn(1, 1, given.tokens, 4096), "pooled": drawn(1, 1, 768), "guidance": torch.full((1, 1), 3.5, device=device)})
                 for _ in range(count + 1)]
        step = Step(0, 28, torch.tensor(500.0, device=device), drawn(1, 16, given.pixels // 8, given.pixels // 8))
        shares = torch.zeros(1, count + 1, given.pixels // 8, given.pixels // 8, device=device, dtype=dtype)
        for k, columns in enumerate(torch.arange(given.pixels // 8).tensor_split(count + 1)):
            shares[:, k, :, columns] = 1.0
        whole = dict.fromkeys(names, 1.0)
        passes = [Pass({}, conds[0]), *(Pass({name: 1.0}, cond) for name, cond in zip(names, conds[1:], strict=True))]
        ways = {"merge": lambda: run.denoise(step, whole, conds[0]), "regional": lambda: run.denoise_regional(step, passes, shares)}
        times, peaks = {way: [] for way in ways}, {way: [] for way in ways}
        for turn in range(given.rounds + 1):
            for way, call in ways.items():
                begun = time.perf_counter()
                with memory(device) as peak:
                    assert call().isfinite().all()
                if turn:  # the first warms up
                    times[way].append(time.perf_counter() - begun)
                    peaks[way] += peak
    took, held = ({way: statistics.median(values) for way, values in table.items()} for table in (times, peaks))
    print(f"K = {count}, {given.pixels} px, {given.tokens} tokens a prompt: regional {took['regional'] / took['merge']:.2f} of Merge's time "
          f"({took['merge']:.2f} s for {given.double} + {given.single} blocks), peak {held['regional']:.0f} MiB against {held['merge']:.0f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="2,3")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(given.device):
        transformer = FluxTransformer2DModel(num_layers=given.double, num_single_layers=given.single, guidance_embeds=True)
    transformer = transformer.to(getattr(torch, given.dtype)).eval().requires_grad_(False)
    with TemporaryDirectory() as folder, torch.no_grad():
        for size in given.sizes.split(","):
            measured(transformer, given, int(size), Path(folder))


if __name__ == "__main__":
    main()
