"""The exact-arithmetic models of reference.toy_models as networks for methods that draft on a chain."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from reference.toy_models import POISON, Tables, ToyMemory, keys_of, moved

from studies.rivals.interface import ChainExits, ChainNetwork, ChainRows


def chain_toy(tables: Tables, depths: tuple[int, ...]) -> ChainNetwork:
    """Return the tables as a ChainNetwork; its memory is a ToyMemory, which is POISON where nothing was written."""

    def run(memory: ToyMemory, stage: int, hidden: jax.Array, start: jax.Array):
        own = {name: getattr(tables, name)[stage][None] for name in ("scale", "shift", "gate")}
        one = Tables(*[None] * 7)._replace(**own)
        position, h = (start[:, None] + jnp.arange(hidden.shape[1])[None])[None], hidden[None, ..., 0]
        key, committed = keys_of(one, h, position), memory.committed[stage]
        seen = jnp.arange(committed.shape[1])[None] < start[:, None]
        total = jnp.sum(jnp.where(seen, committed, 0.0), axis=1)[None, :, None] + jnp.cumsum(key, axis=2)
        return moved(one, h, total, position)[0][..., None], key[0][..., None]

    def write(memory: ToyMemory, stage: int, fresh: jax.Array, start: jax.Array, where: jax.Array):
        batch, rows, _ = fresh.shape
        at = jnp.where(where[:, None], start[:, None] + jnp.arange(rows)[None], memory.committed.shape[2])
        row = memory.committed[stage].at[jnp.arange(batch)[:, None], at].set(fresh[..., 0], mode="drop")
        return memory._replace(committed=memory.committed.at[stage].set(row))

    def newest(memory: ToyMemory, rows: ChainRows, row: jax.Array, exit_index: jax.Array) -> jax.Array:
        # The loop must not ask for a row that has not reached this exit.
        there = jnp.take_along_axis(rows.progress, row[:, None], axis=1)[:, 0] > exit_index
        h = jnp.where(there, rows.states[exit_index, jnp.arange(row.shape[0]), row, 0], POISON)
        return jnp.stack([exit_index.astype(jnp.float32), h], axis=-1)

    def shadows(memory: ToyMemory, rows: ChainRows) -> jax.Array:
        h = rows.states[:-1].reshape(len(depths) - 1, -1)
        return jnp.stack([jnp.broadcast_to(jnp.arange(len(depths) - 1.0)[:, None], h.shape), h], axis=-1)

    def logits(features: jax.Array) -> jax.Array:
        return tables.exit_heads[features[:, 0].astype(jnp.int32), features[:, 1].astype(jnp.int32)]

    return ChainNetwork(
        vocab_size=tables.embedding.shape[0],
        depths=depths,
        embed=lambda token, position: tables.embedding[token][..., None],
        run=run,
        write=write,
        commit=lambda memory, path: memory,
        final=lambda hidden: tables.final_head[hidden[:, 0].astype(jnp.int32)],
        exits=ChainExits(newest, shadows, logits, tables.draft),
    )
