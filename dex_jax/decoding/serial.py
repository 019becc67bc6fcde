"""Serial rounds: draft a small token tree, run it through all layers at once, keep every token that the last one gives.

For one device, which reads all weights in a step anyway: a round takes about as long as an AR step and emits several
tokens. Drafts come from a drafter at depth 0 and from the text itself; what is emitted is always the final layer's.

Letters: B sequences, N rows of a tree, P levels with the root's, w rows of a level, D model width, V vocabulary,
S cache length, T capacity for new tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.decoding.ladder import choose_rung, fill
from dex_jax.decoding.noise import Noise, make_noise, noise_at
from dex_jax.decoding.record import Limits, Record, begin, emit_path, until_done
from dex_jax.decoding.suffix import LONGEST, continuation
from dex_jax.decoding.tree import Candidates, Tree, child_of, depth_in, follow, grow, plant, sort_rows
from dex_jax.errors import DexError
from dex_jax.lattice import NO_NODE, NO_TOKEN, quantized
from dex_jax.sampling import Sampling, choose, log_total, scores

DRAFTED = 0
"""`exits` of a token that the tree held: the drafter and the lookup stand at depth 0."""

FINAL = 1
"""`exits` of a token that only the final layer gave."""

HOPE = 0.25
"""The share of what a level promises, and the lookup does not below it, that drafting there is taken to add: how often
a child turns out worth running, and right. Below what drafters agree, as much of what they draft is not worth
running."""

PRIOR = 16.0
"""AR steps that every sequence is taken to have decoded at AR's pace before its first round, and tokens that drafts are
taken to have promised and kept."""


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """How large a round's tree may get.

    Attributes:
      widths: rows of the levels below the root.
      drafted: on how many levels the drafter proposes; deeper ones only go on with what the text said before.
      lookup: probability that the continuation of a suffix match is right, by the length of the match: 8 numbers, for
        1 to 8 tokens or more; all 0 switches it off.
      rungs: (rows, AR steps that a step of so many takes), ascending and ending at N: a round drafts as many levels and
        runs as many of its most probable rows as are worth their time. Empty for all of them in every round.
      drafting: AR steps that drafting one level takes; only asked for with rungs.

    Raises:
      DexError: no level, a level without rows, more drafted levels than there are, trust that is no probability,
        rungs that do not ascend to N, or a negative cost.

    Examples:
      >>> TreeShape((3, 2, 1), drafted=2, lookup=(0.0,) * 8).rows
      7
    """

    widths: tuple[int, ...]
    drafted: int
    lookup: tuple[float, ...]
    rungs: tuple[tuple[int, float], ...] = ()
    drafting: float = 0.0

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or not 0 <= self.drafted <= len(self.widths):
            raise DexError(
                f"a tree needs at least one row on each of its levels and as many of them drafted at most, not "
                f"{self.drafted} of {self.widths}"
            )
        if len(self.lookup) != LONGEST or not all(0 <= share <= 1 for share in self.lookup):
            raise DexError(f"a tree's lookup is {LONGEST} probabilities, one for each length of match: {self.lookup}")
        if self.rungs:
            ascending = all(a < b and s <= t for (a, s), (b, t) in itertools.pairwise(((0, 0.0), *self.rungs)))
            if not ascending or self.rungs[0][1] <= 0 or self.rungs[-1][0] != self.rows:
                raise DexError(f"a tree's rungs ascend to its {self.rows} rows, with costs above 0, not {self.rungs}")
        if self.drafting < 0:
            raise DexError(f"drafting a level cannot take {self.drafting} AR steps")

    @property
    def counts(self) -> tuple[int, ...]:
        """The row counts that a round may run."""
        return tuple(rows for rows, _ in self.rungs) or (self.rows,)

    @property
    def costs(self) -> RoundCosts | None:
        """What `rungs` and `drafting` say, as arrays; None without rungs."""
        if not self.rungs:
            return None
        return RoundCosts(jnp.asarray([cost for _, cost in self.rungs], jnp.float32), jnp.float32(self.drafting))

    @property
    def without_costs(self) -> TreeShape:
        """What programs depend on: the row counts, and whether levels are chosen, without the figures."""
        rungs = tuple((rows, float(place)) for place, (rows, _) in enumerate(self.rungs, 1))
        return dataclasses.replace(self, rungs=rungs, drafting=float(self.drafting > 0))

    @property
    def rows(self) -> int:
        """N."""
        return 1 + sum(self.widths)

    @property
    def levels(self) -> int:
        """P."""
        return 1 + len(self.widths)

    @property
    def starts(self) -> tuple[int, ...]:
        """First row of each level, the root's among them, and N."""
        return (0, *itertools.accumulate((1, *self.widths)))


class RoundCosts(NamedTuple):
    """What rounds take, in AR steps; programs do not depend on it.

    Attributes:
      rows: float32, of a round of each of the row counts that it may run, beside its drafting.
      drafting: float32, of drafting one level.
    """

    rows: jax.Array
    drafting: jax.Array


class Drafter(NamedTuple):
    """What proposes tokens before any layer has run.

    Attributes:
      begin: (batch, rows) -> drafts [B, rows, D''], what children read of their parents, before any row.
      run: (memory, drafts of the parents [B, w, D''], token [B, w], position [B, w], parent [B, w]) -> (features
        [B, w, D'], drafts [B, w, D'']): some rows of a level; a root's parent is NO_NODE.
      logits: features [M, D'] -> [M, V'] float32.
      rest: features [M, D'] -> [M] float32, the logit of all tokens outside the vocabulary together, or None.
      vocabulary: [V'] int32, the full id of each column, None when V' = V.
    """

    begin: Callable[[int, int], jax.Array]
    run: Callable[..., tuple[jax.Array, jax.Array]]
    logits: Callable[[jax.Array], jax.Array]
    rest: Callable[[jax.Array], jax.Array] | None
    vocabulary: jax.Array | None


class TreeNetwork(NamedTuple):
    """A decoder that runs token trees.

    Attributes:
      vocab_size: V.
      run: (memory, token [B, n], position [B, n], ancestors [B, n, n], prefix [B]) -> (hidden [B, n, D] at depth L,
        fresh): every row attends to the committed prefix and to its ancestors; memory does not change. Leaves of
        `fresh` are [.., n, d], or [B, n].
      commit: (memory, fresh, Confirmed) -> memory: appends the rows of a path to the prefix.
      final: hidden [M, D] -> logits [M, V] float32.
      drafter: None to go by the text alone.
    """

    vocab_size: int
    run: Callable[..., tuple[jax.Array, Any]]
    commit: Callable[[Any, Any, Confirmed], Any]
    final: Callable[[jax.Array], jax.Array]
    drafter: Drafter | None


class Confirmed(NamedTuple):
    """The rows that a round commits.

    Attributes:
      row: [B, P] int32, the root first; from `length` on anything.
      token: [B, P] int32.
      hidden: [B, P, D] at depth L.
      prefix: [B] int32, position of the root: the first one that is not committed yet.
      length: [B] int32, how many rows; 0 for sequences that are done.
    """

    row: jax.Array
    token: jax.Array
    hidden: jax.Array
    prefix: jax.Array
    length: jax.Array


class SerialState(NamedTuple):
    """All that serial rounds carry.

    Attributes:
      tick: int32, rounds since the start, the same for all sequences.
      root: [B] int32, the last token emitted, not yet in memory.
      prefix: [B] int32, its position, and the number of committed positions.
      text: [B, S] int32, all tokens at their positions.
      memory: the network's own.
      noise: None when greedy.
      costs: what rounds take; None where they choose nothing.
      chosen: float32, how many rounds ran each of the row counts, and how many levels were drafted in all.
      spent: float32, AR steps that the rounds took by their costs, times the sequences in them.
      promised: float32, tokens that the drafts of all rounds should have brought by their probabilities.
      record: what has been emitted; its `ticks` are rounds.
    """

    tick: jax.Array
    root: jax.Array
    prefix: jax.Array
    text: jax.Array
    memory: Any
    noise: Noise | None
    costs: RoundCosts | None
    chosen: jax.Array
    spent: jax.Array
    promised: jax.Array
    record: Record


def init(
    network: TreeNetwork,
    memory: Any,
    prompt: jax.Array,
    first_token: jax.Array,
    position: jax.Array,
    *,
    shape: TreeShape,
    length: int,
    capacity: int,
    limits: Limits,
    sampling: Sampling | None = None,
    costs: RoundCosts | None = None,
) -> SerialState:
    """The state before the first round.

    Args:
      network: the callables of one model.
      memory: what its prefill left, with room for `shape.levels` positions past the last token.
      prompt: [B, R] int32, padded on the right.
      first_token: [B] int32, token 0 as the prefill chose it.
      position: [B] int32, its absolute position (the prompt's length).
      shape: of the trees.
      length: S.
      capacity: T.
      limits: when a sequence ends.
      sampling: None for greedy.
      costs: what rounds take; None for what the shape says.
    """
    batch, size = prompt.shape
    text = jnp.full((batch, length), NO_TOKEN, jnp.int32).at[:, :size].set(prompt)
    text = text.at[jnp.arange(batch), position].set(first_token)
    noise = None
    if sampling is not None:
        noise = Noise(jnp.zeros((batch, shape.levels, network.vocab_size), jnp.float32), position)
    record = begin(first_token, capacity, limits)
    none = jnp.float32(0)
    costs = shape.costs if costs is None else costs
    chosen = jnp.zeros(len(shape.counts) + 1)
    return SerialState(jnp.int32(0), first_token, position, text, memory, noise, costs, chosen, none, none, record)


def step(
    network: TreeNetwork, state: SerialState, limits: Limits, sampling: Sampling | None = None, *, shape: TreeShape
) -> SerialState:
    """One round: draft, run, commit. Sequences that are done emit nothing."""
    batch, levels = state.root.shape[0], shape.levels
    noise = _noise_ahead(network, state, sampling, levels)
    # Drafts promise too much where sampling or a text surprises: promises count as far as they were kept so far.
    price = _price(state) / _kept(state)
    tree, levels_drafted = _draft(network, state, sampling, noise, shape, price)
    rung, cost, promised = jnp.int32(0), jnp.float32(0), jnp.float32(0)
    if state.costs is not None:
        tree, rung, promised = _most_promising(tree, ~state.record.done, shape, state.costs, price)
        cost = state.costs.rows[rung] + levels_drafted * state.costs.drafting

    def run_rows(rows: int) -> Any:
        position = state.prefix[:, None] + depth_in(tree)[:, :rows]
        ancestors = tree.ancestors[:, :rows, :rows]
        hidden, fresh = network.run(state.memory, tree.token[:, :rows], position, ancestors, state.prefix)
        row_noise = None if noise is None else noise_at(noise, position + 1).reshape(batch * rows, -1)
        final = choose(network.final(hidden.reshape(batch * rows, -1)), sampling, row_noise)[0]
        fresh = jax.tree.map(lambda leaf: fill(leaf, -1 if leaf.ndim == 2 else -2, shape.rows), fresh)
        return fill(hidden, 1, shape.rows), fill(final.reshape(batch, rows), 1, shape.rows), fresh

    hidden, final, fresh = choose_rung(rung, shape.counts, run_rows)
    row, count = jax.vmap(follow, (0, 0, None))(tree, final, levels)
    emitted = jnp.take_along_axis(final, row, axis=1)
    begun, place = state.record, jnp.arange(levels)[None]
    born_at = jnp.where(place < count[:, None] - 1, DRAFTED, FINAL)
    record, _ = emit_path(begun, emitted, born_at, count, limits)
    count = jnp.where(begun.done, 0, count)
    path = Confirmed(
        row,
        jnp.take_along_axis(tree.token, row, axis=1),
        jnp.take_along_axis(hidden, row[:, :, None], axis=1),
        state.prefix,
        count,
    )
    memory = network.commit(state.memory, fresh, path)
    last = jnp.take_along_axis(emitted, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    at = jnp.where(place < count[:, None], state.prefix[:, None] + 1 + place, state.text.shape[1])
    text = state.text.at[jnp.arange(batch)[:, None], at].set(emitted, mode="drop")
    root = jnp.where(count > 0, last, state.root)
    spent = state.spent + cost * jnp.sum(~begun.done)
    chosen = state.chosen.at[rung].add(1).at[-1].add(levels_drafted)
    return SerialState(
        tick=state.tick + 1,
        root=root,
        prefix=state.prefix + count,
        text=text,
        memory=memory,
        noise=noise,
        costs=state.costs,
        chosen=chosen,
        spent=spent,
        promised=state.promised + promised,
        record=record,
    )


def run(
    network: TreeNetwork,
    state: SerialState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    shape: TreeShape,
    until_tick: jax.Array | None = None,
) -> SerialState:
    """Rounds under one lax.while_loop until every sequence is done, or until `until_tick` (int32 scalar)."""
    return until_done(lambda s: step(network, s, limits, sampling, shape=shape), state, until_tick)


def _price(state: SerialState) -> jax.Array:
    """float32, the tokens that an AR step's time is worth: what all going sequences emit in it at the pace so far.

    Never less than AR's pace, which can always be had.
    """
    emitted = jnp.sum(state.record.lengths - 1).astype(jnp.float32)
    before = PRIOR * state.root.shape[0]
    return jnp.maximum(1, (before + emitted) / (before + state.spent)) * jnp.sum(~state.record.done)


def _kept(state: SerialState) -> jax.Array:
    """float32, how much of what drafts have promised so far they kept, at most 1."""
    before = PRIOR * state.root.shape[0]
    right = jnp.sum(state.record.lengths - 1 - state.record.ticks).astype(jnp.float32)
    return jnp.minimum(1, (before + right) / (before + state.promised))


def _promise(tree: Tree, going: jax.Array) -> jax.Array:
    """[N] float32, how many of the `going` sequences should emit the token of each row."""
    return jnp.sum(jnp.where(going[:, None], jnp.exp(tree.score), 0), axis=0)


def _most_promising(
    tree: Tree, going: jax.Array, shape: TreeShape, costs: RoundCosts, price: jax.Array
) -> tuple[Tree, jax.Array, jax.Array]:
    """The rows by probability, those beyond the chosen rung cut off; the rung as an index; what its drafts promise.

    The sum of path probabilities, the root's 1 among them, is the number of tokens that a round should emit. Time is
    charged at the pace of all rounds, not of this one: that makes the most of all of them together (the rule of renewal
    reward).
    """
    tree = jax.vmap(sort_rows)(tree)
    expected = jnp.cumsum(_promise(tree, going))
    counts = jnp.asarray(shape.counts)
    rung = jnp.argmax(expected[counts - 1] - price * costs.rows).astype(jnp.int32)
    kept = jnp.arange(shape.rows) < counts[rung]
    promised = expected[counts[rung] - 1] - expected[0]
    return tree._replace(parent=jnp.where(kept[None], tree.parent, NO_NODE)), rung, promised


def _draft(
    network: TreeNetwork,
    state: SerialState,
    sampling: Sampling | None,
    noise: Noise | None,
    shape: TreeShape,
    price: jax.Array,
) -> tuple[Tree, jax.Array]:
    """The round's tree, every field with a leading axis B, and how many levels of it the drafter was asked for."""
    batch, drafter, going = state.root.shape[0], network.drafter, ~state.record.done
    most = max(shape.widths)
    room = shape.rows + most  # so that `most` rows can be cut out from any one on
    tree = jax.vmap(plant, (0, None))(state.root, room)
    said, matched = jax.vmap(continuation, (0, 0, None))(state.text, state.prefix + 1, len(shape.widths))
    trust = jnp.asarray((0.0, *shape.lookup), jnp.float32)
    trusted = jnp.where(trust > 0, quantized(jnp.log(trust)), -jnp.inf)[jnp.minimum(matched, LONGEST)]
    at = jnp.where(trusted > -jnp.inf, 0, NO_NODE)  # the row that the continuation has got to
    drafts = None if drafter is None else drafter.begin(batch, room)
    dear = None if state.costs is None or not shape.drafting else price * state.costs.drafting

    def one_level(carry: tuple[Any, ...], parts: tuple[_Level, jax.Array]) -> tuple[tuple[Any, ...], None]:
        tree, drafts, at, levels_drafted = carry
        level, token = parts
        score = jnp.where(at == NO_NODE, -jnp.inf, _at(tree.score, at) + trusted)
        candidates = Candidates(token[:, None], at[:, None], score[:, None])
        if drafter is not None and shape.drafted:
            asked = level.drafted
            if dear is not None:
                claimed = jnp.sum(jnp.where(going, jnp.exp(score), 0))  # by the lookup
                above = jax.lax.dynamic_slice_in_dim(_promise(tree, going), level.above, most)
                hope = HOPE * (jnp.sum(jnp.where(jnp.arange(most) < level.of_above, above, 0)) - claimed)
                asked &= hope > dear

            def drafted(drafts: jax.Array) -> tuple[Candidates, jax.Array]:
                return _drafted(network, state, sampling, noise, tree, drafts, level, most)

            def skipped(drafts: jax.Array) -> tuple[Candidates, jax.Array]:
                none = jnp.full((batch, most * most), NO_NODE, jnp.int32)
                return Candidates(none, none, jnp.full(none.shape, -jnp.inf)), drafts

            more, drafts = jax.lax.cond(asked, drafted, skipped, drafts)
            levels_drafted += asked
            candidates = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), candidates, more)
        tree = jax.vmap(grow, (0, 0, None, None, None))(tree, candidates, level.first, level.width, most)
        return (tree, drafts, jax.vmap(child_of)(tree, at, token), levels_drafted), None

    # In a loop: the levels of a tree, one by one, would be most of the program to compile.
    begun = (tree, drafts, at, jnp.int32(0))
    (tree, _, _, levels_drafted), _ = jax.lax.scan(one_level, begun, (_levels(shape), said.T))
    rows = slice(shape.rows)
    tree = Tree(tree.token[:, rows], tree.parent[:, rows], tree.score[:, rows], tree.ancestors[:, rows, rows])
    return tree, levels_drafted


class _Level(NamedTuple):
    """A level below the root, or all of them with a leading axis; int32 but for the last.

    Attributes:
      first, width: its rows.
      above, of_above: the rows of the level before.
      drafted: bool, whether the drafter may propose it.
    """

    first: jax.Array
    width: jax.Array
    above: jax.Array
    of_above: jax.Array
    drafted: jax.Array


def _levels(shape: TreeShape) -> _Level:
    widths = jnp.asarray((1, *shape.widths), jnp.int32)
    starts = jnp.asarray(shape.starts, jnp.int32)
    drafted = jnp.arange(len(shape.widths)) < shape.drafted
    return _Level(starts[1:-1], widths[1:], starts[:-2], widths[:-1], drafted)


def _drafted(
    network: TreeNetwork,
    state: SerialState,
    sampling: Sampling | None,
    noise: Noise | None,
    tree: Tree,
    drafts: jax.Array,
    level: _Level,
    most: int,
) -> tuple[Candidates, jax.Array]:
    """The drafter's best children of each row above a level, as many as the level has rows, in `most` places each."""
    drafter = network.drafter
    assert drafter is not None
    batch = tree.token.shape[0]

    def above(field: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(field, level.above, most, axis=1)

    token, parent, position = above(tree.token), above(tree.parent), state.prefix[:, None] + above(depth_in(tree))
    of_parent = jnp.take_along_axis(drafts, jnp.maximum(parent, 0)[:, :, None], axis=1)
    features, own = drafter.run(state.memory, of_parent, token, position, parent)
    inside = jnp.arange(most) < level.of_above
    own = jnp.where(inside[None, :, None], own, above(drafts))
    drafts = jax.lax.dynamic_update_slice_in_dim(drafts, own, level.above, axis=1)
    flat = features.reshape(batch * most, -1)
    logits = drafter.logits(flat)
    columns = drafter.vocabulary
    row_noise = None
    if noise is not None:
        row_noise = noise_at(noise, position + 1).reshape(batch * most, -1)
        row_noise = row_noise if columns is None else row_noise[:, columns]
    adjusted = scores(logits, sampling, row_noise)
    log_all = log_total(adjusted, None if drafter.rest is None else drafter.rest(flat), sampling)
    # Asked for values too, XLA sorts the whole vocabulary on CPUs.
    best = jax.lax.top_k(adjusted, most)[1]
    adjusted = jnp.take_along_axis(adjusted, best, axis=1)
    score = jnp.where(adjusted > -jnp.inf, quantized(adjusted - log_all[:, None]), -jnp.inf)
    score = jnp.where(jnp.arange(most)[None] < level.width, score, -jnp.inf).reshape(batch, most, most)
    token = best if columns is None else columns[best]
    row = jnp.broadcast_to((level.above + jnp.arange(most))[None, :, None], score.shape)
    path = jnp.where(inside[None, :, None], above(tree.score)[:, :, None] + score, -jnp.inf)
    return Candidates(token.reshape(batch, -1), row.reshape(batch, -1), path.reshape(batch, -1)), drafts


def _noise_ahead(network: TreeNetwork, state: SerialState, sampling: Sampling | None, levels: int) -> Noise | None:
    """Noise of the positions that the round's rows predict: prefix + 1 to prefix + P."""
    if state.noise is None:
        return None
    frontier = state.prefix + levels

    def one_more(_: int, noise: Noise) -> Noise:
        made = make_noise(noise, sampling, frontier, network.vocab_size)
        assert made is not None
        return made

    return jax.lax.fori_loop(0, levels, one_more, state.noise)


def _at(field: jax.Array, row: jax.Array) -> jax.Array:
    return jnp.take_along_axis(field, jnp.maximum(row, 0)[:, None], axis=1)[:, 0]
