"""The drafters that a user may put at depth 0: a trained drafter, an EAGLE-3 head, or a small model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.decoding.dex.interface import ExitZero
from dex_jax.decoding.dex.own_layers import EagleDrafter, ModelDrafter, OwnArrays, eagle_arrays
from dex_jax.decoding.dex.trained_exits import TrainedHeads, exit_arrays
from dex_jax.decoding.dex.trees import DRAFTED_TREES, LOOKUP_TREES, OWN_LAYERS_TREES, TreeShape
from dex_jax.errors import DexError
from dex_jax.io.eagle import EagleHead, fit_eagle
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn import few_rows
from dex_jax.nn.exits import in_int8
from dex_jax.nn.packed import Packed
from dex_jax.nn.transformer import Transformer
from dex_jax.nn.weights import Packing

if TYPE_CHECKING:
    from dex_jax.io.tokenizer import Tokenizer
    from dex_jax.language_model import LanguageModel, Outline


@dataclasses.dataclass(frozen=True, eq=False)
class DraftModel:
    """A small model that drafts for another one of the same vocabulary."""

    config: ModelConfig
    weights: Any  # as in LanguageModel, or their shapes
    dtype: jnp.dtype
    packing: Packing
    source: str
    vocab_size: int  # of the model that it drafts for


GivenDrafter = TrainedExits | EagleHead | DraftModel


def draft_model(lm: LanguageModel | Outline, small: LanguageModel | Outline) -> DraftModel:
    """Return `small` as the drafter of `lm`.

    Raises:
      DexError: another vocabulary, or a drafter on a mesh.
    """
    name = small.source
    if small.mesh is not None:
        raise DexError(f"{name} drafts on one device: load it without a mesh")
    sizes = lm.config.vocab_size, small.config.vocab_size
    if not _same_tokens(lm.tokenizer, small.tokenizer, *sizes):
        raise DexError(
            f"{name} has another vocabulary than the model ({sizes[1]} and {sizes[0]} tokens): a draft model must know "
            "the same tokens by the same numbers"
        )
    return DraftModel(small.config, small.weights, small.dtype, small.packing, name, sizes[0])


@functools.lru_cache(maxsize=4)
def _same_tokens(one: Tokenizer | None, other: Tokenizer | None, size: int, other_size: int) -> bool:
    """Return whether ids below both vocabulary sizes name the same tokens; ids beyond them only pad a vocabulary."""
    if one is None or other is None:
        return size == other_size
    known, others = (
        {token: i for token, i in each.backend.get_vocab(with_added_tokens=True).items() if i < min(size, other_size)}
        for each in (one, other)
    )
    return known == others


_fitted = functools.lru_cache(maxsize=1)(fit_eagle)


def fitted(given: EagleHead | DraftModel, config: ModelConfig) -> EagleHead | DraftModel:
    """Fit a drafter with layers of its own to a model; raise DexError for a head of another model."""
    return _fitted(given, config) if isinstance(given, EagleHead) else given


def known_trees(drafter: GivenDrafter | None) -> tuple[TreeShape, ...]:
    """Return the trees that a drafter fills, ascending; for None those of the text alone."""
    if drafter is None:
        return LOOKUP_TREES
    return DRAFTED_TREES if isinstance(drafter, TrainedExits) else OWN_LAYERS_TREES


def exit_zero(given: GivenDrafter, length: int) -> ExitZero:
    """Return the ExitZero of a drafter, for programs that run sequences of at most `length` tokens.

    Raises:
      DexError: a draft model with a shorter context.
    """
    if isinstance(given, TrainedExits):
        return TrainedHeads(given.config)
    if isinstance(given, EagleHead):
        return EagleDrafter(dataclasses.replace(given.config, layer=given.config.layer.at_length(length)))
    if length > given.config.context:
        raise DexError(
            f"the draft model {given.source} has a context of {given.config.context} tokens, and prompt and new tokens "
            f"are {length}: leave it out"
        )
    return ModelDrafter(given.config.at_length(length), jnp.dtype(given.dtype), given.vocab_size)


def drafter_arrays(given: GivenDrafter, model: Transformer) -> Any:
    """Return the arrays of a drafter that the compiled programs take beside the model."""
    if isinstance(given, TrainedExits):
        return exit_arrays(model, given.config, _kept(given), given.vocabulary)
    if isinstance(given, EagleHead):
        return _on_device(given, few_rows.kept_dtype(model.dtype))
    return OwnArrays(given.weights)


@functools.lru_cache(maxsize=2)
def _kept(drafter: TrainedExits) -> Mapping[str, np.ndarray | Packed]:
    # A drafter only proposes tokens, and 8 bits are read in half the time of 16.
    return in_int8(drafter.parameters) if few_rows.language() == "C++" else drafter.parameters


@functools.lru_cache(maxsize=1)
def _on_device(head: EagleHead, dtype: jnp.dtype) -> OwnArrays:
    with jax.ensure_compile_time_eval():
        return eagle_arrays(head, dtype)
