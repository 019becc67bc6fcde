"""The programs of a session on a mesh: each is one jax.shard_map over what a device does (decoding/mesh/device.py).

Layers, caches and hidden states are split by stage; heads, mlp and vocabulary by tensor; sequences, with their lattice,
by data. Every device of the stage axis has the embedding and the unembedding, V D numbers that are split over a tensor
axis: stage 1 embeds new tokens, every exit applies the unembedding to its own rows, and the last stage applies it for
the final token, all at the same time. Every device has the whole lattice, and all update it alike.

Letters: B sequences, R prompt tokens, T tokens, K stages, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dex_jax.config import ModelConfig
from dex_jax.decoding import ar
from dex_jax.decoding.dex.interface import Chunk
from dex_jax.decoding.dex.trained_exits import ExitArrays, Heads
from dex_jax.decoding.loops import Prefilled, mesh_loop
from dex_jax.decoding.mesh.device import DeviceNetwork, device_network, extend_stages, from_last_stage
from dex_jax.decoding.plan import Plan
from dex_jax.decoding.record import Limits, until_done
from dex_jax.nn import cache
from dex_jax.nn.forward import last_states
from dex_jax.nn.kinds import kind_table
from dex_jax.nn.layers import names_in
from dex_jax.nn.placing import device_config, weight_specs
from dex_jax.nn.sharding import BY_SEQUENCE, DATA, EVERYWHERE, STAGE, TENSOR, partition, spec_of
from dex_jax.nn.transformer import Staged
from dex_jax.nn.weights import merge_model, with_wide_scales
from dex_jax.sampling import Sampling

_CACHE: Any = spec_of(*cache.AXES)
LIMITS = Limits(BY_SEQUENCE, EVERYWHERE)
MEMORY = cache.Memory(_CACHE, _CACHE, _CACHE, _CACHE, BY_SEQUENCE)


def prefill_chunk(*arguments: Any, plan: Plan) -> tuple[Any, jax.Array]:
    """Run `session.prefill_chunk` on a mesh: states [B, R, D] pass the devices in turn, then all get the last ones."""

    def run(weights: Any, heads: Any, memory: Any, last: Any, tokens: Any, start: Any, lengths: Any) -> Any:
        device, memory = _device(plan, weights, heads), _own(memory)
        ends = lengths if plan.config.layer_kinds else None
        hidden, memory = extend_stages(device, memory, tokens, jnp.full(tokens.shape[0], start), ends)
        exits = memory.exits
        cached, arrays = plan.cached_heads, plan.cached_arrays(heads)
        if cached is not None and arrays is not None:
            exits = cached.extend(device.model, arrays, exits, Chunk(tokens, hidden, start, lengths))
        # The other devices do not have the final states.
        last = from_last_stage(last_states(hidden, last, start, lengths), device.layout.devices)
        if cached is not None and not cached.reads_tokens_only:
            exits = from_last_stage(exits, device.layout.devices)
        return _stacked(memory._replace(exits=exits)), last

    weights, heads = weight_specs(arguments[0], plan.mesh), head_specs(arguments[1])
    inputs = (weights, heads, MEMORY, BY_SEQUENCE, BY_SEQUENCE, EVERYWHERE, BY_SEQUENCE)
    return _mapped(run, plan, inputs, (MEMORY, BY_SEQUENCE))(*arguments)


def start_decoding(*arguments: Any, plan: Plan, capacity: int) -> Any:
    """Run `session.start_decoding` on a mesh: every stage chooses token 0 by itself, without any message."""
    loop = mesh_loop(plan)

    def run(
        weights: Any, heads: Any, memory: Any, last: Any, lengths: Any, limits: Any, sampling: Any, *text: Any
    ) -> Any:
        device = _device(plan, weights, heads)
        token = ar.next_token(device.model, last, lengths, sampling)
        prefilled = Prefilled(_own(memory), token, lengths, limits, sampling, *text)
        state = loop.init_device(device, plan, prefilled, capacity)
        return state._replace(memory=_stacked(state.memory))

    weights, heads, _, _, _, _, sampling, *text = arguments
    models = (weight_specs(weights, plan.mesh), head_specs(heads))
    inputs = (*models, MEMORY, BY_SEQUENCE, BY_SEQUENCE, LIMITS, sampling_specs(sampling))
    about_text = (BY_SEQUENCE,)[: len(text)]
    return _mapped(run, plan, (*inputs, *about_text), state_specs(plan))(*arguments)


def run_ticks(*arguments: Any, plan: Plan) -> Any:
    """Run `session.run_ticks` on a mesh."""
    loop = mesh_loop(plan)

    def run(weights: Any, heads: Any, state: Any, limits: Any, sampling: Any, until_tick: Any) -> Any:
        device = _device(plan, with_wide_scales(weights), heads)

        tick = loop.tick_device(device, plan, limits, sampling)
        state = _together(plan, tick, state._replace(memory=_own(state.memory)), until_tick)
        return state._replace(memory=_stacked(state.memory))

    weights, heads, _, _, sampling, _ = arguments
    states = state_specs(plan)
    inputs = (weight_specs(weights, plan.mesh), head_specs(heads), states, LIMITS, sampling_specs(sampling), EVERYWHERE)
    return _mapped(run, plan, inputs, states)(*arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def mesh_logits(config: ModelConfig, layout: Staged, mesh: Mesh, weights: Any, tokens: jax.Array) -> jax.Array:
    """Return the final logits at every position: tokens [B, T] int32 -> [B, T, V] float32, on every device."""
    config = config.at_length(tokens.shape[1])
    plan = Plan("ar", (config.num_layers,), config=config, layout=layout, mesh=mesh)

    def run(weights: Any, tokens: jax.Array) -> jax.Array:
        device = _device(plan, weights, Heads())
        batch, length = tokens.shape
        model = device.model
        memory = cache.allocate(model.config, batch, length, 0, model.dtype)
        hidden, _ = extend_stages(device, memory, tokens, jnp.zeros(batch, jnp.int32))
        return model.logits(from_last_stage(hidden, device.layout.devices))

    return _mapped(run, plan, (weight_specs(weights, mesh), EVERYWHERE), EVERYWHERE)(weights, tokens)


def state_specs(plan: Plan) -> Any:
    """Return the PartitionSpecs of the state that the method's loop carries, as a prefix of its tree."""
    return mesh_loop(plan).state_specs(plan, MEMORY)


def sampling_specs(sampling: Sampling | None) -> Any:
    """Return the PartitionSpecs of a Sampling, as a prefix of its tree."""
    return EVERYWHERE if sampling is None else Sampling(BY_SEQUENCE, EVERYWHERE, EVERYWHERE, EVERYWHERE)


def head_specs(heads: Heads) -> Heads:
    """Return the PartitionSpecs of trained heads: exits by stage, a drafter and what all exits share everywhere."""

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        return EVERYWHERE if "context" in names_in(path) else spec_of("stage")

    exits = None
    if heads.exits is not None:
        parameters = jax.tree_util.tree_map_with_path(spec, heads.exits.parameters)
        exits = ExitArrays(parameters, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    return Heads(exits, None if heads.drafter is None else EVERYWHERE)


def pad_heads(parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return exit parameters with zeros for the last stage, which has no exit: [K - 1, ...] -> [K, ...]."""
    return {
        name: value if name.startswith("context.") else np.concatenate([value, np.zeros_like(value[:1])])
        for name, value in parameters.items()
    }


def _device(plan: Plan, weights: Any, heads: Heads) -> DeviceNetwork:
    """Build the network of one device, under shard_map, from its part of the weights."""
    assert plan.layout is not None
    assert plan.mesh is not None

    def own(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf[0] if "layers" in names_in(path) else leaf

    config = device_config(plan.config, plan.layout, plan.mesh)
    kinds = kind_table(plan.config, plan.layout.places, STAGE)
    whole = (plan.config.vocab_size, plan.config.width)
    tensor_axis = TENSOR if plan.mesh.shape[TENSOR] > 1 else None
    vocabulary_axis = partition(("vocabulary", "width"), whole, plan.mesh)[0]
    model = merge_model(config, jax.tree_util.tree_map_with_path(own, weights), tensor_axis, vocabulary_axis, kinds)
    return device_network(model, plan, heads)


def _own(memory: cache.Memory) -> cache.Memory:
    """Return a device's memory: its KV caches without the leading axis, of length 1 there, and `exits` as they are."""
    return jax.tree.map(lambda x: x[0], memory._replace(exits=()))._replace(exits=memory.exits)


def _stacked(memory: cache.Memory) -> cache.Memory:
    return jax.tree.map(lambda x: x[None], memory._replace(exits=()))._replace(exits=memory.exits)


def _together(plan: Plan, advance: Callable[[Any], Any], state: Any, until_tick: jax.Array) -> Any:
    """Run `until_done`, in which the whole data axis goes on as long as any device has an unfinished sequence."""
    assert plan.mesh is not None
    if plan.mesh.shape[DATA] == 1:
        return until_done(advance, state, until_tick)

    def unfinished(state: Any) -> jax.Array:
        return jax.lax.psum(jnp.any(~state.record.done).astype(jnp.int32), DATA) > 0

    def body(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        state = advance(carry[0])
        return state, unfinished(state)

    start = (state, unfinished(state))
    return jax.lax.while_loop(lambda carry: carry[1] & (carry[0].tick < until_tick), body, start)[0]


def _mapped(function: Callable[..., Any], plan: Plan, inputs: Any, outputs: Any) -> Callable[..., Any]:
    # Outputs that are declared equal everywhere come from gathers, sums or equal inputs; of the youngest cohort and the
    # choice of rows only those of the first device count.
    return jax.shard_map(function, mesh=plan.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
