"""LoRA files for tests of the catalogue: small, quickly written, with what lies beside them. Nothing of composition writes them."""

import json
import os
import time

import torch

from tests.hostile import seeds

OLD = time.time_ns() - 3600 * 10**9  # so old that nothing waits for it


def lora(path, seed=0, metadata=None, age=OLD, tensors=None):
    """A file with random factors, written an hour ago (age None: now)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    if tensors is None:
        tensors = {name: torch.randn(tensor.shape, generator=rng) if tensor.ndim else tensor for name, tensor in seeds.pair().items()}
    path.write_bytes(seeds.safetensors(tensors, {} if metadata is None else metadata))
    return aged(path, age)


def aged(path, age=OLD):
    if age is not None:
        os.utime(path, ns=(age, age))
    return path


def beside(path, ending, content):
    """A sidecar of a LoRA file: text, or what becomes JSON."""
    file = path.with_name(path.stem + ending)
    file.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return aged(file)


CIVITAI = {
    "id": 1, "modelId": 2, "name": "v1.0", "baseModel": "Illustrious", "trainedWords": ["hoot, red owl", "<s0><s1>"],
    "model": {"name": "Night Owls", "type": "LORA", "tags": ["animal", "character"], "description": "<p>Owls&nbsp;at <b>night</b>.</p><script>alert(1)</script>",
              "allowNoCredit": False, "allowCommercialUse": ["Image", "RentCivit"], "allowDerivatives": True, "allowDifferentLicense": False},
    "description": "<p>Second version</p>", "files": [{"name": "owl.safetensors", "hashes": {"SHA256": "AB" * 32, "AutoV2": "ABABABABAB"}}],
    "images": [{"url": "https://example.com/a.jpeg"}],
}  # fmt: skip
MANAGER = {
    "file_name": "owl", "model_name": "Owl by a friend", "file_path": "/etc/passwd", "sha256": "cd" * 32, "base_model": "Pony",
    "preview_url": "/etc/passwd", "notes": "<i>good at 0.7</i>", "tags": ["bird"], "modelDescription": "<h1>Birds</h1><style>p{}</style>of prey",
    "civitai": CIVITAI, "usage_tips": '{"strength_min": 0.5, "strength_max": 0.9}',
}  # fmt: skip
A1111 = {"description": "mine", "sd version": "SD1", "activation text": "an owl, feathers ,", "preferred weight": 0.65, "negative text": "cat", "notes": "n"}
