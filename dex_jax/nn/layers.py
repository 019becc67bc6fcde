"""One decoder layer: projections, rotary positions, grouped-query attention, gated mlp, norms before or after them.

Letters: B sequences, R rows a sequence (tokens of a prompt chunk, or lattice nodes), D width, H query heads,
G key-value heads, d head width, F mlp width, S keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import LayerKind, ModelConfig, RopeScaling
from dex_jax.nn import few_rows
from dex_jax.nn.packed import Packed
from dex_jax.nn.products import dot, matmul_precision, rows_times_kernel

MASKED_SCORE = -1e30
ALIKE = LayerKind()
"""The kind of layers where a model has but one."""

FEW_ROWS = 64
"""Up to here XLA multiplies faster on a CPU with the rows as columns (benchmarks/few_rows.py)."""

KEY_BLOCK = 256
"""Keys that many rows are scored with at once where XLA attends on a CPU."""


class KeyValues(NamedTuple):
    """Keys (after RoPE) and values that rows may attend to."""

    keys: jax.Array  # [B, G, S, d]
    values: jax.Array  # [B, G, S, d]
    mask: jax.Array  # [B, R, S] bool, which of them each row sees; broadcasting over R is allowed


def linear(
    x: jax.Array, kernel: jax.Array | Packed, bias: jax.Array | None = None, out_dtype=None, whole: bool = True
) -> jax.Array:
    """x [..., in] @ kernel [out, in].T (+ bias [out]): [..., out].

    The kernel is packed, or has x's dtype or one that `few_rows.kept_dtype` gave. Products are accumulated in float32
    and come out as `out_dtype`, None is x's. `whole` is False where the kernel is cut out of a larger array, of which
    C++ would need a copy.
    """
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(kernel, Packed):
        out = kernel.product(rows, whole)
    elif whole and {rows.dtype, kernel.dtype} <= {*few_rows.DTYPES} and few_rows.ready():
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
    # turn it back into without the barriers (benchmarks/few_rows.py).
    columns = jax.lax.optimization_barrier(rows.T)
    return jax.lax.optimization_barrier(dot(kernel.astype(rows.dtype), columns, ((1,), (0,)))).T


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32: x [..., D], scale [D] -> [..., D] in x's dtype."""
    if {x.dtype, scale.dtype} <= {*few_rows.DTYPES} and few_rows.ready():
        norm = functools.partial(_norm_few_rows, eps)
        return jax.lax.platform_dependent(x, scale, cpu=norm, default=functools.partial(_rms_norm, eps=eps))
    return _rms_norm(x, scale, eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm_few_rows(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    return few_rows.few_rows_norm(x, scale, eps).astype(x.dtype)


@_norm_few_rows.defjvp
def _norm_tangent(eps: float, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _norm_few_rows(eps, *primals), jax.jvp(functools.partial(_rms_norm, eps=eps), primals, tangents)[1]


def _rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * inverse * weight).astype(x.dtype)


def rope_frequencies(config: ModelConfig, kind: LayerKind = ALIKE) -> np.ndarray:
    """Rotary angle per position in layers of a kind, [d' / 2] float32; zeros where nothing is rotated.

    The "llama3" ramp is that of Llama 3.1's release, "yarn" that of arXiv 2309.00071, "longrope" of 2402.13753.
    """
    width = config.rotated_dim
    local = kind.rope == "local" and config.local_rope_theta is not None
    theta = np.float32(config.local_rope_theta if local else config.rope_theta)
    frequencies = (1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)
    scaling = config.rope_scaling
    if kind.rope == "none":
        return np.zeros_like(frequencies)
    if scaling is None or kind.rope == "local":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if scaling.long else scaling.short_factors
        return frequencies / np.asarray(factors, np.float32)
    if scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(scaling, width, float(theta))
    else:
        turns = scaling.original_context * frequencies / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)
    return ((1 - kept) * frequencies / scaling.factor + kept * frequencies).astype(np.float32)


def _yarn_ramp(scaling: RopeScaling, width: int, theta: float) -> np.ndarray:
    """How much of each frequency is stretched, from 0 to 1: [d' / 2]."""
    turning = [
        width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.fast, scaling.slow)
    ]
    first, last = (math.floor(turning[0]), math.ceil(turning[1])) if scaling.truncate else turning
    first, last = max(first, 0), min(last, width - 1)
    return np.clip((np.arange(width // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)


class Rotation(NamedTuple):
    """How positions turn heads."""

    cos: jax.Array  # [..., d' / 2] float32
    sin: jax.Array  # [..., d' / 2] float32
    queries: jax.Array | None = None  # [...] float32, what queries are multiplied with besides; None: nothing


def rope_table(positions: jax.Array, config: ModelConfig, kind: LayerKind = ALIKE) -> Rotation:
    """The rotation at absolute positions [...] int32 in layers of a kind."""
    frequencies = rope_frequencies(config, kind).reshape((1,) * positions.ndim + (-1,))
    scaling = config.rope_scaling if kind.rope == "main" else None
    magnitude = 1.0 if scaling is None else scaling.magnitude

    def table(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions[..., None].astype(jnp.float32) * frequencies
        return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude

    def branch(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        # No position is as low as this, which XLA does not know: it leaves branches alone.
        return jax.lax.cond(jnp.any(positions > -(2**30)), table, lambda p: table(jnp.zeros_like(p)), positions)

    # Otherwise XLA computes sines and cosines anew in every layer, for every head; on CPUs despite the barrier.
    made = jax.lax.platform_dependent(positions, cpu=branch, default=table)
    cos, sin = jax.lax.optimization_barrier(made)
    if scaling is None or not scaling.query_growth:
        return Rotation(cos, sin)
    laps = (positions // scaling.original_context).astype(jnp.float32)
    return Rotation(cos, sin, 1 + scaling.query_growth * jnp.log1p(laps))


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the first d' numbers of heads by their positions: x [..., heads, d]; pairs are (i, i + d' / 2)."""
    cos, sin = (t[..., None, :] for t in rotation[:2])
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    left, right, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, rest], axis=-1).astype(x.dtype)


def capped(x: jax.Array, cap: float | jax.Array | None) -> jax.Array:
    """cap tanh(x / cap), or x without one."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def causal_rows(batch: int, rows: int) -> jax.Array:
    """What rows in a line see of one another, those before and themselves: [B, R, R] bool."""
    return jnp.broadcast_to(jnp.tril(jnp.ones((rows, rows), bool))[None], (batch, rows, rows))


def attend(queries: jax.Array, sources: Sequence[KeyValues], whole: bool = True, cap: float | None = None) -> jax.Array:
    """Grouped-query attention of queries [B, R, H, d] over all sources, which share one softmax in float32.

    Every row must see at least one key; `whole` as in `linear`, of keys and values. `cap` as in `capped`, of scores.
    Gives [B, R, H, d] in queries' dtype.
    """
    dtypes = {x.dtype for source in sources for x in source[:2]}
    known = len(dtypes) == 1 and dtypes | {queries.dtype} <= {*few_rows.DTYPES}
    if whole and known and cap is None and queries.shape[3] % few_rows.LANES == 0 and few_rows.ready():
        at_once = functools.partial(_attend, None)
        return jax.lax.platform_dependent(queries, list(sources), cpu=_attend_few_rows, default=at_once)
    if queries.shape[1] > KEY_BLOCK // 16 and any(source.keys.shape[2] > KEY_BLOCK for source in sources):
        in_blocks, at_once = (functools.partial(each, cap) for each in (_attend_in_blocks, _attend))
        return jax.lax.platform_dependent(queries, list(sources), cpu=in_blocks, default=at_once)
    return _attend(cap, queries, sources)


@jax.custom_jvp
def _attend_few_rows(queries: jax.Array, sources: Sequence[KeyValues]) -> jax.Array:
    return few_rows.few_rows_attention(queries, *(x for source in sources for x in source)).astype(queries.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _attend_in_blocks(cap: float | None, queries: jax.Array, sources: Sequence[KeyValues]) -> jax.Array:
    """As `_attend`, a block of keys at a time up to the last that a row sees: most of a cache is often empty."""
    batch, rows, heads, width = queries.shape
    groups = sources[0].keys.shape[1]
    columns = _columns(queries, groups)
    count = columns.shape[3]

    def add(state: tuple, keys: jax.Array, values: jax.Array, mask: jax.Array) -> tuple:
        most, total, mixed = state
        scores = capped(_sum_in_float32("bgsd,bgdn->bgsn", keys, columns), cap)
        seen = jnp.repeat(jnp.broadcast_to(mask, (batch, rows, mask.shape[2])), heads // groups, axis=1)
        scores = jnp.where(seen.transpose(0, 2, 1)[:, None], scores, MASKED_SCORE)
        new = jnp.maximum(most, scores.max(axis=2))
        weights, kept = jnp.exp(scores - new[:, :, None]), jnp.exp(most - new)
        part = _sum_in_float32("bgsn,bgsd->bgnd", weights.astype(values.dtype), values)
        return new, total * kept + weights.sum(axis=2), mixed * kept[..., None] + part

    shape = (batch, groups, count)
    state = (jnp.full(shape, MASKED_SCORE), jnp.zeros(shape), jnp.zeros((*shape, width)))
    # Rows see themselves in the last source: what has been added for rows that saw nothing before is then weighed 0.
    for source in sources:
        length = source.keys.shape[2]
        if length <= KEY_BLOCK:
            state = add(state, *source)
            continue

        def block(i: jax.Array, state: tuple, source: KeyValues = source, length: int = length) -> tuple:
            at = jnp.minimum(i * KEY_BLOCK, length - KEY_BLOCK)
            keys, values, mask = (jax.lax.dynamic_slice_in_dim(x, at, KEY_BLOCK, axis=2) for x in source)
            return add(state, keys, values, mask & (at + jnp.arange(KEY_BLOCK) >= i * KEY_BLOCK)[None, None])

        last = jnp.max(jnp.where(source.mask, jnp.arange(1, length + 1)[None, None], 0))
        state = jax.lax.fori_loop(0, (last + KEY_BLOCK - 1) // KEY_BLOCK, block, state)
    _, total, mixed = state
    out = (mixed / total[..., None]).reshape(batch, groups, rows, heads // groups, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, rows, heads, width).astype(queries.dtype)


@_attend_few_rows.defjvp
def _few_rows_tangent(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _attend_few_rows(*primals), _tangent(None, primals, tangents)


@_attend_in_blocks.defjvp
def _in_blocks_tangent(cap: float | None, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _attend_in_blocks(cap, *primals), _tangent(cap, primals, tangents)


def _tangent(cap: float | None, primals: tuple, tangents: tuple) -> jax.Array:
    (queries, sources), (queries_tangent, sources_tangent) = primals, tangents

    def plain(queries: jax.Array, pairs: list) -> jax.Array:
        both = [KeyValues(keys, values, source.mask) for (keys, values), source in zip(pairs, sources, strict=True)]
        return _attend(cap, queries, both)

    pairs, pairs_tangent = ([source[:2] for source in each] for each in (sources, sources_tangent))
    return jax.jvp(plain, (queries, pairs), (queries_tangent, pairs_tangent))[1]


def _columns(queries: jax.Array, groups: int) -> jax.Array:
    """Queries [B, R, H, d] as keys are multiplied with them, scaled: [B, G, d, R H / G]."""
    batch, rows, heads, width = queries.shape
    scaled = queries * np.float32(width**-0.5).astype(queries.dtype)
    columns = scaled.reshape(batch, rows, groups, heads // groups, width).transpose(0, 2, 4, 1, 3)
    return columns.reshape(batch, groups, width, -1)


def _attend(cap: float | None, queries: jax.Array, sources: Sequence[KeyValues]) -> jax.Array:
    batch, rows, heads, width = queries.shape
    groups = sources[0].keys.shape[1]
    dtype = queries.dtype
    columns = _columns(queries, groups)
    # Keys times query columns, so that the cache is read as it lies: the other way round XLA transposes it first.
    scores = [_sum_in_float32("bgsd,bgdn->bgsn", source.keys, columns).transpose(0, 1, 3, 2) for source in sources]
    masks = jnp.concatenate([jnp.broadcast_to(s.mask, (batch, rows, s.mask.shape[2])) for s in sources], axis=2)
    joined = capped(jnp.concatenate(scores, axis=3), cap).reshape(batch, groups, rows, heads // groups, -1)
    joined = jnp.where(masks[:, None, :, None, :], joined, MASKED_SCORE)
    weights = jax.nn.softmax(joined, axis=-1).astype(dtype).reshape(batch, groups, -1, masks.shape[2])
    bounds = np.cumsum([source.keys.shape[2] for source in sources])[:-1]
    parts = [
        _sum_in_float32("bgns,bgsd->bgnd", part, source.values)
        for part, source in zip(jnp.split(weights, bounds, axis=-1), sources, strict=True)
    ]
    out = functools.reduce(jnp.add, parts).reshape(batch, groups, rows, heads // groups, width).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, rows, heads, width).astype(dtype)


def _sum_in_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum of two arrays of one dtype with a float32 result."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, precision=matmul_precision(a.dtype), preferred_element_type=jnp.float32)

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return product(a.astype(jnp.float32), b.astype(jnp.float32))

    if a.dtype != jnp.bfloat16:
        return product(a, b)
    # jaxlib's CPU backend (0.10.2) has no kernel for some batched bfloat16 products with a float32 result, and says so
    # only when it runs them.
    return jax.lax.platform_dependent(a, b, cpu=widened, default=product)


def recorded(make: Callable[[Callable[..., jax.Array]], nnx.Module]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, kind) of every parameter that a module asks its `init` for, in its order."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}

    def record(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
        found[name] = (shape, kind)
        return jnp.zeros(shape)

    jax.eval_shape(lambda: nnx.state(make(record)))
    return found


def names_in(path: Sequence[Any]) -> list[str]:
    """The names in a path to an array of a module's state."""
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
"""Logical axes of a layer's parameters (dex_jax/sharding.py says where they lie on a mesh)."""


class DecoderLayer(nnx.Module):
    """Attention and gated mlp, with the query-key-value and gate-up projections fused.

    Every parameter may carry leading axes (a stacked layout); the methods work on one layer's slice.

    Args:
      config: shapes and switches.
      init: (name, shape, kind) -> array, kind "kernel", "scale" or "bias".
      tensor_axis: under shard_map, the mesh axis over whose devices heads and mlp are spread; `config` then counts this
        device's own, and the two products that end in D are summed over the axis. None: all is here.
      whole: False where the methods are given parameters cut out of stacked ones (see `linear`).
    """

    def __init__(self, config: ModelConfig, init, tensor_axis: str | None = None, whole: bool = True):
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
        self.whole = whole

    def project(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states [B, R, D] -> queries [B, R, H, d], keys and values [B, G, R, d], rotated by their positions."""
        c = self.config
        qkv = linear(self._normed(x, self.attention_norm), self.qkv[...], _value(self.qkv_bias), whole=self.whole)
        bounds = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
        queries, keys, values = jnp.split(qkv, bounds, axis=-1)
        if c.qk_norm_whole:
            queries, keys = self._normed(queries, self.q_norm), self._normed(keys, self.k_norm)
        queries, keys, values = (each.reshape(*x.shape[:-1], -1, c.head_dim) for each in (queries, keys, values))
        if not c.qk_norm_whole:
            queries, keys = self._normed(queries, self.q_norm), self._normed(keys, self.k_norm)
        rotated = rotate(jnp.concatenate([queries, keys], axis=-2), rotation)
        queries, keys = jnp.split(rotated, [c.num_heads], axis=-2)
        # Attention itself multiplies with d**-0.5.
        scale = 1.0 if c.attention_scale is None else c.attention_scale * c.head_dim**0.5
        if rotation.queries is not None:
            queries = (queries * (scale * rotation.queries)[..., None, None]).astype(x.dtype)
        elif abs(scale - 1) > 1e-12:
            queries = (queries.astype(jnp.float32) * scale).astype(x.dtype)
        return queries, keys.swapaxes(-2, -3), values.swapaxes(-2, -3)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """Adds the attention output [B, R, H, d] and then the mlp to x [B, R, D]."""
        flat = attended.reshape(*x.shape[:-1], -1)
        x = self._added(x, self._summed(flat, self.out[...], _value(self.out_bias)), self.attention_out_norm)
        gate_up = linear(self._normed(x, self.mlp_norm), self.gate_up[...], whole=self.whole)
        gate, up = jnp.split(gate_up, 2, axis=-1)
        activated = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return self._added(x, self._summed(activated * up, self.down[...]), self.mlp_out_norm)

    def _normed(self, x: jax.Array, scale: nnx.Param | None) -> jax.Array:
        """x after the norm of this scale, if the layer has it."""
        return x if scale is None else rms_norm(x, offset_scale(scale[...], self.config), self.config.norm_eps)

    def _added(self, x: jax.Array, y: jax.Array, scale: nnx.Param | None) -> jax.Array:
        """x plus what attention or mlp gave."""
        y = self._normed(y, scale)
        if self.config.residual_scale != 1:
            y = y * np.asarray(self.config.residual_scale, y.dtype)
        return _sum(x, y)

    def _summed(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`linear` whose inputs are spread over the tensor axis, if there is one."""
        if self.tensor_axis is None:
            return linear(x, kernel, bias, whole=self.whole)
        total = jax.lax.psum(linear(x, kernel, whole=self.whole), self.tensor_axis)
        return total if bias is None else total + jnp.broadcast_to(bias, total.shape)


def offset_scale(scale: jax.Array, config: ModelConfig) -> jax.Array:
    """The scale of a norm, [D]: float32 where something is added to what a checkpoint holds."""
    return scale.astype(jnp.float32) + config.norm_offset if config.norm_offset else scale


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y, rounded in any case: on CPUs XLA keeps a sum in float32, in programs for one row and not in others."""

    def in_float32(x: jax.Array, y: jax.Array) -> jax.Array:
        info = jnp.finfo(x.dtype)
        wide = x.astype(jnp.float32) + y.astype(jnp.float32)
        return jax.lax.reduce_precision(wide, info.nexp, info.nmant).astype(x.dtype)

    if x.dtype == jnp.float32:
        return x + y
    return jax.lax.platform_dependent(x, y, cpu=in_float32, default=jnp.add)


def _value(param):
    return None if param is None else param[...]
