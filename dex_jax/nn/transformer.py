"""The transformer as a flax.nnx module with a list of layers, and the layout of its weights on a mesh."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import ModelConfig
from dex_jax.nn.attention import capped
from dex_jax.nn.kinds import KindTable, kind_table
from dex_jax.nn.layers import LAYER_AXES, DecoderLayer, linear, offset_scale, recorded, rms_norm, rounded
from dex_jax.nn.packed import Packed, as_products_read, take_rows


@dataclasses.dataclass(frozen=True)
class Staged:
    """The layout of layers on a mesh: l arrays [M, ...] of each parameter, the j-th with layer j of every device.

    Device m of the stage axis, one of M, has S = K / M stages, those from m S on. The first axis is split over these
    devices; each sees l layers of its own, one array each, as if it had a small model. A stage that is shorter than
    another device's is padded with zero layers, which are skipped.
    """

    depths: tuple[int, ...]  # exit depths x_1 < ... < x_K = L
    held: int = 1  # S, stages that a device holds; `load` sets it by the mesh

    @property
    def devices(self) -> int:
        """Number of devices of the stage axis, M."""
        return len(self.depths) // self.held

    @property
    def device_depths(self) -> tuple[int, ...]:
        """The depths among a device's own l layers at which its S stages end; the last of them is l."""
        lengths = [len(stage) for stage in stage_ranges(self.depths)]
        longest = [max(lengths[s :: self.held]) for s in range(self.held)]
        return tuple(itertools.accumulate(longest))

    @property
    def places(self) -> list[list[int | None]]:
        """The layer, 0-based, at each of the l places of every device, [l][M]; None for padding."""
        stages, found = stage_ranges(self.depths), []
        for s, own in enumerate(stage_ranges(self.device_depths)):
            for j in range(len(own)):
                found.append([stage[j] if j < len(stage) else None for stage in stages[s :: self.held]])
        return found


PARAMETER_AXES: dict[str, tuple[str, ...]] = {
    "embed": ("vocabulary", "width"),
    "final_norm": ("width",),
    "unembed": ("vocabulary", "width"),
    **LAYER_AXES,
}
"""Logical axes of every parameter, without those that a layout puts in front."""


def stage_ranges(depths: tuple[int, ...]) -> list[range]:
    """Return the 0-based layers of each stage for exit depths x_1 < ... < x_K."""
    return [range(lo, hi) for lo, hi in zip((0, *depths[:-1]), depths, strict=True)]


class Transformer(nnx.Module):
    """A decoder-only transformer: embedding, decoder layers, final norm and unembedding.

    Args:
      config: shapes and constants.
      init: (name, shape, kind) -> array, or a Packed where kind is "kernel", with canonical names ("embed",
        "layers.3.qkv"; "layers.*3.qkv" for the fourth layer of every device on a mesh).
      layout: None for L layers, Staged(depths) for l with a leading axis [M].
      tensor_axis: see DecoderLayer.
      vocabulary_axis: under shard_map, the mesh axis over which embedding and unembedding are split by tokens.
      kinds: those of a device's layers on a mesh; None takes them from config.
    """

    def __init__(
        self,
        config: ModelConfig,
        init: Callable[..., jax.Array | Packed],
        layout: Staged | None = None,
        tensor_axis: str | None = None,
        vocabulary_axis: str | None = None,
        kinds: KindTable | None = None,
    ):
        self.config = config
        self.layout = layout
        self.kinds = kinds or kind_table(config)
        self.vocabulary_axis = vocabulary_axis
        self.embed = nnx.Param(init("embed", (config.vocab_size, config.width), "kernel"))
        self.final_norm = nnx.Param(init("final_norm", (config.width,), "scale"))
        self.unembed = None if config.tied else nnx.Param(init("unembed", (config.vocab_size, config.width), "kernel"))
        lead = () if layout is None else (layout.devices,)
        names = [f"layers.{i}" for i in range(config.num_layers)]
        if layout is not None:
            names = [f"layers.*{j}" for j in range(len(layout.places))]
        self.layers = module_list(DecoderLayer(config, _named(init, name, lead), tensor_axis) for name in names)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of hidden states, and of weights that are not packed."""
        return self.final_norm[...].dtype

    @property
    def vocabulary_kernel(self) -> jax.Array | Packed:
        """The kernel that unembeds features, [V, D]: the embedding where it is tied."""
        return (self.embed if self.unembed is None else self.unembed)[...]

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Embed tokens: [...] int32 -> [..., D]."""
        if self.vocabulary_axis is None:
            return self._scaled(take_rows(self.embed[...], tokens).astype(self.dtype))
        rows = self.embed[...].shape[0]
        own = tokens - jax.lax.axis_index(self.vocabulary_axis) * rows
        found = take_rows(self.embed[...], jnp.clip(own, 0, rows - 1)).astype(self.dtype)
        here = (own >= 0) & (own < rows)
        return self._scaled(jax.lax.psum(jnp.where(here[..., None], found, 0), self.vocabulary_axis))

    def _scaled(self, embedded: jax.Array) -> jax.Array:
        scale = self.config.embed_scale
        return embedded if scale == 1 else rounded(lambda embedded: embedded * scale, embedded)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Apply final norm and unembedding: [..., D] -> [..., V] float32 (exit K, and every exit of kind "shared")."""
        return self.unembedding(self.normed(hidden))

    def normed(self, hidden: jax.Array) -> jax.Array:
        """Apply the final norm, and divide by the divisor of logits: [..., D] -> [..., D]."""
        return rms_norm(hidden, self.final_scale, self.config.norm_eps)

    @property
    def final_scale(self) -> jax.Array:
        """The scale of `normed`, [D]."""
        scale, divisor = offset_scale(self.final_norm[...], self.config), self.config.logit_divisor
        return scale if divisor == 1 else scale.astype(jnp.float32) / divisor

    def unembedding(self, features: jax.Array) -> jax.Array:
        """Return the logits of `normed` features, capped like the model's and whole on every device: [..., V]."""
        own = capped(linear(features, self.vocabulary_kernel, out_dtype=jnp.float32), self.config.logit_cap)
        if self.vocabulary_axis is None:
            return own
        return jax.lax.all_gather(own, self.vocabulary_axis, axis=own.ndim - 1, tiled=True)


def layer_parameters(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, kind) of every parameter of a layer, by name, as the module itself requests them."""
    return recorded(functools.partial(DecoderLayer, config))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter, by canonical name."""
    shapes = {"embed": (config.vocab_size, config.width), "final_norm": (config.width,)}
    if not config.tied:
        shapes["unembed"] = (config.vocab_size, config.width)
    layer = layer_parameters(config)
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, (shape, _) in layer.items()}
    return shapes


def build(config: ModelConfig, read: Callable[[str], np.ndarray | Packed], dtype: jnp.dtype) -> Transformer:
    """Build a transformer in `dtype` from `read`: canonical name -> array of any float dtype, or a Packed."""

    def init(name: str, shape: tuple[int, ...], kind: str) -> Any:
        found = read(name)
        # jnp.asarray would compile a program for each shape, which copies once more.
        return jax.device_put(as_products_read(found) if isinstance(found, Packed) else np.asarray(found, dtype=dtype))

    return Transformer(config, init)


def _named(init, prefix: str, lead: tuple[int, ...]):
    return lambda name, shape, kind: init(f"{prefix}.{name}", lead + shape, kind)


def module_list(modules: Iterable[nnx.Module]):
    """Return modules in the form that a field of another module takes."""
    # flax 0.11 has no nnx.List and takes a plain list; later ones refuse one.
    return nnx.List(modules) if hasattr(nnx, "List") else list(modules)
