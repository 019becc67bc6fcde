"""Small random EAGLE-3 heads in every format that is read, for the checkpoint "llama3" of reference.checkpoints.

They are the same on every machine; neither torch nor jax is needed.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from reference.checkpoints import FAMILIES, random_tensor
from safetensors.numpy import save_file

MODEL = "llama3"
VOCABULARY, WIDTH, LAYERS = (FAMILIES[MODEL][key] for key in ("vocab_size", "hidden_size", "num_hidden_layers"))
STEPS, ROOTS, LENGTH = 3, (0, 3, 6), 10

_LAYER = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_QWEN3 = _LAYER | {"model_type": "qwen3", "num_attention_heads": 4, "head_dim": 32, "attention_bias": False}


def _speculators(layer: dict[str, Any], **more: Any) -> dict[str, Any]:
    method = {"proposal_type": "greedy", "speculative_tokens": 3}
    about = {
        "algorithm": "eagle3",
        "proposal_methods": [method],
        "default_proposal_method": "greedy",
        "verifier": {"name_or_path": None, "architectures": ["LlamaForCausalLM"]},
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": about,
        "transformer_layer_config": layer,
        "draft_vocab_size": 60,
    } | more


# vLLM reads SafeAILab's format too; the depths are 2, L // 2 and L - 3 if the config names none.
VARIANTS: dict[str, dict[str, Any]] = {
    "safeailab": _LAYER | {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": 60},
    "residual": _speculators(_LAYER, norm_before_residual=True, eagle_aux_hidden_state_layer_ids=[1, 3, 5]),
    "qwen3": _speculators(_QWEN3, draft_vocab_size=VOCABULARY, norm_output=True, norm_before_residual=True),
    "each_normed": _speculators(_LAYER, fc_norm=True, norm_output=True, eagle_aux_hidden_state_layer_ids=[0, 2, 4, 6]),
    "all_normed": _speculators(_LAYER | {"attention_bias": True}, norm_before_fc=True),
}
OWN_EMBEDDING = ("residual", "each_normed")


def head_tensors(variant: str) -> dict[str, np.ndarray]:
    """Return every tensor of a head by its published name."""
    config = VARIANTS[variant]
    layer = config.get("transformer_layer_config", config)
    heads, keys, d = (layer[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    count, size, mlp = len(depths_of(variant)), config["draft_vocab_size"], layer["intermediate_size"]
    prefix = "midlayer." if variant == "safeailab" else "layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (WIDTH, count * WIDTH),
        "norm.weight": (WIDTH,),
        "lm_head.weight": (size, WIDTH),
        prefix + "input_layernorm.weight": (WIDTH,),
        prefix + "hidden_norm.weight": (WIDTH,),
        prefix + "post_attention_layernorm.weight": (WIDTH,),
        prefix + "self_attn.o_proj.weight": (WIDTH, heads * d),
        prefix + "mlp.gate_proj.weight": (mlp, WIDTH),
        prefix + "mlp.up_proj.weight": (mlp, WIDTH),
        prefix + "mlp.down_proj.weight": (WIDTH, mlp),
    }
    for name, rows in (("q", heads * d), ("k", keys * d), ("v", keys * d)):
        shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, 2 * WIDTH)
        if layer.get("attention_bias"):
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
    if layer.get("attention_bias"):
        shapes[prefix + "self_attn.o_proj.bias"] = (WIDTH,)
    if layer["model_type"] == "qwen3":
        shapes |= {f"{prefix}self_attn.{each}_norm.weight": (d,) for each in "qk"}
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{i}.weight": (WIDTH,) for i in range(count)}
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (count * WIDTH,)
    if variant in OWN_EMBEDDING:
        shapes["embed_tokens.weight"] = (VOCABULARY, WIDTH)
    # The values of reference.checkpoints depend on the name, so every variant has its own.
    tensors = {name: random_tensor(MODEL, f"{variant}/{name}", shape) for name, shape in shapes.items()}
    if size < VOCABULARY:
        ids = np.sort(np.argsort(np.random.PCG64(zlib.crc32(variant.encode())).random_raw(VOCABULARY))[:size])
        tensors["d2t"] = (ids - np.arange(size)).astype(np.int64)
        tensors["t2d"] = np.isin(np.arange(VOCABULARY), ids)
    return tensors


def depths_of(variant: str) -> tuple[int, ...]:
    """Return the depths at which a head reads the model's states."""
    given = VARIANTS[variant].get("eagle_aux_hidden_state_layer_ids")
    return tuple(given or (2, LAYERS // 2, LAYERS - 3))


def write_head(directory: Path, variant: str, **changes: Any) -> Path:
    """Write a head with some keys of its config.json changed; None removes a key."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (VARIANTS[variant] | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(head_tensors(variant), directory / "model.safetensors")
    return directory


def example(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens [T + 1] of positions 0..T, and a model's states [T, n D] of the n depths at positions 0..T - 1."""
    states = len(depths_of(variant)) * WIDTH
    tokens = np.random.PCG64(LENGTH).random_raw(LENGTH + 1) % np.uint64(VOCABULARY)
    return tokens.astype(np.int32), random_tensor(MODEL, f"{variant}/states", (LENGTH, states)) * 4
