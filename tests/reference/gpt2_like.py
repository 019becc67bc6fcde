"""A small GPT-2-like decoder in plain jnp, with a cache of its own, handed to the loop as callables.

Unlike the library's models: learned positions, LayerNorm, full multi-head attention, GELU, and one cache array
[L, 2, B, S + K W, H d] whose first S places are the committed prefix and whose others are the lattice's slots.

Letters: B sequences, R rows, S committed places, K stages, W rows a stage, L layers, H heads, d head width, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax import Committed, Exits, Network, StageView

VOCAB, LAYERS, WIDTH, HEADS, PLACES = 40, 6, 24, 3, 64
HIGHEST = jax.lax.Precision.HIGHEST


class Weights(NamedTuple):
    """Layers have a leading axis L; biases are left out except where LayerNorm has them."""

    tokens: jax.Array
    positions: jax.Array
    norms: jax.Array  # [L, 2, 2, D]: before attention and mlp, scale and shift
    qkv: jax.Array
    out: jax.Array
    up: jax.Array
    down: jax.Array
    last_norm: jax.Array  # [2, D]


def random_weights(seed: int) -> Weights:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[-2]), jnp.float32)

    norms = np.stack([np.ones((LAYERS, 2, WIDTH)), 0.1 * rng.standard_normal((LAYERS, 2, WIDTH))], axis=2)
    return Weights(
        tokens=normal(VOCAB, WIDTH),
        positions=normal(PLACES, WIDTH),
        norms=jnp.asarray(norms, jnp.float32),
        qkv=normal(LAYERS, WIDTH, 3 * WIDTH),
        out=normal(LAYERS, WIDTH, WIDTH),
        up=normal(LAYERS, WIDTH, 4 * WIDTH),
        down=normal(LAYERS, 4 * WIDTH, WIDTH),
        last_norm=jnp.asarray(np.stack([np.ones(WIDTH), np.zeros(WIDTH)]), jnp.float32),
    )


def embed(weights: Weights, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    return weights.tokens[tokens] + weights.positions[positions]


def logits(weights: Weights, hidden: jax.Array) -> jax.Array:
    return jnp.dot(_norm(hidden, weights.last_norm), weights.tokens.T, precision=HIGHEST)


def run_layer(weights: Weights, i: int, x: jax.Array, cache: jax.Array, places: jax.Array, visible: jax.Array):
    """One layer over R rows of each sequence: x [B, R, D], cache [2, B, P, D], places [B, R], visible [B, R, P].

    Keys and values go to their places first, so that a row sees itself.
    """
    batch, rows, _ = x.shape
    fresh = jnp.dot(_norm(x, weights.norms[i, 0]), weights.qkv[i], precision=HIGHEST)
    queries, keys, values = jnp.split(fresh, 3, axis=-1)
    sequences = jnp.arange(batch)[:, None]
    cache = cache.at[0, sequences, places].set(keys).at[1, sequences, places].set(values)

    def heads(y: jax.Array) -> jax.Array:
        return y.reshape(batch, -1, HEADS, WIDTH // HEADS)

    scores = jnp.einsum("brhd,bphd->bhrp", heads(queries), heads(cache[0]), precision=HIGHEST)
    scores = jnp.where(visible[:, None], scores / np.sqrt(WIDTH / HEADS), -1e30)
    mixed = jnp.einsum("bhrp,bphd->brhd", jax.nn.softmax(scores, axis=-1), heads(cache[1]), precision=HIGHEST)
    x = x + jnp.dot(mixed.reshape(batch, rows, WIDTH), weights.out[i], precision=HIGHEST)
    wide = jax.nn.gelu(jnp.dot(_norm(x, weights.norms[i, 1]), weights.up[i], precision=HIGHEST))
    return x + jnp.dot(wide, weights.down[i], precision=HIGHEST), cache


def full_logits(weights: Weights, tokens: jax.Array) -> jax.Array:
    """Without any cache: [B, R] -> [B, R, V]."""
    batch, rows = tokens.shape
    places = jnp.broadcast_to(jnp.arange(rows)[None], (batch, rows))
    visible = jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool))[None], (batch, rows, rows))
    x = embed(weights, tokens, places)
    for i in range(LAYERS):
        x, _ = run_layer(weights, i, x, jnp.zeros((2, batch, rows, WIDTH)), places, visible)
    return logits(weights, x)


def prefill(weights: Weights, prompts: jax.Array, length: int, slots: int) -> jax.Array:
    """The cache after prompts [B, R] padded to the right; keys of padding lie beyond the prefix, to be overwritten."""
    batch, rows = prompts.shape
    cache = jnp.zeros((LAYERS, 2, batch, length + slots, WIDTH))
    places = jnp.broadcast_to(jnp.arange(rows)[None], (batch, rows))
    visible = jnp.arange(length + slots)[None, None, :] <= places[:, :, None]
    x = embed(weights, prompts, places)
    for i in range(LAYERS):
        x, layer = run_layer(weights, i, x, cache[i], places, visible)
        cache = cache.at[i].set(layer)
    return cache


def network(weights: Weights, depths: tuple[int, ...], length: int) -> Network:
    """The callables, for exit depths x_1 < ... < x_K = L and S = length committed places."""

    def advance(cache: jax.Array, hidden: jax.Array, view: StageView) -> tuple[jax.Array, jax.Array]:
        _, batch, rows, _ = hidden.shape
        committed = jnp.broadcast_to(
            (jnp.arange(length)[None, :] < view.prefix[:, None])[:, None, :], (batch, rows, length)
        )
        out = []
        for k, (low, high) in enumerate(zip((0, *depths[:-1]), depths, strict=True)):
            x = hidden[k]
            places = jnp.broadcast_to(length + view.ring[k] * rows + jnp.arange(rows)[None, :], (batch, rows))
            visible = jnp.concatenate([committed, view.ancestors[k]], axis=2)
            for i in range(low, high):
                x, layer = run_layer(weights, i, x, cache[i], places, visible)
                cache = cache.at[i].set(layer)
            out.append(x)
        return jnp.stack(out), cache

    def commit(cache: jax.Array, done: Committed) -> jax.Array:
        sequences, step = jnp.arange(done.slot.shape[0])[:, None], jnp.arange(done.slot.shape[1])[None]
        moved = cache[:, :, sequences, length + done.slot]
        place = jnp.where(step < done.length[:, None], done.position[:, None] + step, cache.shape[3])
        return cache.at[:, :, sequences, place].set(moved, mode="drop")

    return Network(
        vocab_size=VOCAB,
        embed=lambda tokens, positions: embed(weights, tokens, positions),
        advance=advance,
        commit=commit,
        final=lambda hidden: logits(weights, hidden),
        exits=Exits(
            features=lambda memory, hidden, view: hidden[:-1], logits=lambda features: logits(weights, features)
        ),
    )


def _norm(x: jax.Array, scale_and_shift: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-5)
    scale, shift = (part.reshape((1,) * (x.ndim - 1) + (-1,)) for part in scale_and_shift)
    return centred / spread * scale + shift
