"""Distillation of the final distribution into exits, without ever holding [tokens, exits, vocabulary].

The loss of an exit is the forward KL divergence from the final distribution, over the draft vocabulary and one bucket
for all other tokens (which is what is left when distributions are coarsened so), optionally with a share of the
cross-entropy of the final layer's best token. Letters: X exits, N tokens, D width, V vocabulary, V' draft vocabulary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.nn.layers import linear

BLOCK = 512
"""Tokens whose logits exist at one time."""


class Vocabulary(NamedTuple):
    """What turns features into logits.

    Attributes:
      unembed: [V, D], the model's own.
      draft_unembed: [V', D], its rows of the draft vocabulary; None for the full vocabulary.
      draft: [V'] int32, their token ids, ascending; None for the full vocabulary.
    """

    unembed: jax.Array
    draft_unembed: jax.Array | None = None
    draft: jax.Array | None = None


class Targets(NamedTuple):
    """The final distribution of N tokens, as exits see it.

    Attributes:
      inside: [N, V'] float32, probabilities of the (draft) vocabulary.
      outside: [N] float32, of all other tokens together.
      entropy: [N] float32, of the coarsened distribution, in nats.
      best: [N] int32, column of the final layer's best token, V' if it has none.
    """

    inside: jax.Array
    outside: jax.Array
    entropy: jax.Array
    best: jax.Array


def targets(final: jax.Array, vocabulary: Vocabulary, hard: float) -> Targets:
    """The targets of N tokens.

    Args:
      final: [N, D], features after the final norm at depth L.
      vocabulary: of the exits.
      hard: share, from 0 to 1, of the target that is the best token alone.
    """
    logits = linear(final, vocabulary.unembed, out_dtype=jnp.float32)
    top = jnp.argmax(logits, axis=-1)
    log_all = jax.nn.logsumexp(logits, axis=-1)
    if vocabulary.draft is None:
        columns, best, width = logits, top, logits.shape[-1]
    else:
        width = vocabulary.draft.shape[0]
        columns = logits[:, vocabulary.draft]
        at = jnp.minimum(jnp.searchsorted(vocabulary.draft, top), width - 1)
        best = jnp.where(vocabulary.draft[at] == top, at, width)
    inside = jnp.exp(columns - log_all[:, None]) * (1 - hard)
    inside = inside + hard * (jnp.arange(width)[None] == best[:, None])
    # Of the full vocabulary nothing is outside, and what rounding leaves there would count as entropy.
    outside = jnp.zeros_like(log_all)
    if vocabulary.draft is not None:
        outside = jnp.maximum(1 - jnp.sum(inside, axis=-1), 0.0)
    entropy = -jnp.sum(jax.scipy.special.xlogy(inside, inside), axis=-1) - jax.scipy.special.xlogy(outside, outside)
    return Targets(inside, outside, entropy, best)


def exit_losses(
    features: jax.Array, final: jax.Array, weight: jax.Array, vocabulary: Vocabulary, hard: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Divergence of every exit from the final layer.

    Only features get a gradient: the unembedding and the final layer are the frozen model's.

    Args:
      features: [X, N, D + 1], as ExitHeads.features.
      final: [N, D], features after the final norm at depth L.
      weight: [N] float32, how much each token counts.
      vocabulary: of the exits.
      hard: share of the target that is the final layer's best token alone.

    Returns:
      (loss [X]: weighted mean KL in nats, agreement [X]: weighted share of best tokens that agree, coverage: scalar,
      weighted share of final tokens that the vocabulary holds).
    """
    count = final.shape[0]
    block = min(BLOCK, count)
    blocks = -(-count // block)
    short = blocks * block - count
    features = jnp.pad(features, [(0, 0), (0, short), (0, 0)])
    final, weight = jnp.pad(final, [(0, short), (0, 0)]), jnp.pad(weight, (0, short))
    parts = (
        features.reshape(features.shape[0], blocks, block, -1).swapaxes(0, 1),
        final.reshape(blocks, block, -1),
        weight.reshape(blocks, block),
    )

    def one_block(sums: tuple, part: tuple) -> tuple[tuple, None]:
        features, final, weight = part
        found = _block_losses(features, jax.lax.stop_gradient(final), weight, vocabulary, hard)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = jnp.zeros(features.shape[0])
    (loss, agree, covered), _ = jax.lax.scan(one_block, (zeros, zeros, jnp.zeros(())), parts)
    total = jnp.maximum(jnp.sum(weight), 1e-6)
    return loss / total, agree / total, covered / total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _block_losses(features, final, weight, vocabulary, hard):
    return _forward(features, final, weight, vocabulary, hard)[0]


def _forward(features: jax.Array, final: jax.Array, weight: jax.Array, vocabulary: Vocabulary, hard: float):
    """One pass over the logits: ((loss [X], agree [X], covered), gradient of the losses [X, n, D + 1])."""
    target = targets(final, vocabulary, hard)
    unembed = vocabulary.unembed if vocabulary.draft_unembed is None else vocabulary.draft_unembed
    width = unembed.shape[0]

    def one_exit(_: None, row: jax.Array):
        own, rest = row[:, :-1], row[:, -1].astype(jnp.float32)
        logits = linear(own, unembed, out_dtype=jnp.float32)
        log_all = jax.nn.logsumexp(logits, axis=-1)
        if vocabulary.draft is not None:
            log_all = jnp.logaddexp(log_all, rest)
        expected = jnp.sum(target.inside * logits, axis=-1)
        probability = jnp.exp(logits - log_all[:, None])
        slope = (probability - target.inside) * weight[:, None]
        gradient = jnp.matmul(slope.astype(unembed.dtype), unembed, preferred_element_type=jnp.float32)
        rest_gradient = jnp.zeros_like(weight)
        if vocabulary.draft is not None:
            expected = expected + jnp.where(target.outside > 0, target.outside * rest, 0.0)
            rest_gradient = (jnp.exp(rest - log_all) - target.outside) * weight
        loss = jnp.sum((log_all - expected - target.entropy) * weight)
        agree = jnp.sum((jnp.argmax(logits, axis=-1) == target.best) * weight)
        gradient = jnp.concatenate([gradient, rest_gradient[:, None]], axis=-1)
        return None, (loss, agree, gradient.astype(row.dtype))

    _, (loss, agree, gradient) = jax.lax.scan(one_exit, None, features)
    covered = jnp.sum((target.best < width) * weight)
    return (loss, agree, covered), gradient


def _block_forward(features, final, weight, vocabulary, hard):
    found, gradient = _forward(features, final, weight, vocabulary, hard)
    return found, gradient


def _block_backward(hard, kept, cotangent):
    del hard
    scaled = kept * cotangent[0][:, None, None].astype(kept.dtype)
    return scaled, None, None, None


_block_losses.defvjp(_block_forward, _block_backward)
