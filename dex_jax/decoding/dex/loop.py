"""Depth Exploration Decoding: the tick, and the loop over ticks.

One tick advances every cohort by a stage, commits the root's token if it has reached the last one, with all that its
own cohort had drafted rightly, collapses the lattice onto the node that held the last of these tokens, and lets the
surviving nodes propose children, below which exit 0 drafts (arXiv 2606.29223). With K = 1 a tick runs a token tree
through all layers and commits a path of it. `init` and `step` are pure and compose with a caller's own jit; `run` is
one lax.while_loop over `step`.

Letters: B sequences, W rows a cohort, K stages, P levels of a cohort, T capacity for new tokens, S text length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex.drafts import charge
from dex_jax.decoding.dex.interface import Committed, Network, StageView
from dex_jax.decoding.dex.proposals import Proposers, propose
from dex_jax.decoding.dex.shape import RowCosts, TreeShape
from dex_jax.decoding.dex.spawning import spawn
from dex_jax.decoding.dex.state import DexState, Drafting
from dex_jax.decoding.ladder import climb, fill, last_row, row_counts
from dex_jax.decoding.noise import Noise, make_noise, noise_at
from dex_jax.decoding.record import Limits, begin, check_limits, emit_path, until_done
from dex_jax.errors import DexError, whole_number
from dex_jax.lattice import NO_NODE, NO_TOKEN, Lattice, Path
from dex_jax.sampling import Sampling, choose


def init(
    network: Network,
    memory: Any,
    first_token: jax.Array,
    position: jax.Array,
    *,
    stages: int,
    rows: int,
    capacity: int,
    limits: Limits,
    sampling: Sampling | None = None,
    drafts: TreeShape | None = None,
    prompt: jax.Array | None = None,
    length: int = 0,
    costs: RowCosts | None = None,
) -> DexState:
    """The state before tick 0, in which nothing runs and every sequence gets its first root.

    Args:
      network: the callables of one model.
      memory: what its prefill left: positions 0 .. position - 1 committed, room for K W lattice slots and, with drafts,
        for P positions past the last token.
      first_token: [B] int32, token 0 as the prefill chose it.
      position: [B] int32, its absolute position (the prompt's length).
      stages: K.
      rows: W, at least 1.
      capacity: T, room for new tokens.
      limits: when a sequence ends.
      sampling: None for greedy.
      drafts: what exit 0 drafts; None for nothing.
      prompt: [B, R] int32 padded on the right, which drafts look the text up in.
      length: S, at least R and the positions of all new tokens; only asked for with drafts.
      costs: what ticks take, for drafts that choose their rows; None for what `drafts` says.

    Raises:
      DexError: stages or rows that are no whole numbers of at least 1, more stages than one without exits, drafts
        without the prompt, or limits of other shapes.
    """
    whole_number(stages=stages, rows=rows, capacity=capacity)
    if stages > 1 and network.exits is None:
        raise DexError(f"a network without exits has one stage, and not {stages}: give it exits, or stages=1")
    batch = first_token.shape[0]
    record = begin(first_token, capacity, limits)
    blank = jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), lat.empty(stages, rows))
    width = jax.eval_shape(network.embed, first_token[:, None], position[:, None])
    noise = None
    if sampling is not None:
        noise = Noise(jnp.zeros((batch, stages * levels_of(drafts), network.vocab_size), jnp.float32), position)
    drafting = None
    if drafts is not None:
        if prompt is None:
            raise DexError("drafts look the text up in the prompt: give init prompt and length too")
        text = jnp.full((batch, length), NO_TOKEN, jnp.int32).at[:, : prompt.shape[1]].set(prompt)
        none = jnp.float32(0)
        drafting = Drafting(
            text=text.at[jnp.arange(batch), position].set(first_token),
            costs=drafts.costs if costs is None else costs,
            rung=jnp.zeros(stages, jnp.int32),
            chosen=jnp.zeros(len(drafts.counts) + 1),
            spent=none,
            promised=none,
            kept=none,
        )
    return DexState(
        tick=jnp.int32(-1),
        lattice=blank,
        hidden=jnp.zeros((stages, batch, rows, width.shape[-1]), width.dtype),
        prefix=position,
        memory=memory,
        noise=noise,
        record=record,
        drafting=drafting,
    )


def step(
    network: Network,
    state: DexState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    decs: bool = True,
    drafts: TreeShape | None = None,
) -> DexState:
    """One tick: advance, commit, collapse, propose, draft. Sequences that are done are left as they are.

    Args:
      network: the callables of one model.
      state: before the tick.
      limits: when a sequence ends.
      sampling: as given to `init`.
      decs: whether an exit may not repeat a token that its node's children hold (depth-coupled sampling).
      drafts: as given to `init`.

    Raises:
      DexError: a network of other stages than the state has, or without exits, or limits of other shapes.
    """
    stages, exits = state.stages, network.exits
    check_limits(limits, state.prefix.shape[0])
    if stages > 1 and exits is None:
        raise DexError(f"a network without exits has one stage, and the state has {stages}: give the network exits")
    state, view = begin_tick(state, sampling)
    entering = network.embed(view.token[0], view.position[0]).astype(state.hidden.dtype)
    hidden = jnp.concatenate([entering[None], state.hidden[:-1]])
    hidden, memory = _advance(network, state.memory, hidden, view)
    state = state._replace(hidden=hidden, memory=memory)
    finished = jax.vmap(lat.root_finished, (0, None))(state.lattice, state.tick)
    final = final_tokens(network, state, view, finished, sampling, drafts)
    state, path = settle(state, final, limits, drafts)
    state = state._replace(memory=network.commit(memory, committed(state, view, path.slot, path.length)))

    proposals = None
    if exits is not None and stages > 1:
        live = proposers(state)
        nodes = Proposers(live, _by_stage(state.lattice.score, view.ring[:-1]), *children(state.lattice))
        proposals = propose(exits, state.memory, hidden, view, nodes, sampling, state.noise, decs=decs)
    reached = None
    if drafts is not None and network.drafter is not None and network.drafter.reached is not None:
        reached = network.drafter.reached(state.memory, hidden, view)
    return spawn(network.drafter, state, proposals, reached, sampling, drafts)


def run(
    network: Network,
    state: DexState,
    limits: Limits,
    sampling: Sampling | None = None,
    *,
    decs: bool = True,
    drafts: TreeShape | None = None,
    until_tick: jax.Array | None = None,
) -> DexState:
    """Ticks under one lax.while_loop until every sequence is done, or until `until_tick`.

    Args:
      network, state, limits, sampling, decs, drafts: as of `step`.
      until_tick: int32 scalar, the tick after which to stop in any case; None for none.
    """
    options: dict[str, Any] = {"decs": decs, "drafts": drafts}
    return until_done(lambda state: step(network, state, limits, sampling, **options), state, until_tick)


def begin_tick(state: DexState, sampling: Sampling | None) -> tuple[DexState, StageView]:
    """The state with the tick counted and the noise that its nodes need, and the lattice as the stages see it."""
    lattice, tick = state.lattice, state.tick + 1
    furthest = jnp.max(jnp.where(lattice.live, lattice.position, -1), axis=(1, 2))
    noise = make_noise(state.noise, sampling, furthest + 1)
    ring = lat.stage_rows(tick, state.stages)
    seen = (lattice.token, lattice.position, lattice.live, lattice.ancestors, lattice.parent)
    token, position, live, ancestors, parent = (_by_stage(field, ring) for field in seen)
    slots = lattice.position.reshape(lattice.position.shape[0], -1)
    view = StageView(ring, token, position, live, ancestors, parent, state.prefix, slots)
    return charge(state)._replace(tick=tick, noise=noise), view


def _advance(network: Network, memory: Any, hidden: jax.Array, view: StageView) -> tuple[jax.Array, Any]:
    stages = hidden.shape[0]
    says = f"the network does not run the {stages} stages of {hidden.shape[2]} rows that the state has: give both alike"
    try:
        advanced, memory = network.advance(memory, hidden, view)
    except (TypeError, ValueError, IndexError) as error:
        raise DexError(f"{says} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    if advanced.shape != hidden.shape:
        raise DexError(f"{says} (it returns hidden states {advanced.shape} for {hidden.shape})")
    return advanced, memory


def levels_of(drafts: TreeShape | None) -> int:
    """P."""
    return 1 if drafts is None else drafts.levels


def settle(state: DexState, final: jax.Array, limits: Limits, drafts: TreeShape | None) -> tuple[DexState, Path]:
    """Commit and collapse of one tick, all of it bookkeeping, once nodes have advanced and the tick is counted.

    `final` [B, W] int32 is the final layer's token after each live row of the last stage. Gives the state before
    proposals, with memory as it was, and what is committed.
    """
    levels = levels_of(drafts)
    path = jax.vmap(lat.follow, (0, 0, None, None))(state.lattice, final, state.tick, levels)
    record, place = emit_path(state.record, path.token, path.born_at, path.length, limits)
    record = record._replace(ticks=jnp.where(state.record.done, record.ticks, state.tick))
    lattice = jax.vmap(lat.collapse)(state.lattice, path)
    lattice = jax.vmap(lat.bury)(lattice, record.done)
    drafting = state.drafting
    if drafting is not None:
        emitted = place < record.tokens.shape[1]
        sequence, size = jnp.arange(place.shape[0])[:, None], drafting.text.shape[1]
        at = jnp.where(emitted, state.prefix[:, None] + 1 + jnp.arange(levels)[None], size)
        text = drafting.text.at[sequence, at].set(path.token, mode="drop")
        kept = drafting.kept + jnp.sum(emitted & (path.born_at == lat.DRAFTED))
        drafting = drafting._replace(text=text, kept=kept)
    state = state._replace(lattice=lattice, prefix=state.prefix + path.length, record=record, drafting=drafting)
    return state, path


def final_tokens(
    network: Network,
    state: DexState,
    view: StageView,
    where: jax.Array,
    sampling: Sampling | None,
    drafts: TreeShape | None,
) -> jax.Array:
    """The final layer's token after the rows of the last stage that a path may hold: [B, W] int32.

    The state has the noise that these rows need, and the lattice as the stages saw it; `where` [B] bool are the
    sequences whose root has finished.
    """
    hidden = state.hidden[-1]
    batch, rows, width = hidden.shape
    root = jnp.maximum(state.lattice.root, 0)[:, None] % rows

    def ask(states: jax.Array, position: jax.Array) -> jax.Array:
        count = states.shape[1]
        logits = network.final(states.reshape(batch * count, width))
        return choose(logits, sampling, noise_at(state.noise, position + 1))[0].reshape(batch, count)

    def of_roots() -> jax.Array:
        token = ask(jnp.take_along_axis(hidden, root[:, :, None], axis=1), state.prefix[:, None])
        return jnp.broadcast_to(token, (batch, rows))

    def of_rows(count: int) -> jax.Array:
        return fill(ask(hidden[:, :count], view.position[-1, :, :count]), 1, rows)

    none = jnp.zeros((batch, rows), jnp.int32)
    if drafts is None:
        # Between commits the unembedding is a good part of a tick, for nothing.
        return jax.lax.cond(jnp.any(where), of_roots, lambda: none)
    counts = row_counts(drafts.counts, rows, empty=state.stages > 1 or len(drafts.counts) > 1)
    live = view.live[-1] & where[:, None]
    return climb(last_row(live), counts, lambda n: of_rows(n) if n else none)


def committed(state: DexState, view: StageView, slot: jax.Array, length: jax.Array) -> Committed:
    """A path of nodes in slots [B, P], of length [B], as the network commits it."""
    hidden = state.hidden[-1]
    row = slot % hidden.shape[1]
    return Committed(
        slot=slot,
        token=jnp.take_along_axis(view.token[-1], row, axis=1),
        hidden=jnp.take_along_axis(hidden, row[:, :, None], axis=1),
        position=view.prefix,
        length=length,
    )


def proposers(state: DexState) -> jax.Array:
    """Which nodes have just finished a stage k < K and may propose: [K - 1, B, W] bool, exit 1 first."""
    return _by_stage(state.lattice.live, lat.stage_rows(state.tick, state.stages)[:-1])


def children(lattice: Lattice) -> tuple[jax.Array, jax.Array]:
    """(token, parent) of all nodes by slot, [B, K W]; those that do not live have no parent."""
    batch = lattice.token.shape[0]
    parent = jnp.where(lattice.live, lattice.parent, NO_NODE)
    return lattice.token.reshape(batch, -1), parent.reshape(batch, -1)


def _by_stage(field: jax.Array, ring: jax.Array) -> jax.Array:
    """A lattice field [B, K, W, ...] in the order of the stages: [stages, B, W, ...]."""
    return jnp.swapaxes(field[:, ring], 0, 1)
