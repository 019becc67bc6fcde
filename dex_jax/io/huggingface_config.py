"""config.json, in the forms of transformers 4 and 5, as a ModelConfig."""

from __future__ import annotations

from typing import Any

from dex_jax.config import ModelConfig, RopeScaling
from dex_jax.errors import DexError

# What each family's own configuration class means by a key that is left out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
_SHARED_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
_QUANTISED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "bitsandbytes": "bitsandbytes",
}


def huggingface_config(config: dict[str, Any], generation: dict[str, Any], source: str) -> ModelConfig:
    """Reads a Hugging Face configuration.

    Args:
      config: config.json.
      generation: generation_config.json, or empty.
      source: the model, for error messages.

    Returns:
      The model's configuration.

    Raises:
      DexError: another architecture, or a feature that the model here does not have.
    """
    family = config.get("model_type")
    if family not in _DEFAULTS:
        raise DexError(
            f"{source} is of model type {family!r}, and only {', '.join(_DEFAULTS)} are covered: choose another model."
        )
    values = {**_SHARED_DEFAULTS, **_DEFAULTS[family], **config}
    _refuse_uncovered(values, family, source)
    try:
        width, num_heads = values["hidden_size"], values["num_attention_heads"]
        num_layers, vocab_size, mlp_width = (
            values["num_hidden_layers"],
            values["vocab_size"],
            values["intermediate_size"],
        )
    except KeyError as error:
        raise DexError(f"{source} lacks {error} in its config.json: get it again.") from error
    theta, scaling = _rope(values, source)
    bias = bool(values.get("attention_bias", False))
    num_kv_heads = values.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise DexError(f"{source} has {num_heads} heads, which {num_kv_heads} key-value heads do not divide.")
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=values.get("head_dim") or width // num_heads,
        mlp_width=mlp_width,
        context=values["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=values["rms_norm_eps"],
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        qk_norm=family == "qwen3",
        eos_ids=tuple(sorted({*_ids(values.get("eos_token_id")), *_ids(generation.get("eos_token_id"))})),
        bos_id=next(iter(_ids(values.get("bos_token_id"))), None),
    )


def _refuse_uncovered(values: dict[str, Any], family: str, source: str) -> None:
    quantisation = values.get("quantization_config")
    if quantisation:
        method = str(quantisation.get("quant_method", "an unnamed method"))
        raise DexError(
            f"{source} is quantised by {_QUANTISED.get(method, method)}, which is not covered: use the unquantised "
            "model or a GGUF."
        )
    classes = values.get("architectures") or []
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise DexError(f"{source} is a {classes[0]}, and only causal language models are covered.")
    if values.get("mlp_bias"):
        raise DexError(f"{source} has biases in its MLP (mlp_bias), which are not covered.")
    if values["hidden_act"] not in ("silu", "swish"):
        raise DexError(f"{source} uses the activation {values['hidden_act']!r}, and only silu is covered.")
    if values.get("num_experts") or values.get("num_local_experts"):
        raise DexError(f"{source} is a mixture of experts, which is not covered: choose a dense model.")
    if values.get("partial_rotary_factor", 1.0) != 1.0:
        raise DexError(f"{source} rotates only part of each head (partial_rotary_factor), which is not covered.")
    if family != "llama" and _slides(values):
        raise DexError(
            f"{source} attends through a sliding window of {values['sliding_window']} tokens, which is not covered."
        )


def _slides(values: dict[str, Any]) -> bool:
    window = values.get("sliding_window")
    if not values.get("use_sliding_window") or window is None or window >= values["max_position_embeddings"]:
        return False
    kinds = values.get("layer_types")
    if kinds is not None:
        return "sliding_attention" in kinds
    return values.get("max_window_layers", 28) < values["num_hidden_layers"]


def _rope(values: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise DexError(f"{source} rotates only part of each head (partial_rotary_factor), which is not covered.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", float(rope["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                "llama3",
                float(rope["factor"]),
                float(rope["low_freq_factor"]),
                float(rope["high_freq_factor"]),
                int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise DexError(f"{source} lacks {error} for its {kind} RoPE scaling in config.json.") from error
    raise DexError(f"{source} scales RoPE by {kind!r}, and only linear and llama3 scaling are covered.")


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
