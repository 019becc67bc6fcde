"""The final layer's distribution over the draft vocabulary, which exits learn and are measured by.

Letters: N tokens, D width, V vocabulary, V' draft vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.nn.attention import capped
from dex_jax.nn.layers import linear


class Vocabulary(NamedTuple):
    """The unembedding that turns features into logits."""

    unembed: Any  # [V, D], the model's own, packed or not
    draft_unembed: Any = None  # [V', D], its rows of the draft vocabulary; None for the full vocabulary
    draft: jax.Array | None = None  # [V'] int32, their token ids, ascending; None for the full vocabulary
    cap: Any = None  # of logits, ModelConfig.logit_cap


class Targets(NamedTuple):
    """The final distribution of N tokens, as exits see it."""

    inside: jax.Array  # [N, V'] float32, probabilities of the (draft) vocabulary
    outside: jax.Array  # [N] float32, of all other tokens together
    entropy: jax.Array  # [N] float32, of the coarsened distribution, in nats
    best: jax.Array  # [N] int32, column of the final layer's best token, V' if it has none


def targets(final: jax.Array, vocabulary: Vocabulary) -> Targets:
    """Return the targets of N tokens, given their features [N, D] after the final norm at depth L."""
    logits = capped(linear(final, vocabulary.unembed, out_dtype=jnp.float32), vocabulary.cap)
    top = jnp.argmax(logits, axis=-1)
    log_all = jax.nn.logsumexp(logits, axis=-1)
    if vocabulary.draft is None:
        columns, best, width = logits, top, logits.shape[-1]
    else:
        width = vocabulary.draft.shape[0]
        columns = logits[:, vocabulary.draft]
        at = jnp.minimum(jnp.searchsorted(vocabulary.draft, top), width - 1)
        best = jnp.where(vocabulary.draft[at] == top, at, width)
    inside = jnp.exp(columns - log_all[:, None])
    # With the full vocabulary nothing is outside, and what rounding leaves there would count as entropy.
    outside = jnp.zeros_like(log_all)
    if vocabulary.draft is not None:
        outside = jnp.maximum(1 - jnp.sum(inside, axis=-1), 0.0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(inside, inside), axis=-1) - jax.scipy.special.xlogy(outside, outside)
    return Targets(inside, outside, entropy, best)
