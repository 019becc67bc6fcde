"""Numbers that a model and its exits come to, counted from shapes: parameters, cached numbers, columns.

Letters as everywhere: L layers, D width, H query heads, G key-value heads, d head width, V vocabulary, V' draft
vocabulary, K stages.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dex_jax.config import EXIT_KINDS, ExitsConfig, ModelConfig
from dex_jax.decoding.resolve import default_drafter, default_exits
from dex_jax.errors import DexError
from dex_jax.foreign import local_path, parsed, reading
from dex_jax.io import open_checkpoint
from dex_jax.io.exits_file import load_exits
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.language_model import packing_of
from dex_jax.nn.exits import exit_parameters
from dex_jax.nn.transformer import Unrolled, layer_parameters, parameter_shapes
from dex_jax.nn.weights import weight_bytes

DRAFT = 8192
"""Columns that exits are asked with."""


@dataclasses.dataclass(frozen=True)
class Work:
    """A model."""

    layers: int  # L
    width: int  # D
    heads: int  # H
    kv_heads: int  # G
    attention: int  # H d, numbers of a row's queries
    layer: int  # parameters of one layer
    cached: int  # 2 G d, numbers that a layer keeps of one position
    vocabulary: int  # V
    embeddings: int  # V D, twice that when the unembedding is not the embedding

    def divisible(self, tensor: int) -> bool:
        """Whether a tensor axis of this size divides the heads."""
        return self.heads % tensor == 0 and self.kv_heads % tensor == 0


@dataclasses.dataclass(frozen=True)
class ExitWork:
    """Exits of one kind."""

    name: str  # for people
    own: int  # parameters that each exit has alone
    shared: int  # parameters that all exits read, the unembedding apart
    columns: int  # V', of the unembedding that they are asked with
    previous: bool  # whether they read the features of the position before
    committed: int = 0  # of the shared parameters, those that a committed position is read with


def work_of(config: ModelConfig) -> Work:
    """Counts a model."""
    return Work(
        layers=config.num_layers,
        width=config.width,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        attention=config.num_heads * config.head_dim,
        layer=sum(math.prod(shape) for shape, _ in layer_parameters(config).values()),
        cached=2 * config.num_kv_heads * config.head_dim,
        vocabulary=config.vocab_size,
        embeddings=config.vocab_size * config.width * (1 if config.tied else 2),
    )


def packed_bytes(source: str, weights: str | None, platform: str) -> float | None:
    """Bytes of a number of a model, `source` as of `config_of`, for `weights` as of `load`; None where they are dense.

    Blocks take other bytes on a TPU: `platform` as `hardware.platform_of` says it.

    Raises:
      DexError: "stored" of what is only described.
    """
    if weights in (None, "dense"):
        return None
    if _described(source):
        if weights == "stored":
            raise DexError(f"{source} does not say how weights are stored: plan for int8, or name a model's file")
        return 1.0
    checkpoint, dtype = open_checkpoint(source), jnp.dtype(jnp.bfloat16)
    packing = packing_of(checkpoint, dtype, Unrolled(), None, weights, platform)
    numbers = sum(map(math.prod, parameter_shapes(checkpoint.config).values()))
    return sum(weight_bytes(checkpoint.config, dtype, packing).values()) / numbers


def exit_work(exits: ExitsConfig | None, config: ModelConfig) -> ExitWork:
    """Counts exits; None are the model's own norm and unembedding, "shared"."""
    if exits is None:
        return ExitWork("shared", 0, 0, config.vocab_size, previous=False)
    one = exit_parameters(dataclasses.replace(exits, depths=(1,), width=config.width))
    counts = {name: math.prod(shape) for name, (shape, _) in one.items()}
    shared = sum(count for name, count in counts.items() if name.startswith("context."))
    committed = counts["context.enter"] + counts["context.layer.qkv"] if exits.kind == "attn" else 0
    columns = config.vocab_size if exits.draft_size is None else exits.draft_size
    return ExitWork(exits.kind, sum(counts.values()) - shared, shared, columns, exits.needs_previous, committed)


def described_exits(text: str, config: ModelConfig) -> ExitWork | None:
    """Exits that are only described, as "shared" or "linear:8192"; None for other texts. DexError: no such columns."""
    kind, _, columns = text.partition(":")
    if kind not in EXIT_KINDS:
        return None
    if not columns:
        return exit_work(None if kind == "shared" else ExitsConfig(kind, (1,), config.width), config)
    if not columns.isdigit() or not 1 <= int(columns) <= config.vocab_size:
        raise DexError(f"--exits {text}: {columns!r} is no draft vocabulary of 1 to {config.vocab_size} tokens")
    found = exit_work(ExitsConfig(kind, (1,), config.width, draft_size=int(columns)), config)
    return dataclasses.replace(found, name=f"{kind}, draft vocabulary of {int(columns):,}")


def exits_of(text: str, model: str) -> ExitWork:
    """Shapes of the exits that the flag names. DexError: no such exits."""
    config = config_of(model)
    found = described_exits(text, config)
    if found is not None:
        return found
    if text == "default":
        shipped = None if _described(model) else default_exits(open_checkpoint(model).fingerprint())
        return exit_work(None if shipped is None else shipped.config, config)
    exits = load_exits(text).config
    if exits.width != config.width:
        raise DexError(f"the exits in {text} are for a model of width {exits.width}, and {model} has {config.width}")
    return exit_work(exits, config)


def drafter_of(model: str) -> ExitWork:
    """Shapes of exit 0: what ships for the model, or a fused mlp with a small vocabulary where nothing does."""
    config = config_of(model)
    shipped = None if _described(model) else default_drafter(open_checkpoint(model).fingerprint())
    small = ExitsConfig("mlp", (0,), config.width, fused=True, draft_size=min(DRAFT, config.vocab_size))
    return exit_work(small if shipped is None else shipped.config, config)


# From the config.json of each model's release: family, vocabulary, layers, width, heads, key-value heads, their width,
# width of the MLP, context.
SHAPES = {
    "llama-2-7b": ModelConfig("llama", 32000, 32, 4096, 32, 32, 128, 11008, 4096),
    "llama-2-13b": ModelConfig("llama", 32000, 40, 5120, 40, 40, 128, 13824, 4096),
    "llama-2-70b": ModelConfig("llama", 32000, 80, 8192, 64, 8, 128, 28672, 4096),
    "llama-3-8b": ModelConfig("llama", 128256, 32, 4096, 32, 8, 128, 14336, 8192),
    "codellama-34b": ModelConfig("llama", 32000, 48, 8192, 64, 8, 128, 22016, 16384),
    "qwen3-32b": ModelConfig("qwen3", 151936, 64, 5120, 64, 8, 128, 25600, 40960, qk_norm=True),
}
"""Shapes to plan for without any weights."""


def _described(model: str) -> bool:
    """Whether there is no more of a model than its shapes."""
    return model.lower() in SHAPES or model.endswith(".json")


def config_of(source: str) -> ModelConfig:
    """The shapes of a model: a name of SHAPES, a config.json, or whatever `open_checkpoint` opens; no weights are read.

    Raises:
      DexError: none of these.
    """
    if source.lower() in SHAPES:
        return SHAPES[source.lower()]
    if source.endswith(".json"):
        with reading(source, "give a model's config.json"):
            content = parsed(local_path(source).read_bytes(), dict[str, Any], source, "give a model's config.json")
            return huggingface_config(content, {}, source)
    try:
        return open_checkpoint(source).config
    except DexError as error:
        raise DexError(
            f"{error} To plan from shapes alone, name one of {', '.join(SHAPES)} or a config.json."
        ) from error
