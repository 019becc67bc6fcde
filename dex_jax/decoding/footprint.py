"""How much memory a generation needs, from shapes alone: nothing is loaded and nothing is compiled.

Letters: B sequences, S cache length, K stages, D width, V vocabulary. Sizes are bytes on one device; a GB is 1e9 bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dex_jax import cache
from dex_jax.config import ModelConfig
from dex_jax.decoding import session
from dex_jax.decoding.dex.drafters import GivenDrafter, own_bytes
from dex_jax.decoding.dex.interface import ExitZero
from dex_jax.decoding.dex.proposals import HEAD_BLOCK
from dex_jax.decoding.dex.trained_exits import Heads
from dex_jax.decoding.mesh import programs as on_mesh
from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.record import Limits
from dex_jax.decoding.sizes import PIECES
from dex_jax.decoding.spec import Spec
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn import few_rows
from dex_jax.nn.exits import abstract_parameters
from dex_jax.nn.placing import device_config, weight_specs
from dex_jax.nn.transformer import Layout, Staged
from dex_jax.nn.weights import Packing, abstract_weights, weight_bytes
from dex_jax.sampling import Sampling, sampling_keys
from dex_jax.sharding import BY_SEQUENCE, DATA, EVERYWHERE, nbytes, place


class SessionShapes(NamedTuple):
    """Arguments of the decoding programs as jax.ShapeDtypeStruct, to compile ahead of time or to measure."""

    weights: Any  # of the model, in one layout
    memory: cache.Memory  # committed cache, as before the lattice is there
    last: jax.ShapeDtypeStruct  # [B, D], hidden states of last prompt tokens
    lengths: jax.ShapeDtypeStruct  # [B] int32, prompt lengths
    # limits, sampling: as in a session; sampling is None when greedy, and has both filters otherwise
    limits: Limits
    sampling: Sampling | None
    state: Any  # what the loop carries, `memory` included
    scalar: jax.ShapeDtypeStruct  # int32 scalar, a start position or a tick
    prompt: jax.ShapeDtypeStruct | None  # [B, S] int32 with drafts; None otherwise
    heads: Heads = Heads()  # trained ones; none

    def of_prefill(self, chunk: int) -> tuple[Any, ...]:
        """What `session.prefill_chunk` takes for chunks of so many tokens."""
        tokens = jax.ShapeDtypeStruct((self.lengths.shape[0], chunk), jnp.int32)
        return self.weights, self.heads, self.memory, self.last, tokens, self.scalar, self.lengths

    @property
    def of_start(self) -> tuple[Any, ...]:
        """What `session.start_decoding` takes."""
        return self.weights, self.heads, self.memory, self.last, self.lengths, self.limits, self.sampling, self.prompt

    @property
    def of_run(self) -> tuple[Any, ...]:
        """What `session.run_ticks` takes."""
        return self.weights, self.heads, self.state, self.limits, self.sampling, self.scalar


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes that one generation holds on its device."""

    weights_bytes: int  # all parameters, a tied embedding once
    cache_bytes: int  # committed keys and values
    lattice_bytes: int  # what the loop carries beside: lattice keys and values, hidden states, nodes, noise, the record
    exits_bytes: int  # trained exit heads; 0 for "shared" ones, which are the model's own
    workspace_bytes: int  # an estimate of temporaries: the larger of a prefill chunk's and of a tick's

    @property
    def total_bytes(self) -> int:
        """Everything at once."""
        return sum(dataclasses.astuple(self))


def footprint(
    config: ModelConfig,
    dtype: jnp.dtype,
    schedule: Schedule,
    batch: int,
    cache_length: int,
    layout: Layout,
    *,
    sampled: bool = False,
    exits_bytes: int = 0,
    mesh: Mesh | None = None,
    packing: Packing = (),
) -> Footprint:
    """What decoding `batch` sequences of at most `cache_length` positions, as `cache_length_for` gives it, needs.

    `dtype` is of caches, and of weights that are not packed as `packing` says; a `sampled` generation keeps K
    positions' noise of V float32 numbers for each sequence; `exits_bytes` is the size of trained heads. On a mesh
    figures are of one of its devices.
    """
    about = (config, dtype, schedule, layout, batch, cache_length)
    shapes = session_shapes(*about, sampled=sampled, mesh=mesh, packing=packing)
    committed = nbytes((shapes.memory.keys, shapes.memory.values))
    return Footprint(
        weights_bytes=nbytes(shapes.weights),
        cache_bytes=committed,
        lattice_bytes=nbytes(shapes.state) - committed,
        exits_bytes=exits_bytes,
        workspace_bytes=_workspace(config, jnp.dtype(dtype), schedule, layout, batch, cache_length, sampled, mesh),
    )


def trained_bytes(
    config: ModelConfig, dtype: jnp.dtype, exits: GivenDrafter | None, mesh: Mesh | None = None, packing: Packing = ()
) -> int:
    """Size on one device of exits or a drafter, with the rows of the unembedding that a draft vocabulary copies."""
    if exits is None:
        return 0
    if not isinstance(exits, TrainedExits):
        return own_bytes(exits, dtype)
    # On a mesh a device holds the head of its own stage, and what all heads share.
    held = exits.config if mesh is None else dataclasses.replace(exits.config, depths=exits.config.depths[:1])
    kept = few_rows.kept_dtype(jnp.dtype(dtype))
    size = own_bytes(exits, dtype) if held.is_drafter else nbytes(abstract_parameters(held, jnp.dtype(dtype)))
    if exits.vocabulary is None:
        return size
    unembed = "embed" if config.tied else "unembed"
    sizes = weight_bytes(config, kept, tuple(each for each in packing if each[0] == unembed))
    return size + len(exits.vocabulary) * (sizes[unembed] // config.vocab_size + 4) + 4 * config.vocab_size


def remembered_bytes(drafter: ExitZero, dtype: jnp.dtype, batch: int, cache_length: int) -> int:
    """Size of what a drafter remembers of `batch` sequences of at most `cache_length` positions."""
    return nbytes(jax.eval_shape(lambda: drafter.empty(batch, cache_length, dtype)))


def session_shapes(
    config: ModelConfig,
    dtype: jnp.dtype,
    schedule: Schedule,
    layout: Layout,
    batch: int,
    cache_length: int,
    *,
    capacity: int | None = None,
    sampled: bool = False,
    mesh: Mesh | None = None,
    packing: Packing = (),
    drafter: ExitZero | None = None,
    heads: Heads | None = None,
) -> SessionShapes:
    """The shapes of a session's arrays; `capacity` is T, room for new tokens (None: as much as the cache).

    On a mesh, whose layout is Staged and whose devices need not be there, they carry their shardings. `heads` hold the
    shapes of a drafter's arrays.
    """
    capacity = cache_length if capacity is None else capacity
    weights = abstract_weights(config, layout, dtype, packing)
    memory = cache.shapes(config, layout, batch, cache_length, 0, dtype, rings=True)
    array: Any = jax.ShapeDtypeStruct  # stands where arrays will
    last, lengths, scalar = array((batch, config.width), dtype), array((batch,), jnp.int32), array((), jnp.int32)
    limits = Limits(lengths, array((max(len(config.eos_ids), 1),), jnp.int32))
    sampling = None
    if sampled:
        real = array((), jnp.float32)
        sampling = Sampling(jax.eval_shape(lambda: sampling_keys([0] * batch)), real, scalar, real)
    spec = Spec(config, layout, schedule, drafter=drafter, mesh=mesh)
    if drafter is not None:
        memory = memory._replace(exits=jax.eval_shape(lambda: drafter.empty(batch, cache_length, dtype)))
    if mesh is not None:
        memory = memory._replace(lattice_keys=(), lattice_values=())
    start = functools.partial(session.start_decoding, spec=spec, capacity=capacity)
    prompt = None if schedule.drafts is None else array((batch, cache_length), jnp.int32)
    shapes = SessionShapes(weights, memory, last, lengths, limits, sampling, None, scalar, prompt, heads or Heads())
    shapes = shapes._replace(state=jax.eval_shape(start, *shapes.of_start))
    return shapes if mesh is None else SessionShapes(*place(shapes, _specs(spec, shapes), mesh))


def _specs(spec: Spec, shapes: SessionShapes) -> SessionShapes:
    each = BY_SEQUENCE
    return SessionShapes(
        weights=weight_specs(shapes.weights, spec.mesh),
        memory=on_mesh.MEMORY,
        last=each,
        lengths=each,
        limits=on_mesh.LIMITS,
        sampling=on_mesh.sampling_specs(shapes.sampling),
        state=on_mesh.state_specs(spec),
        scalar=EVERYWHERE,
        prompt=each,
        heads=EVERYWHERE,
    )


def device_memory(device: jax.Device | None = None) -> int | None:
    """Bytes free on a device (None: the first one); on a CPU, memory that this process can get. None when unknown."""
    device = jax.devices()[0] if device is None else device
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _host_memory() if device.platform == "cpu" else None


def verdict(needed: Footprint, available: int | None) -> str:
    """One sentence: whether it fits, and what to lower if not."""
    need = f"{needed.total_bytes / 1e9:.2f} GB"
    if available is None:
        return f"needs {need}; the device does not say how much memory it has."
    have = f"{available / 1e9:.2f} GB"
    if needed.total_bytes <= available:
        return f"fits: {need} of the {have} that are free."
    remedies = {
        "weights_bytes": "use int8 weights, a smaller dtype or a smaller model",
        "cache_bytes": "lower the number of prompts or samples, or max_new_tokens",
        "lattice_bytes": "lower rows, explorers, or the number of prompts or samples",
        "exits_bytes": "use fewer explorers or exits with a smaller vocabulary",
        "workspace_bytes": "lower the number of prompts or samples, or rows",
    }
    largest = max(remedies, key=lambda name: getattr(needed, name))
    return f"does not fit: {need} are needed and {have} are free; {remedies[largest]}."


def _workspace(
    config: ModelConfig,
    dtype: jnp.dtype,
    schedule: Schedule,
    layout: Layout,
    batch: int,
    cache_length: int,
    sampled: bool,
    mesh: Mesh | None,
) -> int:
    """Temporaries of the larger of a prefill chunk and a tick, one layer alive at a time."""
    size, real, side_by_side = dtype.itemsize, 4, schedule.stages
    if mesh is not None:
        assert isinstance(layout, Staged)
        config, side_by_side = device_config(config, layout, mesh), 1
        batch //= mesh.shape[DATA]

    def layer(rows: int, keys: int) -> int:
        scores = rows * config.num_heads * keys * (real + size)
        mlp = rows * config.mlp_width * (2 * real + 3 * size)
        return max(scores, mlp) + rows * (config.qkv_width + 4 * config.width) * (real + size)

    def heads(rows: int) -> int:
        # Logits, their masked copy and its probabilities; sampling adds noise and filtered scores.
        return rows * config.vocab_size * real * (5 if sampled else 3)

    chunk = min(cache_length, PIECES[0])
    prefill = layer(batch * chunk, cache_length)
    slots = schedule.rows * (schedule.stages if schedule.has_lattice else 1)
    rows = batch * schedule.rows
    tick = layer(rows * side_by_side, cache_length + slots) + heads(min(rows, batch * HEAD_BLOCK))
    return max(prefill, tick, heads(batch))


def _host_memory() -> int | None:
    """What Linux calls available, within a container's limit; elsewhere all physical memory; None when unknown."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            found += [int(text) for text in [file.read().strip()] if text.isdigit()]
    except OSError:
        pass
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
