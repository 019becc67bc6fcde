"""The meshes that a user may request, and the table that maps logical axes of arrays to axes of the mesh.

A mesh has three axes. "stage": M devices share the K explorers evenly, each with the layers, caches and hidden states
of its own stages and of no other. "tensor": the heads, the mlp and the vocabulary of a stage are split over the
devices of its row. "data": sequences are split over copies of all that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError

DATA, STAGE, TENSOR = "data", "stage", "tensor"
MESH_AXES = (DATA, STAGE, TENSOR)
"""The axes from the slowest link to the fastest: devices of one tensor row are neighbours."""

AUTOMATIC = (AxisType.Auto,) * len(MESH_AXES)

RULES = {"stage": STAGE, "sequence": DATA, "heads": TENSOR, "mlp": TENSOR, "vocabulary": TENSOR}
"""The mesh axis of each logical axis. All others ("width", "layer", positions, rows) are whole on every device."""

EVERYWHERE: Any = PartitionSpec()


def spec_of(*axes: str | None) -> PartitionSpec:
    """Return the PartitionSpec of an array with these logical axes, on a mesh that divides all of them."""
    return PartitionSpec(*(RULES.get(name or "") for name in axes))


BY_SEQUENCE: Any = spec_of("sequence")
BY_STAGE: Any = spec_of("stage", "sequence")


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Return the PartitionSpec of an array on `mesh`; an axis that the devices do not divide is not split."""
    found: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = RULES.get(name or "")
        found.append(axis if axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*found)


def bits_of(dtype: jnp.dtype) -> int:
    """Return the number of bits that a number of this dtype takes on a device, where two of 4 bits share a byte."""
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def nbytes(tree: Any) -> int:
    """Return the bytes that one device holds of all arrays or ShapeDtypeStructs of a tree."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * bits_of(leaf.dtype) // 8

    return sum(map(size, jax.tree.leaves(tree)))


def parse_mesh(text: str) -> dict[str, int]:
    """Parse axis sizes such as "stage=5,tensor=2", all in the order of MESH_AXES, 1 by default; else a DexError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in MESH_AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise _no_mesh(text)
        sizes[name] = int(size)
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def _no_mesh(wanted: Any) -> DexError:
    return DexError(
        f"{wanted!r} is no mesh: write axes among {', '.join(MESH_AXES)} with their sizes, each once, such as "
        "stage=5 or stage=2,tensor=3"
    )


def device_name(device: jax.Device) -> str:
    """Return a device's platform and kind, for reports."""
    return f"{device.platform}:{device.device_kind}"


def make_mesh(wanted: str | dict[str, int] | Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with all three axes.

    Args:
      wanted: "stage=5,tensor=2", the same as a dict, or a jax Mesh with axes among MESH_AXES.
      devices: those to choose from; the first ones are taken, in their order. None stands for all, which JAX puts in
        the order of their links where all are taken.

    Raises:
      DexError: another axis, a size that is no whole number of at least 1, or more devices than there are.
    """
    if isinstance(wanted, Mesh):
        _known(wanted.shape)
        order = [axis for axis in MESH_AXES if axis in wanted.shape]
        by_axis = np.transpose(wanted.devices, [wanted.axis_names.index(axis) for axis in order])
        grid = by_axis.reshape([wanted.shape.get(axis, 1) for axis in MESH_AXES])
        return Mesh(grid, MESH_AXES, axis_types=AUTOMATIC)
    if isinstance(wanted, str):
        wanted = parse_mesh(wanted)
    _known(wanted)
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in wanted.values()):
        raise _no_mesh(wanted)
    sizes = tuple(int(wanted.get(axis, 1)) for axis in MESH_AXES)
    there = jax.devices() if devices is None else list(devices)
    count = int(np.prod(sizes))
    if count > len(there):
        text = ",".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1)
        hint = ""
        if there[0].platform == "cpu":
            hint = f" (XLA_FLAGS=--xla_force_host_platform_device_count={count} makes a CPU count as {count})"
        raise DexError(
            f"the mesh {text} needs {count} devices and there are {len(there)} ({there[0].platform}): ask for a "
            f"smaller one{hint}"
        )
    if devices is None and count == len(there):
        return jax.make_mesh(sizes, MESH_AXES, axis_types=AUTOMATIC)
    return Mesh(np.asarray(there[:count]).reshape(sizes), MESH_AXES, axis_types=AUTOMATIC)


def check_model(mesh: Mesh, config: ModelConfig) -> None:
    """Raise DexError for more stages than the model has layers, or a tensor axis that cannot split the model."""
    stages, splits = mesh.shape[STAGE], mesh.shape[TENSOR]
    if stages > config.num_layers:
        raise DexError(f"a mesh of {stages} stages needs as many layers, and the model has {config.num_layers}")
    heads, groups, mlp = config.num_heads, config.num_kv_heads, config.mlp_width
    if heads % splits or groups % splits or mlp % splits:
        raise DexError(
            f"tensor={splits} must divide the model's {heads} heads, {groups} key-value heads and mlp width {mlp}: "
            "choose another size"
        )
    if config.qk_norm_whole and splits > 1:
        raise DexError("a model that norms all heads together is not split over a tensor axis: use stage= instead")


def check_stages(mesh: Mesh, stages: int) -> None:
    """Raise DexError unless every device of the stage axis gets equally many of a plan's explorers."""
    if stages % mesh.shape[STAGE]:
        raise DexError(
            f"the mesh has stage={mesh.shape[STAGE]} and the plan {stages} explorers: every device runs equally many, "
            "so ask for a multiple of its stages"
        )


def check_batch(mesh: Mesh, sequences: int) -> None:
    """Raise DexError unless the data axis divides the number of sequences."""
    if sequences % mesh.shape[DATA]:
        raise DexError(
            f"data={mesh.shape[DATA]} does not divide the {sequences} sequences: give a multiple of it, or a smaller "
            "data axis"
        )


def place(tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Put arrays where `specs` say (PartitionSpecs, a prefix of the tree); jax.ShapeDtypeStructs get the sharding."""

    def one(leaf: Any, sharding: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(leaf)
        # All hosts hold the same array, and each puts its part on its own devices.
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            bits = one(np.asarray(jax.random.key_data(leaf)), sharding)
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return map_placed(one, tree, specs, mesh)


def zeros(shapes: Any, specs: Any, mesh: Mesh) -> Any:
    """Make arrays of zeros like a tree of jax.ShapeDtypeStructs, on the devices where they belong."""
    shardings = map_placed(lambda leaf, sharding: sharding, shapes, specs, mesh)
    blank = functools.partial(jax.tree.map, lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.jit(blank, out_shardings=shardings)()


def map_placed(function: Any, tree: Any, specs: Any, mesh: Mesh) -> Any:
    """Apply function(leaf, its NamedSharding) to every leaf of a tree; `specs` are a prefix of it."""

    def under(spec: PartitionSpec, branch: Any) -> Any:
        # A program's result without elements lies everywhere, whatever the program says.
        return jax.tree.map(lambda leaf: function(leaf, NamedSharding(mesh, spec if leaf.size else EVERYWHERE)), branch)

    return jax.tree.map(under, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def _known(axes: Any) -> None:
    for axis in axes:
        if axis not in MESH_AXES:
            raise DexError(f"a mesh has the axes {', '.join(MESH_AXES)}, and not {axis!r}: choose among these")
