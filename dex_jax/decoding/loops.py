"""The loops that methods run in: what begins a decoding, what runs it, on one device or on a mesh, and what it counts.

A method's Schedule names its loop, and nobody else asks which method it is. Letters: B sequences, T capacity for new
tokens.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dex_jax import cache
from dex_jax.decoding import ar
from dex_jax.decoding.ar import ARState
from dex_jax.decoding.counting import depth_side_speedup, ticks_of
from dex_jax.decoding.dex import loop
from dex_jax.decoding.dex.interface import Network
from dex_jax.decoding.dex.network import network_of
from dex_jax.decoding.dex.shape import RowCosts
from dex_jax.decoding.dex.state import DexState, Drafting
from dex_jax.decoding.dex.trained_exits import Heads
from dex_jax.decoding.mesh import stage
from dex_jax.decoding.mesh.stage import StageNetwork
from dex_jax.decoding.record import Limits, until_done
from dex_jax.errors import DexError
from dex_jax.nn.transformer import Layout, Staged, Transformer, Unrolled
from dex_jax.sampling import Sampling
from dex_jax.sharding import BY_SEQUENCE, BY_STAGE, EVERYWHERE, check_stages

if TYPE_CHECKING:
    from dex_jax.decoding.methods import Schedule
    from dex_jax.decoding.spec import Spec


class Prefilled(NamedTuple):
    """What a loop begins with."""

    memory: Any  # the prompts' keys and values, without a lattice
    token: jax.Array  # [B] int32, token 0
    lengths: jax.Array  # [B] int32, of the prompts
    limits: Limits  # of the loop
    sampling: Sampling | None  # of the loop
    prompt: jax.Array | None = None  # [B, S] int32 padded on the right, for drafts; None without
    costs: RowCosts | None = None  # what ticks take, for drafts that choose their rows


class Running(NamedTuple):
    """What runs: a model, its trained heads, and how."""

    model: Transformer
    heads: Heads
    spec: Spec


class Loop(abc.ABC):
    """One kind of loop on one device. Its state is its own, but has a `record`, a `tick` and the `memory`.

    A loop is hashable, as programs are compiled for it, and emits only what the last layer says, with the noise of the
    position (ar.next_token). What it counts here is for loops each of whose ticks is a stage.
    """

    def __repr__(self) -> str:
        """Without an address: programs are told apart by what they say of themselves (program_store.py)."""
        return f"{type(self).__name__}()"

    @abc.abstractmethod
    def init(self, what: Running, begun: Prefilled, capacity: int) -> Any:
        """The state before the first tick, with room for T new tokens."""

    @abc.abstractmethod
    def run(self, what: Running, state: Any, limits: Limits, sampling: Sampling | None, until_tick: jax.Array) -> Any:
        """Ticks until every sequence is done, or until `until_tick`."""

    def on_mesh(self, schedule: Schedule) -> MeshLoop:
        """The same loop for a mesh; a DexError where there is none for this schedule."""
        raise DexError(f"method {schedule.method} is for one device: leave the mesh out, or use Dex or AR")

    def ticks(self, exits: np.ndarray, length: int, stages: int) -> int:
        """What `record.ticks` of a sequence is that ends after `length` of its tokens; exits [T] int32."""
        return ticks_of(exits, length, stages)

    def counts(self, schedule: Schedule, record: Any) -> dict[str, Any]:
        """Figures of each sequence, [B], by their names in Stats, or in its `counts` where it has no such field.

        `record` is a Record of NumPy arrays, whose lengths and ticks are those of the text that is given out.
        """
        speedup = depth_side_speedup(record.ticks, record.lengths, schedule.stages)
        return {"ticks": record.ticks, "depth_side_speedup": speedup}


class MeshLoop(Loop):
    """A loop that runs on meshes too, on each device under shard_map."""

    def on_mesh(self, schedule: Schedule) -> MeshLoop:
        """Itself."""
        return self

    def check_mesh(self, schedule: Schedule, mesh: Mesh, layout: Layout) -> None:
        """Refuses, with a DexError, a mesh of other stages or exit depths than it can run on; nothing unless said."""

    @abc.abstractmethod
    def init_stage(self, device: StageNetwork, schedule: Schedule, begun: Prefilled, capacity: int) -> Any:
        """`init` on one device of a mesh."""

    @abc.abstractmethod
    def step_stage(
        self, device: StageNetwork, schedule: Schedule, state: Any, limits: Limits, sampling: Sampling | None
    ) -> Any:
        """One tick there."""

    @abc.abstractmethod
    def state_specs(self, schedule: Schedule, memory: Any) -> Any:
        """Where the state lies on a mesh: PartitionSpecs, a prefix of it, given those of `memory`."""


class ARLoop(MeshLoop):
    """AR: a token a tick (decoding/ar.py)."""

    def init(self, what: Running, begun: Prefilled, capacity: int) -> ARState:
        return ar.init(begun.memory, begun.token, begun.lengths, capacity=capacity, limits=begun.limits)

    def run(
        self, what: Running, state: ARState, limits: Limits, sampling: Sampling | None, until_tick: jax.Array
    ) -> ARState:
        return until_done(lambda state: ar.step(what.model, state, limits, sampling), state, until_tick)

    def init_stage(self, device: StageNetwork, schedule: Schedule, begun: Prefilled, capacity: int) -> ARState:
        return ar.init(begun.memory, begun.token, begun.lengths, capacity=capacity, limits=begun.limits)

    def step_stage(
        self, device: StageNetwork, schedule: Schedule, state: ARState, limits: Limits, sampling: Sampling | None
    ) -> ARState:
        return stage.ar_step(device, state, limits, sampling)

    def state_specs(self, schedule: Schedule, memory: Any) -> ARState:
        return ARState(EVERYWHERE, BY_SEQUENCE, BY_SEQUENCE, memory, BY_SEQUENCE)


class DexLoop(MeshLoop):
    """DEX, with drafts and without (decoding/dex/loop.py)."""

    def init(self, what: Running, begun: Prefilled, capacity: int) -> DexState:
        spec, schedule = what.spec, what.spec.schedule
        if schedule.stages == 1:
            memory = cache.with_cohort(begun.memory, spec.config, schedule.rows)
        else:
            memory = cache.with_lattice(begun.memory, spec.config, spec.layout, schedule.stages * schedule.rows)
        return _begin(network_of(*what), schedule, begun._replace(memory=memory), capacity)

    def run(
        self, what: Running, state: DexState, limits: Limits, sampling: Sampling | None, until_tick: jax.Array
    ) -> DexState:
        schedule = what.spec.schedule
        options: dict[str, Any] = {"decs": schedule.decs, "drafts": schedule.drafts}
        return loop.run(network_of(*what), state, limits, sampling, until_tick=until_tick, **options)

    def check_mesh(self, schedule: Schedule, mesh: Mesh, layout: Layout) -> None:
        assert isinstance(layout, Staged)
        if schedule.stages == 1:  # over several stages a pipeline that runs trees
            return
        check_stages(mesh, schedule.stages)
        if layout.depths != schedule.depths:
            lie, want = (",".join(map(str, depths)) for depths in (layout.depths, schedule.depths))
            raise DexError(
                f"the stages of the mesh end at depths {lie} and the schedule's at {want}: load the model with "
                f"layout=Staged(({want}))"
            )

    def init_stage(self, device: StageNetwork, schedule: Schedule, begun: Prefilled, capacity: int) -> DexState:
        slots = schedule.stages * schedule.rows
        memory = cache.with_lattice(begun.memory, device.model.config, Unrolled(), slots)
        state = _begin(device.network, schedule, begun._replace(memory=memory), capacity)
        return state._replace(hidden=state.hidden[:1])

    def step_stage(
        self, device: StageNetwork, schedule: Schedule, state: DexState, limits: Limits, sampling: Sampling | None
    ) -> DexState:
        if schedule.stages < device.stages:
            assert schedule.drafts is not None
            return loop.step(
                stage.pipeline(device, schedule.drafts.counts), state, limits, sampling, drafts=schedule.drafts
            )
        return stage.step(device, state, limits, sampling, decs=schedule.decs, drafts=schedule.drafts)

    def state_specs(self, schedule: Schedule, memory: Any) -> DexState:
        # Each row of the data axis chooses and counts its drafts for itself, on all of its devices alike.
        drafting = None if schedule.drafts is None else Drafting(BY_SEQUENCE, *(EVERYWHERE,) * 6)
        return DexState(
            tick=EVERYWHERE,
            lattice=BY_SEQUENCE,
            hidden=BY_STAGE,
            prefix=BY_SEQUENCE,
            memory=memory,
            noise=BY_SEQUENCE,
            record=BY_SEQUENCE,
            drafting=drafting,
        )


AR_LOOP, DEX_LOOP = ARLoop(), DexLoop()


def _begin(network: Network, schedule: Schedule, begun: Prefilled, capacity: int) -> DexState:
    memory, token, lengths, limits, sampling, prompt, costs = begun
    length = 0 if prompt is None else prompt.shape[1]
    sizes: dict[str, Any] = {"stages": schedule.stages, "rows": schedule.rows, "capacity": capacity, "length": length}
    of_drafts: dict[str, Any] = {"drafts": schedule.drafts, "prompt": prompt, "costs": costs}
    options: dict[str, Any] = {"limits": limits, "sampling": sampling}
    return loop.init(network, memory, token, lengths, **sizes, **of_drafts, **options)
