"""Forward time of K LoRAs over the bare base: stock PEFT against Medley's dense, one-hot and folded adapters.

    python -m tests.bench.adapters [--pairs 15] [--ranks 16] [--adapters 1,3,5,8] [--dtype float32] [--device cpu]

A UNet of SD1.5's true size with random weights (one set of base weights, shared by both), batch 2, 32x32 latents, LoRAs
on attention and feed-forward. Outputs are checked equal before anything is timed; the arms are interleaved, a round of
all of them at a time, and each ratio is of one round: noise that lasts longer than a round cancels.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

from composition.adapters import Adapters
from composition.request import Lora

SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2,
}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")


def write(folder: Path, unet: torch.nn.Module, count: int, rank: int) -> list[Path]:
    """LoRA files with random factors for every target layer."""
    files = []
    for index in range(count):
        rng = torch.Generator().manual_seed(index)
        tensors = {}
        for path, module in unet.named_modules():
            if path.endswith(TARGETS) and isinstance(module, torch.nn.Linear):
                tensors[f"unet.{path}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=rng) * 0.02
                tensors[f"unet.{path}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=rng) * 0.02
        files.append(folder / f"lora{index}.safetensors")
        save_file(tensors, files[-1])
    return files


def stock(unet: torch.nn.Module, files: list[Path], rank: int) -> Callable[[list[str]], None]:
    """The same LoRAs as PEFT layers; returns what `set_adapters` does on a diffusers model."""
    from safetensors.torch import load_file

    for file in files:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)), unet, file.stem)
        values = {key.removeprefix("unet."): value for key, value in load_file(file).items()}
        for path, module in unet.named_modules():
            if hasattr(module, "lora_A"):
                module.lora_A[file.stem].weight.data.copy_(values[f"{path}.lora_A.weight"])
                module.lora_B[file.stem].weight.data.copy_(values[f"{path}.lora_B.weight"])
    unet._hf_peft_config_loaded = True
    return lambda names: unet.set_adapters(names, [1.0] * len(names))


def apart(unet: torch.nn.Module) -> torch.nn.Module:
    """The same model with the touched weights copied, all others shared."""
    with torch.device("meta"):
        copy = UNet2DConditionModel(**SD15).eval()
    state = {name: value.clone() if name.rpartition(".")[0].endswith(TARGETS) else value
             for name, value in unet.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    return copy


def clock(call: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", default="1,3,5,8")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side", type=int, default=32, help="latent height and width")
    asked = parser.parse_args()
    dtype, counts = getattr(torch, asked.dtype), [int(k) for k in asked.adapters.split(",")]

    torch.manual_seed(0)
    with torch.device(asked.device):
        base = UNet2DConditionModel(**SD15).to(dtype).eval().requires_grad_(False)
    parameters = sum(p.numel() for p in base.parameters())
    print(f"UNet of {parameters:,} parameters, {asked.dtype} on {asked.device}, batch 2, {asked.side}x{asked.side} latents, "
          f"rank {asked.rank}, {asked.pairs} rounds, {torch.get_num_threads()} threads")
    sample = torch.randn(2, 4, asked.side, asked.side, device=asked.device, dtype=dtype)
    text = torch.randn(2, 77, 768, device=asked.device, dtype=dtype)

    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            files = write(Path(folder), base, count, asked.rank)
            with torch.device("meta"):
                rival = UNet2DConditionModel(**SD15).eval()
            rival.load_state_dict(base.state_dict(), assign=True)
            activate = stock(rival.requires_grad_(False), files, asked.rank)
            with torch.device("meta"):
                bare = UNet2DConditionModel(**SD15).eval()
            bare.load_state_dict(base.state_dict(), assign=True)
            names = [file.stem for file in files]
            activate(names)

            adapters = Adapters({"unet": base}, family="sd", block=lambda _: "")
            sources = [(file.stem, Lora(str(file)), file) for file in files]
            with adapters.session(sources):
                measure(asked, adapters, names, base, bare, rival, activate, sample, text)
            adapters.close()


def measure(asked, adapters, names, base, bare, rival, activate, sample, text) -> None:
    def forward(unet):
        return unet(sample, 500, encoder_hidden_states=text, return_dict=False)[0]

    weights = dict.fromkeys(names, 1.0)
    one_hot = [{names[row % len(names)]: 1.0} for row in range(2)]
    expected = forward(rival)
    size = expected.abs().max()
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2

    def check(what, value):
        gap = float((value - expected).abs().max() / size)
        assert gap < tolerance, f"{what} differs from stock PEFT by {gap:.2g} of the largest value"

    adapters.use(weights)
    check("dense", forward(base))
    assert float((forward(bare) - expected).abs().max() / size) > tolerance, "the LoRAs change nothing"
    # One LoRA a row: row by row against stock PEFT with that LoRA alone.
    with adapters.rows(one_hot):
        rows = forward(base)
    for row, use in enumerate(one_hot):
        activate(list(use))
        alone = forward(rival)[row]
        assert float((rows[row] - alone).abs().max() / size) < tolerance, "one-hot rows differ from stock PEFT"
    activate(names)

    ratios: dict[str, list[float]] = {"stock PEFT": [], "dense": [], "one-hot rows": [], "folded": [], "base again": []}
    begun = time.perf_counter()
    with adapters.folded(weights):
        # The folded weights, kept to be lent to a third model: folding and unfolding is no part of a forward.
        folding = time.perf_counter() - begun
        folded = apart(base)
    adapters.use(weights)
    check("folded", forward(folded))
    for _ in range(asked.pairs):
        plain = clock(lambda: forward(bare))
        ratios["stock PEFT"].append(clock(lambda: forward(rival)) / plain)
        ratios["dense"].append(clock(lambda: forward(base)) / plain)
        with adapters.rows(one_hot):
            ratios["one-hot rows"].append(clock(lambda: forward(base)) / plain)
        ratios["folded"].append(clock(lambda: forward(folded)) / plain)
        ratios["base again"].append(clock(lambda: forward(bare)) / plain)

    switch = [clock(lambda i=i: activate([names[i % len(names)]])) for i in range(9)]
    adapters_switch = [clock(lambda i=i: adapters.use({names[i % len(names)]: 1.0})) for i in range(99)]
    print(f"\nK = {len(names)}   forward time over the bare base: median (quartiles)")
    for arm, values in ratios.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        print(f"  {arm:20} {statistics.median(values):.3f}  ({low:.3f} to {high:.3f})")
    ours, theirs = statistics.median(adapters_switch), statistics.median(switch)
    print(f"  switch the live LoRA: set_adapters {theirs * 1e3:.2f} ms, gates {ours * 1e3:.3f} ms: {theirs / ours:.0f}x faster")
    print(f"  fold all: {folding:.1f} s, once per set of weights")


if __name__ == "__main__":
    main()
