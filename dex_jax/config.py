"""Frozen descriptions of a model: what a checkpoint's own configuration says, in one vocabulary."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated

from msgspec import Meta

from dex_jax.errors import DexError
from dex_jax.foreign import Positive, Size, TokenId


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

    def __post_init__(self) -> None:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise DexError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )


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

    Raises:
      DexError: key-value heads that do not divide the heads, or heads of a width that cannot be rotated.
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

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise DexError(f"{self.num_heads} heads, which {self.num_kv_heads} key-value heads do not divide")
        if self.head_dim < 2 or self.head_dim % 2:
            raise DexError(f"heads of width {self.head_dim}, which RoPE cannot rotate: it takes pairs")

    @property
    def qkv_width(self) -> int:
        """Rows of the fused query-key-value projection, (H + 2 G) d."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


_Width = Annotated[int, Meta(ge=1, le=2**20)]

EXIT_KINDS = ("shared", "linear", "lowrank", "mlp", "attn")


@dataclasses.dataclass(frozen=True)
class ExitsConfig:
    """Shapes of trained exit heads, X of them, one at each of `depths`.

    An exit turns the hidden state at its depth into features in the space after the model's final norm, which the
    model's own unembedding (all of it, or the rows of a draft vocabulary) turns into logits.

    Attributes:
      kind: what stands between state and features, after a norm of its own: "shared" nothing, "linear" a residual
        D x D map (a tuned lens), "lowrank" a residual map of `rank`, "mlp" a linear map plus a gated mlp of `hidden`,
        "attn" a linear map plus one light decoder layer over (token, previous position), shared by all exits, with
        its own keys and values of the last `window` committed positions.
      depths: trained depths, ascending, all below L; 0 is the token's embedding, before any layer.
      width: D.
      fused: whether a further map of the previous position's features is added ("attn" reads them in any case).
      rank: of "lowrank", for both maps.
      hidden: mlp width of "mlp" and "attn".
      heads, head_dim, window: of "attn".
      draft_size: V', how many tokens the draft vocabulary holds; None is the full vocabulary.
      norm_eps: epsilon of the norms.
    """

    kind: str
    depths: Annotated[tuple[TokenId, ...], Meta(max_length=4096)]
    width: _Width
    fused: bool = False
    rank: _Width = 64
    hidden: _Width = 256
    heads: _Width = 4
    head_dim: _Width = 64
    window: _Width = 64
    draft_size: Size | None = None
    norm_eps: Positive = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in EXIT_KINDS:
            raise DexError(f"unknown kind of exits {self.kind!r}: choose one of {', '.join(EXIT_KINDS)}")
        ascending = all(a < b for a, b in itertools.pairwise((-1, *self.depths)))
        if not self.depths or not ascending:
            raise DexError(f"exit depths must ascend from 0 or above without repeats, not {self.depths}")

    @property
    def needs_previous(self) -> bool:
        """Whether the features of the position before are an input."""
        return self.fused or self.kind == "attn"

    @property
    def is_drafter(self) -> bool:
        """Whether exit 0 can draft with it: one fused exit at depth 0, without attention.

        Attention brings a drafter nothing that could be told from noise (results/serial.md).
        """
        return self.fused and self.kind != "attn" and self.depths == (0,)
