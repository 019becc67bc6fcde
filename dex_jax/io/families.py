"""The families of models in one table: how config.json, safetensors and GGUF files describe each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from msgspec import Struct, field

from dex_jax.config import Positive, Size, TokenId

Ids = TokenId | list[TokenId] | None
Names = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


class Settings(Struct, kw_only=True):
    """The keys that are read from config.json; each `Family.defaults` has more values for keys that are left out."""

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
    local_rope_theta: Positive | None = field(name="rope_local_base_freq", default=None)
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    original_context: Size | None = field(name="original_max_position_embeddings", default=None)
    partial_rotary_factor: Positive | None = None
    tied: bool | None = field(name="tie_word_embeddings", default=None)
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    activation: str = field(name="hidden_act", default="silu")
    embed_scale: Positive = field(name="embedding_multiplier", default=1.0)
    residual_scale: Positive = field(name="residual_multiplier", default=1.0)
    attention_scale: Positive | None = field(name="attention_multiplier", default=None)
    logit_divisor: Positive = field(name="logits_scaling", default=1.0)
    attention_cap: Positive | None = field(name="attn_logit_softcapping", default=None)
    logit_cap: Positive | None = field(name="final_logit_softcapping", default=None)
    query_size: Positive = field(name="query_pre_attn_scalar", default=256.0)
    eos_token_id: Ids = None
    bos_token_id: Ids = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    use_bidirectional_attention: bool | str | None = None
    sliding_window: Size | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int | None = 28
    period: Size | None = field(name="sliding_window_pattern", default=None)
    layer_types: list[str] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size = 4
    position_embedding_type: str | None = None

    # Rules for layers (0-based): each family has its own.

    def _said(self, layer: int, otherwise: bool) -> bool:
        return otherwise if self.layer_types is None else self.layer_types[layer : layer + 1] == ["sliding_attention"]

    def _always(self, layer: int) -> bool:
        return True

    def _never(self, layer: int) -> bool:
        return False

    def _all_but_every_nth(self, layer: int) -> bool:
        return self._said(layer, self.period is None or (layer + 1) % self.period != 0)

    def _qwen2_slides(self, layer: int) -> bool:
        above = self.max_window_layers is None or layer >= self.max_window_layers
        return bool(self.use_sliding_window) and self._said(layer, above)

    def _smollm3_slides(self, layer: int) -> bool:
        return bool(self.use_sliding_window) and self._said(layer, not self._smollm3_rotates(layer))

    def _smollm3_rotates(self, layer: int) -> bool:
        if self.no_rope_layers is not None:
            return self.no_rope_layers[layer : layer + 1] != [0]
        return (layer + 1) % self.no_rope_layer_interval != 0

    def _granite4_rotates(self, layer: int) -> bool:
        return self.position_embedding_type == "rope"


Rule = Callable[[Settings, int], bool]


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties that set a family apart."""

    class_name: str  # the model's class in transformers
    defaults: dict[str, Any]  # the values of keys that config.json leaves out, as in transformers
    gguf: str | None = None  # its architecture in GGUF files; None where llama.cpp has none, or calls it a "llama"
    interleaved: bool = False  # whether GGUF files hold the rows of q and k in llama.cpp's order
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig that all models share
    # Canonical tensor -> (Hugging Face's names, GGUF's), where they are not those of `tensor_names`.
    names: Names = dataclasses.field(default_factory=dict)
    keys: dict[str, str] = dataclasses.field(default_factory=dict)  # of `Settings` -> what config.json calls them here
    slides: Rule = Settings._never  # which layers see no further than `sliding_window`, where there is one
    rotates: Rule = Settings._always  # which layers know positions
    local_rope: bool = False  # whether layers with a window rotate unscaled
    partial: bool = False  # whether heads may be rotated in part
    scaled: bool = False  # whether embeddings grow by the root of the width, and scores shrink by that of `query_size`

    def settings(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return config.json with defaults for what is left out, without the keys that other families alone know."""
        known = {key: value for key, value in config.items() if key not in self.keys}
        known |= {ours: config[theirs] for ours, theirs in self.keys.items() if theirs in config}
        return self.defaults | {key: known[key] for key in known if self.knows(key)}

    def knows(self, key: str) -> bool:
        """Return whether this family reads a key of config.json; keys of `_OWN` only where `defaults` has them."""
        return key not in _OWN or key in self.defaults


_CAPS = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
_MULTIPLIERS = {f"{name}_multiplier": 1.0 for name in ("embedding", "residual", "attention")} | {"logits_scaling": 1.0}
_OWN = {*_CAPS, *_MULTIPLIERS, "rope_local_base_freq"}

_LLAMA = {"max_position_embeddings": 2048, "eos_token_id": 2, "bos_token_id": 1}
_QWEN2 = {"num_key_value_heads": 32}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "eos_token_id": 2, "bos_token_id": 1}
_SLIDING_MISTRAL = _MISTRAL | {"sliding_window": 4096}
_MINISTRAL3 = _MISTRAL | {"head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5}
_GEMMA2 = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "eos_token_id": 1, "bos_token_id": 2,
    "sliding_window": 4096, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
_GEMMA3 = _GEMMA2 | _CAPS | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "sliding_window_pattern": 6, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}  # fmt: skip
_SMOLLM3 = {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_theta": 2e6}
_SMOLLM3 |= {"eos_token_id": 128001, "bos_token_id": 128000}
_OLMO2 = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279}
_OLMO3 = _OLMO2 | {"rope_theta": 5e5, "sliding_window": 4096, "sliding_window_pattern": 4}
_GRANITE4 = _LLAMA | _MULTIPLIERS | {"intermediate_size": 1024, "num_local_experts": 8}
_PHI3 = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "eos_token_id": 32000, "bos_token_id": 1}

_OF_GEMMA = {"norms": "both", "norm_offset": 1.0}
_OF_OLMO = {"norms": "after", "qk_norm": True, "qk_norm_whole": True}
_OF_QWEN2 = {"qkv_bias": True, "out_bias": False}
_GEMMA_NAMES: Names = {"mlp_norm": (("pre_feedforward_layernorm.weight",), ("ffn_norm.weight",))}
_FUSED: Names = {
    "qkv": (("self_attn.qkv_proj.weight",), ("attn_qkv.weight",)),
    "gate_up": (("mlp.gate_up_proj.weight",), ("ffn_up.weight",)),
}
_SHARED_MLP: Names = {
    "gate_up": (("shared_mlp.input_linear.weight",), ("ffn_gate.weight", "ffn_up.weight")),
    "down": (("shared_mlp.output_linear.weight",), ("ffn_down.weight",)),
}
_GEMMA: dict[str, Any] = {
    "names": _GEMMA_NAMES, "keys": {"hidden_act": "hidden_activation"}, "slides": Settings._all_but_every_nth,
    "scaled": True,
}  # fmt: skip
_SMOL: dict[str, Any] = {"slides": Settings._smollm3_slides, "rotates": Settings._smollm3_rotates}
_HYBRID: dict[str, Any] = {
    "keys": {"intermediate_size": "shared_intermediate_size"},
    "rotates": Settings._granite4_rotates,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _LLAMA, "llama", True),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN2, "qwen2", constants=_OF_QWEN2, slides=Settings._qwen2_slides),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _QWEN2 | {"head_dim": 128},
        "qwen3",
        constants={"qk_norm": True},
        slides=Settings._qwen2_slides,
    ),
    "mistral": Family("MistralForCausalLM", _SLIDING_MISTRAL, slides=Settings._always),
    "ministral": Family("MinistralForCausalLM", _SLIDING_MISTRAL, slides=Settings._all_but_every_nth),
    "ministral3": Family("Ministral3ForCausalLM", _MINISTRAL3, "mistral3", True, slides=Settings._always),
    "gemma2": Family("Gemma2ForCausalLM", _GEMMA2, "gemma2", constants=_OF_GEMMA, **_GEMMA),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _GEMMA3, "gemma3", constants=_OF_GEMMA | {"qk_norm": True}, local_rope=True, **_GEMMA
    ),
    "smollm3": Family("SmolLM3ForCausalLM", _SMOLLM3, "smollm3", True, **_SMOL),
    "olmo2": Family("Olmo2ForCausalLM", _OLMO2, "olmo2", constants=_OF_OLMO),
    "olmo3": Family(
        "Olmo3ForCausalLM", _OLMO3, constants=_OF_OLMO, local_rope=True, slides=Settings._all_but_every_nth
    ),
    "granite": Family("GraniteForCausalLM", _LLAMA | _MULTIPLIERS, "granite", True),
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", _GRANITE4, names=_SHARED_MLP, **_HYBRID),
    "phi3": Family("Phi3ForCausalLM", _PHI3, "phi3", names=_FUSED, partial=True, slides=Settings._always),
}
"""The family of each model_type of config.json."""

WITH_TEXT = ("gemma3", "mistral3")
"""The types of models of images and text with a `text_config` that describes a model of the families above."""
