"""The compiled programs of teacher forcing: texts through the model, then exits over rows of what that gave.

Letters: B texts of a batch, R padded length, A longest answer, X trained depths, P asks, Q pairs (source, lag) of
theirs, C best tokens kept, D width, L layers, M rows of a block, V' draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.forced.asks import Ask
from dex_jax.nn.attention import KeyValues, capped
from dex_jax.nn.exits import Context, ExitHeads, head_at
from dex_jax.nn.forward import depth_states
from dex_jax.nn.layers import linear
from dex_jax.nn.targets import Vocabulary, targets
from dex_jax.nn.transformer import Layout
from dex_jax.nn.weights import merge_model
from dex_jax.sampling import Sampling, position_noise, scores


class Said(NamedTuple):
    """What exits say at N positions."""

    best: Any  # [N, P, C] int32, full ids of the best tokens, best first
    log_probability: Any  # [N, P, C] float32, of these, in nats
    gap: Any  # [N, P, C] float32, how far each is ahead of the next, over the largest |logit|
    divergence: Any  # [N, P] float32, KL from the final distribution over draft vocabulary and rest, in nats
    greedy: Any  # [N] int32, the final layer's best token


@dataclasses.dataclass(frozen=True)
class Statics:
    """What the compiled programs depend on beside shapes."""

    config: ModelConfig
    layout: Layout
    exits: ExitsConfig
    asks: tuple[Ask, ...]
    count: int

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The Q pairs (source, lag) that asks read."""
        return tuple(sorted({(ask.source, ask.lag) for ask in self.asks}))

    def place(self, ask: Ask) -> tuple[int, int]:
        """Where an ask's exit and pair stand."""
        return self.exits.depths.index(ask.depth), self.pairs.index((ask.source, ask.lag))


class Rows(NamedTuple):
    """What exits read at the answer positions of a batch."""

    states: jax.Array  # [X, B A, D], hidden states at the trained depths
    final: jax.Array  # [B A, D], features after the final norm at depth L
    previous: jax.Array | None  # [Q, B A, D], features of the position before; None for exits that do not read them
    context: jax.Array | None  # [Q, B A, D], from the context layer; None but for kind "attn"


@functools.partial(jax.jit, static_argnums=0)
def answer_rows(
    statics: Statics, weights: Any, parameters: dict[str, jax.Array], ids: jax.Array, at: jax.Array
) -> Rows:
    """Runs ids [B, R] and gathers what exits read at positions `at` [B, A]."""
    config, exits, pairs = statics.config, statics.exits, statics.pairs
    model = merge_model(config, statics.layout, weights)
    batch, length = ids.shape
    states = depth_states(model, ids, (*exits.depths, config.num_layers))
    final = model.normed(states[-1])

    def gathered(x: jax.Array) -> jax.Array:
        return x[..., jnp.arange(batch)[:, None], at, :].reshape(*x.shape[:-3], -1, x.shape[-1])

    if not exits.needs_previous:
        return Rows(gathered(states[:-1]), gathered(final), None, None)
    heads = ExitHeads(exits, lambda name, shape, kind: parameters[name])
    own = heads.base(states[:-1].reshape(len(exits.depths), batch * length, -1)).reshape(states[:-1].shape)
    # Row p holds the features of position p - 1.
    true, *before = jnp.pad(jnp.stack([final, *own])[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)])
    reached = dict(zip(exits.depths, before, strict=True)) | {config.num_layers: true}
    previous = jnp.stack([gathered(reached[source]) for source, _ in pairs])
    context = None
    if heads.context is not None:
        lags = jnp.asarray([lag for _, lag in pairs])
        read = previous.reshape(len(pairs), *at.shape, -1)
        context = _contexts(heads.context, model.embed_tokens(ids), true, read, at, lags).reshape(previous.shape)
    return Rows(gathered(states[:-1]), gathered(final), previous, context)


def _contexts(
    context: Context, embedded: jax.Array, true: jax.Array, previous: jax.Array, at: jax.Array, lags: jax.Array
) -> jax.Array:
    """The context layer at positions `at` [B, A] for each pair, whose features are `previous`: [Q, B, A, D].

    `embedded` and `true` [B, R, D] are token embeddings and the true features before each position, `lags` [Q] int32
    say how far back the newest committed position is.
    """
    batch, length, _ = embedded.shape
    everywhere = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    keys, values = context.keys_values(context.enter_rows(embedded, true), everywhere)
    tokens = jnp.take_along_axis(embedded, at[:, :, None], axis=1)
    itself = jnp.broadcast_to(jnp.eye(at.shape[1], dtype=bool)[None], (batch, at.shape[1], at.shape[1]))
    distance = at[:, :, None] - everywhere[:, None, :]

    def one_pair(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        before, newest = pair
        seen = (distance >= newest) & (distance <= context.config.window)
        return context.output(context.enter_rows(tokens, before), at, KeyValues(keys, values, seen), itself)

    return jax.lax.map(one_pair, (previous, lags))


@functools.partial(jax.jit, static_argnums=0)
def ask_exits(
    statics: Statics,
    weights: Any,
    parameters: dict[str, jax.Array],
    draft: jax.Array | None,
    rows: Rows,
    block: jax.Array,
    sampling: Sampling | None,
    position: jax.Array,
) -> Said:
    """All asks at the rows that `block` [M] int32 names, one ask's logits at a time.

    `draft` is [V'] int32 or None. When sampling, by the key of one text and without filters, the best tokens are those
    that would be drawn first, with the noise of `position` [M] int32, that of the token after each row.
    """
    model = merge_model(statics.config, statics.layout, weights)
    unembed = model.vocabulary_kernel
    noise = None
    if sampling is not None:
        noise = jax.vmap(position_noise, (None, 0, None))(sampling.keys[0], position, unembed.shape[0])
        noise = noise if draft is None else noise[:, draft]
    cap = statics.config.logit_cap
    vocabulary = Vocabulary(unembed, None if draft is None else unembed[draft], draft, cap)
    kernel = unembed if vocabulary.draft_unembed is None else vocabulary.draft_unembed
    final, count = rows.final[block], statics.count
    goal = targets(final, vocabulary, hard=0.0)
    size = kernel.shape[0]

    def one_ask(_: None, place: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
        exit_, pair = place
        read = (rows.previous, rows.context)
        previous, context = (None if each is None else each[pair][block][None] for each in read)
        head = head_at(statics.exits, parameters, exit_)
        features = head.features(rows.states[exit_][block][None], previous, context)[0]
        logits = capped(linear(features[:, :-1], kernel, out_dtype=jnp.float32), cap)
        rest = features[:, -1].astype(jnp.float32)
        log_all = jax.nn.logsumexp(logits, axis=-1)
        expected = jnp.sum(goal.inside * logits, axis=-1)
        if draft is not None:
            log_all = jnp.logaddexp(log_all, rest)
            expected = expected + jnp.where(goal.outside > 0, goal.outside * rest, 0.0)
        ranked = scores(logits, sampling, noise)
        # Asked for values too, XLA sorts the whole vocabulary on CPUs and the program takes six times as long.
        column = jax.lax.top_k(ranked, min(size, count + 1))[1]
        kept = jnp.take_along_axis(ranked, column, axis=-1)
        # Nor where what follows reads the logits too.
        logits, kept, column = jax.lax.optimization_barrier((logits, kept, column))
        below = jnp.pad(kept[:, 1:], [(0, 0), (0, count + 1 - kept.shape[1])], constant_values=-jnp.inf)[:, :count]
        gap = (kept[:, :count] - below) / jnp.max(jnp.abs(logits), axis=-1, keepdims=True)
        best = column[:, :count] if draft is None else draft[column[:, :count]]
        return None, (best, kept[:, :count] - log_all[:, None], gap, log_all - expected - goal.entropy)

    places = np.asarray([statics.place(ask) for ask in statics.asks], np.int32)
    _, said = jax.lax.scan(one_ask, None, jnp.asarray(places))
    greedy = jnp.argmax(linear(final, unembed, out_dtype=jnp.float32), axis=-1)
    best, log_probability, gap, divergence = (jnp.moveaxis(x, 0, 1) for x in said)
    return Said(best, log_probability, gap, divergence, greedy)
