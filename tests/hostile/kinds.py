"""Files of every kind of update, good ones and ones with one thing wrong: shapes that no layer has, a tensor too few, ranks of nothing, numbers that are none.

Each bad file has its one broken module alone, so that it is refused whichever kinds are read: a kind that is not supported cannot be
applied, one that is does not fit. Names and shapes are the trainers'; nothing of composition is imported.
"""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tests.hostile import seeds

Shapes = Mapping[str, tuple[int, ...]]
CONV = "lora_unet_conv_in"  # (16, 4, 3, 3)


class Kind(NamedTuple):
    """What a file has of one module. module: (16, 16) or the convolution. alone: tensors without each of which it is broken."""

    module: str
    shapes: Shapes
    alone: tuple[str, ...] = ()


def _all(module: str, shapes: Shapes) -> Kind:
    return Kind(module, shapes, tuple(shapes))


KINDS = {
    "loha": _all(seeds.Q, {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16)}),
    "loha of a convolution": _all(CONV, {"hada_t1": (2, 2, 3, 3), "hada_w1_a": (2, 16), "hada_w1_b": (2, 4), "hada_t2": (2, 2, 3, 3), "hada_w2_a": (2, 16), "hada_w2_b": (2, 4)}),
    "lokr": _all(seeds.Q, {"lokr_w1": (4, 4), "lokr_w2": (4, 4)}),
    "lokr of factors": _all(seeds.Q, {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}),
    "lokr of a convolution": _all(CONV, {"lokr_w1": (4, 2), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 2)}),
    "tucker": Kind(CONV, {"lora_up.weight": (16, 2, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_down.weight": (2, 4, 1, 1)}, ("lora_up.weight", "lora_down.weight")),
    "dora": Kind(seeds.Q, {"lora_up.weight": (16, 2), "lora_down.weight": (2, 16), "dora_scale": (16, 1)}, ("lora_up.weight", "lora_down.weight")),
    "peft dora": Kind("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", {
        "lora_B.weight": (16, 2), "lora_A.weight": (2, 16), "lora_magnitude_vector": (16,)}, ("lora_B.weight", "lora_A.weight")),
    "glora": _all(seeds.Q, {"a1.weight": (2, 16), "a2.weight": (16, 2), "b1.weight": (2, 16), "b2.weight": (16, 2)}),
    "ia3": Kind(seeds.Q, {"weight": (16,), "on_input": ()}),
    "oft": Kind(seeds.Q, {"oft_blocks": (4, 4, 4)}),
    "boft": Kind(seeds.Q, {"oft_blocks": (2, 4, 4, 4)}),
    "oftv2": Kind(seeds.Q, {"oft_R.weight": (4, 6)}),
    "oft by part": Kind(seeds.Q, {"oft_blocks.0": (4, 4, 4)}),
    "full": Kind(seeds.Q, {"diff": (16, 16)}),
    "bias": Kind(seeds.Q, {"diff_b": (16,)}),
    "set": Kind(seeds.Q, {"set_weight": (16, 16)}),
    "norm": Kind("lora_unet_down_blocks_0_attentions_0_no_such_norm", {"w_norm": (16,), "b_norm": (16,)}),
    "lora bias": Kind("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", {
        "lora_B.weight": (16, 2), "lora_A.weight": (2, 16), "lora_B.bias": (16,)}, ("lora_B.weight", "lora_A.weight")),
    "dylora": _all(seeds.Q, {"lora_up.weight": (16, 8), "lora_down.weight": (8, 16)}),
    "first generation": _all("unet:0", {"up": (16, 2), "down": (2, 16)}),
}  # fmt: skip
DYLORA = {"ss_network_module": "networks.dylora", "ss_network_dim": "8", "ss_network_args": '{"unit": "2"}'}
SPEED = ("pytorch_lora_weights lcm-lora-sdv1-5", "sdxl_lightning_4step", "Hyper-SD15-8steps", "sd_turbo")


def tensors(kind: Kind) -> dict[str, Tensor]:
    return {_key(kind, name): torch.full(shape, 0.25) for name, shape in kind.shapes.items()}


def good() -> list[bytes]:
    """A file of each kind, with a plain LoRA beside it."""
    plain = {name: tensor for name, tensor in seeds.pair().items() if name.startswith(seeds.K)}
    return [seeds.safetensors(tensors(kind) | plain, seeds.METADATA | (DYLORA if name == "dylora" else {})) for name, kind in KINDS.items()]


def bad() -> Iterator[tuple[str, bytes]]:
    """A name and a file, for each kind, each of its tensors, and each way to spoil that."""
    for name, kind in KINDS.items():
        metadata = DYLORA if name == "dylora" else {}
        for part, shape in kind.shapes.items():
            whole = tensors(kind)
            key = _key(kind, part)
            if part in kind.alone:
                yield f"{name} without {part}", seeds.safetensors({other: tensor for other, tensor in whole.items() if other != key}, metadata)
            for value in ("nan", "inf"):
                yield f"{name}: {part} of {value}", seeds.safetensors(whole | {key: torch.full(shape, float(value))}, metadata)
            for axis in range(name == "boft", len(shape)):  # of BOFT any number of factors may be
                wider = (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])
                yield f"{name}: {part} of {wider}", seeds.safetensors(whole | {key: torch.full(wider, 0.25)}, metadata)
            if shape:
                empty = (0, *shape[1:])
                yield f"{name}: {part} of {empty}", seeds.safetensors(whole | {key: torch.zeros(empty)}, metadata)
        yield f"{name} in a layer that is not there", seeds.safetensors(
            {key.replace("attn1", "attn7").replace("conv_in", "conv_of_nobody").replace("unet:0", "unet:70000"): tensor for key, tensor in tensors(kind).items()}, metadata)
        yield f"{name} of rank 0", seeds.safetensors({key: tensor[..., :0] if tensor.ndim else tensor for key, tensor in tensors(kind).items()}, metadata)
    for title in SPEED:
        yield f"{title}, one factor", seeds.safetensors({f"{seeds.Q}.lora_down.weight": torch.ones(2, 16)}, {"title": title, "ss_output_name": title})
        yield f"{title} of rank 0", seeds.safetensors({f"{seeds.Q}.lora_down.weight": torch.ones(0, 16), f"{seeds.Q}.lora_up.weight": torch.ones(16, 0)}, {"title": title})
    for shape in ((0,), (2,), (1, 2), (16,)):
        yield f"alpha of shape {shape}", seeds.safetensors({f"{seeds.Q}.lora_down.weight": torch.ones(2, 16), f"{seeds.Q}.lora_up.weight": torch.ones(16, 2),
                                                            f"{seeds.Q}.alpha": torch.ones(shape)}, {})


PATTERNS = ("(.*)*(.*)*z$", "([a-z_]+)+[0-9]$", "(\\w+\\s?)*!", "((a|_)*[a-z]*)*Z", "(?:x?){200}x{200}", "(.+)+\\1$", "(", "[", "(?P<n>", "*", "\\", "(?=(.*)*y)", ".{0,60000}" * 4,
            "(?i)" * 200, "\0", "a" * 100_000, "|" * 50_000, "(" * 5_000)  # fmt: skip


def settings() -> Iterator[tuple[str, str]]:
    """PEFT's settings that say what no trainer says, as JSON; they may be accepted, in time and memory."""
    for pattern in PATTERNS:
        for table in ("alpha_pattern", "rank_pattern"):
            yield f"{table} {pattern[:30]!r}", json.dumps(seeds.ADAPTER | {table: {pattern: 2}})
        yield f"target_modules {pattern[:30]!r}", json.dumps(seeds.ADAPTER | {"target_modules": pattern})
    for kind in ("LOHA", "LOKR", "OFT", "BOFT", "IA3", "ADALORA", "VERA", "HRA", "LN_TUNING", "XLORA", "NO_SUCH_KIND", "PeftType.LORA", ""):
        yield f"peft_type {kind}", json.dumps(seeds.ADAPTER | {"peft_type": kind, "rank_dropout": "a", "use_dora": True, "decompose_factor": -1, "block_size": 0})
    for key, value in {"r": -1, "lora_alpha": "2", "use_rslora": "yes", "use_dora": 7, "lora_bias": True, "layers_pattern": [[]], "modules_to_save": {"a": 1},
                       "alpha_pattern": {"attn1.to_q": None}, "rank_pattern": {"attn1.to_q": 0}}.items():  # fmt: skip
        yield f"{key} of {value}", json.dumps(seeds.ADAPTER | {key: value})


def disguised() -> Iterator[tuple[str, bytes]]:
    """Other files that have the name of a safetensors file."""
    document = {"lora.weight": [0.25] * 8}
    for protocol in range(6):
        yield f"pickle of protocol {protocol}", pickle.dumps(document, protocol=protocol)
        yield f"pickle of protocol {protocol} after eight bytes", len(pickle.dumps(document, protocol)).to_bytes(8, "little") + pickle.dumps(document, protocol=protocol)
    saved = io.BytesIO()
    torch.save({"lora.weight": torch.ones(2, 2)}, saved)
    yield "a file of torch.save", saved.getvalue()
    yield "a file of torch.save after a header", seeds.framed(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', saved.getvalue())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(document))
        archive.writestr("archive/data/0", bytes(1_000_000))
    yield "a zip of a pickle", packed.getvalue()
    tape = io.BytesIO()
    with tarfile.open(fileobj=tape, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pkl"), io.BytesIO())
    yield "a tar", tape.getvalue()
    for name, head in {"7z": b"7z\xbc\xaf\x27\x1c", "gzip": b"\x1f\x8b\x08", "npy": b"\x93NUMPY\x01\x00", "gguf": b"GGUF\x03\0\0\0", "hdf5": b"\x89HDF\r\n\x1a\n", "elf": b"\x7fELF\2\1\1",
                       "script": b"#!/bin/sh\ntouch x\n", "png": b"\x89PNG\r\n\x1a\n", "onnx": b"\x08\x07\x12\x07pytorch"}.items():  # fmt: skip
        yield f"a {name} file", head + bytes(200)


def _key(kind: Kind, name: str) -> str:
    return f"{kind.module}:{name}" if kind.module.startswith("unet:") else f"{kind.module}.{name}"
