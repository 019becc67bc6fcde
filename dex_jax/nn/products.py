"""Matrix products by XLA, summed in float32, and the abilities of the device that programs are compiled for."""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp


class CompileTarget(NamedTuple):
    """The device that programs are compiled for."""

    platform: str  # as jax.Device.platform
    capability: float = 0.0  # compute capability of an NVIDIA GPU


ASSUMED: ContextVar[CompileTarget | None] = ContextVar("ASSUMED", default=None)
"""The device that programs are compiled for, if it is not the one at hand."""

TRITON = "Triton"
DISTRUSTED: set[str] = set()
"""Families of kernels that failed on the device at hand (nn/trial.py), TRITON or planes.PLANES."""

FEWEST = 8
"""The fewest rows of a product on GPUs and TPUs: for fewer, compilers avoid the matrix units, which is far slower."""


def compiled_for() -> CompileTarget:
    """Return the device that programs traced now are compiled for."""
    assumed = ASSUMED.get()
    if assumed is not None:
        return assumed
    device = jax.devices()[0]
    try:
        return CompileTarget(device.platform, float(device.compute_capability) if device.platform == "gpu" else 0.0)
    except ValueError:  # AMD's names are no numbers
        return CompileTarget(device.platform)


def gpu_capability() -> float:
    """Return the compute capability of the NVIDIA GPU that programs are compiled for, 0 without one."""
    return compiled_for().capability


def for_one_device() -> bool:
    """Return whether a program traced now is one device's: XLA cannot divide custom calls among several."""
    axes = jax.sharding.get_abstract_mesh().axis_types if jax.device_count() > 1 else ()
    return jax.device_count() == 1 or (bool(axes) and all(axis == jax.sharding.AxisType.Manual for axis in axes))


def for_triton() -> bool:
    """Return whether a program traced now may use Triton kernels: on one NVIDIA GPU, Ampere or newer."""
    return gpu_capability() >= 8 and for_one_device() and TRITON not in DISTRUSTED


def fills_rows(dtype: jnp.dtype) -> bool:
    """Return whether a step of fewer rows than FEWEST runs FEWEST in all layers, as that takes no longer.

    In float32 GPUs do not run attention of few rows as one kernel, and would move more bytes for eight rows.
    """
    return compiled_for().platform == "tpu" or (for_triton() and dtype.itemsize == 2)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Return the precision at which a product in `dtype` is computed in that dtype.

    GPUs and TPUs compute float32 products in TF32 or bfloat16 passes unless told otherwise.
    """
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def filled_up(rows: jax.Array) -> jax.Array:
    """Pad rows [R, in] with rows of zeros to at least FEWEST."""
    return jnp.pad(rows, ((0, max(0, FEWEST - rows.shape[0])), (0, 0)))


def rows_times_kernel(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply rows [R, in] by kernel [out, in].T in the rows' dtype: [R, out] float32."""
    return dot(filled_up(rows), kernel.astype(rows.dtype), ((1,), (1,)))[: rows.shape[0]]


def sums_over_kernel(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute `rows_times_kernel` of few rows as sums over a float32 kernel that XLA need not hold in memory."""
    wide = rows.astype(jnp.float32)
    return jnp.stack([jnp.sum(kernel * wide[r][None], axis=-1) for r in range(rows.shape[0])])


def dot(a: jax.Array, b: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """Return the product over `axes` of two arrays of one dtype, in float32."""
    precision = matmul_precision(a.dtype)
    return jax.lax.dot_general(a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32)
