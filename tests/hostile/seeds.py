"""Good inputs, which the corpus spoils one by one and the fuzzer at random. Nothing of composition writes them."""

import base64
import json
import struct
import zlib
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = {
    "unet.conv_in": lambda: nn.Conv2d(4, 16, 3),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": lambda: nn.Linear(16, 16),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": lambda: nn.Linear(8, 16),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": lambda: nn.Linear(8, 8),
}
Q, K = (f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{part}" for part in ("attn1_to_q", "attn2_to_k"))
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}
METADATA = {"title": "Owl", "category": "character", "trigger_words": "an owl, owls", "ss_output_name": "owl-v1", "ss_network_alpha": "2",
            "ss_network_args": '{"conv_alpha": "1"}', "modelspec.title": "Owl", "base": "sd", "preview": "aGVsbG8="}


def lora(tensors: dict[str, Tensor] | None = None, metadata: dict[str, Any] | None = None) -> bytes:
    """A safetensors file: kohya's names, two modules."""
    return safetensors(pair() if tensors is None else tensors, METADATA if metadata is None else metadata)


def pair(**changed: Tensor) -> dict[str, Tensor]:
    tensors = {f"{Q}.lora_down.weight": torch.ones(2, 16) / 4, f"{Q}.lora_up.weight": torch.ones(16, 2) / 4, f"{Q}.alpha": torch.tensor(1.0),
               f"{K}.lora_down.weight": torch.ones(2, 8) / 4, f"{K}.lora_up.weight": torch.ones(16, 2) / 4}  # fmt: skip
    return tensors | {f"{Q}.{name}": tensor for name, tensor in changed.items()}


# Of every kind of update, a module of 16 outputs and 16 inputs: ends of keys to shapes.
KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "loha": {"hada_w1_a": (16, 2), "hada_w1_b": (2, 16), "hada_w2_a": (16, 2), "hada_w2_b": (2, 16), "alpha": ()},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4), "alpha": ()}, "lokr whole": {"lokr_w1": (4, 4), "lokr_w2": (4, 4)},
    "dora": {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "dora_scale": (16, 1), "alpha": ()},
    "dora peft": {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "lora_magnitude_vector": (16,)},
    "ia3": {"weight": (16,), "on_input": ()}, "oft": {"oft_blocks": (4, 4, 4), "rescale": (16, 1), "alpha": ()}, "boft": {"oft_blocks": (2, 4, 4, 4)}, "oftv2": {"oft_R.weight": (4, 6)},
    "glora": {"a1.weight": (16, 2), "a2.weight": (2, 16), "b1.weight": (16, 2), "b2.weight": (2, 16), "alpha": ()},
    "full": {"diff": (16, 16), "diff_b": (16,)}, "biased": {"lora_down.weight": (2, 16), "lora_up.weight": (16, 2), "lora_up.bias": (16,)},
}  # fmt: skip


def kind(name: str, **changed: Tensor) -> bytes:
    """A file of one module of a kind; changed: by the end of a tensor's name."""
    return lora({f"{Q}.{end}": changed.get(end, torch.ones(shape) / 4) for end, shape in KINDS[name].items()}, {})


def condition(metadata: dict[str, Any] | None = None, **changed: Tensor) -> bytes:
    """A condition LoRA in the released layout, of one double block; changed: by the end of a tensor's name."""
    names = [f"transformer_blocks.0.attn.processor.{role}_loras.0" for role in ("q", "k", "v", "proj")]
    tensors = {f"{name}.{end}.weight": torch.ones(2, 8) / 4 if end == "down" else torch.ones(8, 2) / 4 for name in names for end in ("down", "up")}
    return safetensors(tensors | {f"{names[0]}.{name}": tensor for name, tensor in changed.items()}, CONDITION if metadata is None else metadata)


CONDITION = {"condition.version": "1", "condition.kind": "spatial", "condition.size": "64", "condition.alpha": "2", "condition.base": "toy",
             "condition.pad": "black", "condition.annotator": "canny", "condition.offset": "64", "condition.clear": "true", "condition.rounded": "false",
             "condition.projection": "true", "condition.bias": "-2", "title": "Edges", "trigger_words": "SKS"}  # fmt: skip


def safetensors(tensors: dict[str, Tensor], metadata: Any) -> bytes:
    header, data = {"__metadata__": metadata} if metadata is not None else {}, b""
    for name, tensor in tensors.items():
        numbers = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(numbers)]}
        data += numbers
    return framed(json.dumps(header).encode(), data)


def framed(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


REQUEST: dict[str, Any] = {
    "prompt": "an owl, (feathers:1.2) <lora:raccoon:0.5>", "negative": "rain",
    "loras": [{"source": "owl", "weight": 0.8, "text_weight": 0.5, "blocks": {"down": 0.5}, "start": 0.1, "end": 0.9, "binds": "owl",
               "region": [0, 0, 0.5, 1], "category": "character", "triggers": ["owl"]}],
    "conditions": [{"source": "edges", "image": "a.png", "annotator": "canny", "kind": "spatial", "weight": 1, "strength": 0.8,
                    "start": 0, "end": 0.5}],
    "model": "pocket", "method": "merge", "options": {"a": 1}, "sampler": "Euler a", "steps": 5, "guidance": 4, "true_guidance": 1, "size": [64, 64],
    "seed": 1, "count": 1, "batched": True, "allow_partial": False, "anchored": True, "windows": "both", "named_only": False, "schema_version": 1,
}  # fmt: skip
DOCUMENT: dict[str, Any] = {
    "schema_version": 1, "request": REQUEST, "receipts": {"owl": {"sha256": "0" * 64, "tensor_sha256": "1" * 64}},
    "condition_receipts": {"edges": {"sha256": "2" * 64, "tensor_sha256": "3" * 64}}, "notes": {"order": "as given"},
    "versions": {"medley": "0.1", "torch": "2"}}  # fmt: skip
ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "alpha_pattern": {"attn1.to_q": 2},
                           "rank_pattern": {"to_k": 2}, "target_modules": ["to_q", "to_k"]}  # fmt: skip
PROFILE: dict[str, Any] = {"name": "owl", "tensor_sha256": "0" * 64, "model": "pocket", "prompt": "an owl", "steps": 2, "seeds": 1,
                           "high": [0.1, 0.2], "base": [0.1, 0.1], "change": 0.1}  # fmt: skip
BEHAVIOUR: dict[str, Any] = {"name": "owl", "tensor_sha256": "0" * 64, "model": "pocket", "judge": "pocket",
                             "probe": {"prompts": ["a fox"], "seeds": 2, "steps": 8, "guidance": 1.0}, "direction": [0.6, 0.8],
                             "strength": 0.5, "consistency": 0.1, "spread": 1.0}  # fmt: skip
SIDECAR: dict[str, Any] = {
    "model_name": "Owl", "base_model": "SD 1.5", "preview_url": "/etc/passwd", "sha256": "0" * 64, "tags": ["bird"], "notes": "n", "modelDescription": "<p>a</p>",
    "usage_tips": '{"strength": 0.7}', "civitai": {"trainedWords": ["hoot"], "model": {"name": "Owl", "allowNoCredit": True}, "files": [{"hashes": {}}]}}  # fmt: skip
TESTBED: dict[str, Any] = {"character": [{"id": "owl", "name": "Owl", "trigger": ["owl"], "url": ""}]}
THRESHOLDS: dict[str, Any] = {"a fox": [0.2, 0.9, 0.05]}
CAPTION: dict[str, Any] = {"file_name": "0.png", "text": "an owl"}
PICTURE_LINE: dict[str, Any] = {"file_name": "0.png", "text": "an owl", "concepts": [{"phrase": "an owl"}], "group": "g", "method": "merge", "seed": 1}
PARAMETERS = (
    "an owl, (feathers:1.2) <lora:owl:0.8>\nNegative prompt: rain\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, "
    'Size: 64x64, Model hash: abcdef, Model: sd, Lora hashes: "owl: 0123456789ab", Hashes: {"lora:owl": "0123456789"}, Version: v1.10\n'
    'Civitai resources: [{"type": "lora", "weight": 0.8, "modelVersionId": 1, "modelName": "Owl"}]')


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, size: tuple[int, int] = (8, 8), colour: int = 0, bits: int = 8, rows: bytes | None = None) -> bytes:
    wide = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1) * size[0] * bits // 8
    body = zlib.compress(b"".join(b"\0" + bytes(min(wide, 64)) for _ in range(min(size[1], 64)))) if rows is None else rows
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_chunk(key: bytes, text: bytes) -> bytes:
    return chunk(b"iTXt", key + b"\0\0\0\0\0" + text)


def picture(medley: bytes | None = None, parameters: bytes | None = None) -> bytes:
    texts = {b"medley": medley, b"parameters": parameters}
    return png(*(text_chunk(key, text) for key, text in texts.items() if text is not None))


def mask() -> str:
    return f"data:image/png;base64,{base64.b64encode(png()).decode()}"


def of(reader: str) -> list[bytes]:
    """The good inputs of one reader."""
    if reader == "kinds":
        from tests.hostile import kinds

        return kinds.good()
    document, request = json.dumps(DOCUMENT).encode(), json.dumps(REQUEST).encode()
    return {
        "lora": [lora(), lora(metadata={"lora_adapter_metadata": json.dumps(ADAPTER)}), *(kind(name) for name in KINDS)],
        "condition": [condition()], "infotext": [PARAMETERS.encode()], "manifest": [request + b"\n\n" + request + b"\n"], "request": [request],
        "record": [picture(document), picture(parameters=PARAMETERS.encode())], "config": [json.dumps(ADAPTER).encode()],
        "picture": [png(), png(colour=6), png(chunk(b"tRNS", b"\0\1")), png(colour=2, bits=16)], "mask": [mask().encode()],
        "captions": [json.dumps(CAPTION).encode()], "profile": [json.dumps(PROFILE).encode()],
        "behaviour": [json.dumps(BEHAVIOUR).encode()], "testbed": [json.dumps(TESTBED).encode()],
        "thresholds": [json.dumps(THRESHOLDS).encode()], "sidecar": [json.dumps(SIDECAR).encode()], "log": [b'{"id": 1}\n{"id": 2}\n'],
    }[reader]
