"""FLUX's and SD3's layers by the names of their authors' code, where one layer is often several of diffusers'.

`attn.qkv` and FLUX's `linear1` hold three or four layers one below the other; the last modulation has its halves the other way
round. Built from the base's own modules, whatever its depth and width.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Part(NamedTuple):
    """A layer of the base that a module of a file updates: with rows start..stop of its up factor (stop None: all to the end).

    turned: the halves of those rows change places.
    """

    path: str
    start: int = 0
    stop: int | None = None
    turned: bool = False

    def rows(self, up: Tensor) -> Tensor:
        """This layer's share of an up factor, or of whatever has the outputs first (out, ...)."""
        share = up[self.start : self.stop]
        return share.roll(share.shape[0] // 2, 0) if self.turned else share


# Layer of the authors' block: layers of diffusers' block, one below the other.
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",), "img_mlp.2": ("ff.net.2",), "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",), "img_mod.lin": ("norm1.linear",), "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",),
    "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),  # XLabs: linear1 without its feed-forward
}
_JOINT = {
    f"{side}.{name}": tuple(layers) for side, names in {
        "x_block": {"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.proj": ("attn.to_out.0",),
                    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "attn2.proj": ("attn2.to_out.0",),
                    "mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",), "adaLN_modulation.1": ("norm1.linear",)},
        "context_block": {"attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "attn.proj": ("attn.to_add_out",),
                          "mlp.fc1": ("ff_context.net.0.proj",), "mlp.fc2": ("ff_context.net.2",),
                          "adaLN_modulation.1": ("norm1_context.linear",)},
    }.items() for name, layers in names.items()
}
_FLUX_OUTER = {
    "img_in": "x_embedder", "img_in.proj": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2", "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2", "final_layer.linear": "proj_out",
}
_SD3_OUTER = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}

# The beginning of a name that only a transformer has, dotted or with underscores.
TRANSFORMER = re.compile(
    r"(?:double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks)[._]\d|"
    r"(?:img_in|txt_in|time_in|vector_in|guidance_in|final_layer|x_embedder|t_embedder|y_embedder|context_embedder|time_text_embed|"
    r"pos_embed|norm_out|proj_out)(?:[._]|$)")


def words() -> Iterator[str]:
    """Every name in the tables above, the authors' and diffusers', without the numbers of blocks."""
    yield from ("double_blocks", "single_blocks", "joint_blocks", "transformer_blocks", "single_transformer_blocks", "final_layer.linear")
    for table in (_DOUBLE, _SINGLE, _JOINT):
        yield from (*table, *(path for paths in table.values() for path in paths))
    for outer in (_FLUX_OUTER, _SD3_OUTER):
        yield from (*outer, *outer.values())


def names(transformer: nn.Module) -> dict[str, tuple[Part, ...]]:
    """Name of the authors' code, dotted, to the layers it stands for. {} for a model that is not a transformer of these kinds."""
    layers = {path: module for path, module in transformer.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    parts: dict[str, tuple[Part, ...]] = {}
    for name, paths in _candidates(transformer):
        if all(path in layers for path in paths):
            ends = [0]
            for path in paths:
                layer = layers[path]  # as declared: a quantized weight has another shape
                ends.append(ends[-1] + (layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels))
            parts[name] = tuple(Part(path, a, b) for path, a, b in zip(paths, ends, ends[1:], strict=False))
            if len(paths) > 1:  # split, as OneTrainer writes them: the first of qkv is qkv.0
                parts |= {f"{name}.{index}": (Part(path),) for index, path in enumerate(paths)}
    turned = {"final_layer.adaLN_modulation.1": "norm_out.linear"}
    if joint := len(getattr(transformer, "transformer_blocks", ())) if "pos_embed.proj" in layers else 0:
        turned[f"joint_blocks.{joint - 1}.context_block.adaLN_modulation.1"] = f"transformer_blocks.{joint - 1}.norm1_context.linear"
    return parts | {name: (Part(path, turned=True),) for name, path in turned.items() if parts and path in layers}


def _candidates(transformer: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    flux = hasattr(transformer, "single_transformer_blocks")
    outer, block, inner = (_FLUX_OUTER, "double_blocks", _DOUBLE) if flux else (_SD3_OUTER, "joint_blocks", _JOINT)
    yield from ((name, (path,)) for name, path in outer.items())
    for kind, authored, rows in (("transformer_blocks", block, inner), ("single_transformer_blocks", "single_blocks", _SINGLE)):
        for index in range(len(getattr(transformer, kind, ()))):
            for name, paths in rows.items():
                yield f"{authored}.{index}.{name}", tuple(f"{kind}.{index}.{path}" for path in paths)
