"""FLUX with conditions as one masked forward over everything, written out: what banks are held to. Imports nothing of composition.

Tokens are in parts: the prompt's, the picture's, and each condition's. Every part has its own time; text and picture attend to everything,
a condition to itself alone. LoRAs are dense updates, gated part by part.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

TEXT, PICTURE = "text", "picture"


def rotated(x, rotary, sequence_dim=2):
    """Rotary embedding of (rows, heads, L, d), or of (rows, L, heads, d) with sequence_dim 1, in the number type of x: diffusers' own rounds to float32."""
    cos, sin = (part.to(x).unsqueeze(0 if sequence_dim == 2 else 1) for part in rotary)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


@dataclass
class Controlled:
    """A condition: tokens (1, N, c), ids (N, 3); own: path -> (down, up, scale, of_output); t from 0 to 1."""

    tokens: Tensor
    ids: Tensor
    own: dict = field(default_factory=dict)
    strength: float = 1.0
    t: float = 0.0
    pooled: Tensor | None = None  # of its modulation, where that is not the picture's


@dataclass
class Style:
    """A LoRA as dense updates by path. gates: part -> number or (1, tokens, 1); parts that are not named are left alone. nowhere: the gate of
    layers without a place."""

    updates: dict
    gates: dict
    nowhere: float = 1.0


class OnePass:
    """seen: path of an attention -> its probabilities (rows, heads, L, L) in the last forward."""

    def __init__(self, transformer, styles=(), bias=None):
        self.transformer, self.styles, self.bias, self.seen = transformer, styles, bias, {}

    def linear(self, path, x, part, own):
        module = self.transformer.get_submodule(path)
        y = module(x)
        for style in self.styles:
            if path in style.updates:
                gate = style.nowhere if ".norm" in path or path.startswith("norm_out") else style.gates.get(part, 0.0)
                y = y + gate * (x @ style.updates[path].T)
        if path in own:
            down, up, scale, of_output = own[path]
            y = y + scale * ((y if of_output else x) @ down.T @ up.T)
        return y

    def __call__(self, picture, picture_ids, text, t, pooled, guidance, conditions=()):
        """picture (rows, N, c), text (rows, L, d), t 0 to 1, pooled (rows, D), guidance None or a number -> (rows, N, c)."""
        model, rows = self.transformer, picture.shape[0]

        def moment(value, pooled):
            times = torch.full((rows,), value * 1000, dtype=picture.dtype)
            if guidance is None:
                return model.time_text_embed(times, pooled)
            return model.time_text_embed(times, torch.full_like(times, guidance * 1000), pooled)

        names = [TEXT, PICTURE, *range(len(conditions))]
        own = {name: conditions[name].own if name in range(len(conditions)) else {} for name in names}
        x = {TEXT: model.context_embedder(text), PICTURE: self.linear("x_embedder", picture, PICTURE, {})}
        temb = {TEXT: moment(t, pooled), PICTURE: moment(t, pooled)}
        ids = [picture_ids.new_zeros(text.shape[1], 3), picture_ids]
        for index, condition in enumerate(conditions):
            x[index] = self.linear("x_embedder", condition.tokens.expand(rows, -1, -1), index, own[index])
            temb[index] = moment(condition.t, pooled if condition.pooled is None else condition.pooled)
            ids.append(condition.ids.to(picture_ids))
        rotary = model.pos_embed(torch.cat(ids))
        lengths = [x[name].shape[1] for name in names]
        mask = self.mask(lengths, conditions, picture.dtype)
        for number in range(len(model.transformer_blocks)):
            x = self.double(f"transformer_blocks.{number}", x, temb, rotary, mask, names, own)
        for number in range(len(model.single_transformer_blocks)):
            x = self.single(f"single_transformer_blocks.{number}", x, temb, rotary, mask, names, own)
        return self.linear("proj_out", model.norm_out(x[PICTURE], temb[PICTURE]), PICTURE, {})

    def mask(self, lengths, conditions, dtype):
        whole = sum(lengths)
        own = lengths[0] + lengths[1]
        mask = torch.full((whole, whole), -math.inf, dtype=dtype)
        mask[:own, :own] = 0.0 if self.bias is None else self.bias
        start = own
        for length, condition in zip(lengths[2:], conditions, strict=True):
            mask[:own, start : start + length] = math.log(condition.strength) if condition.strength else -math.inf
            mask[start : start + length, start : start + length] = 0.0
            start += length
        return mask

    def attend(self, path, parts, rotary, mask, names):
        q, k, v = (torch.cat([parts[name][i] for name in names], 1).transpose(1, 2) for i in range(3))
        q, k = (rotated(value, rotary) for value in (q, k))
        self.seen[path] = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        out = (self.seen[path] @ v).transpose(1, 2).flatten(2)
        return dict(zip(names, out.split([parts[name][0].shape[1] for name in names], 1), strict=True))

    def projected(self, path, x, part, own, added=False):
        attn = self.transformer.get_submodule(path)
        layers, norms = (("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)) if added else (
            ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k))
        q, k, v = (self.linear(f"{path}.{layer}", x, part, own).unflatten(-1, (attn.heads, -1)) for layer in layers)
        return norms[0](q), norms[1](k), v

    def norm(self, path, x, temb, chunks, part, own):
        """An AdaLN-zero, by its own linear and norm."""
        norm = self.transformer.get_submodule(path)
        numbers = self.linear(f"{path}.linear", torch.nn.functional.silu(temb), part, own)[:, None].chunk(chunks, -1)
        return norm.norm(x) * (1 + numbers[1]) + numbers[0], numbers[2:]

    def double(self, path, x, temb, rotary, mask, names, own):
        block = self.transformer.get_submodule(path)
        parts, moduled = {}, {}
        for name in names:
            of_text = name == TEXT
            normed, moduled[name] = self.norm(f"{path}.norm1_context" if of_text else f"{path}.norm1", x[name], temb[name], 6, name, own[name])
            parts[name] = self.projected(f"{path}.attn", normed, name, own[name], added=of_text)
        outs, result = self.attend(f"{path}.attn", parts, rotary, mask, names), {}
        for name in names:
            gate, shift, scale, gate_ff = moduled[name]
            of_text = name == TEXT
            out = self.linear(f"{path}.attn.to_add_out" if of_text else f"{path}.attn.to_out.0", outs[name], name, own[name])
            y = x[name] + gate * out
            normed = (block.norm2_context if of_text else block.norm2)(y) * (1 + scale) + shift
            ff = f"{path}.ff_context" if of_text else f"{path}.ff"
            inner = torch.nn.functional.gelu(self.linear(f"{ff}.net.0.proj", normed, name, own[name]), approximate="tanh")
            result[name] = y + gate_ff * self.linear(f"{ff}.net.2", inner, name, own[name])
        return result

    def single(self, path, x, temb, rotary, mask, names, own):
        parts, moduled = {}, {}
        for name in names:
            normed, (gate,) = self.norm(f"{path}.norm", x[name], temb[name], 3, name, own[name])
            moduled[name] = gate, torch.nn.functional.gelu(self.linear(f"{path}.proj_mlp", normed, name, own[name]), approximate="tanh")
            parts[name] = self.projected(f"{path}.attn", normed, name, own[name])
        outs = self.attend(f"{path}.attn", parts, rotary, mask, names)
        return {name: x[name] + moduled[name][0] * self.linear(f"{path}.proj_out", torch.cat([outs[name], moduled[name][1]], -1), name, own[name])
                for name in names}
