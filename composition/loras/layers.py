"""The layers of a base, by every name a LoRA file may give them.

The map is computed from the base's own `named_modules()`, never from a table of one model's names, so it holds for any
depth: every nn.Linear and nn.Conv2d by its path with underscores (kohya's way), the UNet's also by the names of the
original code (input_blocks, middle_block, output_blocks: "SGM" names), the text encoders' with and without "text_model"
(transformers 5.6 dropped it), and, for first-generation files, by number.
"""

from collections.abc import Collection, Iterator

from torch import nn

from composition.loras import fused
from composition.loras.fused import Part

Layer = nn.Linear | nn.Conv2d
Norm = nn.LayerNorm | nn.GroupNorm
_MAX_PARTS = 64  # of a name, at its dots and underscores

# Parts of a residual block and single layers: path in diffusers -> name in the original code.
_RESIDUAL = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
}
_SINGLE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

# Names with the words that a base may lack: blocks and layers of its larger relatives.
_KNOWN = (
    *_RESIDUAL, *_RESIDUAL.values(), *_SINGLE, *_SINGLE.values(), *fused.words(),
    "down_blocks.attentions.transformer_blocks.attn1.to_q", "up_blocks.resnets.attn2.to_k", "mid_block.to_v.to_out", "proj_in.proj_out",
    "ff.net.proj", "downsamplers.upsamplers.conv", "input_blocks.middle_block.output_blocks.op", "encoder.layers.self_attn.q_proj",
    "k_proj.v_proj.out_proj", "mlp.fc1.fc2", "text_model.text_projection", "single_transformer_blocks.norm_out.linear",
)


def layers(module: nn.Module) -> dict[str, Layer]:
    """Path to layer, for every Linear and Conv2d that a LoRA can act on (a grouped convolution is not one)."""
    return {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def norms(module: nn.Module) -> dict[str, Norm]:
    """Path to norm, for every norm with weights of its own; only full differences can be of one."""
    return {path: norm for path, norm in module.named_modules() if isinstance(norm, Norm) and norm.weight is not None}


def shape(layer: Layer | Norm) -> tuple[int, ...]:
    """(out, in) of a linear, (out, in, height, width) of a convolution, (channels,) of a norm: as declared, also when quantized."""
    if isinstance(layer, Norm):
        return tuple(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels, *layer.kernel_size


def flat(name: str) -> str:
    """A module name with underscores, the one spelling that all layouts share."""
    return name.replace(".", "_")


def parts(component: str, module: nn.Module) -> dict[str, tuple[Part, ...]]:
    """Flat name to the layers it stands for: one as a rule, several where the original code of a transformer has them in one."""
    authored = fused.names(module) if component == "transformer" else {}
    return {flat(name): parts for name, parts in authored.items()} | {name: (Part(path),) for name, path in names(component, module).items()}


def names(component: str, module: nn.Module, of: Collection[str] | None = None) -> dict[str, str]:
    """Flat name to path, for every layer (or those of these paths) of one component ("unet", "text_encoder", ...) of a base."""
    paths = list(layers(module) if of is None else of)
    if component.startswith("text_encoder"):
        short = {path.removeprefix("text_model."): path for path in paths}
        return {flat(prefix + name): path for prefix in ("", "text_model.") for name, path in short.items()}
    blocks = dict(_original_blocks(module))
    by_name = {flat(path): path for path in paths}
    for path in paths:
        if original := _original(path, blocks):
            by_name.setdefault(flat(original), path)
    return by_name


def words(module: nn.Module) -> frozenset[tuple[str, ...]]:
    """The words of which names of layers of such a base are made, whatever its depth, each split at its underscores.

    Its own, and those of the original code and of its relatives with parts that this base lacks.
    """
    own = {word for path in (*layers(module), *fused.names(module), *_KNOWN) for word in path.split(".")}
    return frozenset(tuple(word.split("_")) for word in own if not word.isdecimal())


def spelled(name: str, known: Collection[tuple[str, ...]], there: Collection[str]) -> bool:
    """True when a module's name could be a layer's, of a deeper or wider base: it is made of known words and numbers, dotted or with
    underscores, and not the name of a layer that is `there` (flat names) with more before or after it. "#12" is a layer's too.
    """
    if name.startswith("#"):
        return True
    parts = flat(name).split("_")
    if len(parts) > _MAX_PARTS:
        return False
    longest = max(map(len, known), default=0)
    ends = {0}  # numbers of parts that words and numbers fill
    for start in range(len(parts)):
        if start in ends:
            ends |= {stop for stop in range(start + 1, min(start + longest, len(parts)) + 1) if tuple(parts[start:stop]) in known}
            ends |= {start + 1} if parts[start].isdecimal() else set()
    more_behind = any("_".join(parts[:stop]) in there for stop in range(1, len(parts)))
    more_before = any("_".join(parts[start:]) in there and any(map(str.isdecimal, parts[start:])) for start in range(1, len(parts)))
    return len(parts) in ends and not more_behind and not more_before


def numbered(component: str, module: nn.Module, count: int) -> dict[str, str]:
    """"#0", "#1", ... to path, for a first-generation file with `count` layers; {} when no order has that many.

    Such files number the linears of the attentions and of the gated feed-forwards as the models of their day listed
    them: down blocks, up blocks, middle; in each transformer block attn1, feed-forward, attn2. The text encoder's
    attentions list k, v, q, out.
    """
    known = layers(module)
    if component.startswith("text_encoder"):
        parts = ("k_proj", "v_proj", "q_proj", "out_proj")
        attentions = [path.removesuffix(".k_proj") for path in known if path.endswith("self_attn.k_proj")]
        paths = [f"{attention}.{part}" for attention in attentions for part in parts]
    else:
        order = ("down_blocks", "up_blocks", "mid_block")
        ends = ("to_q", "to_k", "to_v", "to_out.0")
        blocks = [path.removesuffix(".attn1.to_q") for path in known if path.endswith(".attn1.to_q")]
        blocks.sort(key=lambda path: order.index(path.split(".")[0]) if path.split(".")[0] in order else len(order))
        gated = ("ff.net.0.proj",) if count == 9 * len(blocks) else ()
        parts = (*(f"attn1.{end}" for end in ends), *gated, *(f"attn2.{end}" for end in ends))
        paths = [f"{block}.{part}" for block in blocks for part in parts]
    if len(paths) != count or not all(path in known for path in paths):
        return {}
    return {f"#{index}": path for index, path in enumerate(paths)}


def _original(path: str, blocks: dict[str, str]) -> str:
    """The original code's name of a layer, or "": its block's name, then the same tail (renamed in residual blocks)."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        if block := blocks.get(".".join(parts[:cut])):
            tail = ".".join(parts[cut:])
            return f"{block}.{_RESIDUAL.get(tail, tail)}" if tail else block
    return ""


def _original_blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, original name) of the UNet's building blocks, counted as the original code lists them.

    Input blocks: the first convolution, then every residual block with the attention behind it, then the downsampler
    of each level. Output blocks: every residual block with its attention, the last of a level with the upsampler too.
    """
    yield from _SINGLE.items()
    index = 0
    for level, block in enumerate(getattr(unet, "down_blocks", ())):
        for part, lists in _pairs(block):
            index += 1
            for at, path in enumerate(lists):
                yield f"down_blocks.{level}.{path}.{part}", f"input_blocks.{index}.{at}"
        if getattr(block, "downsamplers", None):
            index += 1
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
    index = 0
    for level, block in enumerate(getattr(unet, "up_blocks", ())):
        lists = ()
        for part, lists in _pairs(block):
            for at, path in enumerate(lists):
                yield f"up_blocks.{level}.{path}.{part}", f"output_blocks.{index}.{at}"
            index += 1
        if getattr(block, "upsamplers", None):
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{index - 1}.{len(lists)}.conv"
    middle = getattr(unet, "mid_block", None)
    residuals, attentions = len(getattr(middle, "resnets", ())), len(getattr(middle, "attentions", ()))
    order = [("resnets", 0)]
    for part in range(1, residuals):
        order += [("attentions", part - 1)] * (part <= attentions) + [("resnets", part)]
    yield from ((f"mid_block.{path}.{part}", f"middle_block.{at}") for at, (path, part) in enumerate(order))


def _pairs(block: nn.Module) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(index, which lists have it) for each residual block of a level: ("resnets",) or ("resnets", "attentions")."""
    attentions = len(getattr(block, "attentions", ()))
    for part in range(len(getattr(block, "resnets", ()))):
        yield part, ("resnets", "attentions") if part < attentions else ("resnets",)
