"""The table of loops: how each begins a decoding, what its tick does on one device or on a mesh, and what it counts.

A plan names its loop. Letters: B sequences, T capacity for new tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dex_jax.decoding import ar
from dex_jax.decoding.ar import ARState
from dex_jax.decoding.dex import loop
from dex_jax.decoding.dex.interface import DexState, Network
from dex_jax.decoding.dex.network import network_of
from dex_jax.decoding.dex.row_choice import RowChoice
from dex_jax.decoding.dex.trained_exits import Heads
from dex_jax.decoding.mesh import device as on_device
from dex_jax.decoding.mesh.device import DeviceNetwork
from dex_jax.decoding.plan import Plan
from dex_jax.decoding.record import Limits, depth_side_speedup, ticks_of
from dex_jax.errors import DexError
from dex_jax.nn import cache
from dex_jax.nn.sharding import BY_SEQUENCE, BY_STAGE, EVERYWHERE, check_stages
from dex_jax.nn.transformer import Transformer
from dex_jax.sampling import Sampling

Tick = Callable[[Any], Any]
"""A function that takes a state and returns the state after one tick."""


class Prefilled(NamedTuple):
    """The inputs that a loop begins with."""

    memory: Any  # the prompts' keys and values, without a lattice
    token: jax.Array  # [B] int32, token 0
    lengths: jax.Array  # [B] int32, of the prompts
    limits: Limits  # at which sequences end
    sampling: Sampling | None  # None for greedy
    prompt: jax.Array | None = None  # [B, S] int32 padded on the right, for drafts; None without


class Loop(abc.ABC):
    """One kind of loop on one device, with a state of its own that has a `record`, a `tick` and the `memory`.

    A loop is hashable, as programs are compiled for it, and emits only the final layer's tokens, with the noise of
    their positions (ar.next_token). `ticks` and `counts` are here for loops in which every tick runs a stage.
    """

    @abc.abstractmethod
    def init(self, model: Transformer, heads: Heads, plan: Plan, prefilled: Prefilled, capacity: int) -> Any:
        """Return the state before the first tick, with room for T = `capacity` new tokens."""

    @abc.abstractmethod
    def tick(self, model: Transformer, heads: Heads, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        """Return the function that runs a tick; `record.until_done` repeats it."""

    def on_mesh(self, plan: Plan) -> MeshLoop:
        """Return the loop that does the same on a mesh; its `check_mesh` refuses a mesh that does not fit.

        Raises:
          DexError: this loop runs on one device only.
        """
        raise DexError(f"method {plan.method} is for one device: leave the mesh out, or use Dex or AR")

    def ticks(self, exits: np.ndarray, length: int, stages: int) -> int:
        """Return `record.ticks` of a sequence that ends after `length` of its tokens; exits [T] int32."""
        return ticks_of(exits, length, stages)

    def counts(self, plan: Plan, record: Any) -> dict[str, Any]:
        """Return counts of each sequence, [B], by their names in Stats, or in Stats.counts where it has no such field.

        `record` is a Record of NumPy arrays; its lengths and ticks are those after stop strings have cut the text.
        """
        speedup = depth_side_speedup(record.ticks, record.lengths, plan.stages)
        return {"ticks": record.ticks, "depth_side_speedup": speedup}


class MeshLoop(Loop):
    """A loop that runs on meshes too, on each device under shard_map."""

    def on_mesh(self, plan: Plan) -> MeshLoop:
        """Return the loop itself."""
        return self

    def check_mesh(self, plan: Plan) -> None:
        """Raise a DexError if the plan's mesh has stages or exit depths that the loop cannot run on; here never."""

    @abc.abstractmethod
    def init_device(self, device: DeviceNetwork, plan: Plan, prefilled: Prefilled, capacity: int) -> Any:
        """Return the state that `init` gives, on one device of a mesh."""

    @abc.abstractmethod
    def tick_device(self, device: DeviceNetwork, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        """Return the function that runs a tick on one device of a mesh."""

    @abc.abstractmethod
    def state_specs(self, plan: Plan, memory: Any) -> Any:
        """Return the PartitionSpecs of the state on a mesh, as a prefix of its tree, given those of `memory`."""


class ARLoop(MeshLoop):
    """The loop of AR, which emits a token every tick (decoding/ar.py)."""

    def init(self, model: Transformer, heads: Heads, plan: Plan, prefilled: Prefilled, capacity: int) -> ARState:
        return ar.init(prefilled.memory, prefilled.token, prefilled.lengths, capacity=capacity, limits=prefilled.limits)

    def tick(self, model: Transformer, heads: Heads, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        return lambda state: ar.step(model, state, limits, sampling)

    def init_device(self, device: DeviceNetwork, plan: Plan, prefilled: Prefilled, capacity: int) -> ARState:
        return self.init(device.model, Heads(), plan, prefilled, capacity)

    def tick_device(self, device: DeviceNetwork, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        return lambda state: on_device.ar_step(device, state, limits, sampling)

    def state_specs(self, plan: Plan, memory: Any) -> ARState:
        return ARState(EVERYWHERE, BY_SEQUENCE, BY_SEQUENCE, memory, BY_SEQUENCE)


class DexLoop(MeshLoop):
    """The loop of DEX, with drafts and without (decoding/dex/loop.py)."""

    def init(self, model: Transformer, heads: Heads, plan: Plan, prefilled: Prefilled, capacity: int) -> DexState:
        if plan.stages == 1:
            memory = cache.with_cohort(prefilled.memory, model.config, plan.rows)
        else:
            memory = cache.with_lattice(prefilled.memory, model.config, plan.stages * plan.rows)
        return _initial_state(network_of(model, heads, plan), plan, prefilled._replace(memory=memory), capacity)

    def tick(self, model: Transformer, heads: Heads, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        network = network_of(model, heads, plan)
        return lambda state: loop.step(network, state, limits, sampling, decs=plan.decs, drafts=plan.drafts)

    def check_mesh(self, plan: Plan) -> None:
        assert plan.layout is not None
        assert plan.mesh is not None
        if plan.stages == 1:  # one explorer runs on any mesh, as a pipeline that runs trees
            return
        check_stages(plan.mesh, plan.stages)
        if plan.layout.depths != plan.depths:
            lie, want = (",".join(map(str, depths)) for depths in (plan.layout.depths, plan.depths))
            raise DexError(
                f"the stages of the mesh end at depths {lie} and the explorers' at {want}: load the model with "
                f"layout=Staged(({want}))"
            )

    def init_device(self, device: DeviceNetwork, plan: Plan, prefilled: Prefilled, capacity: int) -> DexState:
        memory = cache.with_lattice(prefilled.memory, device.model.config, plan.stages * plan.rows)
        state = _initial_state(device.network, plan, prefilled._replace(memory=memory), capacity)
        spawning = on_device.no_cohort(len(prefilled.token), plan.rows) if _first_drafts(plan) else None
        return state._replace(hidden=state.hidden[: device.layout.held], spawning=spawning)

    def tick_device(self, device: DeviceNetwork, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        if plan.stages == 1:
            network = on_device.pipeline(device, (1,) if plan.drafts is None else plan.drafts.counts)
            return lambda state: loop.step(network, state, limits, sampling, drafts=plan.drafts)
        return lambda state: on_device.step(device, state, limits, sampling, decs=plan.decs, drafts=plan.drafts)

    def state_specs(self, plan: Plan, memory: Any) -> DexState:
        return DexState(
            tick=EVERYWHERE,
            lattice=BY_SEQUENCE,
            hidden=BY_STAGE,
            prefix=BY_SEQUENCE,
            memory=memory,
            noise=BY_SEQUENCE,
            record=BY_SEQUENCE,
            text=None if plan.drafts is None else BY_SEQUENCE,
            row_choice=None if plan.drafts is None or not plan.drafts.rungs else CHOICE,
            spawning=BY_SEQUENCE if _first_drafts(plan) else None,
        )


def _first_drafts(plan: Plan) -> bool:
    """Return whether the first of several devices drafts for all of them, which run a stage or more each."""
    assert plan.layout is not None
    return plan.drafts is not None and plan.stages > 1 and plan.layout.devices > 1


CHOICE = RowChoice(EVERYWHERE, *[BY_SEQUENCE] * (len(RowChoice._fields) - 1))
"""The PartitionSpecs of a RowChoice on a mesh."""

LOOPS: dict[str, Loop] = {"ar": ARLoop(), "dex": DexLoop()}


def loop_of(plan: Plan) -> Loop:
    """Return the loop that runs a plan: one of LOOPS, or a user's own."""
    return LOOPS[plan.loop] if isinstance(plan.loop, str) else plan.loop


def mesh_loop(plan: Plan) -> MeshLoop:
    """Return the loop of a plan on its mesh; raise DexError where there is none."""
    return loop_of(plan).on_mesh(plan)


def _initial_state(network: Network, plan: Plan, prefilled: Prefilled, capacity: int) -> DexState:
    memory, token, lengths, limits, sampling, prompt = prefilled
    length = 0 if prompt is None else prompt.shape[1]
    sizes: dict[str, Any] = {"stages": plan.stages, "rows": plan.rows, "capacity": capacity, "length": length}
    of_drafts: dict[str, Any] = {"drafts": plan.drafts, "prompt": prompt}
    return loop.init(network, memory, token, lengths, limits=limits, sampling=sampling, **sizes, **of_drafts)
