"""The C++ libraries of a format of kernels, compiled as other CPUs would compile them."""

from __future__ import annotations

import ctypes
import platform
from typing import NamedTuple

import pytest

from dex_jax.nn import few_rows, native


class Build(NamedTuple):
    """The flags by which a library is what another CPU has, and the macros of the instructions that it runs."""

    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()


BYTES, PAIRS = "-DDEX_JAX_BYTES", "-DDEX_JAX_PAIRS"
# -O1 compiles sooner, and nobody waits for these products.
_NO_VECTORS = ("-mno-avx512f", "-mno-avx2", "-mno-avx", "-mno-fma", "-mno-f16c", "-mno-avxvnni", "-O1")
_OF_X86 = {
    "AVX-512 VNNI": Build((BYTES,), ("__AVX512VNNI__",)),
    "AVX-VNNI": Build((BYTES, "-mno-avx512f"), ("__AVXVNNI__",)),
    "AVX-512, pairs": Build((PAIRS,), ("__AVX512BW__",)),
    "AVX2, pairs": Build((PAIRS, "-mno-avx512f"), ("__AVX2__",)),
    "AVX2, plain bytes": Build((BYTES, "-mno-avx512f", "-mno-avxvnni"), ("__AVX2__",)),
    "none, bytes": Build((BYTES, *_NO_VECTORS)),
    "none, pairs": Build((PAIRS, *_NO_VECTORS)),
}
BUILDS = _OF_X86 if platform.machine() in ("x86_64", "AMD64") else {"bytes": Build((BYTES,)), "pairs": Build((PAIRS,))}


def built(format: str, name: str) -> ctypes.CDLL:
    """Return the library of a format in one of BUILDS; skip where this CPU cannot run it."""
    build = BUILDS[name]
    defined = native._compiler()[1].decode().split()
    missing = [macro for macro in build.needs if macro not in defined]
    if missing:
        pytest.skip(f"this CPU has no {', '.join(missing)}")
    return ctypes.CDLL(str(few_rows.library(format, build.flags)))


def format_of(library: ctypes.CDLL) -> ctypes.Array:
    """Return a library's Format (cpp/format.h) as the 64-bit numbers and pointers that it consists of."""
    return (ctypes.c_int64 * 11).in_dll(library, "dex_jax_format")


ROUNDING = slice(7, 10)
"""The fields of a Format that say how rows are rounded."""
