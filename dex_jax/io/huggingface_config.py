"""config.json, in the forms of transformers 4 and 5, as a ModelConfig."""

from __future__ import annotations

from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict, fields

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import Positive, Size, TokenId, typed

_QUANTISED = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8"}
_Ids = TokenId | list[TokenId] | None


class _Config(Struct, kw_only=True):
    """What is read of config.json, with what transformers means by a key that is left out."""

    vocab_size: Size
    num_layers: Size = field(name="num_hidden_layers")
    width: Size = field(name="hidden_size")
    num_heads: Size = field(name="num_attention_heads")
    num_kv_heads: Size | None = field(name="num_key_value_heads", default=None)
    head_dim: Size | None = None
    mlp_width: Size = field(name="intermediate_size")
    context: Size = field(name="max_position_embeddings", default=32768)
    norm_eps: Positive = field(name="rms_norm_eps", default=1e-6)
    rope_theta: Positive | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    hidden_act: str = "silu"
    eos_token_id: _Ids = None
    bos_token_id: _Ids = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    use_sliding_window: bool | None = None
    sliding_window: Size | None = None
    max_window_layers: int | None = 28
    layer_types: list[str] | None = None


class _Llama(_Config):
    context: Size = field(name="max_position_embeddings", default=2048)
    eos_token_id: _Ids = 2
    bos_token_id: _Ids = 1


class _Qwen2(_Config):
    num_kv_heads: Size | None = field(name="num_key_value_heads", default=32)


class _Qwen3(_Qwen2):
    head_dim: Size | None = 128


_FAMILIES: dict[str, type[_Config]] = {"llama": _Llama, "qwen2": _Qwen2, "qwen3": _Qwen3}


class _Generation(Struct):
    eos_token_id: _Ids = None


class _Rope(Struct):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: float | None = None


class _Linear(Struct):
    factor: Positive


class _Llama3(_Linear):
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_context: Size = field(name="original_max_position_embeddings")


_SCALINGS: dict[str, type[_Linear]] = {"linear": _Linear, "llama3": _Llama3}


_SAME = ModelConfig.__annotations__.keys() - {"rope_scaling"}
SHARED_KEYS = {each.name: each.encode_name for each in fields(_Config) if each.name in _SAME}
"""Field of ModelConfig -> key of config.json, where the value is the same in both."""

SCALING_KEYS = {kind: {each.name: each.encode_name for each in fields(read)} for kind, read in _SCALINGS.items()}
"""Kind of RoPE scaling -> field of RopeScaling -> key in config.json."""


def huggingface_config(config: dict[str, Any], generation: dict[str, Any], source: str) -> ModelConfig:
    """The configuration that config.json and generation_config.json (or {}) of a model called `source` mean.

    Raises:
      DexError: another architecture, a feature that the model here does not have, or values that no model has.
    """
    file = f"config.json of {source}"
    family = typed(config, dict[str, Any], file).get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise DexError(
            f"{source} is of model type {family!r:.60}, and only {', '.join(_FAMILIES)} are covered: choose another "
            "model."
        )
    read = typed(config, _FAMILIES[family], file)
    _refuse_uncovered(read, family, source)
    stops = typed(generation, _Generation, f"generation_config.json of {source}").eos_token_id
    bias = bool(read.attention_bias)
    theta, scaling = _rope(read, source, file)
    found = asdict(read) | {
        "family": family,
        "num_kv_heads": read.num_kv_heads or read.num_heads,
        "head_dim": read.head_dim or read.width // read.num_heads,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied": bool(read.tie_word_embeddings),
        "qkv_bias": family == "qwen2" or bias,
        "out_bias": family != "qwen2" and bias,
        "qk_norm": family == "qwen3",
        "eos_ids": sorted({*_ids(read.eos_token_id), *_ids(stops)}),
        "bos_id": next(iter(_ids(read.bos_token_id)), None),
    }
    return typed(found, ModelConfig, file)


def _refuse_uncovered(config: _Config, family: str, source: str) -> None:
    if config.quantization_config:
        method = str(config.quantization_config.get("quant_method", "an unnamed method"))
        raise DexError(
            f"{source} is quantised by {_QUANTISED.get(method, method):.60}, which is not covered: use the unquantised "
            "model or a GGUF."
        )
    classes = config.architectures or []
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise DexError(f"{source} is a {classes[0]:.60}, and only causal language models are covered.")
    if config.mlp_bias:
        raise DexError(f"{source} has biases in its MLP (mlp_bias), which are not covered.")
    if config.hidden_act not in ("silu", "swish"):
        raise DexError(f"{source} uses the activation {config.hidden_act!r:.60}, and only silu is covered.")
    if config.num_experts or config.num_local_experts:
        raise DexError(f"{source} is a mixture of experts, which is not covered: choose a dense model.")
    if family != "llama" and _slides(config):
        raise DexError(
            f"{source} attends through a sliding window of {config.sliding_window} tokens, which is not covered."
        )


def _slides(config: _Config) -> bool:
    window = config.sliding_window
    if not config.use_sliding_window or window is None or window >= config.context:
        return False
    if config.layer_types is not None:
        return "sliding_attention" in config.layer_types
    return config.max_window_layers is None or config.max_window_layers < config.num_layers


def _rope(config: _Config, source: str, file: str) -> tuple[float, dict[str, Any] | None]:
    given = config.rope_parameters or config.rope_scaling or {}
    rope = typed(given, _Rope, f"RoPE in {file}")
    if any(share not in (None, 1.0) for share in (config.partial_rotary_factor, rope.partial_rotary_factor)):
        raise DexError(f"{source} rotates only part of each head (partial_rotary_factor), which is not covered.")
    theta = rope.rope_theta or config.rope_theta or 10000.0
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return theta, None
    if kind not in _SCALINGS:
        raise DexError(f"{source} scales RoPE by {kind!r:.60}, and only linear and llama3 scaling are covered.")
    return theta, {"kind": kind} | asdict(typed(given, _SCALINGS[kind], f"{kind} RoPE in {file}"))


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
