"""What conditions cost at FLUX.1's true width, random weights: time and counted multiply-adds of one evaluation over the plain one's.

    python -m tests.bench.easycontrol [--counts 1,2] [--pixels 1024] [--tokens 512] [--condition 512] [--double 1] [--single 2] [--rank 128]
                                      [--rounds 3] [--device cpu] [--dtype bfloat16] [--counted]

Three ways to read the same conditions, each of (condition / 16)^2 tokens, with a condition LoRA on them: "one pass" puts them into every
evaluation, under a mask; "as published" keeps keys, values and attention outputs, and still takes the conditions' tokens through every linear
layer and feed-forward of every evaluation, as EasyControl's code does; "banks" is Medley's, which appends keys and values and nothing else. Each is
asked in turn in the same rounds, plain first; ratios are medians of those within a round. All three answer alike, which is checked. Blocks are
alike, so a few of FLUX.1's 19 double and 38 single ones (twice as many single as double, as here) tell the whole's ratio. "extraction" is what
filling the banks takes, once a picture and for all its steps. Multiply-adds are counted by PyTorch's own counter; --counted does nothing else, in
seconds on any machine, for all 19 and 38 blocks with --double 19 --single 38.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from composition.backbones.flux import FluxBackbone, packed, places
from composition.conditions import spatial_ids
from composition.hooks.banks import Appended, Banks, Update
from composition.loop import Conditioning
from tests.gpu import clock

LAYERS = ("to_q", "to_k", "to_v", "to_out.0")  # with a condition's LoRA; the last acts on its output


class Whole:
    """All tokens in one evaluation, written out: the text's, the picture's, and each condition's, in parts with a time of their own.

    Once `kept` is filled, conditions neither project keys and values with their LoRA nor attend; their tokens go on through the layers.
    """

    def __init__(self, transformer: Any, updates: Sequence[Mapping[str, Update]]) -> None:
        self.transformer, self.updates = transformer, updates
        self.keeping = False
        self.kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def __call__(self, latents: Tensor, t: Tensor, cond: Conditioning, tokens: Sequence[Tensor], ids: Sequence[Tensor]) -> Tensor:
        model = self.transformer
        pooled, guidance = cond.values["pooled"][0].to(latents), cond.values["guidance"][0].to(latents) * 1000
        temb = [model.time_text_embed(time, guidance, pooled) for time in (t.to(latents).expand(1), t.new_zeros(1).to(latents))]
        text, parts = model.context_embedder(cond.values["text"][0]), [model.x_embedder(packed(latents)), *(model.x_embedder(some) for some in tokens)]
        everywhere = torch.cat([text.new_zeros(text.shape[1], 3), places(latents), *(some.to(text) for some in ids)])
        rotary = model.pos_embed(everywhere)
        lengths = [text.shape[1], *(part.shape[1] for part in parts)]
        mask = self._mask(lengths, text)
        for index, block in enumerate(model.transformer_blocks):
            text, parts = self._double(f"transformer_blocks.{index}.attn", block, text, parts, temb, rotary, mask)
        for index, block in enumerate(model.single_transformer_blocks):
            text, parts = self._single(f"single_transformer_blocks.{index}.attn", block, text, parts, temb, rotary, mask)
        return model.proj_out(model.norm_out(parts[0], temb[0]))

    @property
    def _cached(self) -> bool:
        return bool(self.kept) and not self.keeping

    def _mask(self, lengths: Sequence[int], like: Tensor) -> Tensor | None:
        if self._cached:
            return None
        own = lengths[0] + lengths[1]
        mask = like.new_full((sum(lengths), sum(lengths)), -torch.inf)
        mask[:own] = 0
        start = own
        for length in lengths[2:]:
            mask[start : start + length, start : start + length] = 0
            start += length
        return mask

    def _projected(self, path: str, attn: Any, x: Tensor, number: int, added: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value (1, N, heads, d). number: of the condition, -1 for text and picture."""
        layers, norms = (("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)) if added else (
            LAYERS[:3], (attn.norm_q, attn.norm_k))
        q, k, v = (self._linear(f"{path}.{layer}", attn.get_submodule(layer), x, number).unflatten(-1, (attn.heads, -1)) for layer in layers)
        return norms[0](q), norms[1](k), v

    def _linear(self, path: str, layer: Any, x: Tensor, number: int) -> Tensor:
        y = layer(x)
        skipped = self._cached and not path.endswith(LAYERS[3])  # in the published code the LoRA of the output alone is still computed
        update = self.updates[number].get(path) if number >= 0 and not skipped else None
        return y if update is None else update(x, y)

    def _attend(self, path: str, projected: Sequence[tuple[Tensor, Tensor, Tensor]], rotary: Any, mask: Tensor | None) -> list[Tensor]:
        """Each part's attention output (1, N, width): of text and picture over all, of a condition over itself."""
        lengths = [part[0].shape[1] for part in projected]
        q, k, v = (torch.cat([part[i] for part in projected], 1) for i in range(3))
        own = lengths[0] + lengths[1] if self._cached else None
        if self._cached:
            kept = self.kept[path]
            k, v = (torch.cat([some[:, :own], *(part[i] for part in kept)], 1) for i, some in enumerate((k, v)))
            q = q[:, :own]
        cos, sin = (part.to(q)[None, :, None] for part in rotary)
        turned = [some * cos[:, : some.shape[1]] + torch.stack([-some[..., 1::2], some[..., ::2]], -1).flatten(-2) * sin[:, : some.shape[1]] for some in (q, k)]
        out = F.scaled_dot_product_attention(*(some.transpose(1, 2) for some in (*turned, v)), attn_mask=mask).transpose(1, 2).flatten(2)
        if self._cached:
            return [*out.split(lengths[:2], 1), *(part[2] for part in self.kept[path])]
        outs = list(out.split(lengths, 1))
        if self.keeping:
            self.kept[path] = [(projected[i][1], projected[i][2], outs[i]) for i in range(2, len(lengths))]
        return outs

    def _double(self, path: str, block: Any, text: Tensor, parts: list[Tensor], temb: list[Tensor], rotary: Any, mask: Any) -> tuple[Tensor, list[Tensor]]:
        attn = block.attn
        normed_text, *moduled_text = block.norm1_context(text, emb=temb[0])
        normed = [block.norm1(part, emb=temb[min(index, 1)]) for index, part in enumerate(parts)]
        projected = [self._projected(path, attn, normed_text, -1, added=True), *(self._projected(path, attn, item[0], index - 1) for index, item in enumerate(normed))]
        outs = self._attend(path, projected, rotary, mask)
        text = _fed(block.norm2_context, block.ff_context, text, attn.to_add_out(outs[0]), moduled_text)
        parts = [_fed(block.norm2, block.ff, part, self._linear(f"{path}.to_out.0", attn.to_out[0], out, index - 1), item[1:])
                 for index, (part, out, item) in enumerate(zip(parts, outs[1:], normed, strict=True))]
        return text, parts

    def _single(self, path: str, block: Any, text: Tensor, parts: list[Tensor], temb: list[Tensor], rotary: Any, mask: Any) -> tuple[Tensor, list[Tensor]]:
        every = [text, *parts]
        normed = [block.norm(part, emb=temb[int(index > 1)]) for index, part in enumerate(every)]
        projected = [self._projected(path, block.attn, item[0], index - 2) for index, item in enumerate(normed)]
        outs = self._attend(path, projected, rotary, mask)
        done = [part + gate[:, None] * block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(item))], 2))
                for part, out, (item, gate) in zip(every, outs, normed, strict=True)]
        return done[0], done[1:]


def _fed(norm: Any, ff: Any, x: Tensor, out: Tensor, moduled: Sequence[Tensor]) -> Tensor:
    gate, shift, scale, gate_ff = (some[:, None] for some in moduled)
    x = x + gate * out
    return x + gate_ff * ff(norm(x) * (1 + scale) + shift)


def updates(transformer: Any, rank: int, seed: int) -> dict[str, Update]:
    """A condition's LoRA with random factors."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, module in transformer.named_modules():
        inside, layer = name.partition(".attn.")[::2]
        if inside and layer in LAYERS:
            weight = module.weight
            down = torch.randn(rank, weight.shape[0] if layer == LAYERS[3] else weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1 / rank**0.5
            found[name] = Update(down.to(weight), up.to(weight), 1.0, layer == LAYERS[3])
    return found


class Bench:
    """A denoiser, what it reads, and the ways to read `count` conditions."""

    def __init__(self, transformer: Any, device: str, *, side: int, tokens: int, grid: int, rank: int, count: int) -> None:
        self.device = torch.device(device)
        weight = transformer.x_embedder.weight
        self.backbone = FluxBackbone(SimpleNamespace(transformer=transformer, scheduler=None, _execution_device=self.device))
        self.banks = Banks(transformer, tuple(self.backbone.prompt_attention()))
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(weight)

        config = transformer.config
        self.latents, self.t = drawn(1, config.in_channels // 4, side, side), torch.tensor(500.0, device=self.device)
        self.cond = Conditioning({"text": drawn(1, 1, tokens, config.joint_attention_dim), "pooled": drawn(1, 1, config.pooled_projection_dim),
                                  "guidance": torch.full((1, 1), 3.5, device=self.device)})
        self.tokens = [drawn(1, grid * grid, config.in_channels) for _ in range(count)]
        self.ids = [spatial_ids((grid, grid), (side // 2, side // 2)).to(self.device)] * count
        self.updates = [updates(transformer, rank, seed) for seed in range(count)]
        self.whole, self.published = Whole(transformer, self.updates), Whole(transformer, self.updates)
        self.published.keeping = True
        self._asked(self.published)
        self.published.keeping = False
        self.filled = self.extraction()

    def extraction(self) -> list[Any]:
        """The banks of the conditions, filled."""
        filled = []
        for tokens, ids, update in zip(self.tokens, self.ids, self.updates, strict=True):
            with self.banks.extracting(update) as bank:
                self.backbone.read_alone(tokens, ids, self.t.new_zeros(()), self.cond)
            filled.append(bank)
        return filled

    def plain(self) -> Tensor:
        return self._evaluated(nullcontext())

    def appended(self) -> Tensor:
        return self._evaluated(self.banks.appended([Appended(bank) for bank in self.filled]))

    def one_pass(self) -> Tensor:
        return self._asked(self.whole)

    def as_published(self) -> Tensor:
        return self._asked(self.published)

    def _evaluated(self, context: Any) -> Tensor:
        with context:
            return packed(self.backbone.denoise(self.latents, self.t, self.cond)[0])

    def _asked(self, whole: Whole) -> Tensor:
        return whole(self.latents, self.t, self.cond, self.tokens, self.ids)


def measured(bench: Bench, rounds: int, left: Callable[[], float] = lambda: 1.0) -> dict[str, dict[str, float]]:
    """By way: seconds, ratio to the plain evaluation in the same round (medians), counted multiply-adds and their ratio, and how far its
    answer is from the one pass's. rounds: 0 counts alone. left: seconds that remain; a round is begun while there are any."""
    ways: dict[str, Callable[[], Any]] = {"plain": bench.plain, "banks": bench.appended, "as published": bench.as_published, "one pass": bench.one_pass,
                                          "extraction": bench.extraction}
    counted, answers, times = {}, {}, {way: [] for way in ways}
    for way, call in ways.items():  # the first warms up
        with FlopCounterMode(display=False) as counter:
            answers[way] = call()
        counted[way] = counter.get_total_flops() / 2
    if not rounds:
        return {way: {"GMAC": count / 1e9, "counted": count / counted["plain"]} for way, count in counted.items()}
    for _ in range(rounds):
        for way, call in ways.items():
            times[way].append(clock.timed(bench.device, call)[0])
        if left() <= 0:
            break
    rows = {}
    for way in ways:
        ratio = statistics.median(a / b for a, b in zip(times[way], times["plain"], strict=True))
        rows[way] = {"s": statistics.median(times[way]), "over plain": ratio, "GMAC": counted[way] / 1e9, "counted": counted[way] / counted["plain"]}
        if way in ("banks", "as published"):
            rows[way]["gap"] = float((answers[way] - answers["one pass"]).abs().max() / answers["one pass"].abs().max())
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", default="1,2")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--condition", type=int, default=512, help="side of a condition in pixels")
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--counted", action="store_true", help="count multiply-adds alone, without computing anything")
    given = parser.parse_args()
    if given.counted:
        given.device, given.rounds = "meta", 0
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    with torch.device(given.device):
        transformer = FluxTransformer2DModel(num_layers=given.double, num_single_layers=given.single, guidance_embeds=True)
    transformer = transformer.to(dtype).eval().requires_grad_(False)
    print(f"{given.double} double and {given.single} single blocks of FLUX.1's width, {given.tokens} + {(given.pixels // 16) ** 2} tokens, conditions of "
          f"{(given.condition // 16) ** 2}, {given.dtype} on {given.device}, {torch.get_num_threads()} threads, {given.rounds} rounds")
    with torch.no_grad():
        for count in map(int, given.counts.split(",")):
            bench = Bench(transformer, given.device, side=given.pixels // 8, tokens=given.tokens, grid=given.condition // 16, rank=given.rank, count=count)
            for way, row in measured(bench, given.rounds).items():
                gap = f", answer apart by {row['gap']:.2g}" if "gap" in row else ""
                time = f"{row['over plain']:.3f} of plain's time ({row['s']:.2f} s), " if "s" in row else ""
                print(f"{count} condition{'s' * (count > 1)}, {way}: {time}{row['counted']:.3f} of plain's multiply-adds ({row['GMAC']:.0f} G){gap}", flush=True)


if __name__ == "__main__":
    main()
