"""One decoder layer, with projections, a gated mlp and norms before or after, and the operations it is made of.

Letters: B sequences, R rows a sequence (tokens of a prompt chunk, or lattice nodes), D width, H query heads,
G key-value heads, d head width, F mlp width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dex_jax.config import ModelConfig
from dex_jax.nn import few_rows
from dex_jax.nn.packed import Packed
from dex_jax.nn.products import dot, rows_times_kernel
from dex_jax.nn.rotary import Rotation, turned

FEW_ROWS = 64
"""The most rows that XLA on a CPU multiplies faster as columns (benchmarks/few_rows.py of commit 67cc4e4)."""


Init = Callable[[str, tuple[int, ...], str], jax.Array]
"""The function (name, shape, kind) -> a parameter; kind is "kernel", "scale" or "bias" unless stated otherwise."""


def linear(x: jax.Array, kernel: jax.Array | Packed, bias: jax.Array | None = None, out_dtype=None) -> jax.Array:
    """Multiply x [..., in] by kernel [out, in].T (+ bias [out]): [..., out].

    The kernel is packed, or has x's dtype or one that `few_rows.kept_dtype` gave. Products are accumulated in float32
    and returned in `out_dtype`; None stands for x's.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, Packed):
        out = kernel.product(rows)
    elif isinstance(kernel, few_rows.OneOf):
        out = few_rows.few_rows_product(rows, kernel)
    elif {rows.dtype, kernel.dtype} <= {*few_rows.DTYPES} and few_rows.ready():
        out = jax.lax.platform_dependent(rows, kernel, cpu=few_rows.few_rows_product, default=rows_times_kernel)
    elif rows.shape[0] > FEW_ROWS:
        out = rows_times_kernel(rows, kernel)
    else:
        out = jax.lax.platform_dependent(rows, kernel, cpu=_kernel_times_columns, default=rows_times_kernel)
    out = out.astype(out_dtype or x.dtype)
    if bias is not None:
        out = out + bias[None]
    return out.reshape(*x.shape[:-1], kernel.shape[0])


def _kernel_times_columns(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    # On CPUs, few rows: [out, in] @ [in, R] runs 1.2 to 1.6 times as fast as the transposed product, which XLA would
    # turn it back into without the barriers (benchmarks/few_rows.py of commit 67cc4e4).
    columns = jax.lax.optimization_barrier(rows.T)
    return jax.lax.optimization_barrier(dot(kernel.astype(rows.dtype), columns, ((1,), (0,)))).T


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Compute the root-mean-square norm of x [..., D] in float32, with scale [D]: [..., D] in x's dtype."""
    norm, plain = (functools.partial(each, eps=eps) for each in (few_rows.few_rows_norm, _rms_norm))
    return few_rows.in_cpp(norm, plain, x, scale)


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * inverse * weight).astype(x.dtype)


def gated(gate_up: jax.Array, activation: str) -> jax.Array:
    """Activate the first half of the last axis ("silu" or "gelu"), times the second: [..., 2 F] -> [..., F]."""

    def plain(gate_up: jax.Array) -> jax.Array:
        gate, up = jnp.split(gate_up, 2, axis=-1)
        activate = jax.nn.silu if activation == "silu" else jax.nn.gelu
        return rounded(lambda gate, up: activate(gate) * up, gate, up)

    return few_rows.in_cpp(functools.partial(few_rows.few_rows_gate, activation=activation), plain, gate_up)


def recorded(make: Callable[[Init], nnx.Module]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, kind) of every parameter that a module requests from its `init`, by name, in its order."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def record(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
        found[name] = (shape, kind)
        return jnp.zeros(shape)

    jax.eval_shape(lambda: nnx.state(make(record)))
    return found


def names_in(path: Sequence[Any]) -> list[str]:
    """Return the names in a path to an array of a module's state."""
    return [str(entry.key) for entry in path if hasattr(entry, "key")]


LAYER_AXES: dict[str, tuple[str, ...]] = {
    "attention_norm": ("width",),
    "attention_out_norm": ("width",),
    "qkv": ("heads", "width"),
    "qkv_bias": ("heads",),
    "q_norm": ("head",),
    "k_norm": ("head",),
    "out": ("width", "heads"),
    "out_bias": ("width",),
    "mlp_norm": ("width",),
    "mlp_out_norm": ("width",),
    "gate_up": ("mlp", "width"),
    "down": ("width", "mlp"),
}
"""Logical axes of a layer's parameters (dex_jax/nn/sharding.py says where they lie on a mesh)."""


class DecoderLayer(nnx.Module):
    """A decoder layer: attention and a gated mlp, with the query-key-value and gate-up projections fused.

    Every parameter may carry a leading axis (on a mesh); the methods work on one layer's slice.

    Args:
      config: shapes and switches.
      init: gives each parameter.
      tensor_axis: under shard_map, the mesh axis that splits heads and mlp over devices; `config` then counts this
        device's own, and the two products that end in D are summed over the axis. None: all is here.
    """

    def __init__(self, config: ModelConfig, init: Init, tensor_axis: str | None = None):
        c = config

        def parameter(there: bool, name: str, kind: str, *shape: int) -> nnx.Param | None:
            return nnx.Param(init(name, shape, kind)) if there else None

        before, after = c.norms in ("before", "both"), c.norms in ("after", "both")
        queries, keys = (c.num_heads, c.num_kv_heads) if c.qk_norm_whole else (1, 1)
        self.attention_norm = parameter(before, "attention_norm", "scale", c.width)
        self.qkv = nnx.Param(init("qkv", (c.qkv_width, c.width), "kernel"))
        self.qkv_bias = parameter(c.qkv_bias, "qkv_bias", "bias", c.qkv_width)
        self.q_norm = parameter(c.qk_norm, "q_norm", "scale", queries * c.head_dim)
        self.k_norm = parameter(c.qk_norm, "k_norm", "scale", keys * c.head_dim)
        self.out = nnx.Param(init("out", (c.width, c.num_heads * c.head_dim), "kernel"))
        self.out_bias = parameter(c.out_bias, "out_bias", "bias", c.width)
        self.attention_out_norm = parameter(after, "attention_out_norm", "scale", c.width)
        self.mlp_norm = parameter(before, "mlp_norm", "scale", c.width)
        self.gate_up = nnx.Param(init("gate_up", (2 * c.mlp_width, c.width), "kernel"))
        self.down = nnx.Param(init("down", (c.width, c.mlp_width), "kernel"))
        self.mlp_out_norm = parameter(after, "mlp_out_norm", "scale", c.width)
        self.config = config
        self.tensor_axis = tensor_axis

    def project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project states [B, R, D] to queries [B, R, H, d], keys and values [B, G, R, d]; rotate queries and keys."""
        c = self.config
        qkv = linear(self.entered(x), self.qkv[...], _value(self.qkv_bias))
        bounds = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
        if c.qk_norm:
            parts = jnp.split(qkv, bounds, axis=-1)
            own = [each if c.qk_norm_whole else each.reshape(*x.shape[:-1], -1, c.head_dim) for each in parts[:2]]
            normed = [self._normed(each, scale) for each, scale in zip(own, (self.q_norm, self.k_norm), strict=True)]
            qkv = jnp.concatenate([*(each.reshape(*x.shape[:-1], -1) for each in normed), parts[2]], axis=-1)
        queries, keys, values = turned(qkv, rotation, c.num_kv_heads, c.head_dim)
        # Attention itself multiplies with d**-0.5.
        scale = 1.0 if c.attention_scale is None else c.attention_scale * c.head_dim**0.5
        if rotation.queries is not None:
            scale = scale * rotation.queries[..., None, None]
        if rotation.queries is not None or abs(scale - 1) > 1e-12:
            queries = rounded(lambda queries: queries * scale, queries)
        return queries, keys, values

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Add the attention output [B, R, H, d] and then the mlp to x [B, R, D]."""
        flat = attended.reshape(*x.shape[:-1], -1)
        attended = self._summed(flat, self.out[...], _value(self.out_bias))
        x = self._added(self.residual(x), attended, self.attention_out_norm)
        gate_up = linear(self._normed(x, self.mlp_norm), self.gate_up[...])
        down = self._summed(gated(gate_up, self.config.activation), self.down[...])
        return self._added(x, down, self.mlp_out_norm)

    def entered(self, x: jax.Array) -> jax.Array:
        """Return the layer's input as the attention projects it, after the norm that the layer may have."""
        return self._normed(x, self.attention_norm)

    def residual(self, x: jax.Array) -> jax.Array:
        """Return the part of the layer's input that attention and mlp are added to."""
        return x

    def _normed(self, x: jax.Array, scale: nnx.Param | None) -> jax.Array:
        """Return x after the norm with this scale, if the layer has it."""
        return x if scale is None else rms_norm(x, offset_scale(scale[...], self.config), self.config.norm_eps)

    def _added(self, x: jax.Array, y: jax.Array, scale: nnx.Param | None) -> jax.Array:
        """Return x plus the output of attention or mlp."""
        factor = self.config.residual_scale
        if factor == 1:
            return rounded(jnp.add, x, self._normed(y, scale))
        return rounded(lambda x, y: x + y * factor, x, self._normed(y, scale))

    def _summed(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Apply `linear` to inputs that are split over the tensor axis, if there is one."""
        if self.tensor_axis is None:
            return linear(x, kernel, bias)
        total = jax.lax.psum(linear(x, kernel), self.tensor_axis)
        return total if bias is None else total + jnp.broadcast_to(bias, total.shape)


def offset_scale(scale: jax.Array, config: ModelConfig) -> jax.Array:
    """Return the scale of a norm, [D]: float32 where something is added to the checkpoint's."""
    return scale.astype(jnp.float32) + config.norm_offset if config.norm_offset else scale


def rounded(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Return function(*operands), element by element, rounded to the operands' dtype in any case.

    On CPUs XLA leaves out roundings between operations that it fuses, in programs for one row and not in others.
    """
    dtype = operands[0].dtype
    if dtype == jnp.float32:
        return function(*operands)
    info = jnp.finfo(dtype)

    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x.astype(jnp.float32), info.nexp, info.nmant)

    def in_float32(*operands: jax.Array) -> jax.Array:
        return cut(function(*map(cut, operands))).astype(dtype)

    return jax.lax.platform_dependent(*operands, cpu=in_float32, default=lambda *x: function(*x).astype(dtype))


def _value(param):
    return None if param is None else param[...]
