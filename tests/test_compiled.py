"""Reading an optimised program: a small one written out by hand, whose figures can be counted on paper."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dex_jax.errors import DexError
from dex_jax.evaluation import targets
from dex_jax.evaluation.compiled import read
from dex_jax.nn.attention import KeyValues, attend
from dex_jax.nn.products import ASSUMED, Device

# A loop of 3 turns within a loop: a product by a library, rows cut out of a cache and rows written into it, a choice.
PROGRAM = """\
HloModule jit_run, is_scheduled=true

%fused_rows (p0: bf16[1024,64], p1: s32[]) -> bf16[8,64] {
  %p0 = bf16[1024,64]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = bf16[8,64]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={8,64}
}

%fused_write (w0: bf16[1024,64], w1: bf16[8,64], w2: s32[]) -> bf16[1024,64] {
  %w0 = bf16[1024,64]{1,0} parameter(0)
  %w1 = bf16[8,64]{1,0} parameter(1)
  %w2 = s32[] parameter(2)
  %nothing = s32[] constant(0)
  ROOT %written = bf16[1024,64]{1,0} dynamic-update-slice(%w0, %w1, %w2, %nothing)
}

%turn (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %negated = bf16[8,64]{1,0} negate(%x), metadata={op_name="jit(run)/while/body/attention/neg"}
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%i, %negated)
}

%goes_on (c: (s32[], bf16[8,64])) -> pred[] {
  %c = (s32[], bf16[8,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %most = s32[] constant(3)
  ROOT %less = pred[] compare(%j, %most), direction=LT
}

%few (f: bf16[8,64]) -> bf16[8,64] {
  ROOT %f = bf16[8,64]{1,0} parameter(0)
}

%many (m: bf16[8,64]) -> bf16[8,64] {
  %m = bf16[8,64]{1,0} parameter(0)
  ROOT %copied = bf16[8,64]{1,0} copy(%m)
}

%body (state: (bf16[1024,64], bf16[64,64], s32[], pred[])) -> (bf16[1024,64], bf16[64,64], s32[], pred[]) {
  %state = (bf16[1024,64]{1,0}, bf16[64,64]{1,0}, s32[], pred[]) parameter(0)
  %cache = bf16[1024,64]{1,0} get-tuple-element(%state), index=0
  %kernel = bf16[64,64]{1,0} get-tuple-element(%state), index=1
  %at = s32[] get-tuple-element(%state), index=2
  %which = pred[] get-tuple-element(%state), index=3
  %rows = bf16[8,64]{1,0} fusion(%cache, %at), kind=kLoop, calls=%fused_rows
  %start = (bf16[64,64]{1,0:S(1)}, bf16[64,64]{1,0}, u32[]) copy-start(%kernel)
  %near = bf16[64,64]{1,0:S(1)} copy-done(%start)
  %quarter = ((bf16[64,64]{1,0}), bf16[16,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%kernel), slice={[0:16], [0:64]}
  %brought = bf16[16,64]{1,0:S(1)} slice-done(%quarter)
  %gemm = (bf16[8,64]{1,0}, s8[4194304]{0}) custom-call(%rows, %near), custom_call_target="__cublas$gemm", \
backend_config={"estimated_cycles":"70"}
  %product = bf16[8,64]{1,0} get-tuple-element(%gemm), index=0
  %begun = (s32[], bf16[8,64]{1,0}) tuple(%at, %product)
  %turns = (s32[], bf16[8,64]{1,0}) while(%begun), condition=%goes_on, body=%turn, \
backend_config={"known_trip_count":{"n":"3"}}
  %turned = bf16[8,64]{1,0} get-tuple-element(%turns), index=1
  %chosen = bf16[8,64]{1,0} conditional(%which, %turned, %turned), branch_computations={%few, %many}
  %kept = bf16[1024,64]{1,0} fusion(%cache, %chosen, %at), kind=kLoop, calls=%fused_write
  ROOT %next = (bf16[1024,64]{1,0}, bf16[64,64]{1,0}, s32[], pred[]) tuple(%kept, %kernel, %at, %which)
}

%never (n: (bf16[1024,64], bf16[64,64], s32[], pred[])) -> pred[] {
  %n = (bf16[1024,64]{1,0}, bf16[64,64]{1,0}, s32[], pred[]) parameter(0)
  ROOT %going = pred[] get-tuple-element(%n), index=3
}

ENTRY %main (a: bf16[1024,64], b: bf16[64,64], s: s32[], p: pred[]) -> bf16[1024,64] {
  %a = bf16[1024,64]{1,0} parameter(0)
  %b = bf16[64,64]{1,0} parameter(1)
  %s = s32[] parameter(2)
  %p = pred[] parameter(3)
  %first = (bf16[1024,64]{1,0}, bf16[64,64]{1,0}, s32[], pred[]) tuple(%a, %b, %s, %p)
  %loop = (bf16[1024,64]{1,0}, bf16[64,64]{1,0}, s32[], pred[]) while(%first), condition=%never, body=%body
  ROOT %result = bf16[1024,64]{1,0} get-tuple-element(%loop), index=0
}
"""
ROWS, KERNEL, NUMBER = 8 * 64 * 2, 64 * 64 * 2, 4


def test_what_a_step_moves_launches_and_takes() -> None:
    program = read(PROGRAM)
    assert program.loops == ("body",)
    # Of caches what is cut out and what is written, once each; the kernel and a quarter as they are brought onto the
    # chip; a library's room to work in not at all; of the choice the branch that copies.
    by_hand = {
        "rows": ROWS + NUMBER + ROWS,
        "start": KERNEL,
        "quarter": KERNEL // 4,
        "gemm": ROWS + ROWS,
        "turns": 3 * (2 * ROWS + (NUMBER + NUMBER + 1)),
        "chosen": 2 * ROWS,
        "kept": ROWS + NUMBER + ROWS,
    }
    assert program.moved("body") == sum(by_hand.values())
    assert program.moved("body", "attention") == 3 * 2 * ROWS
    assert program.kernels("body") == 1 + 2 + 1 + 3 * 2 + 1 + 1
    assert program.cycles("body") == 70


def test_what_runs_within_loops() -> None:
    program = read(PROGRAM)
    names = {each.name for each in program.within(*program.loops)}
    assert {"negated", "copied", "gemm"} <= names
    assert "cut" not in names
    cut, written = (program.computations["body"][name] for name in ("rows", "kept"))
    assert [program.operation_of(each) for each in (cut, written)] == ["dynamic-slice", "dynamic-update-slice"]
    near = program.computations["body"]["near"]
    assert (near.nbytes, near.results[0].nbytes, near.works) == (0, KERNEL, False)


def test_a_target_without_a_compiler_is_told_and_nothing_stays_assumed(monkeypatch) -> None:
    monkeypatch.setattr(targets.topologies, "get_topology_desc", None)
    for name, keyword in (("abacus", "t4"), ("h100", "jax-cuda12-pjrt"), ("v5e", "libtpu")):
        with pytest.raises(DexError, match=keyword), targets.target(name):
            pass
    monkeypatch.setattr(targets.topologies, "get_topology_desc", lambda **about: SimpleNamespace(devices=["it"]))
    with targets.target("h100") as devices:
        assert (devices, ASSUMED.get()) == (["it"], Device("gpu", 9.0))
    assert ASSUMED.get() is None


def test_what_was_traced_for_one_target_is_not_used_for_another(monkeypatch) -> None:
    monkeypatch.setattr(targets.topologies, "get_topology_desc", lambda **about: SimpleNamespace(devices=["it"]))
    keys = jnp.ones((1, 1, 30, 20))  # of a width that C++ does not take
    source = KeyValues(keys, keys, jnp.ones((1, 4, 30), bool))
    attention = jax.jit(lambda queries: attend(queries, [source]))

    def has_ways(name: str) -> bool:
        with targets.target(name):
            return "platform_index" in str(attention.trace(jnp.ones((1, 4, 1, 20))).jaxpr)

    assert [has_ways(name) for name in ("v5e", "h100", "v5e", "t4")] == [False, True, False, True]
