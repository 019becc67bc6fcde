"""The drafts of exit 0 below the anchors of a cohort, and the choice of the rows that are worth their time.

Drafts come from the text itself (what followed the same suffix before) and from a drafter, a head at depth 0. None of
them ever changes a token: the final layer decides all that is emitted.

Letters: B sequences, A anchors, N rows of a cohort while it grows, M tokens that the text may go
on with, S text length, E width of what a drafter knows of a position.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.interface import DexState, Drafter, DraftRows
from dex_jax.decoding.dex.lookup import continuation_scores
from dex_jax.decoding.dex.row_choice import RowChoice, choose_rung, is_worth_a_level, rests, updated
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.ladder import fill
from dex_jax.decoding.noise import Noise, make_noise, noise_at
from dex_jax.lattice import NO_NODE, NO_TOKEN, Candidates, Cohort, Lattice, quantized
from dex_jax.sampling import Sampling, log_total, perturbed_logits

ANCHORS = 8
"""Number of anchors of a cohort, the best ones, that exit 0 drafts below."""


def with_drafts(
    drafter: Drafter | None,
    state: DexState,
    anchors: Cohort,
    before: jax.Array | None,
    sampling: Sampling | None,
    shape: TreeShape,
) -> tuple[DexState, Cohort]:
    """Add drafts below the first ANCHORS anchors of a cohort, and keep only the rows that are worth their time.

    `drafter` and `before` [B, A, E], what it reads of the position before each of these, are None to draft
    from the text alone. The noise must be that of `with_noise`. Gives (state, N rows of each sequence, best first).
    """
    count = anchors.token.shape[1]
    under = min(count, ANCHORS)
    # A slice as long as the widest level fits wherever a level begins.
    size = max(state.rows, count + sum(shape.widths) + shape.tail) + max(under, *shape.widths)
    cohort = jax.vmap(lat.widen, (0, None))(anchors, size)
    levels = _levels(shape, count, under)

    def grown() -> tuple[Cohort, _Drafting]:
        following = _continuations_below(state, anchors, under, shape)
        return _add_levels(drafter, state, cohort, levels, before, following, sampling, shape)

    if state.row_choice is None:
        cohort, drafting = grown()
    else:
        resting = rests(state.row_choice, ~state.record.done)
        cohort, drafting = jax.lax.cond(resting, lambda: (cohort, _no_drafting(cohort)), grown)
    ordered = jax.vmap(lat.sort_rows)(cohort)
    if state.row_choice is None:
        return state, ordered
    return _worth_their_time(state, state.row_choice, ordered, shape, drafting)


def with_noise(state: DexState, anchors: Cohort, sampling: Sampling | None, shape: TreeShape | None) -> DexState:
    """Make the noise of the positions of all drafts below some anchors; `shape` is None where there are none."""
    if shape is None:
        return state
    furthest = jnp.max(jnp.where(anchors.score > -jnp.inf, anchors.position, -1), axis=1)
    return state._replace(noise=make_noise(state.noise, sampling, furthest + len(shape.widths)))


class _Continuations(NamedTuple):
    """The continuations of the text below each of the first anchors of a cohort."""

    token: jax.Array  # [B, A, M] int32
    log_probability: jax.Array  # [B, A, M] float32, that a token is right if those before it are; -inf for none


def _continuations_below(state: DexState, anchors: Cohort, under: int, shape: TreeShape) -> _Continuations:
    """Return the tokens that followed the same suffix before, below each of the first `under` anchors."""
    assert state.text is not None
    text = jax.vmap(_texts, (0, 0, 0, 0, None))(state.text, state.lattice, anchors, state.prefix, under)
    axes = (0, 0, None, None)
    ends = anchors.position[:, :under] + 1
    by_length = jnp.asarray(shape.match_log_probability)
    token, score = jax.vmap(jax.vmap(continuation_scores, axes), axes)(text, ends, by_length, shape.levels - 1)
    return _Continuations(token, jnp.where(anchors.score[:, :under, None] > -jnp.inf, score, -jnp.inf))


def _add_levels(
    drafter: Drafter | None,
    state: DexState,
    cohort: Cohort,
    levels: _Level,
    before: jax.Array | None,
    following: _Continuations,
    sampling: Sampling | None,
    shape: TreeShape,
) -> tuple[Cohort, _Drafting]:
    """Return the cohort with the best drafts of each level below the one above, and what the drafter did for it."""
    (batch, under, _), down = following.token.shape, len(shape.widths)
    most = max(under, *shape.widths)

    def one_level(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, cohort, known, at, drafting = carry
        level, token, more = jax.tree.map(lambda part: part[number], parts)
        score = jax.vmap(_score_at)(cohort, at) + more
        candidates = Candidates(token, at, score)
        if drafter is not None and shape.drafter_levels:
            called = level.by_drafter
            if state.row_choice is not None:
                above = jax.lax.dynamic_slice_in_dim(jnp.exp(cohort.score), level.above, most, axis=1)
                above = jnp.sum(jnp.where(jnp.arange(most) < level.of_above, above, 0), axis=1)
                below = above - jnp.sum(jnp.exp(score), axis=1)
                called &= is_worth_a_level(state.row_choice, ~state.record.done, below)
                so_far = drafting.called + jnp.where(called, below, 0)
                drafting = _Drafting(drafting.levels + called, so_far, drafting.scores)

            def by_drafter(known: Any) -> tuple[Candidates, Any]:
                return _drafts_of(drafter, state.memory, before, known, cohort, sampling, state.noise, level, most)

            def skipped(known: Any) -> tuple[Candidates, Any]:
                none = jnp.full((batch, most * most), NO_NODE, jnp.int32)
                return Candidates(jnp.full_like(none, NO_TOKEN), none, jnp.full(none.shape, -jnp.inf)), known

            more, known = jax.lax.cond(called, by_drafter, skipped, known)
            candidates = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), candidates, more)
        cohort = jax.vmap(lat.grow, (0, 0, None, None, None))(cohort, candidates, level.first, level.width, most)
        at = jax.vmap(jax.vmap(lat.child_of, (None, 0, 0)))(cohort, at, token)
        if state.row_choice is not None:
            row = jnp.arange(cohort.token.shape[1])[None]
            in_text = jnp.any(row[..., None] == at[:, None], axis=2)
            new = (row >= level.first) & (row < level.first + level.width) & ~in_text
            drafting = drafting._replace(scores=jnp.where(new, cohort.score, drafting.scores))
        return number + 1, cohort, known, at, drafting

    def more_to_come(carry: tuple[Any, ...]) -> jax.Array:
        """Return whether the last level has a row; nothing is below an empty one, and most ticks draft few levels."""
        number, cohort, *_ = carry
        above = jax.tree.map(lambda part: part[jnp.minimum(number, down - 1)], (levels.above, levels.of_above))
        row = jnp.arange(cohort.token.shape[1])
        inside = (row >= above[0]) & (row < above[0] + above[1])
        return (number < down) & jnp.any((cohort.score > -jnp.inf) & inside[None])

    known = None if drafter is None else drafter.blank(batch, cohort.token.shape[1])
    # The row that each continuation has reached.
    at = jnp.where(following.log_probability[..., 0] > -jnp.inf, jnp.arange(under)[None], NO_NODE)
    # In a loop, as unrolled levels would be most of the program to compile.
    parts: Any = (levels, *(jnp.moveaxis(each[..., :down], 2, 0) for each in following))
    carry = (jnp.int32(0), cohort, known, at, _no_drafting(cohort))
    done, cohort, _, at, drafting = jax.lax.while_loop(more_to_come, one_level, carry)
    at = jnp.where(done == down, at, NO_NODE)
    if shape.tail:
        first = levels.first[-1] + levels.width[-1]
        token, score = (each[..., down:] for each in following)
        cohort = jax.vmap(_go_on, (0, 0, 0, 0, None))(cohort, at, token, score, first)
    return cohort, drafting


def _worth_their_time(
    state: DexState, choice: RowChoice, cohort: Cohort, shape: TreeShape, drafting: _Drafting
) -> tuple[DexState, Cohort]:
    """Drop the rows of a sorted cohort behind those that together promise the most tokens for their time."""
    probability, roots = jnp.exp(cohort.score), (cohort.score[:, 0] == 0).astype(jnp.float32)
    rung = choose_rung(choice, shape.rungs, ~state.record.done, probability, roots, drafting.levels, state.stages)
    kept = jnp.arange(cohort.token.shape[1]) < jnp.asarray(shape.rungs)[rung]
    cohort = cohort._replace(score=jnp.where(kept[None], cohort.score, -jnp.inf))
    least = jnp.min(jnp.where(cohort.score > -jnp.inf, cohort.score, 0), axis=1, keepdims=True)
    used = jnp.sum(jnp.where(drafting.scores >= least, jnp.exp(drafting.scores), 0), axis=1)
    expected = jnp.sum(jnp.exp(cohort.score), axis=1)
    about = (state.record.lengths, roots, rung, expected, drafting.levels, drafting.called, used)
    return state._replace(row_choice=updated(choice, *about)), cohort


class _Drafting(NamedTuple):
    """The work of the drafter for a cohort."""

    levels: jax.Array  # int32, the number of levels that it drafted
    called: jax.Array  # [B] float32, as in RowChoice, for this cohort alone
    scores: jax.Array  # [B, N] float32 of the rows that it alone drafted, -inf elsewhere


def _no_drafting(cohort: Cohort) -> _Drafting:
    nothing = jnp.zeros(cohort.score.shape[0], jnp.float32)
    return _Drafting(jnp.int32(0), nothing, jnp.full_like(cohort.score, -jnp.inf))


class _Level(NamedTuple):
    """One level below the anchors, or all with a leading axis; all fields but the last are int32."""

    first: jax.Array
    width: jax.Array
    above: jax.Array  # the first row of the level above
    of_above: jax.Array  # the number of its rows
    by_drafter: jax.Array  # bool, whether the drafter may propose it


def _levels(shape: TreeShape, anchors: int, under: int) -> _Level:
    starts = jnp.asarray((0, *itertools.accumulate((anchors, *shape.widths))), jnp.int32)
    widths = jnp.asarray((under, *shape.widths), jnp.int32)
    drafted = jnp.arange(len(shape.widths)) < shape.drafter_levels
    return _Level(starts[1:-1], widths[1:], starts[:-2], widths[:-1], drafted)


def _score_at(cohort: Cohort, at: jax.Array) -> jax.Array:
    return jnp.where(at == NO_NODE, -jnp.inf, cohort.score[jnp.maximum(at, 0)])


def _go_on(cohort: Cohort, at: jax.Array, following: jax.Array, log_probability: jax.Array, first: jax.Array) -> Cohort:
    """Add to one sequence's cohort the rest of the continuation that is most probable to go on.

    at [n] int32 are the rows that continuations have reached; `following` and `log_probability` [n, M] are
    the tokens after them and their scores. The rest goes into the rows from `first` on.
    """
    score = _score_at(cohort, at)
    best = jnp.argmax(score + log_probability[:, 0])
    # Not by cumsum, which is several kernels on GPUs; scores are exact in any order.
    down = jnp.tril(jnp.ones((following.shape[1],) * 2, bool))
    more = jnp.sum(jnp.where(down, log_probability[best][None], 0), axis=1)
    return lat.lengthen(cohort, at[best], following[best], score[best] + more, first)


def _texts(text: jax.Array, lattice: Lattice, cohort: Cohort, prefix: jax.Array, anchors: int) -> jax.Array:
    """Return the text down to each of the first A = `anchors` of one sequence: [A, S] int32."""
    size = text.shape[0]
    ancestors = lattice.ancestors.reshape(-1, lattice.ancestors.shape[-1])
    token, position = lattice.token.reshape(-1), lattice.position.reshape(-1)

    def of_anchor(own: jax.Array, at: jax.Array, parent: jax.Array) -> jax.Array:
        path = ancestors[jnp.maximum(parent, 0)] & (parent != NO_NODE)
        whole = text.at[jnp.where(path, position, size)].set(token, mode="drop")
        return whole.at[jnp.where(at > prefix, at, size)].set(own, mode="drop")

    return jax.vmap(of_anchor)(cohort.token[:anchors], cohort.position[:anchors], cohort.parent[:anchors])


def _drafts_of(
    drafter: Drafter,
    memory: Any,
    before: jax.Array | None,
    known: Any,
    cohort: Cohort,
    sampling: Sampling | None,
    noise: Noise | None,
    level: _Level,
    most: int,
) -> tuple[Candidates, Any]:
    """Return the drafter's best children of each row above a level, as many as the level has rows, in `most` places.

    `known` are its states of the rows so far, [B, N, ...], and come back with those of the rows above the level.
    """
    batch = cohort.token.shape[0]

    def above(field: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(field, level.above, most, axis=1)

    token, position = above(cohort.token), above(cohort.position)
    assert before is not None
    inside = jnp.arange(most) < level.of_above
    alive = inside[None] & (above(cohort.score) > -jnp.inf)
    rows = DraftRows(jnp.where(alive, token, NO_TOKEN), position, above(cohort.above), fill(before, 1, most))
    features, own = drafter.features(memory, known, rows)

    def put(states: jax.Array, new: jax.Array) -> jax.Array:
        kept = jnp.where(inside.reshape(1, -1, *[1] * (new.ndim - 2)), new.astype(states.dtype), above(states))
        return jax.lax.dynamic_update_slice_in_dim(states, kept, level.above, axis=1)

    known = jax.tree.map(put, known, own)
    flat = features.reshape(batch * most, -1)
    columns = drafter.vocabulary
    adjusted = perturbed_logits(drafter.logits(flat), sampling, noise_at(noise, position + 1, columns))
    log_all = log_total(adjusted, None if drafter.rest is None else drafter.rest(flat), sampling)
    # If the values are used too, XLA sorts the whole vocabulary on CPUs.
    places = min(most, adjusted.shape[1])
    best = jax.lax.top_k(adjusted, places)[1]
    adjusted = jnp.take_along_axis(adjusted, best, axis=1)
    score = jnp.where(adjusted > -jnp.inf, quantized(adjusted - log_all[:, None]), -jnp.inf)
    score = jnp.where(jnp.arange(places)[None] < level.width, score, -jnp.inf)
    score = jnp.pad(score, ((0, 0), (0, most - places)), constant_values=-jnp.inf).reshape(batch, most, most)
    token = fill(best if columns is None else columns[best], 1, most)
    path = jnp.where(inside[None, :, None], above(cohort.score)[:, :, None] + score, -jnp.inf)
    row = jnp.broadcast_to((level.above + jnp.arange(most))[None, :, None], path.shape)
    return Candidates(token.reshape(batch, -1), row.reshape(batch, -1), path.reshape(batch, -1)), known
