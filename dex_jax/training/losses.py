"""The loss that distils the final distribution into exits, without holding logits [tokens, exits, vocabulary].

The loss of an exit is the forward KL divergence from the final distribution, over the draft vocabulary and one bucket
for all other tokens.

Letters: X exits, N tokens, D width, V vocabulary, V' draft vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dex_jax.nn.attention import capped
from dex_jax.nn.layers import linear
from dex_jax.nn.targets import Vocabulary, targets

BLOCK = 512
"""Number of tokens that have logits at one time."""


def exit_losses(
    features: jax.Array, final: jax.Array, weight: jax.Array, vocabulary: Vocabulary
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the divergence of every exit from the final layer.

    Only features get a gradient, as the unembedding and the final layer belong to the frozen model.

    Args:
      features: [X, N, D + 1], from ExitHeads.features.
      final: [N, D], features after the final norm at depth L.
      weight: [N] or [X, N] float32, how much each token counts, for all exits or for each.
      vocabulary: of the exits.

    Returns:
      (loss [X]: weighted mean KL in nats, agreement [X]: weighted share of best tokens that agree, coverage: scalar,
      share of final tokens that the vocabulary holds, weighted as for the first exit).
    """
    count = final.shape[0]
    block = min(BLOCK, count)
    blocks = -(-count // block)
    short = blocks * block - count
    features = jnp.pad(features, [(0, 0), (0, short), (0, 0)])
    final = jnp.pad(final, [(0, short), (0, 0)])
    weight = jnp.pad(jnp.broadcast_to(weight, (*features.shape[:1], count)), [(0, 0), (0, short)])
    parts = (
        features.reshape(features.shape[0], blocks, block, -1).swapaxes(0, 1),
        final.reshape(blocks, block, -1),
        weight.reshape(-1, blocks, block).swapaxes(0, 1),
    )

    def one_block(sums: tuple, part: tuple) -> tuple[tuple, None]:
        features, final, weight = part
        found = _block_losses(features, jax.lax.stop_gradient(final), weight, vocabulary)
        return jax.tree.map(jnp.add, sums, found), None

    zeros = jnp.zeros(features.shape[0])
    (loss, agree, in_vocabulary), _ = jax.lax.scan(one_block, (zeros, zeros, jnp.zeros(())), parts)
    total = jnp.maximum(jnp.sum(weight, axis=1), 1e-6)
    return loss / total, agree / total, in_vocabulary / total[0]


@jax.custom_vjp
def _block_losses(features, final, weight, vocabulary):
    return _forward(features, final, weight, vocabulary)[0]


def _forward(features: jax.Array, final: jax.Array, weight: jax.Array, vocabulary: Vocabulary):
    """Run one pass over the logits: ((loss [X], agree [X], covered), gradient of the losses [X, n, D + 1])."""
    target = targets(final, vocabulary)
    unembed = vocabulary.unembed if vocabulary.draft_unembed is None else vocabulary.draft_unembed
    width = unembed.shape[0]

    def one_exit(_: None, exit: tuple[jax.Array, jax.Array]):
        row, weight = exit
        own, rest = row[:, :-1], row[:, -1].astype(jnp.float32)
        logits = capped(linear(own, unembed, out_dtype=jnp.float32), vocabulary.cap)
        log_all = jax.nn.logsumexp(logits, axis=-1)
        if vocabulary.draft is not None:
            log_all = jnp.logaddexp(log_all, rest)
        expected = jnp.sum(target.inside * logits, axis=-1)
        probability = jnp.exp(logits - log_all[:, None])
        slope = (probability - target.inside) * weight[:, None]
        if vocabulary.cap is not None:
            slope = slope * (1 - jnp.square(logits / vocabulary.cap))
        gradient = jnp.matmul(slope.astype(unembed.dtype), unembed, preferred_element_type=jnp.float32)
        rest_gradient = jnp.zeros_like(weight)
        if vocabulary.draft is not None:
            expected = expected + jnp.where(target.outside > 0, target.outside * rest, 0.0)
            rest_gradient = (jnp.exp(rest - log_all) - target.outside) * weight
        loss = jnp.sum((log_all - expected - target.entropy) * weight)
        agree = jnp.sum((jnp.argmax(logits, axis=-1) == target.best) * weight)
        gradient = jnp.concatenate([gradient, rest_gradient[:, None]], axis=-1)
        return None, (loss, agree, gradient.astype(row.dtype))

    _, (loss, agree, gradient) = jax.lax.scan(one_exit, None, (features, weight))
    in_vocabulary = jnp.sum((target.best < width) * weight[0])
    return (loss, agree, in_vocabulary), gradient


def _block_backward(kept, cotangent):
    return kept * cotangent[0][:, None, None].astype(kept.dtype), None, None, None


_block_losses.defvjp(_forward, _block_backward)
