"""Frozen descriptions of a model: what a checkpoint's own configuration says, in one vocabulary."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts.

    Attributes:
      kind: "linear" (every frequency divided by `factor`) or "llama3" (only the low ones, with a smooth ramp between
        `low_freq_factor` and `high_freq_factor` wavelengths of `original_context`).
      factor: the stretch.
      low_freq_factor, high_freq_factor, original_context: used by "llama3" only.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one Llama-family decoder.

    Letters follow the rest of the package: D width, H query heads, G key-value heads, d head width, F mlp width,
    V vocabulary, L layers.

    Attributes:
      family: "llama", "qwen2" or "qwen3"; only a name, the switches below say what the layers do.
      vocab_size: V.
      num_layers: L.
      width: D.
      num_heads: H.
      num_kv_heads: G; divides H.
      head_dim: d; independent of D / H.
      mlp_width: F.
      context: the longest sequence (prompt and new tokens) in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, or how frequencies are stretched.
      norm_eps: epsilon of every RMS norm.
      tied: the unembedding is the embedding.
      qkv_bias, out_bias: biases of the attention projections.
      qk_norm: an RMS norm over d of every query and key head, before RoPE (Qwen3).
      eos_ids: token ids that end a sequence.
      bos_id: the token that begins one, or None.
    """

    family: str
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    context: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    @property
    def qkv_width(self) -> int:
        """Rows of the fused query-key-value projection, (H + 2 G) d."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
