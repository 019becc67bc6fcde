"""Trials of the kernels for GPUs and TPUs against XLA's own operations, on a small case before a process uses them.

They are compiled in the project's tests and have not run on every device there is: where one raises, or gives other
numbers, a line says so and XLA's operations are used.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, quants

from dex_jax.nn import gpu_attention, gpu_writes, planes
from dex_jax.nn.attention import KeyValues
from dex_jax.nn.blocks import FORMATS
from dex_jax.nn.products import ASSUMED, DISTRUSTED, TRITON, compiled_for, gpu_capability

TOLERANCE = 0.05
"""The largest difference allowed: results are about 1 and are rounded to bfloat16, some of them twice."""


def try_kernels() -> None:
    """Try the kernels that programs for the device at hand would use, once in a process."""
    if ASSUMED.get() is not None:  # nothing that is compiled can run here
        return
    if gpu_capability() >= 8:
        _try(TRITON, "the attention kernel", _attention)
        _try(TRITON, "the kernel that writes into caches", _writes)
    if compiled_for().platform == "tpu":
        _try(planes.PLANES, "the layout in planes", _planes)


@functools.cache
def _try(family: str, name: str, case: Callable[[], tuple[Any, Any]]) -> None:
    """Run a case, which returns a kernel's result and XLA's, and distrust the family where it fails or they differ."""
    try:
        found, wanted = (np.asarray(each, np.float32) for each in case())
        off = float(np.abs(found - wanted).max()) if np.isfinite(found).all() else np.inf
        why = None if off <= TOLERANCE else f"differs from XLA's operations by {off:.2g}"
    except Exception as error:  # whatever a compiler or a device says
        why = f"fails ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if why is not None:
        DISTRUSTED.add(family)
        print(f"{name} {why} on {jax.devices()[0].device_kind}: XLA's operations are used", file=sys.stderr)


def _numbers(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape), jnp.bfloat16)


def _attention() -> tuple[Any, Any]:
    queries, pairs = _numbers(1, 2, 4, 64), [(_numbers(1, 2, size, 64),) * 2 for size in (200, 2)]
    masks = np.broadcast_to(np.arange(200) < 150, (1, 2, 200)), np.tril(np.ones((1, 2, 2), bool))
    sources = [KeyValues(*pair, jnp.asarray(mask)) for pair, mask in zip(pairs, masks, strict=True)]
    joined = jnp.concatenate([pair[0] for pair in pairs], axis=2).swapaxes(1, 2)
    wanted = jax.nn.dot_product_attention(queries, joined, joined, mask=np.concatenate(masks, axis=2)[:, None])
    return jax.jit(gpu_attention.attend_in_one_kernel)(queries, sources), wanted


def _writes() -> tuple[Any, Any]:
    cache, fresh, at = jnp.zeros((1, 2, 64, 64), jnp.bfloat16), _numbers(1, 1, 2, 3, 64), jnp.asarray([7])
    row = jnp.asarray([[0, 1, 2]])
    written = jax.jit(lambda *caches: gpu_writes.write(caches, (fresh, fresh), row, at, [0], 0))(cache, cache)
    return jnp.stack(written), jnp.stack([cache.at[:, :, 7:10].set(fresh[0])] * 2)


def _planes() -> tuple[Any, Any]:
    found, wanted, rows = [], [], np.linspace(-1, 1, 256, dtype=np.float32)[None] / 16
    for format, (columns, size) in FORMATS.items():
        # Bytes below 48 stand for small numbers and small scales in every format.
        blocks = np.random.default_rng(0).integers(0, 48, (8, 256 // columns * size), np.uint8)
        dense = quants.dequantize(blocks, GGMLQuantizationType[format])
        largest = max(1.0, float(np.abs(dense).max()))
        kept = planes.in_planes(blocks, format)
        found.append(jnp.concatenate([kept.dense().ravel(), jax.jit(type(kept).product)(kept, rows).ravel()]) / largest)
        wanted.append(np.concatenate([dense.ravel(), (rows @ dense.T).ravel()]) / largest)
    return jnp.concatenate(found), np.concatenate(wanted)
