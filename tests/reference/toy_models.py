"""Networks in exact arithmetic: small integers in float32, so that every comparison can ask for equality.

A position's hidden state is one number below the prime P. Stage k turns it into a key, adds up the keys of all that
the position may see, and lets the sum move the state or not:

    key_k(m) = scale_k h_{k-1}(m) + m                    (mod P, kept in memory, so a commit copies it)
    s        = sum of key_k(m) over the visible m, the position n itself included
    h_k(n)   = h_{k-1}(n) + gate_k[s mod G] (n' s + shift_k)    (mod P), n' = n mod (P - 1) + 1

A mask, slot, position or commit that is wrong changes s, and with it tokens. Where the gate is 0 the state stays, so
the share of zeros says how often exits agree with the final layer. Logits are tables: head_k[h].

Exit 0 makes a state of its own from before(n), a state of the position before: the final layer's if that is committed,
the one at the deepest exit that a seed's parent has passed, or its own if it drafted the parent:

    d(n) = before(n) + token(n) + n    (mod P), logits head_0[d]

`Tables` is a pytree of arrays, to be passed through jit as an argument; `ToyModel` is the same in plain Python.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax import Committed, Drafter, DraftRows, Exits, Network, StageView
from dex_jax.decoding.dex.interface import before_rows

P = 31
GATES = 8
# Whatever must never be read is NaN: one leak turns a whole sequence to nonsense.
POISON = np.float32(np.nan)


class Tables(NamedTuple):
    """One random model of K stages over V tokens: float32 integers, those of the first three below P."""

    embedding: jax.Array  # [V]
    scale: jax.Array  # [K]
    shift: jax.Array  # [K]
    gate: jax.Array  # [K, GATES], 0 or 1
    exit_heads: jax.Array  # [K - 1, P, V']
    final_head: jax.Array  # [P, V]
    draft_head: jax.Array  # [P, V'], of exit 0
    draft: jax.Array | None = None  # [V'] int32 token ids of the exits' columns, None when they have all V


class ToyMemory(NamedTuple):
    """Keys `committed` [K, B, S] and `lattice` [K, B, K W], and the final layer's newest committed state `last` [B]."""

    committed: jax.Array
    lattice: jax.Array
    last: jax.Array


@functools.lru_cache(maxsize=256)
def random_tables(
    seed: int,
    stages: int,
    vocab_size: int,
    *,
    openness: float = 0.3,
    spread: int = 6,
    disagreement: int = 2,
    draft_size: int | None = None,
) -> Tables:
    """Return random tables; `draft_size` is V', if the exits know only a part of the vocabulary.

    `openness` is the share of gates that move the state in stages 2..K; those of stage 1 all do. With 0, exits agree as
    often as their heads do. Logits are integers from 0 to `spread`, and a small one makes ties; an exit's stray as far
    as `disagreement` from the final layer's.
    """
    rng = np.random.default_rng(seed)
    final_head = rng.integers(0, spread + 1, (P, vocab_size))
    draft = None if draft_size is None else rng.permutation(vocab_size)[:draft_size]
    columns = np.arange(vocab_size) if draft is None else draft
    exit_heads = np.zeros((stages, P, len(columns)))  # exit 0 is the last of them here
    for k in range(stages):
        for h in range(P):
            exit_heads[k, h] = _unambiguous_row(rng, final_head[h, columns], disagreement)
    gate = (rng.random((stages, GATES)) < openness).astype(np.float32)
    gate[0] = 1.0
    return Tables(
        embedding=rng.integers(0, P, vocab_size).astype(np.float32),
        scale=rng.integers(1, P, stages).astype(np.float32),
        shift=rng.integers(0, P, stages).astype(np.float32),
        gate=gate,
        exit_heads=exit_heads[:-1].astype(np.float32),
        draft_head=exit_heads[-1].astype(np.float32),
        final_head=final_head.astype(np.float32),
        draft=None if draft is None else draft.astype(np.int32),
    )


def _unambiguous_row(rng: np.random.Generator, base: np.ndarray, disagreement: int) -> np.ndarray:
    """Return logits near `base` with log-probabilities that stay clear of the edges at which scores are rounded.

    The logarithm is the only step here that is not exact; this keeps its last bit from mattering.
    """
    while True:
        row = base + rng.integers(-disagreement, disagreement + 1, base.shape)
        steps = [_log_softmax(row / temperature) * 1024 for temperature in (0.5, 1.0, 2.0)]
        if all(np.abs(s - np.floor(s) - 0.5).min() > 0.004 for s in steps):
            return row


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())


class ToyModel:
    """The tables in plain Python, for the twin: no batch, and no cache but a dictionary of prefixes."""

    def __init__(self, tables: Tables):
        self.heads = [*np.asarray(tables.exit_heads), np.asarray(tables.final_head)]
        self.embedding = [int(x) for x in tables.embedding]
        self.scale = [int(x) for x in tables.scale]
        self.shift = [int(x) for x in tables.shift]
        self.gate = [[int(x) for x in row] for row in tables.gate]
        everything = range(len(self.embedding))
        some = everything if tables.draft is None else [int(i) for i in tables.draft]
        self.vocabularies = [some, *[some] * len(tables.exit_heads), everything]
        self.draft_head = np.asarray(tables.draft_head)
        self._known: dict[tuple[int, ...], tuple[list[int], list[int]]] = {(): ([0] * len(self.scale), [])}

    def vocabulary(self, stage: int):
        return self.vocabularies[stage]

    def logits(self, tokens: tuple[int, ...], stage: int) -> np.ndarray:
        return self.heads[stage - 1][self._run(tuple(tokens))[1][stage - 1]]

    def state(self, tokens: tuple[int, ...], stage: int) -> int:
        """Return the state at the last of `tokens` after `stage`, one of 1..K."""
        return self._run(tuple(tokens))[1][stage - 1]

    def drafted(self, before: int, token: int, position: int) -> tuple[np.ndarray, int]:
        """Return exit 0's logits after `token` at `position`, and the state that it makes there."""
        state = (before + token + position) % P
        return self.draft_head[state], state

    def _run(self, tokens: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Return the sum of keys of each stage, and the state after each stage, at the last of `tokens`."""
        if tokens not in self._known:
            sums = list(self._run(tokens[:-1])[0])
            n, h, states = len(tokens) - 1, self.embedding[tokens[-1]], []
            for k in range(len(self.scale)):
                sums[k] += (self.scale[k] * h + n) % P
                move = (n % (P - 1) + 1) * (sums[k] % P) + self.shift[k]
                h = (h + self.gate[k][sums[k] % GATES] * move) % P
                states.append(h)
            self._known[tokens] = sums, states
        return self._known[tokens]


def toy_network(tables: Tables) -> Network:
    """Return the tables as the Network that the loop calls."""
    stages = tables.scale.shape[0]
    vocab_size = tables.embedding.shape[0]

    def advance(memory: ToyMemory, hidden: jax.Array, view: StageView) -> tuple[jax.Array, ToyMemory]:
        _, batch, rows = view.token.shape
        h = hidden[..., 0]
        key = keys_of(tables, h, view.position)
        key = jnp.where(view.live, key, POISON)
        slots = view.ring[:, None] * rows + jnp.arange(rows)[None, :]
        place = jnp.arange(stages)[:, None, None], jnp.arange(batch)[None, :, None], slots[:, None, :]
        lattice = memory.lattice.at[place].set(key)
        in_prefix = jnp.arange(memory.committed.shape[2])[None, None, :] < view.prefix[None, :, None]
        total = jnp.sum(jnp.where(in_prefix, memory.committed, 0.0), axis=2)[:, :, None]
        total = total + jnp.sum(jnp.where(view.ancestors, lattice[:, :, None, :], 0.0), axis=3)
        h = jnp.where(view.live, moved(tables, h, total, view.position), POISON)
        return h[..., None], memory._replace(lattice=lattice)

    def commit(memory: ToyMemory, done: Committed) -> ToyMemory:
        sequences = jnp.arange(done.slot.shape[0])[:, None]
        step = jnp.arange(done.slot.shape[1])[None]
        on_path = step < done.length[:, None]
        place = jnp.where(on_path, done.position[:, None] + step, memory.committed.shape[2])
        key = memory.lattice[:, sequences, done.slot]
        last = jnp.take_along_axis(done.hidden[:, :, 0], jnp.maximum(done.length - 1, 0)[:, None], axis=1)[:, 0]
        return memory._replace(
            committed=memory.committed.at[:, sequences, place].set(key, mode="drop"),
            last=jnp.where(done.length > 0, last, memory.last),
        )

    def features(memory: ToyMemory, hidden: jax.Array, view: StageView) -> jax.Array:
        hidden = hidden[:-1]
        number = jnp.broadcast_to(jnp.arange(stages - 1.0)[:, None, None, None], hidden.shape)
        return jnp.concatenate([number, hidden], axis=-1)

    def exit_logits(features: jax.Array) -> jax.Array:
        number, h = features[:, 0].astype(jnp.int32), features[:, 1].astype(jnp.int32)
        return tables.exit_heads[number, h]

    def drafted(memory: ToyMemory, states: jax.Array, below: DraftRows) -> tuple[jax.Array, jax.Array]:
        state = jnp.mod(before_rows(states, below) + (below.token + below.position)[..., None], float(P))
        return state, state

    columns = None
    if tables.draft is not None:
        width = tables.draft.shape[0]
        columns = jnp.full(vocab_size, width, jnp.int32).at[tables.draft].set(jnp.arange(width))
    return Network(
        vocab_size=vocab_size,
        embed=lambda tokens, positions: tables.embedding[tokens][..., None],
        advance=advance,
        commit=commit,
        final=lambda hidden: tables.final_head[hidden[:, 0].astype(jnp.int32)],
        exits=None if stages == 1 else Exits(features, exit_logits, tables.draft, columns),
        drafter=Drafter(
            committed=lambda memory: memory.last[:, None],
            node_features=lambda memory, hidden, view: hidden,
            blank=lambda batch, rows: jnp.zeros((batch, rows, 1)),
            features=drafted,
            logits=lambda features: tables.draft_head[features[:, 0].astype(jnp.int32)],
            vocabulary=tables.draft,
        ),
    )


def toy_prefill(tables: Tables, prompts: jax.Array, lengths: jax.Array, *, capacity: int, slots: int) -> ToyMemory:
    """Return the memory after `prompts` [B, R] int32, padded right, of `lengths` [B]; `capacity` more tokens fit."""
    batch, width = prompts.shape
    positions = jnp.broadcast_to(jnp.arange(width)[None, :], (batch, width))
    h = tables.embedding[prompts][None]
    committed = []
    for k in range(tables.scale.shape[0]):
        stage = Tables(*[None] * 8)._replace(
            scale=tables.scale[k : k + 1], shift=tables.shift[k : k + 1], gate=tables.gate[k : k + 1]
        )
        key = keys_of(stage, h, positions[None])
        h = moved(stage, h, jnp.cumsum(key, axis=2), positions[None])
        committed.append(key[0])
    keys = jnp.where((positions < lengths[:, None])[None], jnp.stack(committed), POISON)
    room = jnp.full((keys.shape[0], batch, capacity), POISON)
    last = jnp.take_along_axis(h[0], lengths[:, None] - 1, axis=1)[:, 0]
    lattice = jnp.full((keys.shape[0], batch, slots), POISON)
    return ToyMemory(jnp.concatenate([keys, room], axis=2), lattice, last)


def keys_of(tables: Tables, h: jax.Array, position: jax.Array) -> jax.Array:
    return jnp.mod(tables.scale[:, None, None] * h + position, float(P))


def moved(tables: Tables, h: jax.Array, total: jax.Array, position: jax.Array) -> jax.Array:
    weight = (position % (P - 1) + 1).astype(jnp.float32)
    move = weight * jnp.mod(total, float(P)) + tables.shift[:, None, None]
    opened = jnp.mod(total, float(GATES)).astype(jnp.int32)
    gate = jax.vmap(lambda row, index: row[index])(tables.gate, opened)
    return jnp.mod(h + gate * move, float(P))
