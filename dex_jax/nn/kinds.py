"""What rows see in layers of different kinds: windows and rotations, by where a layer stands.

Letters: B sequences, R rows of each, S keys, K stages, l layers in the longest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import LayerKind, ModelConfig
from dex_jax.nn.layers import Rotation, rope_table

Index = int | jax.Array


@dataclasses.dataclass(frozen=True)
class KindTable:
    """The kinds of a model's layers, by place.

    Attributes:
      rows: of each of l places in a stage the kinds that stand there, one for every stage; of an unrolled model one for
        every layer.
      stage_axis: under shard_map, the mesh axis whose devices are the stages; None: a place says its stage itself.
    """

    rows: tuple[tuple[LayerKind, ...], ...]
    stage_axis: str | None = None

    @property
    def distinct(self) -> tuple[LayerKind, ...]:
        """Every kind once."""
        return tuple(dict.fromkeys(kind for row in self.rows for kind in row))

    def index(self, place: Any) -> Index:
        """Which of `distinct` a layer is: at place i of an unrolled model, or at (index within the stage, stage)."""
        order = {kind: i for i, kind in enumerate(self.distinct)}
        table = np.asarray([[order[kind] for kind in row] for row in self.rows], np.int32)
        if isinstance(place, tuple):
            return jnp.asarray(table)[place] if len(order) > 1 else 0
        row = table[place]
        if self.stage_axis is None or (row == row[0]).all():
            return int(row[0])
        return jnp.asarray(row)[jax.lax.axis_index(self.stage_axis)]


def kind_table(config: ModelConfig, stages: Sequence[range] = (), stage_axis: str | None = None) -> KindTable:
    """The table of a model whose layers are cut into `stages`, () for an unrolled one.

    Where a shorter stage has no layer, any kind does.
    """
    if not stages:
        return KindTable(tuple((kind,) for kind in config.kinds))
    longest = max(len(stage) for stage in stages)
    rows = [[config.kinds[stage[min(j, len(stage) - 1)]] for stage in stages] for j in range(longest)]
    return KindTable(tuple(tuple(row) for row in rows), stage_axis)


class Sight(NamedTuple):
    """How rows are turned and what they see in a layer."""

    rotation: Rotation  # of [B, R]
    committed: jax.Array  # [B, R, S] bool, broadcasting over R is allowed
    among: jax.Array  # [B, R, R] bool
    lattice: Any = None  # [B, R, slots] bool; None where there is none


def sights(
    config: ModelConfig,
    table: KindTable,
    position: jax.Array,
    committed: jax.Array,
    among: jax.Array,
    lattice: jax.Array | None = None,
    slots: jax.Array | None = None,
) -> list[Sight]:
    """What rows see in layers of each kind, in the order of `table.distinct`, given what they would without windows.

    Args:
      config, table: of the model.
      position: [B, R] int32, absolute positions of the rows.
      committed: [B, R or 1, S] bool, of committed positions 0 .. S - 1.
      among: [B, R, R] bool, of one another.
      lattice: [B, R, slots] bool, of lattice slots, whose positions are `slots` [B, slots] int32; None for none.
    """

    def within(seen: jax.Array, keys: jax.Array, window: int) -> jax.Array:
        return seen & (position[:, :, None] - keys[:, None, :] < window)

    def sight(kind: LayerKind) -> Sight:
        rotation = rotations[kind.rope]
        if kind.window is None:
            return Sight(rotation, committed, among, lattice)
        everywhere = jnp.arange(committed.shape[2])[None]
        of_lattice = None if lattice is None or slots is None else within(lattice, slots, kind.window)
        seen, own = within(committed, everywhere, kind.window), within(among, position, kind.window)
        return Sight(rotation, seen, own, of_lattice)

    rotations = {kind.rope: rope_table(position, config, kind) for kind in table.distinct}
    return [sight(kind) for kind in table.distinct]


def sight_at(table: KindTable, found: list[Sight], place: Any) -> Sight:
    """What `sights` found for a layer, by its place."""
    index = table.index(place)
    if isinstance(index, int):
        return found[index]

    def chosen(*each: jax.Array) -> jax.Array:
        shape = np.broadcast_shapes(*(x.shape for x in each))
        return jax.lax.select_n(index, *(jnp.broadcast_to(x, shape) for x in each))

    return jax.tree.map(chosen, *found)
