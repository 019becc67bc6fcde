"""Canonical tensors: their names, their shapes, and what the two file formats call their parts."""

from __future__ import annotations

from typing import NamedTuple

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


class Part(NamedTuple):
    """One tensor of a file: its name there and its expected shape."""

    name: str
    shape: Shape


def layer_prefix(layer: int, *, gguf: bool) -> str:
    """Return the prefix of the names of layer `layer`'s tensors in a file."""
    return f"blk.{layer}." if gguf else f"model.layers.{layer}."


def canonical_parts(config: ModelConfig, *, gguf: bool) -> dict[str, tuple[Part, ...]]:
    """Map every canonical tensor of the model to the file's tensors that it is stacked from."""
    shapes = _part_shapes(config)
    in_layer = LAYER_NAMES | FAMILIES[config.family].names
    places = [("", "", _TOP)]
    places += [(f"layers.{i}.", layer_prefix(i, gguf=gguf), in_layer) for i in range(config.num_layers)]
    return {
        ours + name: _parts(theirs, names[gguf], shapes[name])
        for ours, theirs, table in places
        for name, names in table.items()
        if name in shapes
    }


def _parts(prefix: str, names: tuple[str, ...], shapes: list[Shape]) -> tuple[Part, ...]:
    if len(names) == 1:  # what others hold in several tensors
        shapes = [stacked_shape(shapes)]
    return tuple(Part(prefix + name, shape) for name, shape in zip(names, shapes, strict=True))


def stacked_shape(shapes: list[Shape]) -> Shape:
    """Return the shape of a canonical tensor, which has its parts one above the other."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _part_shapes(config: ModelConfig) -> dict[str, list[Shape]]:
    """Return the shapes of the parts of every kind of canonical tensor that the model has."""
    D, F, V, d = config.width, config.mlp_width, config.vocab_size, config.head_dim
    q, kv = config.num_heads * d, config.num_kv_heads * d
    before, after = config.norms != "after", config.norms != "before"
    shapes: list[tuple[str, bool, list[Shape]]] = [
        ("embed", True, [(V, D)]),
        ("unembed", not config.tied, [(V, D)]),
        ("final_norm", True, [(D,)]),
        ("attention_norm", before, [(D,)]),
        ("qkv", True, [(q, D), (kv, D), (kv, D)]),
        ("qkv_bias", config.qkv_bias, [(q,), (kv,), (kv,)]),
        ("q_norm", config.qk_norm, [(q if config.qk_norm_whole else d,)]),
        ("k_norm", config.qk_norm, [(kv if config.qk_norm_whole else d,)]),
        ("out", True, [(D, q)]),
        ("out_bias", config.out_bias, [(D,)]),
        ("attention_out_norm", after, [(D,)]),
        ("mlp_norm", before, [(D,)]),
        ("gate_up", True, [(F, D), (F, D)]),
        ("down", True, [(D, F)]),
        ("mlp_out_norm", after, [(D,)]),
    ]
    return {name: parts for name, there, parts in shapes if there}
