"""Greedy answers to many prompts in large batches, and what exits say along them in the same pass.

The keys and values that AR has left of the prompts are used again: the states of the answers cost one more run of the
answers' tokens, and the prompts, which are longer, run once.

Letters: B prompts of a batch, N most tokens of an answer, X exits in use, Q pairs (source, lag), P asks, C best tokens,
D width, V' draft vocabulary, S window of the context layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.methods import AR
from dex_jax.decoding.network import extend_with_states, states_at
from dex_jax.decoding.session import Session
from dex_jax.decoding.trained_exits import EMPTY_ENTRY
from dex_jax.evaluation.bench.forced_counts import Ask, Forced
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel, merge_model
from dex_jax.nn.exits import ExitHeads, head_at, select_exits
from dex_jax.nn.layers import KeyValues, linear
from dex_jax.nn.transformer import Layout

BLOCK = 256
"""Positions whose logits exist at one time, of one ask."""

FOREVER = 2**30


class Answer(NamedTuple):
    """One answer.

    Attributes:
      tokens: [n] int32, an EOS that ended it included.
      forced: what exits say along it; None where nothing was asked.
    """

    tokens: np.ndarray
    forced: Forced | None


def batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Numbers of prompts to run together, by length, all batches but the last full.

    Those that would not fill a batch of their own padded length are padded to the next, which costs less than to
    compile programs for as many rows.

    Args:
      lengths: of the prompts, in tokens.
      batch: B at most.

    Examples:
      >>> list(batches([100, 120, 10, 200, 110], 2))
      [[2, 0], [4, 1], [3]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def answer(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    exits: TrainedExits | None = None,
    asks: Sequence[Ask] = (),
    count: int = 1,
    batch: int | None = None,
) -> list[Answer]:
    """Answers prompts greedily with AR.

    Args:
      lm: the model.
      prompts: token ids; those of about one length run best together, see `batches`.
      max_new_tokens: N.
      exits: that are asked; None where there is nothing to ask.
      asks: P of them, at depths that the exits have.
      count: C.
      batch: rows to fill up to, so that a last batch needs no program of its own.
    """
    filled = [*prompts, *[prompts[-1]] * ((batch or 0) - len(prompts))]
    chosen = None
    if exits is not None and asks:
        depths = tuple(sorted({ask.depth for ask in asks} | {ask.source for ask in asks} - {lm.config.num_layers}))
        config, parameters = select_exits(exits.config, exits.parameters, depths)
        chosen = dataclasses.replace(exits, config=config, parameters=parameters)
    session = Session(lm, filled, AR().schedule_for(lm.config.num_layers), max_new_tokens, None, chosen)
    session.prefill()
    record = session.advance(FOREVER)
    tokens = [np.asarray(record.tokens[b, : record.lengths[b]], np.int32) for b in range(len(prompts))]
    forced: list[Forced | None] = [None] * len(prompts)
    if chosen is not None:
        forced = list(_forced(lm, session, chosen, tokens, tuple(asks), count, max_new_tokens))
    return [Answer(text, found) for text, found in zip(tokens, forced, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Statics:
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

    @property
    def places(self) -> np.ndarray:
        """[P, 2] int32: where each ask's exit and pair stand."""
        found = [(self.exits.depths.index(a.depth), self.pairs.index((a.source, a.lag))) for a in self.asks]
        return np.asarray(found, np.int32)


class _Rows(NamedTuple):
    """What exits read along the answers of a batch.

    Attributes:
      states: [X, B N, D], hidden states at the exits' depths.
      previous: [Q, B N, D], features of the position before; None for exits that do not read them.
      context: [Q, B N, D], from the context layer; None but for kind "attn".
    """

    states: jax.Array
    previous: jax.Array | None
    context: jax.Array | None


def _forced(
    lm: LanguageModel,
    session: Session,
    exits: TrainedExits,
    texts: Sequence[np.ndarray],
    asks: tuple[Ask, ...],
    count: int,
    max_new_tokens: int,
) -> Iterator[Forced]:
    """What exits say along texts that a session has just emitted."""
    size = lm.config.vocab_size if exits.vocabulary is None else len(exits.vocabulary)
    count = min(count, size - 1)
    statics = _Statics(lm.config, lm.layout, exits.config, asks, count)
    parameters = {name: jnp.asarray(value, lm.dtype) for name, value in exits.parameters.items()}
    draft = None if exits.vocabulary is None else jnp.asarray(exits.vocabulary, jnp.int32)
    kernel = _kernel(lm.config, lm.layout, lm.weights, draft)
    padded = np.zeros((len(session.lengths), max_new_tokens), np.int32)
    for row, text in zip(padded, texts, strict=False):
        row[: len(text)] = text
    memory, starts = session.state.memory, jnp.asarray(session.lengths)
    rows = _answer_rows(statics, lm.weights, parameters, memory, jnp.asarray(padded), starts)
    # The last token of an answer is asked nothing.
    index = np.concatenate([b * max_new_tokens + np.arange(len(text) - 1) for b, text in enumerate(texts)])
    best = np.zeros((len(index), len(asks), count), np.int32)
    gap = np.ones((len(index), len(asks), count), np.float32)
    for first in range(0, len(index), BLOCK):
        part = index[first : first + BLOCK]
        block = jnp.asarray(np.pad(part, (0, BLOCK - len(part))), jnp.int32)
        said = jax.device_get(_ask(statics, kernel, parameters, draft, rows, block))
        best[first : first + len(part)], gap[first : first + len(part)] = (x[: len(part)] for x in said)
    start = 0
    for text in texts:
        own = slice(start, start + len(text) - 1)
        yield Forced(lm.config.num_layers, exits.config, asks, text, best[own], gap[own])
        start += len(text) - 1


@functools.partial(jax.jit, static_argnums=0)
def _answer_rows(
    statics: _Statics, weights: Any, parameters: dict[str, jax.Array], memory: Any, tokens: jax.Array, start: jax.Array
) -> _Rows:
    """Runs answers again: tokens [B, N] from position `start` [B] on, beside the prompts in `memory`."""
    config, exits = statics.config, statics.exits
    model = merge_model(config, statics.layout, weights)
    batch, length = tokens.shape
    all_states, _ = extend_with_states(model, memory, tokens, start)
    *states, last = states_at(model, tokens, all_states, (*exits.depths, config.num_layers))
    flat = jnp.stack(states).reshape(len(states), batch * length, -1)
    if not exits.needs_previous:
        return _Rows(flat, None, None)
    heads = ExitHeads(exits, lambda name, shape, kind: parameters[name])
    own = heads.base(flat).reshape(len(states), batch, length, -1)
    true = jnp.concatenate([memory.exits.previous[:, None], model.normed(last)[:, :-1]], axis=1)
    # Token 0 follows the prompt, which is committed: nobody reads an estimate there.
    estimates = jnp.pad(own[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)])
    previous = jnp.stack(
        [true if source == config.num_layers else estimates[exits.depths.index(source)] for source, _ in statics.pairs]
    )
    context = None
    if heads.context is not None:
        layer, window = heads.context, memory.exits.context
        position = start[:, None] + jnp.arange(length)[None]
        embedded = model.embed_tokens(tokens)
        keys, values = layer.keys_values(layer.enter_rows(embedded, true), position)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in ((window.keys, keys), (window.values, values)))
        entries = jnp.concatenate([window.position, position], axis=1)[:, None, :]
        distance = position[:, :, None] - entries
        itself = jnp.broadcast_to(jnp.eye(length, dtype=bool)[None], (batch, length, length))

        def one_pair(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            before, lag = pair
            seen = (entries != EMPTY_ENTRY) & (distance >= lag) & (distance <= exits.window)
            return layer.output(layer.enter_rows(embedded, before), position, KeyValues(keys, values, seen), itself)

        lags = jnp.asarray([lag for _, lag in statics.pairs])
        context = jax.lax.map(one_pair, (previous, lags)).reshape(len(statics.pairs), batch * length, -1)
    return _Rows(flat, previous.reshape(len(statics.pairs), batch * length, -1), context)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernel(config: ModelConfig, layout: Layout, weights: Any, draft: jax.Array | None) -> jax.Array:
    """[V', D], the unembedding of what exits know, gathered once for all blocks."""
    model = merge_model(config, layout, weights)
    unembed = (model.embed if model.unembed is None else model.unembed)[...]
    return unembed if draft is None else unembed[draft]


@functools.partial(jax.jit, static_argnums=0)
def _ask(
    statics: _Statics,
    kernel: jax.Array,
    parameters: dict[str, jax.Array],
    draft: jax.Array | None,
    rows: _Rows,
    block: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(best [M, P, C] int32, gap [M, P, C] float32) at the rows that `block` [M] int32 names.

    kernel: [V', D]; draft: [V'] int32.
    """

    def one_ask(_: None, place: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        exit_, pair = place[0], place[1]
        head = head_at(statics.exits, parameters, exit_)
        previous = None if rows.previous is None else rows.previous[pair][block][None]
        context = None if rows.context is None else rows.context[pair][block][None]
        features = head.features(rows.states[exit_][block][None], previous, context)[0]
        logits = linear(features[:, :-1], kernel, out_dtype=jnp.float32)
        # Asked for values too, XLA sorts the whole vocabulary on CPUs.
        column = jax.lax.top_k(logits, statics.count + 1)[1]
        kept = jnp.take_along_axis(logits, column, axis=-1)
        # Nor where what follows reads the logits too.
        logits, kept, column = jax.lax.optimization_barrier((logits, kept, column))
        gap = (kept[:, :-1] - kept[:, 1:]) / jnp.max(jnp.abs(logits), axis=-1, keepdims=True)
        best = column[:, :-1]
        return None, (best if draft is None else draft[best], gap)

    _, said = jax.lax.scan(one_ask, None, jnp.asarray(statics.places))
    best, gap = (jnp.moveaxis(x, 0, 1) for x in said)
    return best, gap
