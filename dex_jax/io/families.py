"""Families of models: how config.json, safetensors and GGUF files say what each is, as one table.

A `Settings` says what a key of config.json means that is left out, as in transformers; `switches` are the fields of
ModelConfig that follow from its keys, `Family.constants` those that all models of a family share.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from msgspec import Struct, field

from dex_jax.foreign import Positive, Size, TokenId

Ids = TokenId | list[TokenId] | None
Names = dict[str, tuple[tuple[str, ...], tuple[str, ...]]]


class Settings(Struct, kw_only=True):
    """What is read of config.json."""

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
    partial_rotary_factor: Positive | None = None
    tied: bool | None = field(name="tie_word_embeddings", default=None)
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    activation: str = field(name="hidden_act", default="silu")
    eos_token_id: Ids = None
    bos_token_id: Ids = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    sliding_window: Size | None = None
    layer_types: list[str] | None = None

    def slides(self, layer: int) -> bool:
        """Whether a layer (0-based) sees no further than `sliding_window`; it counts where there is a window."""
        return False

    def said_to_slide(self, layer: int, otherwise: bool) -> bool:
        """What `layer_types` says of a layer, and `otherwise` where it is left out."""
        return otherwise if self.layer_types is None else self.layer_types[layer : layer + 1] == ["sliding_attention"]

    def rotates(self, layer: int) -> bool:
        """Whether a layer knows positions."""
        return True

    def switches(self) -> dict[str, Any]:
        """Fields of ModelConfig that follow from those above."""
        return {"qkv_bias": bool(self.attention_bias), "out_bias": bool(self.attention_bias)}


class _Typed(Settings):
    """Layers slide where `layer_types` says so, and without it all but every `period`-th."""

    period: Size | None = field(name="sliding_window_pattern", default=None)

    def slides(self, layer: int) -> bool:
        return self.said_to_slide(layer, self.period is None or (layer + 1) % self.period != 0)


class _Llama(Settings):
    context: Size = field(name="max_position_embeddings", default=2048)
    eos_token_id: Ids = 2
    bos_token_id: Ids = 1


class _Qwen2(Settings):
    num_kv_heads: Size | None = field(name="num_key_value_heads", default=32)
    use_sliding_window: bool | None = None
    max_window_layers: int | None = 28

    def slides(self, layer: int) -> bool:
        above = self.max_window_layers is None or layer >= self.max_window_layers
        return bool(self.use_sliding_window) and self.said_to_slide(layer, above)


class _Qwen3(_Qwen2):
    head_dim: Size | None = 128


class _Mistral(Settings):
    context: Size = field(name="max_position_embeddings", default=131072)
    num_kv_heads: Size | None = field(name="num_key_value_heads", default=8)
    eos_token_id: Ids = 2
    bos_token_id: Ids = 1
    sliding_window: Size | None = 4096

    def slides(self, layer: int) -> bool:
        return True


class _Ministral(_Typed, _Mistral):
    pass


class _Ministral3(_Mistral):
    head_dim: Size | None = 128
    context: Size = field(name="max_position_embeddings", default=262144)
    norm_eps: Positive = field(name="rms_norm_eps", default=1e-5)
    sliding_window: Size | None = None


class _Gemma2(_Typed):
    num_heads: Size = field(name="num_attention_heads", default=8)
    num_kv_heads: Size | None = field(name="num_key_value_heads", default=4)
    head_dim: Size | None = 256
    context: Size = field(name="max_position_embeddings", default=8192)
    tied: bool | None = field(name="tie_word_embeddings", default=True)
    activation: str = field(name="hidden_activation", default="gelu_pytorch_tanh")
    eos_token_id: Ids = 1
    bos_token_id: Ids = 2
    sliding_window: Size | None = 4096
    period: Size | None = field(name="sliding_window_pattern", default=2)
    query_pre_attn_scalar: Positive = 256.0
    attention_cap: Positive | None = field(name="attn_logit_softcapping", default=50.0)
    logit_cap: Positive | None = field(name="final_logit_softcapping", default=30.0)
    use_bidirectional_attention: bool | str | None = None

    def switches(self) -> dict[str, Any]:
        return super().switches() | {
            "embed_scale": self.width**0.5,
            "attention_scale": self.query_pre_attn_scalar**-0.5,
        }


class _Gemma3(_Gemma2):
    vocab_size: Size = 262208
    context: Size = field(name="max_position_embeddings", default=131072)
    period: Size | None = field(name="sliding_window_pattern", default=6)
    attention_cap: Positive | None = field(name="attn_logit_softcapping", default=None)
    logit_cap: Positive | None = field(name="final_logit_softcapping", default=None)
    rope_theta: Positive | None = 1e6
    local_rope_theta: Positive | None = field(name="rope_local_base_freq", default=1e4)


class _SmolLM3(Settings):
    num_kv_heads: Size | None = field(name="num_key_value_heads", default=4)
    tied: bool | None = field(name="tie_word_embeddings", default=True)
    rope_theta: Positive | None = 2e6
    eos_token_id: Ids = 128001
    bos_token_id: Ids = 128000
    use_sliding_window: bool | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size = 4

    def slides(self, layer: int) -> bool:
        return bool(self.use_sliding_window) and self.said_to_slide(layer, not self.rotates(layer))

    def rotates(self, layer: int) -> bool:
        if self.no_rope_layers is not None:
            return self.no_rope_layers[layer : layer + 1] != [0]
        return (layer + 1) % self.no_rope_layer_interval != 0


class _Olmo2(Settings):
    context: Size = field(name="max_position_embeddings", default=2048)
    norm_eps: Positive = field(name="rms_norm_eps", default=1e-5)
    eos_token_id: Ids = 50279


class _Olmo3(_Typed, _Olmo2):
    rope_theta: Positive | None = 5e5
    sliding_window: Size | None = 4096
    period: Size | None = field(name="sliding_window_pattern", default=4)


class _Granite(_Llama):
    embed_scale: Positive = field(name="embedding_multiplier", default=1.0)
    residual_scale: Positive = field(name="residual_multiplier", default=1.0)
    attention_scale: Positive = field(name="attention_multiplier", default=1.0)
    logit_divisor: Positive = field(name="logits_scaling", default=1.0)


class _Granite4(_Granite):
    mlp_width: Size = field(name="shared_intermediate_size", default=1024)
    num_local_experts: int | None = 8
    position_embedding_type: str | None = None

    def rotates(self, layer: int) -> bool:
        return self.position_embedding_type == "rope"


class _Phi3(Settings):
    context: Size = field(name="max_position_embeddings", default=4096)
    norm_eps: Positive = field(name="rms_norm_eps", default=1e-5)
    original_context: Size | None = field(name="original_max_position_embeddings", default=None)
    eos_token_id: Ids = 32000
    bos_token_id: Ids = 1

    def slides(self, layer: int) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart."""

    class_name: str  # the model's class in transformers
    settings: type[Settings]  # its config.json
    gguf: str | None = None  # its architecture in GGUF files; None where llama.cpp has none, or calls it a "llama"
    interleaved: bool = False  # whether GGUF files hold the rows of q and k in llama.cpp's order
    constants: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of ModelConfig that all models share
    # Canonical tensor -> (Hugging Face's names, GGUF's), where they are not those of `tensor_names`.
    names: Names = dataclasses.field(default_factory=dict)
    local_rope: bool = False  # whether layers with a window rotate unscaled
    partial: bool = False  # whether heads may be rotated in part


_GEMMA = {"norms": "both", "norm_offset": 1.0}
_GEMMA3 = _GEMMA | {"qk_norm": True}
_GEMMA_NAMES: Names = {"mlp_norm": (("pre_feedforward_layernorm.weight",), ("ffn_norm.weight",))}
_OLMO = {"norms": "after", "qk_norm": True, "qk_norm_whole": True}
_SPLIT_GATE_UP = ("ffn_gate.weight", "ffn_up.weight")
_FUSED: Names = {
    "qkv": (("self_attn.qkv_proj.weight",), ("attn_qkv.weight",)),
    "gate_up": (("mlp.gate_up_proj.weight",), ("ffn_up.weight",)),
}
_SHARED_MLP: Names = {
    "gate_up": (("shared_mlp.input_linear.weight",), _SPLIT_GATE_UP),
    "down": (("shared_mlp.output_linear.weight",), ("ffn_down.weight",)),
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _Llama, "llama", True),
    "qwen2": Family("Qwen2ForCausalLM", _Qwen2, "qwen2", constants={"qkv_bias": True, "out_bias": False}),
    "qwen3": Family("Qwen3ForCausalLM", _Qwen3, "qwen3", constants={"qk_norm": True}),
    "mistral": Family("MistralForCausalLM", _Mistral),
    "ministral": Family("MinistralForCausalLM", _Ministral),
    "ministral3": Family("Ministral3ForCausalLM", _Ministral3, "mistral3", True),
    "gemma2": Family("Gemma2ForCausalLM", _Gemma2, "gemma2", constants=_GEMMA, names=_GEMMA_NAMES),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _Gemma3, "gemma3", constants=_GEMMA3, names=_GEMMA_NAMES, local_rope=True
    ),
    "smollm3": Family("SmolLM3ForCausalLM", _SmolLM3, "smollm3", True),
    "olmo2": Family("Olmo2ForCausalLM", _Olmo2, "olmo2", constants=_OLMO),
    "olmo3": Family("Olmo3ForCausalLM", _Olmo3, constants=_OLMO, local_rope=True),
    "granite": Family("GraniteForCausalLM", _Granite, "granite", True),
    "granitemoehybrid": Family("GraniteMoeHybridForCausalLM", _Granite4, names=_SHARED_MLP),
    "phi3": Family("Phi3ForCausalLM", _Phi3, "phi3", names=_FUSED, partial=True),
}
"""model_type of config.json -> what it is."""

WITH_TEXT = ("gemma3", "mistral3")
"""Models of images and text whose `text_config` describes a model of the families above."""
