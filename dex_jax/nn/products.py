"""Products of matrices as XLA makes them, summed in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Device(NamedTuple):
    """The device that programs are compiled for."""

    platform: str  # as jax.Device.platform
    capability: float = 0.0  # compute capability of an NVIDIA GPU


ASSUMED: ContextVar[Device | None] = ContextVar("ASSUMED", default=None)
"""The device that programs are compiled for where that is not the one at hand."""

TRITON = "Triton"
DISTRUSTED: set[str] = set()
"""Families of kernels that failed on the device at hand (nn/trial.py), TRITON or planes.PLANES."""

FEWEST = 8
"""Rows of a product on GPUs and TPUs: of fewer, compilers make sums of products beside the matrix units, which take
several times as long."""


def compiled_for() -> Device:
    """Return the device that programs traced now are for."""
    assumed = ASSUMED.get()
    if assumed is not None:
        return assumed
    device = jax.devices()[0]
    try:
        return Device(device.platform, float(device.compute_capability) if device.platform == "gpu" else 0.0)
    except ValueError:  # of AMD's, whose names are no numbers
        return Device(device.platform)


def gpu_capability() -> float:
    """Compute capability of the NVIDIA GPU that is compiled for, 0 without one."""
    return compiled_for().capability


def for_one_device() -> bool:
    """Return whether what is traced is what one device does: XLA cannot divide among several what it does not know."""
    axes = jax.sharding.get_abstract_mesh().axis_types if jax.device_count() > 1 else ()
    return jax.device_count() == 1 or (bool(axes) and all(axis == jax.sharding.AxisType.Manual for axis in axes))


def for_triton() -> bool:
    """Return whether what is traced may have kernels of Triton's: for one NVIDIA GPU, of Ampere or newer."""
    return gpu_capability() >= 8 and for_one_device() and TRITON not in DISTRUSTED


def fills_rows(dtype: jnp.dtype) -> bool:
    """Return whether a step of fewer rows than FEWEST runs FEWEST from the first layer to the last: it takes no longer.

    In float32 GPUs have no attention of few rows as one kernel, and would move more bytes for eight.
    """
    return compiled_for().platform == "tpu" or (for_triton() and dtype.itemsize == 2)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """The dot precision under which `dtype` means what it says.

    GPUs and TPUs compute float32 products in TF32 or bfloat16 passes unless told otherwise.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def filled_up(rows: jax.Array) -> jax.Array:
    """rows [R, in] with zeros behind them, as many as a product has at least."""
    return jnp.pad(rows, ((0, max(0, FEWEST - rows.shape[0])), (0, 0)))


def rows_times_kernel(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """rows [R, in] @ kernel [out, in].T, computed in rows' dtype: [R, out] float32."""
    return dot(filled_up(rows), kernel.astype(rows.dtype), ((1,), (1,)))[: rows.shape[0]]


def sums_over_kernel(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute `rows_times_kernel` of few rows as sums over a float32 kernel that XLA need not hold: it is read once."""
    wide = rows.astype(jnp.float32)
    return jnp.stack([jnp.sum(kernel * wide[r][None], axis=-1) for r in range(rows.shape[0])])


def computed_once(function: Callable[..., Any], first: jax.Array, *others: jax.Array) -> Any:
    """function(first, *others), of which CPUs compute nothing anew for each use; `first` is int32, above -2^30."""

    def branch(first: jax.Array, *others: jax.Array) -> Any:
        # That `first` is above XLA does not know: it leaves branches alone.
        above = jnp.any(first > -(2**30))
        return jax.lax.cond(above, function, lambda first, *others: function(0 * first, *others), first, *others)

    return jax.lax.platform_dependent(first, *others, cpu=branch, default=function)


def dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """The product over `axes` of two arrays of one dtype, in float32."""
    precision = matmul_precision(a.dtype)
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
