"""Teacher forcing of trained exits: what each of them says at every answer position of some texts.

Every text runs through the model once. Of each exit's logits only the best few tokens, the divergence and one
probability leave the device, and the logits of one exit at one block of positions are all that exists at a time.

Letters: B texts of a batch, R padded length, A longest answer, N answer positions, X trained depths, P pairs of an exit
and what it reads of the position before, S such sources, C best tokens kept, D width, L layers, V' draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.methods import even_depths
from dex_jax.decoding.network import depth_states
from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel, merge_model
from dex_jax.nn.exits import Context, ExitHeads, head_at, parameters_of
from dex_jax.nn.layers import KeyValues, linear
from dex_jax.nn.targets import Vocabulary, targets
from dex_jax.nn.transformer import Layout

Text = tuple[Sequence[int], Sequence[int]]
"""(token ids of the prompt, token ids of the answer)."""

Pair = tuple[int, int]
"""(depth of an exit, depth of the features it reads of the position before; L: the true final ones)."""

EXPLORERS = (2, 3, 5, 6, 10)
LENGTH_STEP = 64
BLOCK = 256
"""Positions whose logits exist at one time, of one exit."""


class Said(NamedTuple):
    """What exits say at N positions.

    Attributes:
      best: [N, P, C] int32, full ids of the best tokens, best first.
      divergence: [N, P] float32, KL from the final distribution over draft vocabulary and rest, in nats.
      confidence: [N, P] float32, probability of the best token.
      log_probability: [N, P, C] float32, of the best tokens, in nats.
      greedy: [N] int32, the final layer's best token.
    """

    best: Any
    divergence: Any
    confidence: Any
    log_probability: Any
    greedy: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """What exits said at every answer position of some texts, one text after the other, N positions in all.

    Attributes:
      layers: L.
      depths: the X trained depths.
      pairs: P pairs; the first X are (depth, L) of every trained depth.
      grids: depths x_1 < ... < x_K = L of each grid.
      said: arrays on the host; C >= K - 1 for every grid unless V' is smaller.
      target: [N] int32, the answers' tokens.
      held: [N] bool, whether the draft vocabulary holds the target.
      lengths: how many positions each text has.
    """

    layers: int
    depths: tuple[int, ...]
    pairs: tuple[Pair, ...]
    grids: tuple[tuple[int, ...], ...]
    said: Said
    target: np.ndarray
    held: np.ndarray
    lengths: tuple[int, ...]

    def of(self, texts: Sequence[int]) -> Measurement:
        """The measurement of some of the texts, by number."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in texts])
        return dataclasses.replace(
            self,
            said=jax.tree.map(lambda field: field[at], self.said),
            target=self.target[at],
            held=self.held[at],
            lengths=tuple(self.lengths[i] for i in texts),
        )


def measure(
    lm: LanguageModel,
    heads: ExitHeads,
    vocabulary: np.ndarray | None,
    texts: Sequence[Text],
    *,
    explorers: Sequence[int] = EXPLORERS,
    depths: Sequence[tuple[int, ...]] = (),
    batch: int = 8,
    count: int = 1,
) -> Measurement:
    """Teacher-forces texts and asks every exit at every answer position.

    For kind "attn" one thing is an approximation: of a node's ancestors that are not committed yet, only the parent is
    hidden from the context layer, while older ones count as committed. In a lattice they may be missing too.

    Args:
      lm: the model.
      heads: exits at trained depths below L; cast to the model's dtype, as decoding does.
      vocabulary: [V'] int32 ascending, token ids of the draft vocabulary; None for the full one.
      texts: (prompt, answer) of token ids, answered greedily by the model; nothing counts after an EOS.
      explorers: K of the even grids; those that the trained depths do not hold are left out.
      depths: further grids, x_1 < ... < x_K = L each.
      batch: B.
      count: C at least.

    Raises:
      DexError: exits or a vocabulary that do not fit the model, further grids that the trained depths do not hold, or
        texts without a prompt or an answer or too long.
    """
    layers, exits = lm.config.num_layers, heads.config
    _check_exits(lm.config, exits, vocabulary)
    kept = [_checked_text(lm, number, *text) for number, text in enumerate(texts, 1)]
    if not kept or batch < 1:
        raise DexError(
            f"there is nothing to measure: {len(kept)} texts in batches of {batch}, give at least one of each"
        )
    even = [even_depths(k, layers) for k in explorers if 1 < k <= layers]
    grids = tuple(grid for grid in even if set(grid[:-1]) <= set(exits.depths))
    grids += tuple(_checked_grid(exits, layers, grid) for grid in depths)
    pairs = _pairs(exits, layers, grids)
    size = lm.config.vocab_size if vocabulary is None else len(vocabulary)
    count = min(size, max([count, *(len(grid) - 1 for grid in grids)]))
    parameters = {name: jnp.asarray(value, lm.dtype) for name, value in parameters_of(heads).items()}
    draft = None if vocabulary is None else jnp.asarray(vocabulary, jnp.int32)
    statics = _Statics(lm.config, lm.layout, exits, pairs, count)

    longest = max(len(answer) for _, answer in kept)
    order = sorted(range(len(kept)), key=lambda i: len(kept[i][0]) + len(kept[i][1]))
    found: dict[int, Said] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        ids, at = _padded([kept[i] for i in chosen], batch, longest)
        rows = _answer_rows(statics, lm.weights, parameters, jnp.asarray(ids), jnp.asarray(at))
        index = np.concatenate([row * longest + np.arange(len(kept[i][1])) for row, i in enumerate(chosen)])
        blocks = []
        for first in range(0, len(index), BLOCK):
            part = index[first : first + BLOCK]
            block = jnp.asarray(np.pad(part, (0, BLOCK - len(part))))
            said = jax.device_get(_ask(statics, lm.weights, parameters, draft, rows, block))
            blocks.append(Said(*(field[: len(part)] for field in said)))
        joined = _joined(blocks)
        bounds = np.cumsum([0, *(len(kept[i][1]) for i in chosen)])
        for row, i in enumerate(chosen):
            found[i] = Said(*(field[bounds[row] : bounds[row + 1]] for field in joined))
    target = np.concatenate([np.asarray(answer, np.int32) for _, answer in kept])
    return Measurement(
        layers=layers,
        depths=exits.depths,
        pairs=pairs,
        grids=grids,
        said=_joined([found[i] for i in range(len(kept))]),
        target=target,
        held=np.ones(len(target), bool) if vocabulary is None else np.isin(target, vocabulary),
        lengths=tuple(len(answer) for _, answer in kept),
    )


@dataclasses.dataclass(frozen=True)
class _Statics:
    """What the compiled programs depend on beside shapes.

    Attributes:
      config, layout: of the model.
      exits: shapes of the heads.
      pairs: P.
      count: C.
    """

    config: ModelConfig
    layout: Layout
    exits: ExitsConfig
    pairs: tuple[Pair, ...]
    count: int

    @property
    def sources(self) -> tuple[int, ...]:
        """The S depths whose features of the position before are read, L last."""
        return tuple(sorted({previous for _, previous in self.pairs}))

    @property
    def places(self) -> np.ndarray:
        """[P, 2] int32: where each pair's exit and source stand among depths and sources."""
        found = [(self.exits.depths.index(depth), self.sources.index(previous)) for depth, previous in self.pairs]
        return np.asarray(found, np.int32)


class Rows(NamedTuple):
    """What exits read at the answer positions of a batch, [.., B A, D] each.

    Attributes:
      states: [X, B A, D], hidden states at the trained depths.
      final: [B A, D], features after the final norm at depth L.
      previous: [S, B A, D], features of the position before from each source; None for exits that do not read them.
      context: [S, B A, D], from the context layer; None but for kind "attn".
    """

    states: jax.Array
    final: jax.Array
    previous: jax.Array | None
    context: jax.Array | None


@functools.partial(jax.jit, static_argnums=0)
def _answer_rows(
    statics: _Statics, weights: Any, parameters: dict[str, jax.Array], ids: jax.Array, at: jax.Array
) -> Rows:
    """Runs ids [B, R] and gathers what exits read at positions `at` [B, A]."""
    config, exits, sources = statics.config, statics.exits, statics.sources
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
    ends = [final if source == config.num_layers else own[exits.depths.index(source)] for source in sources]
    before = jnp.pad(jnp.stack(ends)[:, :, :-1], [(0, 0), (0, 0), (1, 0), (0, 0)])
    previous = gathered(before)
    context = None
    if heads.context is not None:
        lag = jnp.asarray([1 if source == config.num_layers else 2 for source in sources])
        rows = previous.reshape(len(sources), *at.shape, -1)
        true = before[sources.index(config.num_layers)]
        context = _contexts(heads.context, model.embed_tokens(ids), true, rows, at, lag).reshape(previous.shape)
    return Rows(gathered(states[:-1]), gathered(final), previous, context)


def _contexts(
    context: Context, embedded: jax.Array, true: jax.Array, previous: jax.Array, at: jax.Array, lag: jax.Array
) -> jax.Array:
    """The context layer at positions `at` [B, A] for each source: [S, B, A, D].

    Args:
      context: the layer.
      embedded, true: [B, R, D], token embeddings, and the true features before each position.
      previous: [S, B, A, D].
      at: [B, A] int32.
      lag: [S] int32, how far back the newest committed position is: 1, or 2 where the parent is not committed.
    """
    batch, length, _ = embedded.shape
    everywhere = jnp.broadcast_to(jnp.arange(length)[None], (batch, length))
    keys, values = context.keys_values(context.enter_rows(embedded, true), everywhere)
    tokens = jnp.take_along_axis(embedded, at[:, :, None], axis=1)
    itself = jnp.broadcast_to(jnp.eye(at.shape[1], dtype=bool)[None], (batch, at.shape[1], at.shape[1]))
    distance = at[:, :, None] - everywhere[:, None, :]

    def one_source(source: tuple[jax.Array, jax.Array]) -> jax.Array:
        before, newest = source
        seen = (distance >= newest) & (distance <= context.config.window)
        return context.output(context.enter_rows(tokens, before), at, KeyValues(keys, values, seen), itself)

    return jax.lax.map(one_source, (previous, lag))


@functools.partial(jax.jit, static_argnums=0)
def _ask(
    statics: _Statics,
    weights: Any,
    parameters: dict[str, jax.Array],
    draft: jax.Array | None,
    rows: Rows,
    block: jax.Array,
) -> Said:
    """All pairs at the rows that `block` [N] int32 names, one pair's logits at a time; draft: [V'] int32 or None."""
    model = merge_model(statics.config, statics.layout, weights)
    unembed = (model.embed if model.unembed is None else model.unembed)[...]
    vocabulary = Vocabulary(unembed, None if draft is None else unembed[draft], draft)
    kernel = unembed if vocabulary.draft_unembed is None else vocabulary.draft_unembed
    final = rows.final[block]
    goal = targets(final, vocabulary, hard=0.0)

    def one_pair(_: None, place: jax.Array) -> tuple[None, tuple[jax.Array, ...]]:
        exit_, source = place[0], place[1]
        head = head_at(statics.exits, parameters, exit_)
        previous = None if rows.previous is None else rows.previous[source][block][None]
        context = None if rows.context is None else rows.context[source][block][None]
        features = head.features(rows.states[exit_][block][None], previous, context)[0]
        logits, rest = linear(features[:, :-1], kernel, out_dtype=jnp.float32), features[:, -1].astype(jnp.float32)
        log_all = jax.nn.logsumexp(logits, axis=-1)
        expected = jnp.sum(goal.inside * logits, axis=-1)
        if draft is not None:
            log_all = jnp.logaddexp(log_all, rest)
            expected = expected + jnp.where(goal.outside > 0, goal.outside * rest, 0.0)
        # Asked for values too, XLA sorts the whole vocabulary on CPUs and the program takes six times as long.
        column = jax.lax.top_k(logits, statics.count)[1]
        best = column if draft is None else draft[column]
        kept = jnp.take_along_axis(logits, column, axis=-1) - log_all[:, None]
        return None, (best, log_all - expected - goal.entropy, jnp.exp(kept[:, 0]), kept)

    _, said = jax.lax.scan(one_pair, None, jnp.asarray(statics.places))
    greedy = jnp.argmax(linear(final, unembed, out_dtype=jnp.float32), axis=-1)
    best, divergence, confidence, kept = (jnp.moveaxis(x, 0, 1) for x in said)
    return Said(best, divergence, confidence, kept, greedy)


def _joined(parts: Sequence[Said]) -> Said:
    return jax.tree.map(lambda *fields: np.concatenate(fields), *parts)


def _pairs(config: ExitsConfig, layers: int, grids: Sequence[tuple[int, ...]]) -> tuple[Pair, ...]:
    """All (depth, L), then what exits of the grids read where the position before has not reached L."""
    true = [(depth, layers) for depth in config.depths]
    if not config.needs_previous:
        return tuple(true)
    own = {(a, b) for grid in grids for i, a in enumerate(grid[:-1]) for b in grid[i + 1 : -1]}
    return (*true, *sorted(own))


def _checked_grid(config: ExitsConfig, layers: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    ascending = all(a < b for a, b in itertools.pairwise(grid))
    if not (ascending and len(grid) > 1 and grid[-1] == layers and set(grid[:-1]) <= set(config.depths)):
        trained = ", ".join(map(str, config.depths))
        raise DexError(
            f"the grid {','.join(map(str, grid))} does not ascend through depths that have exits ({trained}) to the "
            f"last layer, {layers}: give another"
        )
    return tuple(grid)


def _padded(texts: Sequence[Text], batch: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, R], answer positions [B, A]); rows and positions beyond a text's end hold anything."""
    length = max(len(prompt) + len(answer) for prompt, answer in texts) - 1
    ids = np.zeros((batch, -(-length // LENGTH_STEP) * LENGTH_STEP), np.int32)
    at = np.zeros((batch, longest), np.int32)
    for row, (prompt, answer) in enumerate(texts):
        ids[row, : len(prompt) + len(answer) - 1] = [*prompt, *answer[:-1]]
        at[row] = np.minimum(len(prompt) - 1 + np.arange(longest), ids.shape[1] - 1)
    return ids, at


def _checked_text(lm: LanguageModel, number: int, prompt: Sequence[int], answer: Sequence[int]) -> Text:
    """The text up to the answer's first EOS."""
    end = next((i + 1 for i, token in enumerate(answer) if token in lm.eos_ids), len(answer))
    if not len(prompt) or not end:
        raise DexError(f"text {number} has no {'answer' if len(prompt) else 'prompt'}: give at least one token of each")
    if len(prompt) + end > lm.config.context:
        raise DexError(
            f"text {number} has {len(prompt) + end} tokens, which passes the model's context of {lm.config.context}: "
            "shorten it"
        )
    ids = [int(token) for token in (*prompt, *answer[:end])]
    if not all(0 <= token < lm.config.vocab_size for token in ids):
        raise DexError(f"text {number} holds token ids outside the model's vocabulary of {lm.config.vocab_size}")
    return ids[: len(prompt)], ids[len(prompt) :]


def _check_exits(model: ModelConfig, exits: ExitsConfig, vocabulary: np.ndarray | None) -> None:
    if exits.width != model.width or exits.depths[-1] >= model.num_layers:
        raise DexError(
            f"exits of width {exits.width} at depths {exits.depths} do not fit a model of width {model.width} and "
            f"{model.num_layers} layers: use those that were trained for it"
        )
    size = None if vocabulary is None else len(vocabulary)
    if size != exits.draft_size:
        raise DexError(f"the exits need a draft vocabulary of {exits.draft_size} tokens and were given {size}")
    if vocabulary is not None and not (
        np.all(np.diff(vocabulary) > 0) and vocabulary[0] >= 0 and vocabulary[-1] < model.vocab_size
    ):
        raise DexError("the draft vocabulary must hold ascending token ids of the model's vocabulary, without repeats")
