"""The work of one device of a mesh, under shard_map: its own stages of the network, and its messages to the others.

Every device keeps the whole lattice and updates it alike, and only the first one drafts. This passes between devices in
a tick: the hidden states of one cohort to the next device, in one permute; the exits' proposals and the final layer's
tokens, in one gather of integers; with drafts, the cohort of the first device, in another; and for exits or a drafter
that read the position before, the features of each stage's cohort, in one more.

A device sees its layers as a small unrolled model, so that the functions of nn/forward.py run here unchanged.

Letters: B sequences (of this device's share of the data axis), W rows a stage, K stages, S of them on each device, D
width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax import lattice as lat
from dex_jax.decoding.ar import ARState, emitted, next_token
from dex_jax.decoding.dex import loop
from dex_jax.decoding.dex.drafts import with_noise
from dex_jax.decoding.dex.interface import Committed, DexState, Network, StageView, before_nodes
from dex_jax.decoding.dex.network import shared_exits, transformer_network
from dex_jax.decoding.dex.proposals import ask_exits
from dex_jax.decoding.dex.trained_exits import (
    Heads,
    TrainedHeads,
    base_features,
    exit_heads,
    extend_features,
    row_features,
    trained_exits,
)
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.ladder import fill, last_row, row_counts, run_rung
from dex_jax.decoding.plan import Plan
from dex_jax.decoding.record import Limits
from dex_jax.lattice import NO_NODE, NO_TOKEN, Cohort, Proposals
from dex_jax.nn.attention import causal_rows
from dex_jax.nn.cache import NOWHERE, Memory, write_rows
from dex_jax.nn.forward import InUse, run_rows
from dex_jax.nn.no_copies import ordered_after
from dex_jax.nn.sharding import STAGE
from dex_jax.nn.transformer import Staged, Transformer
from dex_jax.sampling import Sampling

BITS = 32
"""Number of bits of a word that is sent."""


class DeviceNetwork(NamedTuple):
    """The model and the callables that one device of a mesh runs."""

    model: Transformer  # the layers of this device's stages, unrolled, and embedding, final norm and unembedding
    layout: Staged  # of all stages over the devices
    in_use: InUse  # by layer of `model`, whether this device has it: those that pad shorter stages are skipped
    # `advance` runs these stages, and `commit` does not change Memory.exits; the `features` of its exits are not used.
    network: Network
    # hidden [S, B, W, D] of these stages -> features of all stages' cohorts [K, B, W, D], or () where nothing reads the
    # position before.
    share: Callable[[jax.Array], Any]
    extend_exits: Callable[[Any, Committed, Any], Any]  # (Memory.exits, Committed, shared) -> Memory.exits
    # (Memory.exits, hidden [S, B, W, D], view, shared) -> [S, B, W, D'], of the exits of these stages.
    features: Callable[[Any, jax.Array, StageView, Any], jax.Array]


def device_network(model: Transformer, plan: Plan, heads: Heads) -> DeviceNetwork:
    """Build the callables of one device, under shard_map.

    `model` has this device's layers, unrolled; `plan` is that of the whole generation, and its layout gives the depths;
    `heads` have only the exits of this device's stages, and zeros for the last stage, which has no exit.
    """
    assert plan.layout is not None
    layout, in_use, own = plan.layout, layers_in_use(plan.layout), None
    cached, arrays = plan.cached_heads, plan.cached_arrays(heads)
    exits = shared_exits(model) if len(layout.depths) > 1 else None
    if plan.exits is not None and heads.exits is not None:
        exits, own = trained_exits(model, plan.exits, heads.exits), exit_heads(plan.exits, heads.exits)
    drafter = None
    if plan.drafter is not None and heads.drafter is not None:
        # `step` sets its `node_features`, as that comes from all stages.
        drafter = plan.drafter.drafter(model, heads.drafter)
    drafts = plan.drafts
    counts = None if drafts is None or not drafts.rungs else drafts.counts  # those that ticks choose from
    network = transformer_network(model, layout.device_depths, exits, in_use=in_use, drafter=drafter, counts=counts)

    def share(hidden: jax.Array) -> Any:
        if cached is None or cached.reads_tokens_only:
            return ()
        features = model.normed(hidden)
        if own is not None:
            last = is_last(layout)[..., None]
            features = jnp.where(last, features, base_features(own, hidden))
        return gathered(features, layout)

    def extend_exits(memory: Any, done: Committed, shared: Any) -> Any:
        if cached is None or arrays is None:
            return memory
        if cached.reads_tokens_only:
            return cached.extend(model, arrays, memory, done.chunk)
        row = (done.slot % shared.shape[2])[:, :, None]
        features = jnp.take_along_axis(shared[-1], row, axis=1)
        assert isinstance(cached, TrainedHeads)
        return extend_features(model, cached.config, arrays, memory, done._replace(hidden=features).chunk)

    def features(memory: Any, hidden: jax.Array, view: StageView, shared: Any) -> jax.Array:
        if own is None or plan.exits is None:
            return model.normed(hidden)
        here = own_stages(view, layout)
        if not plan.exits.needs_previous:
            return row_features(model, own, hidden, here.token, here.position)
        before = before_nodes(shared, memory.previous, here.parent, view.ring)
        base = own_part(shared, layout)
        return row_features(model, own, hidden, here.token, here.position, before, base, memory.context)

    return DeviceNetwork(model, layout, in_use, network, share, extend_exits, features)


def own_part(by_stage: jax.Array, layout: Staged) -> jax.Array:
    """Return the part [S, ...] of an array [K, ...] that belongs to this device's stages."""
    return jax.lax.dynamic_slice_in_dim(by_stage, jax.lax.axis_index(STAGE) * layout.held, layout.held)


def gathered(own: jax.Array, layout: Staged) -> jax.Array:
    """Gather the arrays [S, ...] of all devices, one after the other: [K, ...]."""
    return own if layout.devices == 1 else jax.lax.all_gather(own, STAGE, tiled=True)


def own_stages(view: StageView, layout: Staged) -> StageView:
    """Return the part of a view that belongs to this device's stages."""
    by_stage = ("ring", "token", "position", "live", "ancestors", "parent")
    return view._replace(**{name: own_part(getattr(view, name), layout) for name in by_stage})


def is_last(layout: Staged) -> jax.Array:
    """Return which of this device's stages is the last of all: [S, 1, 1] bool."""
    stages = len(layout.depths)
    return own_part(jnp.arange(stages) == stages - 1, layout)[:, None, None]


def layers_in_use(layout: Staged) -> InUse:
    """Return by place whether this device has a layer there, as bool scalars; None where every device has one."""
    device = jax.lax.axis_index(STAGE)
    return [None if None not in row else jnp.asarray([x is not None for x in row])[device] for row in layout.places]


def step(
    device: DeviceNetwork,
    state: DexState,
    limits: Limits,
    sampling: Sampling | None,
    decs: bool,
    drafts: TreeShape | None,
) -> DexState:
    """Run one tick, as `loop.step`, with an explorer on each of K > 1 stages, which the devices share evenly.

    The exits of all stages and the final layer are asked at once, before the commit is known, and proposals below nodes
    that the collapse removes are dropped: this takes one exchange instead of two, and no head waits for another. Where
    a tick commits a path, the context layer of exits sees only its root before the next tick. The first device drafts,
    while the others run the next tick's layers: they learn of its cohort after that. Between ticks the state's `hidden`
    [S, B, W, D] is what this device's stages run next.
    """
    network, before = device.network, state.memory.exits
    state, view = loop.begin_tick(state, sampling)
    state, moved = advance(device, state, view)
    if state.spawning is not None:
        cohort = from_first_device(state.spawning)
        state = state._replace(lattice=jax.vmap(lat.spawn, (0, None, 0))(state.lattice, state.tick - 1, cohort))
    finished, last = loop.roots_finished(state), jax.lax.axis_index(STAGE) == device.layout.devices - 1
    final = loop.final_tokens(network, state, view, finished & last, sampling, drafts)
    shared = device.share(state.hidden)

    def commit_all(memory: Memory, done: Committed) -> Memory:
        return network.commit(memory, done)._replace(exits=device.extend_exits(before, done, shared))

    root = loop.committed(state, view, jnp.maximum(state.lattice.root, 0)[:, None], finished.astype(jnp.int32))
    own = ask_own_exit(device, state, view, device.extend_exits(before, root, shared), shared, sampling, decs)
    proposals, final = exchange(own, final, device.layout)
    state, path = loop.commit(network._replace(commit=commit_all), state, view, final, limits, drafts)
    state = loop.collapse(state, path)
    anchors = loop.anchors_of(state, proposals._replace(valid=proposals.valid & loop.proposers(state)))
    drafter = network.drafter
    if drafter is not None:
        drafter = drafter._replace(node_features=lambda memory, hidden, view: shared)
    state = with_noise(state, anchors, sampling, drafts)

    def drafted() -> tuple[Any, Cohort]:
        after, cohort = loop.draft(network._replace(drafter=drafter), state, view, anchors, sampling, drafts)
        return after.row_choice, lat.first_rows(cohort, state.rows)

    if state.spawning is None:
        choice, cohort = drafted()
    else:
        first = jax.lax.axis_index(STAGE) == 0
        choice, cohort = jax.lax.cond(first, drafted, lambda: (state.row_choice, state.spawning))
        state = state._replace(spawning=cohort)
    return loop.spawn(state._replace(row_choice=choice, hidden=moved), cohort)


def no_cohort(sequences: int, rows: int) -> Cohort:
    """Return cohorts of B = `sequences` without any node: fields [B, W]."""
    none = jnp.full((sequences, rows), NO_NODE, jnp.int32)
    blank = jnp.zeros((sequences, rows, rows), bool)
    return Cohort(none, none, none, none, none, jnp.full(none.shape, -jnp.inf), blank)


def advance(device: DeviceNetwork, state: DexState, view: StageView) -> tuple[DexState, jax.Array]:
    """Run the cohorts of this device's stages: (state, hidden states that the stages run next, [S, B, W, D])."""
    network, devices = device.network, device.layout.devices
    entering = network.embed(view.token[0], view.position[0]).astype(state.hidden.dtype)
    if devices > 1:
        entering = jnp.where(jax.lax.axis_index(STAGE) == 0, entering, state.hidden[0])
    hidden = jnp.concatenate([entering[None], state.hidden[1:]])
    hidden, memory = network.advance(state.memory, hidden, own_stages(view, device.layout))
    leaving = hidden[-1:]
    if devices > 1:
        leaving = jax.lax.ppermute(leaving, STAGE, [(d, d + 1) for d in range(devices - 1)])
    return state._replace(hidden=hidden, memory=memory), jnp.concatenate([leaving, hidden[:-1]])


def from_first_device(cohort: Cohort) -> Cohort:
    """Return the cohort of the first device, fields [B, W], by one gather of int32."""
    rows = np.arange(cohort.within.shape[-1])
    place = jnp.asarray(rows % BITS, jnp.int32)[None, None]
    bits = jnp.pad(cohort.within.astype(jnp.int32) << place, [(0, 0), (0, 0), (0, -len(rows) % BITS)])
    bits = jnp.sum(bits.reshape(*bits.shape[:2], -1, BITS), axis=-1)
    score = jax.lax.bitcast_convert_type(cohort.score, jnp.int32)
    words = jnp.stack([*cohort[:5], score, *jnp.unstack(bits, axis=-1)], axis=-1)
    *numbers, score = jnp.unstack((words := jax.lax.all_gather(words, STAGE)[0])[..., :6], axis=-1)
    within = (words[..., 6 + rows // BITS] >> place & 1).astype(bool)
    return Cohort._make([*numbers, jax.lax.bitcast_convert_type(score, jnp.float32), within])


def ask_own_exit(
    device: DeviceNetwork,
    state: DexState,
    view: StageView,
    exit_memory: Any,
    shared: Any,
    sampling: Sampling | None,
    decs: bool,
) -> Proposals:
    """Return the proposals of this device's exits below their nodes, fields [S, B, W]; the last stage has none."""
    own = own_stages(view, device.layout)
    asking = own.live & ~is_last(device.layout)

    def features() -> jax.Array:
        return device.features(exit_memory, state.hidden, view, shared)

    wanted = jax.eval_shape(features)
    found = jax.lax.cond(jnp.any(asking), features, lambda: jnp.zeros(wanted.shape, wanted.dtype))
    assert device.network.exits is not None
    nodes = (found, own.ring, own.position, asking)
    return ask_exits(device.network.exits, *nodes, state.lattice, sampling, state.noise, decs=decs)


def exchange(own: Proposals, token: jax.Array, layout: Staged) -> tuple[Proposals, jax.Array]:
    """Share all proposals and the final layer's tokens with all devices, by one gather of [S, B, W, 2] int32.

    `own` are the proposals of this device, fields [S, B, W], none of them valid on the last stage; `token` [B, W] int32
    counts on the last stage alone. Gives (proposals with fields [K - 1, B, W], token [B, W]).
    """
    word = jnp.where(own.valid, own.token, NO_TOKEN)
    word = jnp.where(is_last(layout), token, word)
    bits = jax.lax.bitcast_convert_type(own.log_probability, jnp.int32)
    words = gathered(jnp.stack([word, bits], axis=-1), layout)
    proposed = words[:-1, ..., 0]
    score = jax.lax.bitcast_convert_type(words[:-1, ..., 1], jnp.float32)
    return Proposals(proposed, score, proposed != NO_TOKEN), words[-1, ..., 0]


def extend_stages(
    device: DeviceNetwork, memory: Memory, tokens: jax.Array, start: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, Memory]:
    """Run `forward.extend` on one device after the other, with a permute between two of them.

    Nothing is written for sequences that end, by `lengths` [B] int32, at `start` or before; None writes all. The hidden
    states are those at depth L on the last stage, and of no use elsewhere.
    """
    batch, rows = tokens.shape
    positions = start[:, None] + jnp.arange(rows)[None, :]
    x, fresh = through_stages(
        device, memory, device.model.embed_tokens(tokens), positions, causal_rows(batch, rows), start
    )
    at = ordered_after(start if lengths is None else jnp.where(start < lengths, start, NOWHERE), x, fresh[0][-1])
    kinds = device.model.kinds.rows
    keys, values = (
        tuple(write_rows(cache, rows, at, own) for cache, rows, own in zip(caches, each, kinds, strict=True))
        for caches, each in zip((memory.keys, memory.values), fresh, strict=True)
    )
    return x, memory._replace(keys=keys, values=values)


def through_stages(
    device: DeviceNetwork,
    memory: Memory,
    x: jax.Array,
    position: jax.Array,
    among: jax.Array,
    prefix: jax.Array,
    used: jax.Array | None = None,
    counts: tuple[int, ...] = (),
) -> tuple[jax.Array, Any]:
    """Run `forward.run_rows` on one device after the other, with a permute between two of them.

    Only the first `used` of N rows count, and the smallest of `counts` (or N) that holds them is run; None runs all.
    Gives (hidden states as `extend_stages`, keys and values of this device's layers).
    """
    leaf, rows, layers = memory.keys[0], x.shape[1], range(len(memory.keys))
    blank = jnp.zeros((*leaf.shape[:2], rows, leaf.shape[3]), leaf.dtype)
    fresh: Any = ((blank,) * len(layers),) * 2
    for turn in range(device.layout.devices):

        def run(x: jax.Array, fresh: Any) -> Any:
            def first(width: int) -> Any:
                if width == 0:
                    return x, fresh
                about = (position[:, :width], among[:, :width, :width], prefix, layers, device.in_use)
                out, found = run_rows(device.model, memory, x[:, :width], *about)
                return fill(out, 1, rows), jax.tree.map(lambda each: fill(each, 2, rows), found)

            return first(rows) if used is None else run_rung(used, row_counts(counts, rows), first)

        if device.layout.devices == 1:
            return run(x, fresh)
        # The caller writes the caches: passed through a conditional they would be copied.
        x, fresh = jax.lax.cond(jax.lax.axis_index(STAGE) == turn, run, lambda x, fresh: (x, fresh), x, fresh)
        if turn < device.layout.devices - 1:
            x = jax.lax.ppermute(x, STAGE, [(turn, turn + 1)])
    return x, fresh


def pipeline(device: DeviceNetwork, counts: tuple[int, ...]) -> Network:
    """Build the network of one explorer over all stages, for `loop.step`: a pipeline that runs trees, a rival of DEX.

    In a tick a cohort runs through one stage after the other, then all devices get its states at depth L. The programs
    are compiled for `counts` rows, and for all.
    """

    def advance(memory: Memory, hidden: jax.Array, view: StageView) -> tuple[jax.Array, Memory]:
        among = view.ancestors[0] | jnp.eye(hidden.shape[2], dtype=bool)[None]
        about = (view.position[0], among, view.prefix, last_row(view.live[0]), counts)
        x, (keys, values) = through_stages(device, memory, hidden[0], *about)
        memory = memory._replace(lattice_keys=keys, lattice_values=values)
        return from_last_stage(x, device.layout.devices)[None], memory

    def commit(memory: Memory, done: Committed) -> Memory:
        shared = device.model.normed(done.hidden)
        by_row = done._replace(slot=jnp.broadcast_to(jnp.arange(done.slot.shape[1])[None], done.slot.shape))
        exits = device.extend_exits(memory.exits, by_row, shared[None])
        return device.network.commit(memory, done)._replace(exits=exits)

    return device.network._replace(advance=advance, commit=commit, exits=None)


def ar_step(device: DeviceNetwork, state: ARState, limits: Limits, sampling: Sampling | None = None) -> ARState:
    """Decode one token for every sequence that is not done, as `ar.step`, with one gather."""
    hidden, memory = extend_stages(device, state.memory, state.token[:, None], state.prefix)
    token = jax.lax.cond(
        jax.lax.axis_index(STAGE) == device.layout.devices - 1,
        lambda: next_token(device.model, hidden[:, 0], state.prefix + 1, sampling),
        lambda: jnp.zeros_like(state.token),
    )
    if device.layout.devices > 1:
        # A gather takes half the messages of a sum, and tokens are small.
        token = jax.lax.all_gather(token, STAGE)[-1]
    return emitted(state, memory, token, limits)


def from_last_stage(tree: Any, devices: int) -> Any:
    """Broadcast the arrays of the last of `devices` stage devices to all of them."""
    if devices == 1:
        return tree
    last = jax.lax.axis_index(STAGE) == devices - 1
    return jax.tree.map(lambda x: jax.lax.psum(jnp.where(last, x, jnp.zeros_like(x)), STAGE), tree)
