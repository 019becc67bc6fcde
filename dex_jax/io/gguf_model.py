"""A GGUF file as a model: its configuration, and q and k rows back in the order that Hugging Face uses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dex_jax.config import ModelConfig, RopeScaling
from dex_jax.errors import DexError
from dex_jax.io.gguf_file import GGUFFile

_FAMILIES = ("llama", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Reads a GGUF file's metadata.

    Args:
      file: the open file.

    Returns:
      The model's configuration.

    Raises:
      DexError: another architecture, or a feature that the model here does not have.
    """
    meta, path = file.metadata, file.path
    family = meta.get("general.architecture")
    if family not in _FAMILIES:
        raise DexError(
            f"{path} holds a model of architecture {family!r}, and only {', '.join(_FAMILIES)} are covered: "
            "choose another file."
        )
    if meta.get("split.count", 1) > 1:
        raise DexError(
            f"{path} is one of {meta['split.count']} parts: join them with llama-gguf-split --merge and open that file."
        )
    if meta.get(f"{family}.expert_count", 0) > 0:
        raise DexError(f"{path} is a mixture of experts, which is not covered: choose a dense model.")

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{family}.{key}", default)
        if value is None:
            raise DexError(f"{path} is damaged: its metadata lack {family}.{key}.")
        return _same(value, f"{path}: {family}.{key}") if isinstance(value, np.ndarray) else value

    width, num_heads = get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", width // num_heads)
    if get("attention.value_length", head_dim) != head_dim:
        raise DexError(f"{path} has values of another width than its keys, which is not covered.")
    if get("rope.dimension_count", head_dim) != head_dim:
        raise DexError(f"{path} rotates only part of each head (partial RoPE), which is not covered.")
    if "token_embd.weight" not in file.tensors:
        raise DexError(f"{path} has no tensor token_embd.weight: it is not a complete model.")
    rope_theta = _decimal(get("rope.freq_base", 10000.0))
    return ModelConfig(
        family=family,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        num_layers=get("block_count"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        mlp_width=get("feed_forward_length"),
        context=get("context_length"),
        rope_theta=rope_theta,
        rope_scaling=_rope_scaling(file, family, head_dim, rope_theta),
        norm_eps=_decimal(get("attention.layer_norm_rms_epsilon")),
        tied="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        eos_ids=tuple(sorted({meta[key] for key in _eos_keys(meta)})),
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
    )


class GGUFWeights:
    """The tensors of a GGUF file, in Hugging Face's row order. The same methods as `GGUFFile`."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self._file = file
        self._heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}
        self.names = tuple(file.tensors)
        self.shape, self.dtype, self.file_of = file.shape, file.dtype, file.file_of

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads rows `start` to `stop` of one tensor (all rows where q and k rows are reordered)."""
        heads = self._heads.get(name.split(".")[-2])
        if heads is None:
            return self._file.read(name, start, stop)
        return unpermute(self._file.read(name), heads)[start:stop]


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of q and k rows.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face and this package rotate halves (i, i + d / 2), so the
    converter interleaves the two halves of every head for architecture "llama".

    Args:
      array: [heads * d, ...].
      heads: how many heads the rows hold.

    Returns:
      The same rows with the two halves of every head one after the other.
    """
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _eos_keys(meta: dict[str, Any]) -> list[str]:
    return [key for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in meta]


def _rope_scaling(file: GGUFFile, family: str, head_dim: int, theta: float) -> RopeScaling | None:
    kind = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", _decimal(file.metadata.get(f"{family}.rope.scaling.factor", 1.0)))
    if kind != "none":
        raise DexError(f"{file.path} scales RoPE by {kind!r}, and only linear and llama3 scaling are covered.")
    if _ROPE_FACTORS not in file.tensors:
        return None
    factors = file.read(_ROPE_FACTORS).astype(np.float64)
    # The other constants are lost in the file; those of every published Llama 3.x must lead to the same factors.
    scaling = RopeScaling(
        "llama3", _decimal(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192
    )
    expected = llama3_factors(scaling, head_dim, theta)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise DexError(
            f"{file.path} holds RoPE factors ({_ROPE_FACTORS}) other than those of Llama 3.x, which are not covered: "
            "use the Hugging Face directory of this model."
        )
    return scaling


def llama3_factors(scaling: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    """By what each of the d / 2 rotary frequencies is divided under llama3 scaling, float64 [d / 2]."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_context * frequencies / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to a float32: 1e-05, where the file holds 9.99999975e-06."""
    return float(str(np.float32(value)))


def _same(values: np.ndarray, where: str) -> Any:
    if len(set(values.tolist())) != 1:
        raise DexError(f"{where} differs from layer to layer, which is not covered.")
    return values[0].item()
