"""The KV caches of the committed prefix and of the lattice, and the writes into them.

The committed cache holds absolute positions; the lattice cache holds the K W slots of the ring of cohorts, which are
written once and never move. Layers with a window keep the positions that are still seen, in a ring (nn/kinds.py). Both
are tuples of one array for each layer; on a mesh they are l arrays with a leading axis [M], and a device has its part.

Letters: B sequences, S cache length, K stages, W rows a stage, M devices of the stage axis, l layers of a device,
G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.config import LayerKind, ModelConfig
from dex_jax.nn import few_rows, gpu_writes
from dex_jax.nn.kinds import MOST_WRITTEN, KindTable, common_window, kind_table, ring_length, ring_of
from dex_jax.nn.no_copies import ordered_after
from dex_jax.nn.transformer import Staged

UNROLLED_WRITES = 2
"""The largest batch with unrolled writes: in larger ones they would be most of the program to compile."""

AXES = ("stage", "sequence", "heads", None, None)
"""Logical axes of a cache on a mesh, [M, B, G, positions, d] (dex_jax/nn/sharding.py)."""

Leaves = Any  # a tuple of L arrays, or on a mesh of l with a leading axis [M]


class Memory(NamedTuple):
    """The KV caches and other state that a network keeps of a batch."""

    keys: Leaves  # of the committed prefix, [B, G, S, d] a layer
    values: Leaves  # as keys
    # Lattice slots, [B, G, K W, d] a layer, K W is 0 outside DEX; [L, B, G, W, d] in one where K = 1 (`with_cohort`)
    lattice_keys: Leaves
    lattice_values: Leaves
    # what trained exits keep of the committed prefix (decoding/dex/trained_exits.py), () when nothing
    exits: Any = ()


def allocate(config: ModelConfig, batch: int, length: int, slots: int, dtype: jnp.dtype) -> Memory:
    """Return empty caches for `batch` sequences, `length` committed positions and `slots` = K W lattice slots."""
    return jax.tree.map(jnp.zeros_like, shapes(config, batch, length, slots, dtype))


def shapes(
    config: ModelConfig,
    batch: int,
    length: int,
    slots: int,
    dtype: jnp.dtype,
    rings: bool = False,
    layout: Staged | None = None,
) -> Memory:
    """Return the shapes of `allocate`'s caches as jax.ShapeDtypeStruct; `layout` is that of weights on a mesh.

    With `rings`, layers with a window get rings, if all layers that share an array have the same window. Callers then
    write at most MOST_WRITTEN positions at a time.
    """
    lead = () if layout is None else (layout.devices,)

    def leaf(positions: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*lead, batch, config.num_kv_heads, positions, config.head_dim), dtype)

    def committed(kinds: tuple[LayerKind, ...]) -> jax.ShapeDtypeStruct:
        window = common_window(kinds) if rings else None
        return leaf(length if window is None else min(length, ring_length(window)))

    rows = kind_table(config, () if layout is None else layout.places).rows
    keys, lattice = tuple(map(committed, rows)), (leaf(slots),) * len(rows)
    return Memory(keys, keys, lattice, lattice)


def lengths_of(memory: Memory) -> tuple[int, ...]:
    """Return the distinct lengths of the arrays that hold committed positions, ascending."""
    return tuple(sorted({leaf.shape[-2] for leaf in jax.tree.leaves(memory.keys)}))


def with_lattice(memory: Memory, config: ModelConfig, slots: int) -> Memory:
    """Return the same committed prefix with `slots` = K W empty lattice slots in place of the old ones."""
    leaf = jax.tree.leaves(memory.keys)[0]
    fresh = allocate(config, leaf.shape[-4], 0, slots, leaf.dtype)
    return memory._replace(lattice_keys=fresh.lattice_keys, lattice_values=fresh.lattice_values)


def with_cohort(memory: Memory, config: ModelConfig, rows: int) -> Memory:
    """Return the same committed prefix with room for one cohort of W = `rows` nodes, replaced in every tick (K = 1)."""
    leaf = jax.tree.leaves(memory.keys)[0]
    blank = jnp.zeros((config.num_layers, leaf.shape[-4], config.num_kv_heads, rows, config.head_dim), leaf.dtype)
    return memory._replace(lattice_keys=blank, lattice_values=blank)


NOWHERE = -1
"""The start position of rows to discard: nothing reads what is written there."""


def write_rows(cache: jax.Array, new: jax.Array, start: jax.Array, kinds: Sequence[LayerKind] = ()) -> jax.Array:
    """Return a layer's cache [B, G, S, d] with `new` [B, G, R, d] written at positions from `start` [B] int32 on.

    `start` may be NOWHERE. `kinds` are those of the layers that share the cache: one, or on a mesh one for each device.
    """
    ring = ring_of(kinds, cache.shape[-2])

    def write(b: int | jax.Array, cache: jax.Array) -> jax.Array:
        return _put_at(cache, jax.lax.dynamic_slice_in_dim(new, b, 1, axis=0), b, start[b], ring)

    return _for_each(cache.shape[0], write, cache)


def written_in_place(caches: Leaves, rows: int) -> bool:
    """Return whether one call writes `rows` rows into all these caches, one a layer: on CPUs and newer GPUs."""
    return (caches[0].dtype in few_rows.DTYPES and few_rows.ready()) or gpu_writes.fits(caches[0], rows)


def write_in_place(
    keys: Sequence[jax.Array],
    values: Sequence[jax.Array],
    fresh: tuple[Any, Any],
    row: jax.Array | None,
    at: jax.Array,
    kinds: Sequence[Sequence[LayerKind]],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Return keys and values of layers, [B, G, S, d], with P rows written at positions from `at` [B] int32 on.

    `row` [B, P] chooses them among the keys and values `fresh`, which are arrays [L, B, G, N, d] or L of [B, G, N, d];
    None takes all. `kinds` are those of each layer, see `write_rows`. Call it only where `written_in_place` is true.
    """
    together = isinstance(fresh[0], jax.Array)
    given = tuple(fresh) if together else (*fresh[0], *fresh[1])
    count, batch, rows = len(keys), keys[0].shape[0], given[0].shape[-2]
    row = jnp.broadcast_to(jnp.arange(rows), (batch, rows)) if row is None else row
    rings = [ring_of(own, cache.shape[-2]) for own, cache in zip(kinds, keys, strict=True)]

    def plain(caches: tuple[jax.Array, ...], given: tuple[jax.Array, ...], row: jax.Array, at: jax.Array) -> Any:
        apart = [*given[0], *given[1]] if together else given
        chosen = [jnp.take_along_axis(each, row[:, None, :, None], axis=2, mode="clip") for each in apart]
        each = zip(caches, chosen, [*kinds, *kinds], strict=True)
        return tuple(write_rows(cache, new, at, own) for cache, new, own in each)

    def by_triton(caches: Any, given: Any, row: jax.Array, at: jax.Array) -> Any:
        pair = given if together else (jnp.stack(given[:count]), jnp.stack(given[count:]))
        return gpu_writes.write(caches, pair, row, at, rings, MOST_WRITTEN)

    if few_rows.ready():
        written: Any = few_rows.write((*keys, *values), given, row, at, rings, MOST_WRITTEN)
    else:
        operands = ((*keys, *values), given, row, at)
        written = jax.lax.platform_dependent(*operands, cuda=by_triton, default=plain)
    return written[:count], written[count:]


def commit_slots(memory: Memory, slot: jax.Array, position: jax.Array, kinds: KindTable) -> Memory:
    """Copy the lattice slots `slot` [B, P] int32 of each sequence to positions from `position` [B] int32 on.

    Sequences that commit fewer slots, or none, are written too: nobody attends to those positions before their own
    commit overwrites them, and a plain write needs neither a read nor a choice. position + P must not pass the cache's
    end. `kinds` are the model's.
    """
    count = slot.shape[1]

    def leaf(cache: jax.Array, lattice: jax.Array, own: Sequence[LayerKind]) -> jax.Array:
        ring = ring_of(own, cache.shape[-2])

        def write(b: int | jax.Array, cache: jax.Array) -> jax.Array:
            size = (1, cache.shape[1], 1, cache.shape[3])
            each = [jax.lax.dynamic_slice(lattice, (b, 0, slot[b, i], 0), size) for i in range(count)]
            new = each[0] if count == 1 else jnp.concatenate(each, axis=-2)
            return _put_at(cache, new, b, ordered_after(position[b], new), ring)

        return _for_each(cache.shape[0], write, cache)

    if written_in_place(memory.keys, count):
        fresh = (memory.lattice_keys, memory.lattice_values)
        keys, values = write_in_place(memory.keys, memory.values, fresh, slot, position, kinds.rows)
        return memory._replace(keys=keys, values=values)

    return memory._replace(
        keys=tuple(map(leaf, memory.keys, memory.lattice_keys, kinds.rows)),
        values=tuple(map(leaf, memory.values, memory.lattice_values, kinds.rows)),
    )


def _put_at(cache: jax.Array, rows: jax.Array, b: int | jax.Array, position: jax.Array, ring: int) -> jax.Array:
    """Write `rows` [1, G, R, d] of sequence b into a cache from `position` on; `ring` is a ring's size, 0 for none."""
    if not ring:
        end = cache.shape[-2] - rows.shape[-2]
        return _put(cache, rows, (b, 0, jnp.where(position < 0, end, position), 0))
    assert rows.shape[-2] <= MOST_WRITTEN, "who writes more at a time allocates no rings"
    # The rows are written twice: where they begin, with those past the ring's end in the margin behind it, and a turn
    # earlier, which puts these at the ring's start. Rows that do not pass the end then lie in the front margin alone.
    place = jnp.where(position < 0, 0, MOST_WRITTEN + position % ring)
    for at in (place, jnp.maximum(place - ring, 0)):
        cache = _put(cache, rows, (b, 0, at, 0))
    return cache


def _put(cache: jax.Array, rows: jax.Array, at: tuple[int | jax.Array, ...]) -> jax.Array:
    """Write `rows` into a cache from `at` on, as jax.lax.dynamic_update_slice does; both have one dtype."""
    put = jax.lax.dynamic_update_slice
    if cache.dtype != jnp.bfloat16:
        return put(cache, rows, at)

    def as_bits(cache: jax.Array, rows: jax.Array, at: tuple[jax.Array, ...]) -> jax.Array:
        cache_bits, row_bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (cache, rows))
        return jax.lax.bitcast_convert_type(put(cache_bits, row_bits, at), cache.dtype)

    # On CPUs XLA would convert the whole cache to float32 and back for every write.
    return jax.lax.platform_dependent(cache, rows, at, cpu=as_bits, default=put)


def _for_each(batch: int, write: Callable[[int | jax.Array, jax.Array], jax.Array], cache: jax.Array) -> jax.Array:
    """Apply write(b, cache) for every b < B, in place.

    A vmapped write would be a scatter, for which TPUs want the whole cache in another layout, a second copy.
    """
    if batch > UNROLLED_WRITES:
        # Backwards: libtpu 0.0.42 takes a loop that counts up for one that builds a stack, and fails to compile it.
        return jax.lax.fori_loop(0, batch, lambda i, cache: write(batch - 1 - i, cache), cache)
    for b in range(batch):
        cache = write(b, cache)
    return cache
