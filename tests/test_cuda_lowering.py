"""The decoding programs lower for CUDA on a machine without a GPU: jax.export from abstract shapes.

Nothing is compiled. What is asserted is read off the StableHLO: float32 products ask for the highest precision,
nothing is float64, and no custom call is one that only a CPU has.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import pytest
from conftest import slow
from reference.compiled import assumed
from reference.small_models import LLAMA, outline_of, programs_of

from dex_jax.decoding.plan import plan_for
from dex_jax.decoding.request import AR, Dex, Request
from dex_jax.decoding.session import Session

CONFIG = dataclasses.replace(LLAMA, family="qwen3", num_layers=3, tied=False, qk_norm=True, eos_ids=(2,))
DEX = plan_for(Dex(explorers=3, draft=False), CONFIG.num_layers)
METHODS = {
    "ar": plan_for(AR(), CONFIG.num_layers),
    "dex": DEX,
    "one": plan_for(Dex(explorers=1), CONFIG.num_layers),
}
HALF = {"ar": "bfloat16", "dex": "float16", "one": "bfloat16"}
LOOPS = [case for m in HALF for case in ((m, False, "float32"), slow(m, True, HALF[m]))]
ON_EVERY_PLATFORM = {
    *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"),
    "mhlo.topk",  # jax.lax.top_k as jax 0.7 exports it
}


@pytest.fixture(autouse=True)
def for_a_gpu():
    """Programs are not for the device at hand, but for a GPU."""
    with assumed("h100"):
        yield


def exported(name: str, method: str, dtype: str, *, sampled: bool) -> str:
    """StableHLO of a program for CUDA."""
    request = Request(max_new_tokens=64, **{"temperature": 1.0, "top_k": 5, "top_p": 0.9} if sampled else {})
    session = Session(outline_of(CONFIG, dtype), [[1, 2], [3]], METHODS[method], request)
    program, arguments, statics = programs_of(session)[name]
    module = jax.export.export(jax.jit(functools.partial(program.jitted, **statics)), platforms=["cuda"])(*arguments)
    assert module.platforms == ("cuda",)
    return module.mlir_module()


def assert_fit_for_cuda(text: str, dtype: str) -> None:
    """Precision, dtypes and custom calls of one module."""
    products = re.findall(r"stablehlo\.dot_general.*", text)
    assert products
    if dtype == "float32":
        assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
    # Whatever the operands, sums are float32.
    assert [line for line in products if not re.search(r"-> tensor<[\dx]*xf32>", line)] == []
    assert not re.search(r"\bf64\b|xf64>", text)
    calls = set(re.findall(r"stablehlo\.custom_call @([\w.]+)", text))
    assert [call for call in sorted(calls) if call not in ON_EVERY_PLATFORM and not call.startswith("cu")] == []
    # [out, in] @ [in, rows] is the CPU's orientation.
    plain = [line for line in products if "batching_dims" not in line]
    assert plain
    assert all("contracting_dims = [1] x [1]" in line for line in plain)


@pytest.mark.parametrize(("method", "sampled", "dtype"), LOOPS)
def test_loop(method, sampled, dtype) -> None:
    assert_fit_for_cuda(exported("run_ticks", method, dtype, sampled=sampled), dtype)


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("prefill_chunk", "dex", "bfloat16"),
        ("prefill_chunk", "dex", "float32"),
        ("start_decoding", "dex", "float32"),
        ("start_decoding", "one", "bfloat16"),
    ],
)
def test_prefill_and_start(name, method, dtype) -> None:
    assert_fit_for_cuda(exported(name, method, dtype, sampled=True), dtype)


def test_the_check_sees_what_it_looks_for() -> None:
    def double(x):
        return jax.lax.dot_general(x, x, (((1,), (1,)), ((), ())))

    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    text = jax.export.export(jax.jit(double), platforms=["cuda"])(shape).mlir_module()
    with pytest.raises(AssertionError):
        assert_fit_for_cuda(text, "float32")
