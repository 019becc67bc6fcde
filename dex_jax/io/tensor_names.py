"""Canonical tensors: their names, their shapes, and what the two file formats call their parts."""

from __future__ import annotations

import dataclasses

from dex_jax.config import ModelConfig
from dex_jax.io.families import FAMILIES, Names

Shape = tuple[int, ...]

# canonical name: (Hugging Face names, GGUF names). A canonical tensor is its parts, one above the other in this order.
_TOP: Names = {
    "embed": (("model.embed_tokens.weight",), ("token_embd.weight",)),
    "final_norm": (("model.norm.weight",), ("output_norm.weight",)),
    "unembed": (("lm_head.weight",), ("output.weight",)),
}
LAYER_NAMES: Names = {
    "attention_norm": (("input_layernorm.weight",), ("attn_norm.weight",)),
    "qkv": (tuple(f"self_attn.{each}_proj.weight" for each in "qkv"), tuple(f"attn_{each}.weight" for each in "qkv")),
    "qkv_bias": (tuple(f"self_attn.{each}_proj.bias" for each in "qkv"), tuple(f"attn_{each}.bias" for each in "qkv")),
    "q_norm": (("self_attn.q_norm.weight",), ("attn_q_norm.weight",)),
    "k_norm": (("self_attn.k_norm.weight",), ("attn_k_norm.weight",)),
    "out": (("self_attn.o_proj.weight",), ("attn_output.weight",)),
    "out_bias": (("self_attn.o_proj.bias",), ("attn_output.bias",)),
    "attention_out_norm": (("post_attention_layernorm.weight",), ("post_attention_norm.weight",)),
    "mlp_norm": (("post_attention_layernorm.weight",), ("ffn_norm.weight",)),
    "gate_up": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), ("ffn_gate.weight", "ffn_up.weight")),
    "down": (("mlp.down_proj.weight",), ("ffn_down.weight",)),
    "mlp_out_norm": (("post_feedforward_layernorm.weight",), ("post_ffw_norm.weight",)),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of a file: its name there and its expected shape."""

    name: str
    shape: Shape


def layer_prefix(layer: int, *, gguf: bool) -> str:
    """What the names of layer `layer`'s tensors begin with in a file."""
    return f"blk.{layer}." if gguf else f"model.layers.{layer}."


def canonical_parts(config: ModelConfig, *, gguf: bool) -> dict[str, tuple[Part, ...]]:
    """Maps every canonical tensor of the model to the file's tensors that it is stacked from."""
    shapes = _part_shapes(config)
    in_layer = LAYER_NAMES | FAMILIES[config.family].names
    places = [("", "", _TOP)]
    places += [(f"layers.{i}.", layer_prefix(i, gguf=gguf), in_layer) for i in range(config.num_layers)]
    return {
        ours + name: _parts(names[gguf], theirs, shapes[name])
        for ours, theirs, table in places
        for name, names in table.items()
        if name in shapes
    }


def stacked_shape(parts: tuple[Part, ...]) -> Shape:
    """The shape of a canonical tensor: its parts, one above the other."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _parts(names: tuple[str, ...], prefix: str, shapes: list[Shape]) -> tuple[Part, ...]:
    if len(names) == 1:  # what others hold in several tensors
        shapes = [(sum(shape[0] for shape in shapes), *shapes[0][1:])]
    return tuple(Part(prefix + name, shape) for name, shape in zip(names, shapes, strict=True))


def _part_shapes(config: ModelConfig) -> dict[str, list[Shape]]:
    """The shapes of the parts of every kind of canonical tensor that the model has."""
    D, F, V, d = config.width, config.mlp_width, config.vocab_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    shapes: dict[str, list[Shape]] = {
        "embed": [(V, D)],
        "unembed": [(V, D)],
        "final_norm": [(D,)],
        "attention_norm": [(D,)],
        "qkv": [(q, D), (kv, D), (kv, D)],
        "qkv_bias": [(q,), (kv,), (kv,)],
        "q_norm": [(q if config.qk_norm_whole else d,)],
        "k_norm": [(kv if config.qk_norm_whole else d,)],
        "attention_out_norm": [(D,)],
        "mlp_out_norm": [(D,)],
        "out": [(D, q)],
        "out_bias": [(D,)],
        "mlp_norm": [(D,)],
        "gate_up": [(F, D), (F, D)],
        "down": [(D, F)],
    }
    optional = {
        "unembed": not config.tied,
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "q_norm": config.qk_norm,
        "k_norm": config.qk_norm,
        "attention_norm": config.norms != "after",
        "mlp_norm": config.norms != "after",
        "attention_out_norm": config.norms != "before",
        "mlp_out_norm": config.norms != "before",
    }
    return {name: parts for name, parts in shapes.items() if optional.get(name, True)}
