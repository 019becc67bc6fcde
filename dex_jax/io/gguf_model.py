"""A GGUF file as a checkpoint: its metadata are translated to the keys of config.json."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field

from dex_jax.config import ModelConfig, RopeScaling, TokenId
from dex_jax.foreign import refuse, typed
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.families import FAMILIES
from dex_jax.io.gguf_file import GGUFFile
from dex_jax.io.gguf_tokenizer import gguf_tokenizer
from dex_jax.io.huggingface_config import huggingface_config, yarn_magnitude

_ARCHITECTURES = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
_LLAMA3, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# The number of layers of the two models that divide scores by the root of D / H and not of d: no file says it.
_WIDE_SCALE = {"gemma2": 46, "gemma3_text": 62}
# The key of config.json for each key that follows the architecture.
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_experts",
}
_PATTERN = "attention.sliding_window_pattern"


class _About(Struct):
    architecture: str = field(name="general.architecture")
    parts: int = field(name="split.count", default=1)
    eos: TokenId | None = field(name="tokenizer.ggml.eos_token_id", default=None)
    end_of_turn: TokenId | None = field(name="tokenizer.ggml.eot_token_id", default=None)
    bos: TokenId | None = field(name="tokenizer.ggml.bos_token_id", default=None)


class _Model(Struct):
    """The keys, beside `_KEYS`, that are read of those that begin with the architecture."""

    value_width: int | None = field(name="attention.value_length", default=None)
    rotated: int | None = field(name="rope.dimension_count", default=None)
    scaling: str = field(name="rope.scaling.type", default="none")
    factor: float = field(name="rope.scaling.factor", default=1.0)
    original_context: int | None = field(name="rope.scaling.original_context_length", default=None)
    magnitude: float = field(name="rope.scaling.attn_factor", default=1.0)
    fast: float = field(name="rope.scaling.yarn_beta_fast", default=32.0)
    slow: float = field(name="rope.scaling.yarn_beta_slow", default=1.0)
    log_multiplier: float = field(name="rope.scaling.yarn_log_multiplier", default=0.0)
    query_growth: float = field(name="attention.temperature_scale", default=0.0)
    window: int = field(name="attention.sliding_window", default=0)
    pattern: list[bool] | int | None = field(name=_PATTERN, default=None)


def open_gguf(path: Path) -> Checkpoint:
    """Open the checkpoint in a GGUF file; raise DexError for a damaged file, or a model that is not covered."""
    file = GGUFFile(path)
    config = _config(file)
    if FAMILIES[config.family].interleaved:
        file.heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    file.norm_offset = np.float32(config.norm_offset)
    tokenizer = partial(gguf_tokenizer, file.metadata, config.eos_ids, str(path))
    return Checkpoint(config, str(path), file, True, tokenizer)


def _config(file: GGUFFile) -> ModelConfig:
    path, tensors = file.path, file.stored
    about = typed(file.metadata, _About, path, "choose another file")
    architecture, prefix = about.architecture, f"{about.architecture}."
    unknown, covered = architecture not in _ARCHITECTURES, ", ".join(_ARCHITECTURES)
    refuse(
        path,
        (unknown, f"holds a model of architecture {architecture!r:.60}, and only {covered} are covered"),
        (about.parts > 1, f"is one of {about.parts} parts: join them with llama-gguf-split --merge and open that file"),
        ("token_embd.weight" not in tensors, "has no tensor token_embd.weight: it is not a complete model"),
    )
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    own = {key: value if key == _PATTERN else _plain(value, f"{path}: {prefix}{key}") for key, value in own.items()}
    model = typed(own, _Model, path)
    family = _ARCHITECTURES[architecture]
    if family == "olmo2" and model.window > 0:
        family = "olmo3"  # llama.cpp calls both the same
    said = {ours: own[key] for key, ours in _KEYS.items() if key in own}
    content: dict[str, Any] = {"rope_theta": 10000.0, "head_dim": None, "num_key_value_heads": None} | said
    content |= {
        "model_type": family,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "eos_token_id": [token for token in (about.eos, about.end_of_turn) if token is not None],
        "bos_token_id": about.bos,
        "sliding_window": model.window if model.window > 0 else None,
    }
    if isinstance(model.pattern, list):
        content["layer_types"] = ["sliding_attention" if each else "full_attention" for each in model.pattern]
    elif model.pattern is not None:
        content["sliding_window_pattern"] = model.pattern
    read = partial(huggingface_config, generation={}, source=str(path), told_by="the metadata")
    plain = read(content)
    other = model.value_width not in (None, plain.head_dim)
    refuse(path, (other, "has values of another width than its keys, which is not covered"))
    wide = plain.num_layers == _WIDE_SCALE.get(family)
    content["query_pre_attn_scalar"] = plain.width / plain.num_heads if wide else plain.head_dim
    content["partial_rotary_factor"] = None if model.rotated is None else model.rotated / plain.head_dim
    return read(content | {"rope_scaling": _rope_scaling(file, model, plain)})


def _rope_scaling(file: GGUFFile, model: _Model, plain: ModelConfig) -> dict[str, Any] | None:
    """Return the entry of config.json for RoPE scaling; `plain` is the model without any."""
    # Where the two weights of arXiv 2309.00071 are equal, as with this key, they cancel.
    grown = 1.0 if model.log_multiplier else yarn_magnitude(model.factor)
    said: dict[str, Any] = {
        "rope_type": model.scaling,
        "factor": model.factor,
        "original_max_position_embeddings": model.original_context,
        "beta_fast": model.fast,
        "beta_slow": model.slow,
        "attention_factor": grown if model.scaling == "yarn" else model.magnitude,
        "llama_4_scaling_beta": model.query_growth,
    }
    if {_LONG, _SHORT} <= file.stored.keys():
        long, short = ([_plain(each) for each in file.read(name).tolist()] for name in (_LONG, _SHORT))
        return said | {"rope_type": "longrope", "long_factor": long, "short_factor": short}
    if model.scaling == "none" and _LLAMA3 in file.stored:
        from dex_jax.nn.rotary import rope_frequencies

        factors = file.read(_LLAMA3).astype(np.float64)
        # The other constants are lost in the file; those of every published Llama 3.x must lead to the same factors.
        scaling = RopeScaling("llama3", max(_plain(factors.max()), 1e-3), 1.0, 4.0, 8192)
        expected = rope_frequencies(plain) / rope_frequencies(dataclasses.replace(plain, rope_scaling=scaling))
        fits = factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4)
        told = f"holds RoPE factors ({_LLAMA3}) other than those of Llama 3.x: use the Hugging Face directory"
        refuse(file.path, (not fits, told))
        constants = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return said | {"rope_type": "llama3", "factor": scaling.factor} | constants
    return None if model.scaling == "none" else said


def _plain(value: Any, where: str = "") -> Any:
    """Return a number as it was meant: the one that a list for all layers repeats, or the decimal behind a float32.

    That is the shortest decimal that rounds to it (1e-05, where the file holds 9.99999975e-06).
    """
    if isinstance(value, list) and value:
        refuse(where, (any(each != value[0] for each in value), "differs from layer to layer, which is not covered"))
        return _plain(value[0])
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):  # a double that no float32 holds is refused as infinite
        return float(str(np.float32(value)))
