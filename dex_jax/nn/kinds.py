"""Attention masks, with windows, and rotations of layers of different kinds, by a layer's place.

Letters: B sequences, R rows of each, S keys, l layers of a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import LayerKind, ModelConfig
from dex_jax.nn.rotary import Rotation, rope_table

MOST_WRITTEN = 512
"""The most positions that one call writes to a ring."""


def ring_size(window: int) -> int:
    """Return the size of the ring that layers with a window keep positions in: p is at place p mod ring_size.

    What one call writes beyond a sequence's end takes the place of positions that no row sees any more.
    """
    return -(-window // MOST_WRITTEN) * MOST_WRITTEN + MOST_WRITTEN


def ring_length(window: int) -> int:
    """Return the length of a ring's array, with a margin at both ends so that a run of positions is written uncut."""
    return ring_size(window) + 2 * MOST_WRITTEN


def common_window(kinds: Sequence[LayerKind]) -> int | None:
    """Return the window of layers that share an array; None where they differ, or one of them sees everything."""
    windows = {kind.window for kind in kinds}
    return windows.pop() if len(windows) == 1 else None


def ring_of(kinds: Sequence[LayerKind], length: int) -> int:
    """Return the size of the ring in an array of `length` for layers of these kinds; 0 where it is no ring."""
    window = common_window(kinds)
    return ring_size(window) if window is not None and length == ring_length(window) else 0


@dataclasses.dataclass(frozen=True)
class KindTable:
    """The kinds of a model's layers, by place."""

    # for each of l places the kinds of the layers there, one for each stage device; without a mesh one for every layer
    rows: tuple[tuple[LayerKind, ...], ...]
    stage_axis: str | None = None  # under shard_map, the mesh axis of the devices that have the stages

    @property
    def distinct(self) -> tuple[LayerKind, ...]:
        """All kinds, each once."""
        return tuple(dict.fromkeys(kind for row in self.rows for kind in row))

    def index(self, place: Any) -> int | jax.Array:
        """Return the index in `distinct` of the layer at `place`."""
        order = {kind: i for i, kind in enumerate(self.distinct)}
        if len(order) == 1:
            return 0
        row = np.asarray([order[kind] for kind in self.rows[place]], np.int32)
        if self.stage_axis is None or (row == row[0]).all():
            return int(row[0])
        return jnp.asarray(row)[jax.lax.axis_index(self.stage_axis)]


def kind_table(
    config: ModelConfig, places: Sequence[Sequence[int | None]] = (), stage_axis: str | None = None
) -> KindTable:
    """Return the table of a model with its layers at `places` (transformer.Staged), () without a mesh.

    A place where a device has no layer gets the kind of another device's layer there.
    """
    if not places:
        return KindTable(tuple((kind,) for kind in config.kinds))
    there = [[next(x for x in row if x is not None) if layer is None else layer for layer in row] for row in places]
    return KindTable(tuple(tuple(config.kinds[layer] for layer in row) for row in there), stage_axis)


class MasksAndRotation(NamedTuple):
    """The rotation and the attention masks of rows in a layer."""

    rotation: Rotation  # of rows [B, R]
    committed: jax.Array  # [B, R, S] bool, broadcasting over R is allowed
    among: jax.Array  # [B, R, R] bool
    lattice: Any = None  # [B, R, slots] bool; None where there is none


def masks_and_rotations(
    config: ModelConfig,
    table: KindTable,
    position: jax.Array,
    prefix: jax.Array,
    lengths: Sequence[int],
    among: jax.Array,
    lattice: jax.Array | None = None,
    slots: jax.Array | None = None,
    live: jax.Array | None = None,
    first_seen: int = 0,
) -> list[list[MasksAndRotation]]:
    """Return the masks and the rotation for each kind in `table.distinct` and each of `lengths`.

    Args:
      config: that of the model.
      table: that of the model.
      position: [B, R] int32, absolute positions of the rows.
      prefix: [B] int32, the number of committed positions.
      lengths: the distinct lengths of the arrays that hold them.
      among: [B, R, R] bool, what rows see of one another if there is no window.
      lattice: [B, R, slots] bool, the lattice slots that rows see if there is no window; None for none.
      slots: [B, slots] int32, the positions of the lattice slots; None for none.
      live: [B, R, 1] bool, rows that see anything committed; None for all.
      first_seen: the first committed position that is seen.
    """

    def within(seen: jax.Array, keys: jax.Array, window: int | None) -> jax.Array:
        return seen if window is None else seen & (position[:, :, None] - keys[:, None, :] < window)

    def committed(kind: LayerKind, length: int) -> jax.Array:
        held = jnp.broadcast_to(jnp.arange(length)[None], (prefix.shape[0], length))
        if ring := ring_of([kind], length):
            place, newest = held - MOST_WRITTEN, prefix[:, None] - 1
            inside = (place >= 0) & (place < ring)
            held = jnp.where(inside, newest - (newest - place) % ring, -1)
        seen = within(((held >= first_seen) & (held < prefix[:, None]))[:, None], held, kind.window)
        return seen if live is None else seen & live

    def masks(kind: LayerKind, length: int) -> MasksAndRotation:
        own = within(among, position, kind.window)
        of_lattice = None if lattice is None or slots is None else within(lattice, slots, kind.window)
        return MasksAndRotation(rotations[kind.rope], committed(kind, length), own, of_lattice)

    rotations = {kind.rope: rope_table(position, config, kind) for kind in table.distinct}
    return [[masks(kind, length) for length in lengths] for kind in table.distinct]


def masks_and_rotation_at(
    table: KindTable, found: list[list[MasksAndRotation]], place: Any, which: int = 0
) -> MasksAndRotation:
    """Return the entry of `masks_and_rotations` for the layer at `place`, with caches of length number `which`."""
    index = table.index(place)
    if isinstance(index, int):
        return found[index][which]

    def chosen(*each: jax.Array) -> jax.Array:
        shape = np.broadcast_shapes(*(x.shape for x in each))
        return jax.lax.select_n(index, *(jnp.broadcast_to(x, shape) for x in each))

    return jax.tree.map(chosen, *(by_length[which] for by_length in found))
