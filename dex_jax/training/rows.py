"""Rows of the training stream: where each stands in its item's script, and what it runs next. Pure functions.

Letters: B rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.decoding.ladder import climb, rungs
from dex_jax.nn.transformer import Transformer
from dex_jax.sampling import best_column, filtered, position_noise
from dex_jax.training.items import NO_ITEM, Scripts


class Rows(NamedTuple):
    """Where each row stands before a step; all [B] int32."""

    slot: jax.Array  # its item's place among the scripts, NO_ITEM when it has none
    turn: jax.Array  # of that item
    position: jax.Array  # of the token that the step runs
    token: jax.Array  # that token
    forced: jax.Array  # forced tokens of the item taken so far, `token` included
    free: jax.Array  # free tokens of the turn taken so far, `token` included


def take_items(rows: Rows, scripts: Scripts, taken: jax.Array, waiting: jax.Array) -> tuple[Rows, jax.Array]:
    """Idle rows start waiting items, the lowest row the earliest item: returns (rows, how many are taken by now)."""
    idle = rows.slot == NO_ITEM
    index = taken + jnp.cumsum(idle) - 1
    starts = idle & (index < waiting)
    slot = jnp.where(starts, rows.slot.shape[0] + index, rows.slot)
    first = scripts.forced[jnp.maximum(slot, 0), 0]
    fresh = Rows(slot, *(jnp.zeros_like(slot) for _ in range(5)))._replace(token=first, forced=jnp.ones_like(slot))
    rows = Rows(*(jnp.where(starts, new, old) for new, old in zip(fresh, rows, strict=True)))
    return rows, taken + jnp.sum(starts)


def asked(rows: Rows, scripts: Scripts) -> jax.Array:
    """[B] bool, the rows whose next token the model chooses; an end token may be what it chooses."""
    slot = jnp.maximum(rows.slot, 0)
    in_free_part = rows.forced >= scripts.end[slot, rows.turn]
    return (rows.slot != NO_ITEM) & in_free_part & (rows.free < scripts.limit[slot, rows.turn])


def advance(rows: Rows, scripts: Scripts, chosen: jax.Array, end_ids: tuple[int, ...]) -> tuple[Rows, jax.Array]:
    """Moves each row past the step that has just run.

    `chosen` [B] int32 is the model's choice where a row is `asked` for one; tokens of `end_ids` end a free part.

    Returns:
      (rows before the next step, weight [B] float32 of this one).
    """
    slot = jnp.maximum(rows.slot, 0)
    idle = rows.slot == NO_ITEM
    asks = asked(rows, scripts)
    is_end = jnp.any(chosen[:, None] == jnp.asarray(end_ids, jnp.int32)[None, :], axis=1)
    goes_on = asks & ~is_end
    turn_over = (rows.forced >= scripts.end[slot, rows.turn]) & ~goes_on
    last = rows.turn + 1 == scripts.turns[slot]
    item_over = turn_over & last
    turn = jnp.where(turn_over & ~last, rows.turn + 1, rows.turn)
    forces = ~goes_on & ~item_over
    scripted = scripts.forced[slot, jnp.minimum(rows.forced, scripts.forced.shape[1] - 1)]
    free_step = asks | (item_over & (scripts.limit[slot, rows.turn] > 0))
    weight = jnp.where(free_step, 1.0, scripts.forced_weight[slot, turn])
    moved = Rows(
        slot=jnp.where(item_over, NO_ITEM, rows.slot),
        turn=turn,
        position=rows.position + 1,
        token=jnp.where(goes_on, chosen, scripted),
        forced=rows.forced + forces,
        free=jnp.where(turn_over, 0, rows.free + goes_on),
    )
    rows = Rows(*(jnp.where(idle, old, new) for old, new in zip(rows, moved, strict=True)))
    return rows, jnp.where(idle, 0.0, weight)


def choices(model: Transformer, final: jax.Array, rows: Rows, scripts: Scripts, key: jax.Array) -> jax.Array:
    """The model's choice of the token after final [B, D], for rows that are asked for one: [B] int32, others any."""
    batch = final.shape[0]
    slot = jnp.maximum(rows.slot, 0)
    asks = asked(rows, scripts)
    temperature, top_p = scripts.temperature[slot, rows.turn], scripts.top_p[slot, rows.turn]
    number, position = scripts.number[slot], rows.position + 1

    def best(at: jax.Array) -> jax.Array:
        return best_column(model.logits(final[at]))

    def sampled(at: jax.Array) -> jax.Array:
        # Rows of a rung that do not sample have temperature 0; nobody reads what they get.
        logits = model.logits(final[at]) / jnp.where(temperature[at] > 0, temperature[at], 1.0)[:, None]
        cuts = top_p[at] < 1
        # With p = 1 rounding might cut the tail off all the same.
        kept = jax.lax.cond(
            jnp.any(cuts), lambda x: jnp.where(cuts[:, None], filtered(x, None, top_p[at]), x), lambda x: x, logits
        )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number[at])
        noise = jax.vmap(position_noise, (0, 0, None))(keys, position[at], logits.shape[-1])
        return best_column(kept + noise)

    def where_needed(needed: jax.Array, pick: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """pick() for few more rows than those that need it: unembedding and noise are a large part of a step."""
        order = jnp.argsort(~needed)

        def run(count: int) -> jax.Array:
            nothing = jnp.zeros(batch, jnp.int32)
            return nothing.at[order[:count]].set(pick(order[:count])) if count else nothing

        return climb(jnp.sum(needed), (0, *rungs(batch, max(1, batch // 8))), run)

    samples = asks & (temperature > 0)
    return jnp.where(samples, where_needed(samples, sampled), where_needed(asks & ~samples, best))
