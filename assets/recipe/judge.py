"""The judge stage: a small open-clip model that says what is in a picture, trained on everything the emoji art can draw.

Images meet phrases and captions under a sigmoid loss (arXiv 2303.15343) whose labels are exact, since every scene
is labelled with what it holds: a picture of a fox and a robot agrees with "a fox" and with "a robot" alike. Beside it the images meet a
table with one free vector for each name, under a softmax; it is thrown away after training, and without it nothing was
learned while all texts still read alike. The judge is never used in training the base, is trained once, and its files are
frozen by the hash in the model card.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

from composition.hooks.kernels import attention_for

from .autoencoder import tensor
from .drawing import Pool, Stock
from .labelled import ALSO, TEST, Labelled, Named, Source, phrase
from .loop import Loop, Minutes

__all__ = ["ALSO", "TEST", "Labelled", "Source", "phrase"]

SIDE = 96  # pictures of any size are scaled to this
LENGTH = 24  # tokens of a text, both ends included
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
NAMES = 96  # phrases of names that each batch is compared with, those in its pictures first
MOST = 6  # names that a picture can hold


def build_tokenizer(texts: Sequence[str], entries: int = 2048) -> PreTrainedTokenizerFast:
    """Byte-level pairs over lower-cased text; the end token has the largest number, as open-clip's pooling needs."""
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=entries - 2, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False, min_frequency=2))
    words.add_special_tokens(["<start>", "<end>"])
    start, end = words.token_to_id("<start>"), words.token_to_id("<end>")
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<start>", eos_token="<end>", pad_token="<pad>",
                                   model_max_length=LENGTH)  # fmt: skip


def config(entries: int, width: int = 32, dim: int = 256) -> dict:
    """The open-clip configuration: a residual net with attention pooling, and a causal text transformer."""
    return {
        "model_cfg": {
            "embed_dim": dim, "init_logit_bias": -10,
            "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": width, "patch_size": None},
            "text_cfg": {"context_length": LENGTH, "vocab_size": entries, "width": 192, "heads": 6, "layers": 3,
                         "hf_tokenizer_name": "local"},
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }  # fmt: skip


def build(entries: int) -> nn.Module:
    """Untrained: texts that agree by half are as likely true as not."""
    cfg = config(entries)["model_cfg"]
    cfg["text_cfg"].pop("hf_tokenizer_name")
    model = open_clip.CLIP(**cfg)
    nn.init.constant_(model.logit_scale, float(np.log(20)))
    nn.init.constant_(model.logit_bias, -8.0)
    return model


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Augmentation, as generated pictures are softer, noisier and off in colour: (B, 3, size, size) in -1..1 to the judge's SIDE."""
    b, by = len(x), max(1, x.shape[-1] // 64)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(b, *shape, device=x.device)

    soft = F.avg_pool2d(F.pad(x, (by, by, by, by), mode="replicate"), 2 * by + 1, 1)
    x = x + (soft - x) * some(1, 1, 1).mul(1.4).clamp(max=1)
    x = x * (1 + 0.3 * (some(3, 1, 1) - 0.5)) + 0.3 * (some(3, 1, 1) - 0.5) + 0.08 * some(1, 1, 1) * torch.randn_like(x)
    return F.interpolate(x.clamp(-1, 1), (SIDE, SIDE), mode="bicubic", align_corners=False)


class Batch(NamedTuple):
    """One batch: pictures (B, 3, SIDE, SIDE), token ids of T texts (T, LENGTH), their truth (B, T): 1, 0, or -1 where it does not
    count, and which of all N names each picture holds (B, N)."""

    images: torch.Tensor
    ids: torch.Tensor
    truth: torch.Tensor
    names: torch.Tensor


class Learner(nn.Module):
    """What is trained: the model, and the table of one free vector for each name."""

    def __init__(self, model: nn.Module, names: int, dim: int):
        super().__init__()
        self.model, self.table = model, nn.Parameter(torch.randn(names, dim))


class Answers(NamedTuple):
    """The labels of B scenes, as numbers in the order of a Source: names held (B, N) bool, place (B,), style (B,) (0 is none),
    whether the caption names the place (B,) bool, and the caption's tokens (B, LENGTH)."""

    names: torch.Tensor
    place: torch.Tensor
    style: torch.Tensor
    place_in_caption: torch.Tensor
    caption: torch.Tensor


def answers(labels: torch.Tensor, names: int) -> Answers:
    """From the rows (B, MOST + 3 + LENGTH) that `labels` makes."""
    labels = labels.long()
    held = torch.zeros(len(labels), names + 1, dtype=torch.bool, device=labels.device)
    held.scatter_(1, labels[:, :MOST], True)  # the number after the last name stands for no name
    place, style, place_in_caption = labels[:, MOST : MOST + 3].unbind(1)
    return Answers(held[:, :names], place, style, place_in_caption.bool(), labels[:, MOST + 3 :])


def labels(source: Named, words: PreTrainedTokenizerFast, scenes: Sequence[Labelled]) -> np.ndarray:
    """(B, MOST + 3 + LENGTH) int16: numbers of the names, place, style, whether the caption names the place, and its tokens."""
    rows = np.full((len(scenes), MOST), len(source.names), np.int16)
    for row, scene in zip(rows, scenes, strict=True):
        held = sorted(source.names.index(name) for name in scene.names)
        row[: len(held)] = held
    rest = [[source.places.index(s.place), 1 + source.styles.index(s.style) if s.style else 0, phrase("place", s.place) in s.caption]
            for s in scenes]  # fmt: skip
    return np.concatenate([rows, np.array(rest, np.int16), ids(words, [s.caption for s in scenes]).numpy().astype(np.int16)], 1)


def ids(words: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """(T, LENGTH) int64."""
    return words(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


class Questions:
    """The token ids of every text a batch can be compared with: names in two phrasings, places and styles."""

    def __init__(self, source: Named, words: PreTrainedTokenizerFast, device: torch.device, names_per_batch: int = NAMES):
        """names_per_batch: as many as there are, or more, for all of them."""
        called = [phrase("object", n) for n in source.names]
        self.forms = [ids(words, called).to(device)] * 2 + [ids(words, [f"a picture of {name}" for name in called]).to(device)]
        other = [phrase("place", p) for p in source.places] + [phrase("style", k) for k in source.styles]
        self.other, self.names_per_batch = ids(words, other).to(device), min(names_per_batch, len(called))
        self.places, self.styles = len(source.places), len(source.styles)

    def ask(self, images: torch.Tensor, known: Answers) -> Batch:
        """The texts of one batch: names, every place and style, and the captions of a quarter of its scenes."""
        pick = (known.names.any(0) + torch.rand(known.names.shape[1], device=images.device)).topk(self.names_per_batch).indices
        form = self.forms[int(torch.randint(len(self.forms), ()))]
        count = len(images) // 4
        truth = torch.cat([known.names[:, pick].float(), F.one_hot(known.place, self.places).float(),
                           F.one_hot(known.style, self.styles + 1)[:, 1:].float(), agreement(known, count)], 1)  # fmt: skip
        return Batch(images, torch.cat([form[pick], self.other, known.caption[:count]]), truth, known.names.float())


def agreement(known: Answers, count: int) -> torch.Tensor:
    """Truth of the first ``count`` scenes' captions for every scene, (B, count): 1 of its own, -1 where it holds, else 0."""
    first = Answers(*(values[:count] for values in known))
    held = first.names.float() @ (~known.names).float().T < 0.5  # (count, B): nothing is named that is not there
    held &= (first.place[:, None] == known.place) | ~first.place_in_caption[:, None]
    held &= (first.style[:, None] == known.style) | (first.style == 0)[:, None]
    return torch.where(torch.eye(len(known.place), count, device=held.device).bool(), 1.0, -held.T.float())


def loss_of(learner: Learner, see: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, ids: torch.Tensor,
            truth: torch.Tensor, names: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """Sigmoid loss over all pairs of picture and text whose truth is known, a sum over texts, a mean over pictures; and
    the softmax over the table, whose goal is shared evenly among the names a picture holds."""
    model = learner.model
    with torch.autocast(images.device.type, torch.bfloat16):
        seen, read = see(images), model.encode_text(ids)
    seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
    each = F.binary_cross_entropy_with_logits(
        model.logit_scale.exp() * seen @ read.T + model.logit_bias, truth.clamp(min=0), reduction="none")
    pairs = (each * (truth >= 0)).sum(1).mean()
    return pairs + F.cross_entropy(20 * seen @ F.normalize(learner.table, dim=-1).T, names / names.sum(1, keepdim=True))


def stock(source: Source, words: PreTrainedTokenizerFast, first: int, **sizes: int | None) -> Stock:
    """Pictures (size, size, 3) uint8 and their `labels`."""

    def draw(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        scenes = [source.scene(start + i) for i in range(count)]
        return np.stack([s.picture for s in scenes]), labels(source.named, words, scenes)

    return Stock(draw, first=first, **sizes)


def vocabulary(source: Source) -> PreTrainedTokenizerFast:
    """The tokenizer of all names, places and styles, and of the words between them."""
    texts = [phrase("object", n) for n in source.names] * 3 + [phrase("place", p) for p in source.places] * 60
    texts += [phrase("style", k) for k in source.styles] * 60 + [source.scene(i).caption for i in range(2000)]
    return build_tokenizer(texts)


def train(source: Named, words: PreTrainedTokenizerFast, stock: Stock, folder: Path, work: Path, *, minutes: Minutes,
          device: torch.device, size: int = 128, names_per_batch: int = NAMES, limit: int = 16_384, compiled: bool = True,
          ended: Callable[[], None] = lambda: None) -> Loop:  # fmt: skip
    """Train or resume from ``work/judge.pt``, and write the open-clip folder. limit: pictures kept on the device. ended: called
    when the training is over and only its statistics and files remain to be written."""
    print(f"judge: {len(source.names)} names, {len(source.places)} places, {len(words)} tokens", flush=True)
    model = build(len(words)).to(device)
    model.visual.to(memory_format=torch.channels_last)
    see = torch.compile(model.encode_image, dynamic=False) if compiled else model.encode_image
    learner = Learner(model, len(source.names), config(0)["model_cfg"]["embed_dim"]).to(device)
    loop = Loop(learner, work / "judge.pt", minutes=minutes, peak=2e-3, cool=0.5, average=0.998, decay=0.02)
    pool, questions = Pool(stock, device, limit=limit), Questions(source, words, device, names_per_batch)

    def loss(pictures: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss_of(learner, see, *questions.ask(blurred(tensor(pictures)), answers(labels, len(source.names))))

    with attention_for(device, positions=LENGTH, gradients=True):
        loop.run(pool.batches(size), loss)
    ended()
    with loop.averaged():
        settle(model, pool.batches(size))
        save(model, words, folder)
    return loop


@torch.no_grad()
def settle(model: nn.Module, batches: Iterator[tuple[torch.Tensor, ...]], count: int = 40) -> None:
    """Fit the running statistics of the normalisation to the averaged weights, over so many batches of pictures."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for _ in range(count):
        model.encode_image(blurred(tensor(next(batches)[0])))
    model.eval()


def save(model: nn.Module, words: PreTrainedTokenizerFast, folder: Path) -> None:
    """The folder that ``open_clip.create_model_and_transforms("local-dir:...")`` reads, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    words.save_pretrained(folder)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    weights = {k: v.contiguous() for k, v in weights.items() if k != "attn_mask"}
    save_file(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)
    (folder / "open_clip_config.json").write_text(json.dumps(config(len(words)), indent=2) + "\n")
