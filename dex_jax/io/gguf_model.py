"""A GGUF file as a model: its configuration, and q and k rows back in the order that Hugging Face uses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from msgspec import Struct, field
from msgspec.structs import asdict

from dex_jax.config import ModelConfig, RopeScaling
from dex_jax.errors import DexError
from dex_jax.foreign import Positive, Size, TokenId, typed
from dex_jax.io.families import FAMILIES, layer_kinds
from dex_jax.io.gguf_file import GGUFFile
from dex_jax.io.huggingface_config import yarn_magnitude

_ARCHITECTURES = {family.gguf: name for name, family in FAMILIES.items() if family.gguf}
_ROPE_FACTORS, _LONG, _SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# What llama.cpp takes where a file does not say it: every n-th layer sees everything; 0: none does.
_PERIODS = {"gemma2": 2, "gemma3_text": 6, "olmo3": 4, "phi3": 0}
# How many layers the two models have whose scores are divided by the root of D / H and not of d: no file says it.
_WIDE_SCALE = {"gemma2": 46, "gemma3_text": 62}
_NO_ROPE_PERIOD = {"smollm3": 4}


class _File(Struct):
    architecture: str = field(name="general.architecture")
    parts: int = field(name="split.count", default=1)
    eos: TokenId | None = field(name="tokenizer.ggml.eos_token_id", default=None)
    end_of_turn: TokenId | None = field(name="tokenizer.ggml.eot_token_id", default=None)
    bos: TokenId | None = field(name="tokenizer.ggml.bos_token_id", default=None)


class _Model(Struct, kw_only=True):
    """What is read of the keys that begin with the architecture."""

    num_layers: Size = field(name="block_count")
    width: Size = field(name="embedding_length")
    mlp_width: Size = field(name="feed_forward_length")
    context: Size = field(name="context_length")
    num_heads: Size = field(name="attention.head_count")
    num_kv_heads: Size | None = field(name="attention.head_count_kv", default=None)
    head_dim: Size | None = field(name="attention.key_length", default=None)
    value_width: Size | None = field(name="attention.value_length", default=None)
    rotated: Size | None = field(name="rope.dimension_count", default=None)
    norm_eps: Positive = field(name="attention.layer_norm_rms_epsilon")
    rope_theta: Positive = field(name="rope.freq_base", default=10000.0)
    local_rope_theta: Positive | None = field(name="rope.freq_base_swa", default=None)
    scaling: str = field(name="rope.scaling.type", default="none")
    scaling_factor: Positive = field(name="rope.scaling.factor", default=1.0)
    original_context: Size | None = field(name="rope.scaling.original_context_length", default=None)
    magnitude: Positive | None = field(name="rope.scaling.attn_factor", default=None)
    fast: Positive = field(name="rope.scaling.yarn_beta_fast", default=32.0)
    slow: Positive = field(name="rope.scaling.yarn_beta_slow", default=1.0)
    log_multiplier: float = field(name="rope.scaling.yarn_log_multiplier", default=0.0)
    rotates: bool = field(name="rope.scaling.finetuned", default=True)
    query_growth: float = field(name="attention.temperature_scale", default=0.0)
    window: int = field(name="attention.sliding_window", default=0)
    pattern: list[bool] | int | None = field(name="attention.sliding_window_pattern", default=None)
    attention_cap: Positive | None = field(name="attn_logit_softcapping", default=None)
    logit_cap: Positive | None = field(name="final_logit_softcapping", default=None)
    attention_scale: Positive | None = field(name="attention.scale", default=None)
    embed_scale: Positive = field(name="embedding_scale", default=1.0)
    residual_scale: Positive = field(name="residual_scale", default=1.0)
    logit_divisor: Positive = field(name="logit_scale", default=1.0)
    experts: int = field(name="expert_count", default=0)


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The configuration that a GGUF file's metadata describe.

    A DexError: another architecture, a feature that the model here does not have, or values that no model has.
    """
    path, tensors = file.path, file.tensors
    about = typed(file.metadata, _File, path, "choose another file")
    architecture = about.architecture
    if architecture not in _ARCHITECTURES:
        raise DexError(
            f"{path} holds a model of architecture {architecture!r:.60}, and only {', '.join(_ARCHITECTURES)} are "
            "covered: choose another file."
        )
    if about.parts > 1:
        raise DexError(
            f"{path} is one of {about.parts} parts: join them with llama-gguf-split --merge and open that file."
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    listed = "attention.sliding_window_pattern"
    same = {key: value if key == listed else _same(value, f"{path}: {prefix}{key}") for key, value in own.items()}
    model = typed({key: _decimal(value) for key, value in same.items()}, _Model, path)
    family = _ARCHITECTURES[architecture]
    if family == "olmo2" and model.window > 0:
        family = "olmo3"  # llama.cpp calls both the same
    head_dim = model.head_dim or model.width // model.num_heads
    if model.experts > 0:
        raise DexError(f"{path} is a mixture of experts, which is not covered: choose a dense model.")
    if model.value_width not in (None, head_dim):
        raise DexError(f"{path} has values of another width than its keys, which is not covered.")
    if model.rotated not in (None, head_dim) and not FAMILIES[family].partial:
        raise DexError(f"{path} rotates only part of each head (partial RoPE), which is not covered.")
    if "token_embd.weight" not in tensors:
        raise DexError(f"{path} has no tensor token_embd.weight: it is not a complete model.")
    gemma = bool(FAMILIES[family].constants.get("norm_offset"))
    found = asdict(model) | FAMILIES[family].constants
    if gemma:
        found["embed_scale"] = model.width**0.5
        wide = model.num_layers == _WIDE_SCALE.get(family)
        found["attention_scale"] = (model.width / model.num_heads if wide else head_dim) ** -0.5
    found |= {
        "family": family,
        "rotated": None if model.rotated in (None, head_dim) else model.rotated,
        "local_rope_theta": model.local_rope_theta or (10000.0 if family == "gemma3_text" else None),
        "layer_kinds": _layer_kinds(model, family),
        "activation": "gelu" if gemma else "silu",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "head_dim": head_dim,
        "tied": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "out_bias": "blk.0.attn_output.bias" in tensors,
        "qk_norm": FAMILIES[family].constants.get("qk_norm", False) or "blk.0.attn_q_norm.weight" in tensors,
        "eos_ids": sorted({token for token in (about.eos, about.end_of_turn) if token is not None}),
        "bos_id": about.bos,
    }
    config = typed(found, ModelConfig, path)
    return dataclasses.replace(config, rope_scaling=_rope_scaling(file, model, config))


class GGUFWeights:
    """The tensors of a GGUF file as Hugging Face has them. The same methods as `GGUFFile`."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self._file = file
        interleaved = FAMILIES[config.family].interleaved
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if interleaved else {}
        self._norm_offset = np.float32(config.norm_offset)
        self.names = tuple(file.tensors)
        self.shape, self.dtype, self.file_of, self.format_of = file.shape, file.dtype, file.file_of, file.format_of

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows `start` to `stop` of one tensor (all rows where q and k rows are reordered)."""
        if (heads := self._heads_of(name)) is not None:
            return unpermute(self._file.read(name), heads)[start:stop]
        rows = self._file.read(name, start, stop)
        # The converter has added the offset.
        return rows - self._norm_offset if self._norm_offset and name.endswith("norm.weight") else rows

    def blocks(self, name: str) -> np.ndarray:
        """The rows of a tensor as they are packed: [rows, bytes] uint8."""
        rows, heads = self._file.blocks(name), self._heads_of(name)
        return rows if heads is None else unpermute(rows, heads)

    def _heads_of(self, name: str) -> int | None:
        return self._heads.get(name.split(".")[-2])


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows [heads * d, ...] of q and k.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face and this package rotate halves (i, i + d / 2), so the
    converter interleaves the two halves of every head for architecture "llama".
    """
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _rope_scaling(file: GGUFFile, model: _Model, config: ModelConfig) -> RopeScaling | None:
    if model.scaling == "linear":
        return RopeScaling("linear", model.scaling_factor)
    if model.scaling == "yarn" and model.original_context is not None:
        return RopeScaling(
            "yarn",
            model.scaling_factor,
            original_context=model.original_context,
            fast=model.fast,
            slow=model.slow,
            # Where the two weights of arXiv 2309.00071 are equal, as with this key, they cancel.
            magnitude=1.0 if model.log_multiplier else yarn_magnitude(model.scaling_factor),
            query_growth=model.query_growth,
        )
    if {_LONG, _SHORT} <= file.tensors.keys() and model.original_context is not None:
        long, short = (tuple(map(_decimal, file.read(name).tolist())) for name in (_LONG, _SHORT))
        return RopeScaling(
            "longrope",
            factor=model.context / model.original_context,
            original_context=model.original_context,
            magnitude=model.magnitude or 1.0,
            long_factors=long,
            short_factors=short,
        )
    if model.scaling != "none":
        raise DexError(
            f"{file.path} scales RoPE by {model.scaling!r:.60}, and only linear, llama3, yarn and longrope are covered."
        )
    shape = file.shape(_ROPE_FACTORS)
    if shape is None:
        return None
    from dex_jax.nn.rotary import rope_frequencies

    factors = file.read(_ROPE_FACTORS).astype(np.float64) if shape == (config.rotated_dim // 2,) else np.zeros(1)
    # The other constants are lost in the file; those of every published Llama 3.x must lead to the same factors.
    scaling = RopeScaling(
        "llama3", _decimal(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    stretched = dataclasses.replace(config, rope_scaling=scaling)
    if scaling.factor <= 0 or not np.allclose(
        factors, rope_frequencies(config) / rope_frequencies(stretched), rtol=1e-4
    ):
        raise DexError(
            f"{file.path} holds RoPE factors ({_ROPE_FACTORS}) other than those of Llama 3.x, which are not covered: "
            "use the Hugging Face directory of this model."
        )
    return scaling


def _layer_kinds(model: _Model, family: str) -> list[dict[str, Any]]:
    """The kinds of the layers as ModelConfig takes them."""
    window = model.window if 0 < model.window < model.context else None
    period = _PERIODS.get(family) if model.pattern is None else model.pattern
    unrotated = _NO_ROPE_PERIOD.get(family)

    def slides(layer: int) -> bool:
        if model.window <= 0 or period is None:
            return False
        if isinstance(period, list):
            return layer < len(period) and period[layer]
        return period == 0 or (layer + 1) % period != 0

    def rotates(layer: int) -> bool:
        return model.rotates and (unrotated is None or (layer + 1) % unrotated != 0)

    return layer_kinds(model.num_layers, window, slides, rotates, FAMILIES[family].local_rope)


def _decimal(value: Any) -> Any:
    """The shortest decimal that rounds to a float32: 1e-05, where the file holds 9.99999975e-06; else the value."""
    if not isinstance(value, float):
        return value
    with np.errstate(over="ignore"):  # a double that no float32 holds is refused as infinite
        return float(str(np.float32(value)))


def _same(value: Any, where: str) -> Any:
    """The number that a list with one for each layer repeats; anything else as it is."""
    if not isinstance(value, list) or not value:
        return value
    if any(each != value[0] for each in value):
        raise DexError(f"{where} differs from layer to layer, which is not covered.")
    return value[0]
