"""Depth Exploration Decoding: the tick, and the loop over ticks.

One tick advances every cohort by a stage, commits the root, if it has reached the last one, with the right drafts of
its own cohort, collapses the lattice onto the node, if any, that holds the last token emitted, and lets the surviving
nodes propose children, below which exit 0 drafts (arXiv 2606.29223). With K = 1 a tick runs a token tree
through all layers and commits a path of it. `init` and `step` are pure and compose with a caller's own jit; `run` is
one lax.while_loop over `step`.

Letters: B sequences, W rows a cohort, K stages, P levels of a cohort, A anchors of a cohort, N rows of a cohort that is
not in the lattice yet, T capacity for new tokens, S text length.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dex_jax import lattice as lat
from dex_jax.decoding.dex import row_choice
from dex_jax.decoding.dex.drafts import ANCHORS, with_drafts, with_noise
from dex_jax.decoding.dex.interface import Committed, DexState, Network, StageView, before_nodes
from dex_jax.decoding.dex.proposals import ask_exits
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.ladder import fill, last_row, row_counts, run_rung
from dex_jax.decoding.noise import Noise, make_noise, noise_at
from dex_jax.decoding.record import Limits, check_limits, emit_path, new_record, until_done
from dex_jax.errors import DexError, whole_number
from dex_jax.lattice import NO_NODE, NO_TOKEN, Cohort, Path, Proposals
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
) -> DexState:
    """Return the state before tick 0, which runs nothing and gives every sequence its first root.

    Args:
      network: the callables of one model.
      memory: its memory after prefill: positions 0 .. position - 1 are committed, and there is room for K W lattice
        slots and, with drafts, for P positions past the last token.
      first_token: [B] int32, token 0 as the prefill chose it.
      position: [B] int32, its absolute position (the prompt's length).
      stages: K.
      rows: W, at least 1.
      capacity: T, room for new tokens.
      limits: when a sequence ends.
      sampling: None for greedy.
      drafts: the tree that exit 0 drafts; None for nothing.
      prompt: [B, R] int32 padded on the right, for drafts from the text.
      length: S, at least R and the positions of all new tokens; needed with drafts only.

    Raises:
      DexError: stages, rows or capacity that is not a whole number of at least 1, more stages than one without
        exits, drafts without the prompt, or limits of other shapes.
    """
    whole_number(stages=stages, rows=rows, capacity=capacity)
    if stages > 1 and network.exits is None:
        raise DexError(f"a network without exits has one stage, and not {stages}: give it exits, or stages=1")
    batch = first_token.shape[0]
    width = jax.eval_shape(network.embed, first_token[:, None], position[:, None])
    noise = None
    if sampling is not None:
        noise = Noise(jnp.zeros((batch, stages * levels_of(drafts), network.vocab_size), jnp.float32), position)
    text = None
    if drafts is not None:
        if prompt is None:
            raise DexError("drafts look the text up in the prompt: give init prompt and length too")
        text = jnp.full((batch, length), NO_TOKEN, jnp.int32).at[:, : prompt.shape[1]].set(prompt)
        text = text.at[jnp.arange(batch), position].set(first_token)
    return DexState(
        tick=jnp.int32(-1),
        lattice=jax.tree.map(lambda x: jnp.broadcast_to(x[None], (batch, *x.shape)), lat.empty(stages, rows)),
        hidden=jnp.zeros((stages, batch, rows, width.shape[-1]), width.dtype),
        prefix=position,
        memory=memory,
        noise=noise,
        record=new_record(first_token, capacity, limits),
        text=text,
        row_choice=None if drafts is None or not drafts.rungs else row_choice.new_choice(batch, drafts.rungs),
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
    """Run one tick: advance, commit, collapse, propose, draft, spawn; sequences that are done stay as they are.

    Args:
      network: the callables of one model.
      state: before the tick.
      limits: when a sequence ends.
      sampling: as in `init`.
      decs: whether an exit may not repeat a token that its node's children hold (depth-coupled sampling).
      drafts: as in `init`.

    Raises:
      DexError: a network of other stages than the state has, or without exits, or limits of other shapes.
    """
    check_limits(limits, state.prefix.shape[0])
    if (drafts is None) != (state.text is None):
        raise DexError("init and step must be given the same drafts: the state has none without a prompt, or has one")
    if state.stages > 1 and network.exits is None:
        raise DexError(
            f"a network without exits has one stage, and the state has {state.stages}: give the network exits"
        )
    state, view = begin_tick(state, sampling)
    state = advance(network, state, view)
    final = final_tokens(network, state, view, roots_finished(state), sampling, drafts)
    state, path = commit(network, state, view, final, limits, drafts)
    state = collapse(state, path)
    anchors = anchors_of(state, propose(network, state, view, sampling, decs=decs))
    state = with_noise(state, anchors, sampling, drafts)
    state, cohort = draft(network, state, view, anchors, sampling, drafts)
    return spawn(state, cohort)


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
    """Run ticks under one lax.while_loop until every sequence is done, or until `until_tick`.

    `until_tick` is an int32 scalar, the tick after which to stop in any case, None for none; the other arguments are as
    in `step`.
    """
    options: dict[str, Any] = {"decs": decs, "drafts": drafts}
    return until_done(lambda state: step(network, state, limits, sampling, **options), state, until_tick)


def begin_tick(state: DexState, sampling: Sampling | None) -> tuple[DexState, StageView]:
    """Count the tick and make the noise that its nodes need: (state, the lattice as the stages see it)."""
    lattice, tick = state.lattice, state.tick + 1
    furthest = jnp.max(jnp.where(lattice.live, lattice.position, -1), axis=(1, 2))
    noise = make_noise(state.noise, sampling, furthest + 1)
    ring = lat.stage_rows(tick, state.stages)
    seen = (lattice.token, lattice.position, lattice.live, lattice.ancestors, lattice.parent)
    token, position, live, ancestors, parent = (jnp.swapaxes(field[:, ring], 0, 1) for field in seen)
    slots = lattice.position.reshape(lattice.position.shape[0], -1)
    view = StageView(ring, token, position, live, ancestors, parent, state.prefix, slots)
    return state._replace(tick=tick, noise=noise), view


def advance(network: Network, state: DexState, view: StageView) -> DexState:
    """Run the next stage of every node: hidden states move up by one stage, and the youngest cohort is embedded."""
    entering = network.embed(view.token[0], view.position[0]).astype(state.hidden.dtype)
    hidden = jnp.concatenate([entering[None], state.hidden[:-1]])
    says = (
        f"the network does not run the {state.stages} stages of {state.rows} rows that the state has: give both alike"
    )
    try:
        advanced, memory = network.advance(state.memory, hidden, view)
    except (TypeError, ValueError, IndexError) as error:
        raise DexError(f"{says} ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error
    if advanced.shape != hidden.shape:
        raise DexError(f"{says} (it returns hidden states {advanced.shape} for {hidden.shape})")
    return state._replace(hidden=advanced, memory=memory)


def roots_finished(state: DexState) -> jax.Array:
    """Return whether the root of each sequence has run its last stage: [B] bool."""
    return jax.vmap(lat.root_finished, (0, None))(state.lattice, state.tick)


def final_tokens(
    network: Network,
    state: DexState,
    view: StageView,
    where: jax.Array,
    sampling: Sampling | None,
    drafts: TreeShape | None,
) -> jax.Array:
    """Return the final layer's token after the rows of the last stage that a path may hold: [B, W] int32.

    `where` [B] bool are the sequences that need them.
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
        # Between commits the unembedding would take a good part of a tick, for nothing.
        return jax.lax.cond(jnp.any(where), of_roots, lambda: none)
    counts = row_counts(drafts.counts, rows, empty=state.stages > 1 or len(drafts.counts) > 1)
    live = view.live[-1] & where[:, None]
    return run_rung(last_row(live), counts, lambda n: of_rows(n) if n else none)


def commit(
    network: Network, state: DexState, view: StageView, final: jax.Array, limits: Limits, drafts: TreeShape | None
) -> tuple[DexState, Path]:
    """Emit the tokens `final` [B, W] after finished roots and the right drafts below them, and commit the path."""
    levels = levels_of(drafts)
    path = jax.vmap(lat.follow, (0, 0, None, None))(state.lattice, final, state.tick, levels)
    record, place = emit_path(state.record, path.token, path.born_at, path.length, limits)
    record = record._replace(ticks=jnp.where(state.record.done, record.ticks, state.tick))
    text = state.text
    if text is not None:
        sequence, size = jnp.arange(place.shape[0])[:, None], text.shape[1]
        at = jnp.where(place < record.tokens.shape[1], state.prefix[:, None] + 1 + jnp.arange(levels)[None], size)
        text = text.at[sequence, at].set(path.token, mode="drop")
    memory = network.commit(state.memory, committed(state, view, path.slot, path.length))
    prefix = state.prefix + path.length
    return state._replace(prefix=prefix, memory=memory, record=record, text=text), path


def committed(state: DexState, view: StageView, slot: jax.Array, length: jax.Array) -> Committed:
    """Return a path of nodes, in slots [B, P] and of length [B], as the network commits it."""
    hidden = state.hidden[-1]
    row = slot % hidden.shape[1]
    return Committed(
        slot=slot,
        token=jnp.take_along_axis(view.token[-1], row, axis=1),
        hidden=jnp.take_along_axis(hidden, row[:, :, None], axis=1),
        position=view.prefix,
        length=length,
    )


def collapse(state: DexState, path: Path) -> DexState:
    """Keep the node that holds the last token emitted and what hangs below it; nothing in sequences that are done."""
    lattice = jax.vmap(lat.collapse)(state.lattice, path)
    return state._replace(lattice=jax.vmap(lat.bury)(lattice, state.record.done))


def propose(
    network: Network, state: DexState, view: StageView, sampling: Sampling | None, *, decs: bool
) -> Proposals | None:
    """Return the proposals of exits 1..K-1 below the nodes that have just reached them: fields [K - 1, B, W]."""
    if network.exits is None or state.stages == 1:
        return None
    features = network.exits.features(state.memory, state.hidden, view)
    nodes = (features, view.ring[:-1], view.position[:-1], proposers(state))
    return ask_exits(network.exits, *nodes, state.lattice, sampling, state.noise, decs=decs)


def proposers(state: DexState) -> jax.Array:
    """Return which nodes have just finished a stage k < K and may propose: [K - 1, B, W] bool, exit 1 first."""
    return jnp.swapaxes(state.lattice.live[:, lat.stage_rows(state.tick, state.stages)[:-1]], 0, 1)


def anchors_of(state: DexState, proposals: Proposals | None) -> Cohort:
    """Return the best proposals as seeds, or a fresh root where no node holds the last token: fields [B, A, ...]."""
    fresh = (state.lattice.root == NO_NODE) & ~state.record.done
    last = jnp.take_along_axis(state.record.tokens, state.record.lengths[:, None] - 1, axis=1)[:, 0]
    roots = jax.vmap(lat.fresh_root, (0, 0, None))(last, state.prefix, state.stages)
    roots = roots._replace(score=jnp.where(fresh[:, None], roots.score, -jnp.inf))
    if proposals is None:
        return roots
    roots = jax.vmap(lat.widen, (0, None))(roots, state.rows)
    seeds = jax.vmap(lat.seeds, (0, None, 1))(state.lattice, state.tick, proposals)
    return jax.vmap(lambda new, *both: jax.tree.map(lambda a, b: jnp.where(new, a, b), *both))(fresh, roots, seeds)


def draft(
    network: Network,
    state: DexState,
    view: StageView,
    anchors: Cohort,
    sampling: Sampling | None,
    drafts: TreeShape | None,
) -> tuple[DexState, Cohort]:
    """Return (state, the anchors with what exit 0 drafts below them, the best rows first: fields [B, N, ...])."""
    if drafts is None:
        return state, jax.vmap(lat.widen, (0, None))(anchors, state.rows)
    drafter, before = network.drafter, None
    if drafter is not None:
        before, parent = drafter.committed(state.memory)[:, None], anchors.parent[:, :ANCHORS]
        if drafter.node_features is None:
            before = jnp.broadcast_to(before, (*parent.shape, before.shape[-1]))
        else:
            by_node = drafter.node_features(state.memory, state.hidden, view)
            before = before_nodes(by_node, before[:, 0], parent[None], view.ring)[0]
    return with_drafts(drafter, state, anchors, before, sampling, drafts)


def spawn(state: DexState, cohort: Cohort) -> DexState:
    """Put the cohort's best rows into the lattice as nodes."""
    return state._replace(lattice=jax.vmap(lat.spawn, (0, None, 0))(state.lattice, state.tick, cohort))


def levels_of(drafts: TreeShape | None) -> int:
    """Return P, the number of levels of a cohort, 1 without drafts."""
    return 1 if drafts is None else drafts.levels
