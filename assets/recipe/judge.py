"""The judge stage: a small open-clip model that says what is in a picture, trained on everything the emoji art can draw.

Images meet phrases and captions under a sigmoid loss (arXiv 2303.15343) whose answers are known exactly, since every scene
says what it holds: a picture of a fox and a robot agrees with "a fox" and with "a robot" alike. Beside it the images meet a
table with one free vector for each name, under a softmax; it is thrown away after training, and without it nothing was
learned while all texts still read alike. The judge is never used in training the base, is trained once, and its files are
frozen by the hash in the model card.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
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

from composition.training.attention import plain_attention

from .loop import Loop
from .objects import HELD_OBJECTS, OBJECTS, WORN, article
from .places import HELD_PLACES, PLACES
from .styles import STYLES
from .world import ART, World

SIDE = 64  # pictures of any size are scaled to this
LENGTH = 24  # tokens of a text, both ends included
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
GROUPS = (3, 4, 5, 6, 7)  # animals, food, travel, activities, things: of emojibase's groups
NAMES = 96  # phrases of names that each batch is asked about, those in its pictures first
ALSO = (*HELD_OBJECTS, *WORN, *HELD_PLACES)
START, TEST = 6 * 10**9, 7 * 10**9  # scene numbers for its training and for what is measured


class Labelled(NamedTuple):
    """A picture and all that is true of it: names of objects and things worn, place, style ("" for none), caption."""

    picture: np.ndarray  # (size, size, 3) uint8
    names: frozenset[str]
    place: str
    style: str
    caption: str


def further_names(art: str | Path) -> dict[str, str]:
    """Emoji names and code points beside the world's own: those all vendors draw, one name for one look."""
    taken = {c: n for n, c in (OBJECTS | HELD_OBJECTS).items()} | {w.code: n for n, w in WORN.items()}
    names: dict[str, str] = {}
    for entry in json.loads((Path(art) / "emojibase-data/en/data.json").read_text()):
        code, label = entry["hexcode"].lower().removesuffix("-fe0f"), entry["label"].lower()
        plain = label.removesuffix(" face")
        known = {*taken.values(), *names}
        if entry.get("group") not in GROUPS or code in taken or {label, plain} & known or "thirty" in label:
            continue
        if not label.replace(" ", "").replace("-", "").isalpha() or len(label.split()) > 3 or "moon" in label:
            continue
        spelled = [[Path(art) / ART[v].format(s) for s in (code, f"{code}-fe0f")] for v in ART]
        if all(any(p.is_file() for p in paths) for paths in spelled):
            names[plain] = code
    return names


class Source:
    """Labelled scenes by number: three of four of the world and what is held out, the others of everything."""

    def __init__(self, art: str | Path, size: int, *, objects: int = 48, places: int = len(PLACES)):
        more = further_names(art)
        common = {"objects": objects, "places": places, "size": size, "vendors": tuple(ART), "also": ALSO}
        self.world, self.everything = World(art, **common), World(art, more=more, **common)
        self.own, self.further = list(OBJECTS)[:objects], list(more)
        self.names = [*self.own, *HELD_OBJECTS, *WORN, *self.further]
        self.places, self.styles = [*self.world.places, *HELD_PLACES], list(STYLES)

    def scene(self, seed: int, **fixed) -> Labelled:
        """``fixed``: subject, place, count, wears, vendor as a World's scene takes them, and style ("" for none)."""
        rng = random.Random(f"judge/{seed}")
        wide = rng.random() < 0.25
        world = self.everything if wide else self.world
        style = fixed.pop("style", rng.choice(self.styles) if rng.random() < 0.2 else "")
        if not fixed.get("subject"):
            fixed["subject"] = rng.choice(self.further if wide else list(HELD_OBJECTS) if rng.random() < 0.3 else self.own)
        if "wears" not in fixed and rng.random() < 0.35:
            fixed["wears"] = rng.choice(list(WORN))
        fixed.setdefault("place", rng.choice(self.places))
        fixed.setdefault("count", rng.choices((1, 2, 3), (0.5, 0.38, 0.12))[0])
        scene = world.scene(seed, **fixed)
        picture, caption = scene.picture, scene.caption
        if style:
            words, draw = STYLES[style]
            picture, caption = draw(picture), f"{caption}, {words}"
        return Labelled(picture, frozenset(thing.name for thing in scene.objects), scene.place, style, caption)


def phrase(kind: str, name: str) -> str:
    """What the judge is asked: "a fox", "on the moon", "ink drawing"."""
    if kind == "place":
        return (PLACES | HELD_PLACES)[name][0]
    return STYLES[name][0] if kind == "style" else article(name)


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
    """Generated pictures are softer, noisier and off in colour: (B, 3, size, size) in -1..1 to the judge's SIDE."""
    b = len(x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x + (soft - x) * torch.rand(b, 1, 1, 1).mul(1.4).clamp(max=1)
    gain, shift = 1 + 0.3 * (torch.rand(b, 3, 1, 1) - 0.5), 0.3 * (torch.rand(b, 3, 1, 1) - 0.5)
    x = x * gain + shift + 0.08 * torch.rand(b, 1, 1, 1) * torch.randn_like(x)
    return F.interpolate(x.clamp(-1, 1), (SIDE, SIDE), mode="bicubic", align_corners=False)


class Asked(NamedTuple):
    """One batch: pictures (B, 3, SIDE, SIDE), token ids of T texts (T, LENGTH), their truth (B, T): 1, 0, or -1 for no
    matter, and which of all names each picture holds (B, N)."""

    images: torch.Tensor
    ids: torch.Tensor
    truth: torch.Tensor
    names: torch.Tensor


class Learner(nn.Module):
    """What is trained: the model, and the table of one free vector for each name."""

    def __init__(self, model: nn.Module, names: int, dim: int):
        super().__init__()
        self.model, self.table = model, nn.Parameter(torch.randn(names, dim))


def question(source: Source, scenes: Sequence[Labelled], rng: random.Random) -> tuple[list[str], torch.Tensor]:
    """Texts and the truth of each for each scene: names, every place and style, and the scenes' own captions."""
    held = sorted({n for s in scenes for n in s.names})
    asked = (held + rng.sample(source.names, NAMES))[:NAMES]
    asked = list(dict.fromkeys(asked))
    form = rng.choice(("{}", "{}", "a picture of {}"))
    texts = [form.format(phrase("object", n)) for n in asked]
    truth = [[float(n in s.names) for n in asked] + [float(p == s.place) for p in source.places]
             + [float(k == s.style) for k in source.styles] for s in scenes]  # fmt: skip
    texts += [phrase("place", p) for p in source.places] + [phrase("style", k) for k in source.styles]
    captions = scenes[: len(scenes) // 4]
    texts += [c.caption for c in captions]
    for i, row in enumerate(truth):
        s = scenes[i]
        for j, c in enumerate(captions):
            agrees = c.names <= s.names and (c.place == s.place or phrase("place", c.place) not in c.caption)
            agrees = agrees and c.style in ("", s.style)
            row.append(1.0 if i == j else -1.0 if agrees else 0.0)
    return texts, torch.tensor(truth)


def questions(source: Source, words: PreTrainedTokenizerFast, size: int, first: int, device: torch.device) -> Iterator[Asked]:
    """Endless batches never seen before."""
    while True:
        rng = random.Random(first)
        scenes = [source.scene(first + i) for i in range(size)]
        texts, truth = question(source, scenes, rng)
        x = torch.from_numpy(np.stack([s.picture for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
        ids = words(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
        names = torch.tensor([[float(n in s.names) for n in source.names] for s in scenes])
        yield Asked(blurred(x).to(device, memory_format=torch.channels_last), ids.to(device), truth.to(device), names.to(device))
        first += size


def loss_of(learner: Learner, images: torch.Tensor, ids: torch.Tensor, truth: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Sigmoid loss over all pairs of picture and text whose truth is known, a sum over texts, a mean over pictures; and
    the softmax over the table, whose goal is shared evenly among the names a picture holds."""
    model = learner.model
    with torch.autocast(images.device.type, torch.bfloat16):
        seen, read = model.encode_image(images), model.encode_text(ids)
    seen, read = F.normalize(seen.float(), dim=-1), F.normalize(read.float(), dim=-1)
    each = F.binary_cross_entropy_with_logits(
        model.logit_scale.exp() * seen @ read.T + model.logit_bias, truth.clamp(min=0), reduction="none")
    pairs = (each * (truth >= 0)).sum(1).mean()
    return pairs + F.cross_entropy(20 * seen @ F.normalize(learner.table, dim=-1).T, names / names.sum(1, keepdim=True))


def train(art: str | Path, folder: Path, work: Path, *, minutes: float, device: torch.device, size: int = 128,
          pixels: int = 64) -> None:  # fmt: skip
    """Train or resume from ``work/judge.pt``, and write the open-clip folder."""
    source = Source(art, pixels)
    texts = [phrase("object", n) for n in source.names] * 3 + [phrase("place", p) for p in source.places] * 60
    texts += [phrase("style", k) for k in source.styles] * 60 + [source.scene(i).caption for i in range(2000)]
    words = build_tokenizer(texts)
    print(f"judge: {len(source.names)} names, {len(source.places)} places, {len(words)} tokens", flush=True)
    model = build(len(words)).to(device)
    model.visual.to(memory_format=torch.channels_last)
    model.visual.compile(dynamic=False)
    learner = Learner(model, len(source.names), config(0)["model_cfg"]["embed_dim"]).to(device)
    loop = Loop(learner, work / "judge.pt", minutes=minutes, peak=2e-3, cool=0.5, average=0.998, decay=0.02)
    with plain_attention(device, LENGTH):
        loop.run(questions(source, words, size, START + loop.seen, device), lambda *asked: loss_of(learner, *asked))
    with loop.averaged():
        settle(model, source, loop.seen)
        save(model, words, folder)


@torch.no_grad()
def settle(model: nn.Module, source: Source, first: int, count: int = 40) -> None:
    """Fit the running statistics of the normalisation to the averaged weights, over fresh batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for k in range(count):
        x = np.stack([source.scene(START + first + k * 64 + i).picture for i in range(64)])
        x = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1
        model.encode_image(blurred(x).to(next(model.parameters()).device))
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
