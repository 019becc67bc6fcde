"""The weights of a transformer on a mesh: which devices hold what, and how each part gets straight to its device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dex_jax.config import ModelConfig
from dex_jax.nn.layers import names_in
from dex_jax.nn.packed import Packed
from dex_jax.nn.sharding import TENSOR, partition
from dex_jax.nn.tiles import in_tiles
from dex_jax.nn.transformer import PARAMETER_AXES, Staged, Transformer
from dex_jax.nn.weights import Packing, blank_weight


def build_on_mesh(
    config: ModelConfig,
    layout: Staged,
    read: Callable[[str], np.ndarray | Packed],
    dtype: jnp.dtype,
    mesh: Mesh,
    packing: Packing = (),
) -> Transformer:
    """Build a transformer on a mesh: every tensor is read once and put on the devices that own it.

    Only tensors that devices of this process need are read. Rows of fused projections are in another order than in
    the checkpoint where a tensor axis splits them: see `tensor_part`. It splits int8 weights too, but no blocks.
    """
    places = layout.places

    def host(name: str) -> list[np.ndarray]:
        found = read(name)
        return jax.tree.leaves(found if isinstance(found, Packed) else np.asarray(found, dtype))

    def init(name: str, shape: tuple[int, ...], kind: str) -> Any:
        field = name.split(".")[-1]
        axes = PARAMETER_AXES[field]
        blank = jax.eval_shape(lambda: blank_weight(name, shape, dtype, packing))
        leaves, tree = jax.tree.flatten(blank)

        def laid(leaf: int, rows: np.ndarray) -> np.ndarray:
            """Return a device's part of an array in the layout that its products read."""
            tiles = isinstance(blank, Packed) and blank.tiles and leaf < len(blank.parts)
            return in_tiles(rows, blank.formats[leaf]) if tiles else rows

        if not name.startswith("layers."):
            whole = host(name)
            shards = [lambda index, i=i: laid(i, whole[i][index]) for i in range(len(leaves))]
            placed = [_place_parts(own.shape, axes, mesh, shard) for own, shard in zip(whole, shards, strict=True)]
            return jax.tree.unflatten(tree, placed)
        number = int(name.split(".")[1].lstrip("*"))

        @functools.lru_cache(maxsize=layout.devices if len(leaves) > 1 else 1)
        def tensor(device: int) -> list[np.ndarray]:
            layer = places[number][device]
            if layer is None:
                return [np.zeros(leaf.shape[1:], leaf.dtype) for leaf in leaves]
            return host(f"layers.{layer}.{field}")

        def part(leaf: int, index: tuple[slice, ...]) -> np.ndarray:
            return laid(leaf, tensor_part(config, field, tensor(index[0].start or 0)[leaf], index[1:]))[None]

        lead = ("stage", *axes)
        placed = [_place_parts(leaf.shape, lead, mesh, functools.partial(part, i)) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(tree, placed)

    return Transformer(config, init, layout)


def _place_parts(
    shape: tuple[int, ...], axes: tuple[str, ...], mesh: Mesh, part: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Make an array with these logical axes of the parts that `part` returns for the devices of this process."""
    sharding = NamedSharding(mesh, partition(axes[: len(shape)], shape, mesh))
    where: dict[Any, Any] = dict(sharding.addressable_devices_indices_map(shape))
    devices = sorted(where, key=lambda device: where[device][0].start or 0)
    shards = [jax.device_put(part(where[device]), device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def tensor_part(config: ModelConfig, field: str, whole: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """Return one device's part of a layer's tensor `whole`, which is in the checkpoint's order.

    A fused projection has the rows of several tensors, one above the other; a device takes its share of each, so
    that its rows are its own query, key and value heads, or its own gates and ups. `index` says where the part lies in
    the array on the mesh.
    """
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    split: dict[str, tuple[int, ...]] = {
        "qkv": (queries, keys, keys),
        "qkv_bias": (queries, keys, keys),
        "gate_up": (config.mlp_width, config.mlp_width),
    }
    first = index[0]
    if field not in split or first.start is None:
        return whole[index]
    rows = first.stop - first.start
    splits = whole.shape[0] // rows
    at = first.start // rows
    bounds = np.cumsum(split[field])[:-1]
    parts = [np.split(part, splits)[at] for part in np.split(whole, bounds)]
    return np.concatenate(parts)


def weight_specs(weights: Any, mesh: Mesh | None) -> Any:
    """Return the PartitionSpec of every weight; `weights` are those of a LanguageModel on a mesh, arrays or shapes."""
    assert mesh is not None

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        names = names_in(path)
        field = next(name for name in reversed(names) if name in PARAMETER_AXES)
        lead = ("stage",) if "layers" in names else ()
        return partition((*lead, *PARAMETER_AXES[field])[: len(leaf.shape)], leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(spec, weights)


def device_config(config: ModelConfig, layout: Staged, mesh: Mesh) -> ModelConfig:
    """Return the configuration of one device's part: the layers of its stages, and its share of heads and mlp."""
    splits = mesh.shape[TENSOR]
    return dataclasses.replace(
        config,
        num_layers=len(layout.places),
        layer_kinds=(),  # they differ from device to device, and `kind_table` has them
        num_heads=config.num_heads // splits,
        num_kv_heads=config.num_kv_heads // splits,
        mlp_width=config.mlp_width // splits,
    )
