"""The frozen configurations of models and their heads, in one vocabulary for all kinds of checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Literal

from msgspec import Meta

from dex_jax.errors import DexError

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
"""The size of an axis, or the number of things of one kind."""

TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]
"""A number above 0, neither infinite nor NaN."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The stretch of rotary frequencies for longer contexts.

    Attributes:
      kind: "linear" (every frequency divided by `factor`), "llama3" (only the low ones, with a smooth ramp between
        `low_freq_factor` and `high_freq_factor` wavelengths of `original_context`), "yarn" (the ramp runs from those
        that turn `fast` times in `original_context` to those that turn `slow` times, and begins at whole frequencies if
        `truncate`) or "longrope" (each frequency by a factor of its own).
      factor: the stretch.
      low_freq_factor, high_freq_factor: of "llama3".
      original_context: positions before any stretch.
      fast, slow, truncate: of "yarn".
      magnitude: the factor of sines and cosines, in "yarn" and "longrope".
      query_growth: queries at position p are multiplied with 1 + query_growth log(1 + floor(p / original_context)).
      short_factors, long_factors: of "longrope", d' / 2 each: for sequences up to `original_context`, and beyond.
      long: whether "longrope" takes the long ones; see `ModelConfig.at_length`.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: Positive
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0
    original_context: Size = 8192
    fast: Positive = 32.0
    slow: Positive = 1.0
    truncate: bool = True
    magnitude: Positive = 1.0
    query_growth: float = 0.0
    short_factors: tuple[Positive, ...] = ()
    long_factors: tuple[Positive, ...] = ()
    long: bool = False

    def __post_init__(self) -> None:
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise DexError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The properties that differ from layer to layer of one model.

    Attributes:
      window: number of positions that a row sees, its own included; None for all.
      rope: "main" rotates by the model's rope_theta and rope_scaling, "local" by its local_rope_theta and unscaled,
        "none" not at all.
    """

    window: Size | None = None
    rope: Literal["main", "local", "none"] = "main"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shapes and constants of a model.

    Letters follow the rest of the package: D width, H query heads, G key-value heads, d head width, F mlp width,
    V vocabulary, L layers.

    Attributes:
      family: a key of `io.families.FAMILIES`; only a name, the switches below say what the layers do.
      vocab_size, num_layers, width, num_heads, mlp_width: V, L, D, H and F.
      num_kv_heads: G; divides H.
      head_dim: d; independent of D / H.
      context: the longest sequence (prompt and new tokens) in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None, or how frequencies are stretched.
      norm_eps: epsilon of every RMS norm.
      tied: the unembedding is the embedding.
      qkv_bias, out_bias: biases of the attention projections.
      qk_norm: an RMS norm over d of every query and key head, before RoPE (Qwen3).
      eos_ids, bos_id: tokens that end a sequence, and the one that begins it, or None.
      layer_kinds: the kinds of the layers, L of them; () for layers that are all LayerKind().
      local_rope_theta: base of the rotary frequencies of layers with the rope "local"; None is rope_theta.
      rotated: number of the d values of a head that are rotated, the first ones; None for all.
      qk_norm_whole: `qk_norm` is over all heads together (OLMo 2).
      norms: whether attention and mlp norm what they read ("before"), what they give ("after"), or "both".
      norm_offset: the number that is added to the scale of every norm (Gemma: 1).
      activation: of the mlp's gate, "silu" or "gelu" (by tanh).
      embed_scale: the factor of embeddings.
      residual_scale: the factor of the outputs of attention and mlp, before they are added.
      attention_scale: the factor of scores; None is d**-0.5.
      attention_cap, logit_cap: scores, or logits, become cap tanh(x / cap); None leaves them.
      logit_divisor: the divisor of logits, before the cap.

    Raises:
      DexError: key-value heads do not divide the heads, heads cannot be rotated, or the number of layer kinds, or
        RoPE's factors or base, do not fit.
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
    layer_kinds: tuple[LayerKind, ...] = ()
    local_rope_theta: float | None = None
    rotated: int | None = None
    qk_norm_whole: bool = False
    norms: Literal["before", "after", "both"] = "before"
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu"] = "silu"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: Positive | None = None
    attention_cap: Positive | None = None
    logit_cap: Positive | None = None
    logit_divisor: Positive = 1.0

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise DexError(f"{self.num_heads} heads, which {self.num_kv_heads} key-value heads do not divide")
        if self.head_dim < 2 or self.head_dim % 2:
            raise DexError(f"heads of width {self.head_dim}, which RoPE cannot rotate: it takes pairs")
        if not 2 <= self.rotated_dim <= self.head_dim or self.rotated_dim % 2:
            raise DexError(f"RoPE cannot rotate {self.rotated_dim} of {self.head_dim} numbers of a head")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise DexError(f"{len(self.layer_kinds)} kinds of layers for {self.num_layers} layers")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "yarn" and self.rope_theta <= 1:
            raise DexError(f"YaRN cannot stretch frequencies of the base {self.rope_theta}")
        if scaling is not None and scaling.kind == "longrope":
            for factors in (scaling.short_factors, scaling.long_factors):
                if len(factors) != self.rotated_dim // 2:
                    raise DexError(f"{len(factors)} RoPE factors for {self.rotated_dim // 2} frequencies")

    @property
    def qkv_width(self) -> int:
        """Number of rows of the fused query-key-value projection, (H + 2 G) d."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def rotated_dim(self) -> int:
        """Number of the d values of a head that are rotated, d'."""
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, L of them."""
        return self.layer_kinds or (LayerKind(),) * self.num_layers

    def at_length(self, length: int) -> ModelConfig:
        """Return the model for sequences of at most `length` tokens, as some RoPE scalings have factors for long ones.

        Cached keys stay as they were rotated, so that all tokens of a sequence take the factors of its whole length.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "longrope" or scaling.long == (length > scaling.original_context):
            return self
        return dataclasses.replace(self, rope_scaling=dataclasses.replace(scaling, long=not scaling.long))


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """The shapes and switches of an EAGLE-3 head (arXiv 2503.01840), a drafter that reads hidden states of a model."""

    layer: ModelConfig  # its one layer, and the vocabulary of the tokens that it reads
    reads: tuple[int, ...]  # depths of the model, 0..L, from which it reads states side by side
    state_width: int  # D of the model, of each of them
    draft_size: int  # V', number of tokens that it knows to draft
    own_embedding: bool = False  # whether it embeds tokens itself, or as the model does
    norm_before_residual: bool = False  # whether its layer adds to the normed features, not to those before the norm
    norm_states: Literal["each", "all"] | None = None  # normed before they are joined, each by itself or all together
    norm_output: bool = False  # whether it goes on from its features after the last norm, and not from those before


_Width = Annotated[int, Meta(ge=1, le=2**20)]

EXIT_KINDS = ("shared", "linear", "mlp", "attn")


@dataclasses.dataclass(frozen=True)
class ExitsConfig:
    """The shapes of X trained exit heads, one at each of `depths`.

    An exit turns the hidden state at its depth into features in the space after the model's final norm, which the
    model's own unembedding (all of it, or the rows of a draft vocabulary) turns into logits.

    Attributes:
      kind: what stands between state and features, after a norm of its own: "shared" nothing, "linear" a residual
        D x D map (a tuned lens), "mlp" a linear map plus a gated mlp of `hidden`, "attn" a linear map plus one light
        decoder layer over (token, previous position), shared by all exits, with its own keys and values of the last
        `window` committed positions.
      depths: trained depths, ascending, all below L; 0 is the token's embedding, before any layer.
      width: D.
      fused: whether a further map of the previous position's features is added ("attn" reads them in any case).
      hidden: mlp width of "mlp" and "attn".
      heads, head_dim, window: of "attn".
      draft_size: V', number of tokens of the draft vocabulary; None is the full vocabulary.
      norm_eps: epsilon of the norms.
    """

    kind: str
    depths: Annotated[tuple[TokenId, ...], Meta(max_length=4096)]
    width: _Width
    fused: bool = False
    hidden: _Width = 256
    heads: _Width = 4
    head_dim: _Width = 64
    window: _Width = 64
    draft_size: Size | None = None
    norm_eps: Positive = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in EXIT_KINDS:
            raise DexError(f"unknown kind of exits {self.kind!r}: choose one of {', '.join(EXIT_KINDS)}")
        if not self.depths or any(a >= b for a, b in itertools.pairwise((-1, *self.depths))):
            raise DexError(f"exit depths must ascend from 0 or above without repeats, not {self.depths}")

    @property
    def needs_previous(self) -> bool:
        """True if the features of the position before are an input."""
        return self.fused or self.kind == "attn"

    @property
    def is_drafter(self) -> bool:
        """True if exit 0 can draft with it: one fused exit at depth 0, without attention.

        Attention has brought a drafter no measurable gain.
        """
        return self.fused and self.kind != "attn" and self.depths == (0,)
