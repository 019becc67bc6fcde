"""What is read off compiled programs, by hand and on programs that libtpu compiles for chips that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import pytest
from reference.small_models import LLAMA

from dex_jax.errors import DexError
from studies.planner import compiled
from studies.planner.compiled import Evidence, collectives_of, kernels_of

HLO = """\
HloModule jit_run
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %x, f32[] %y)
}
%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0:T(8,128)}) parameter(0)
  %h = bf16[4,8]{1,0:T(8,128)} get-tuple-element((s32[], bf16[4,8]) %p), index=1
  %all-reduce.1 = bf16[4,8]{1,0:T(8,128)} all-reduce(bf16[4,8] %h), replica_groups={{0,1}}, to_apply=%add
  %all-reduce.2 = (f32[2]{0}, f32[3]{0}) all-reduce(f32[2] %a, f32[3] %b), replica_groups={{0,1}}, to_apply=%add
  %ag = (s32[1,5]{1,0}, s32[2,5]{1,0}) all-gather-start(s32[1,5] %c), dimensions={0}
  %agd = s32[2,5]{1,0} all-gather-done((s32[1,5], s32[2,5]) %ag)
  %cp = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(bf16[4,8] %h), source_target_pairs={{0,1}}
  %cpd = bf16[4,8]{1,0} collective-permute-done((bf16[4,8], bf16[4,8], u32[], u32[]) %cp)
  ROOT %t = (s32[], bf16[4,8]) tuple(s32[] %i, bf16[4,8] %cpd)
}
ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %w = (s32[], bf16[4,8]) while((s32[], bf16[4,8]) %z), condition=%cond, body=%body
  ROOT %out = bf16[4,8]{1,0} copy(bf16[4,8] %a)
}
"""


def test_collectives_by_hand() -> None:
    assert collectives_of(HLO) == {
        "all-reduce": (2, 4 * 8 * 2 + 2 * 4 + 3 * 4),
        "all-gather": (1, 2 * 5 * 4),
        "collective-permute": (1, 4 * 8 * 2),
    }


STABLEHLO = """\
module @jit_run {
  func.func public @main(%arg0: tensor<4x8xbf16>) -> tensor<4x8xbf16> {
    %0 = sdy.manual_computation(%arg0) in_shardings=[<@mesh, []>] (%arg1: tensor<4x8xbf16>) {
      %1 = func.call @layer(%arg1) : (tensor<4x8xbf16>) -> tensor<4x8xbf16>
      %2 = func.call @layer(%1) : (tensor<4x8xbf16>) -> tensor<4x8xbf16>
      %3 = "stablehlo.all_gather"(%2) <{all_gather_dim = 0 : i64}> : (tensor<1x5xi32>) -> tensor<2x5xi32>
      %4 = "stablehlo.collective_permute"(%2) <{pairs = dense<[[0, 1]]>}> : (tensor<4x8xbf16>) -> tensor<4x8xbf16>
      sdy.return %4 : tensor<4x8xbf16>
    } : (tensor<4x8xbf16>) -> tensor<4x8xbf16>
    return %0 : tensor<4x8xbf16>
  }
  func.func private @layer(%arg0: tensor<4x8xbf16>) -> tensor<4x8xbf16> {
    %0 = "stablehlo.all_reduce"(%arg0) <{replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>}> ({
    ^bb0(%arg1: tensor<bf16>, %arg2: tensor<bf16>):
      %1 = stablehlo.add %arg1, %arg2 : tensor<bf16>
      stablehlo.return %1 : tensor<bf16>
    }) : (tensor<4x8xbf16>) -> tensor<4x8xbf16>
    return %0 : tensor<4x8xbf16>
  }
}
"""


def test_collectives_as_they_are_written() -> None:
    assert compiled.collectives_as_written(STABLEHLO) == {
        "all-reduce": (2, 2 * 4 * 8 * 2),
        "all-gather": (1, 2 * 5 * 4),
        "collective-permute": (1, 4 * 8 * 2),
    }
    assert [compiled._hlo_name(item) for item in ("i1", "i32", "ui8", "bf16", "f32")] == [
        *("pred", "s32", "u8", "bf16", "f32")
    ]


def test_kernels_by_hand() -> None:
    # Two all-reduces, the starts of a gather and a permute, and the copy.
    assert kernels_of(HLO) == 5


def test_evidence_is_shown() -> None:
    evidence = Evidence("a tick", "v5e", 8, 3 * 10**9, 10**7, True, 4e9, 5e9, 7, {"all-reduce": (2, 1024)}, 0.01, 3e9)
    text = " | ".join(compiled.evidence_rows([evidence])[0])
    for part in ("8 v5e", "3.00", "0.010", "yes", "10.00", "2 all-reduce, 1,024 bytes"):
        assert part in text


@pytest.mark.parametrize("text", ["v5e", "v5e:", "v5e:2x", "h100:2x4", "v5e:2 x 4"])
def test_bad_topologies(text: str) -> None:
    with pytest.raises(DexError, match="is no TPU topology"):
        compiled.topology_devices(text)


def test_without_libtpu(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(DexError, match="needs libtpu"):
        compiled.topology_devices("v5e:2x2")


SMALL = dataclasses.replace(LLAMA, vocab_size=1024, width=256, num_kv_heads=4, head_dim=128, mlp_width=512, tied=False)


@pytest.mark.tpu
def test_a_tick_and_its_rivals_compile() -> None:
    pytest.importorskip("libtpu")
    evidence = compiled.compiled_evidence(SMALL, "v5e:2x2", explorers=4, rows=2)
    tick, through, tensor = json.loads(json.dumps([dataclasses.asdict(each) for each in evidence]))
    # [W, D] to the next stage and one gather of tokens and scores; K - 1 permutes through the stages.
    assert tick["collectives"]["collective-permute"] == [1, 2 * SMALL.width * 2]
    assert tick["collectives"]["all-gather"][0] == 1
    assert through["collectives"]["collective-permute"][0] == 3
    assert "all-reduce" not in tick["collectives"]
    # Two a layer, and that of the embedding; the compiler may merge none of them.
    assert tensor["collectives"]["all-reduce"][0] >= 2 * SMALL.num_layers
    devices = compiled.topology_devices("v5e:2x2")[1]
    written = compiled._lower(SMALL, compiled.AR().schedule_for(4), (1, 2, 3, 4), {"tensor": 4}, devices, 1, 1024)
    counted = compiled.collectives_as_written(written.as_text())
    assert counted["all-reduce"] == (2 * SMALL.num_layers + 1, (2 * SMALL.num_layers + 1) * SMALL.width * 2)
    for each in (tick, through, tensor):
        assert each["fits"]
        assert each["flops"] > 0
        assert each["kernels"] > 10
        # The roofline's bytes are the compiler's, up to what the loop carries beside and how arrays are laid out.
        assert each["argument_bytes"] == pytest.approx(each["predicted_bytes"], rel=0.1)


@pytest.mark.tpu
def test_an_arrangement_that_there_is_not() -> None:
    assert importlib.util.find_spec("libtpu") is not None
    with pytest.raises(DexError, match="does not know the topology"):
        compiled.topology_devices("v5e:3x5")
    with pytest.raises(DexError, match="has 4 chips, too few for 8 stages"):
        compiled.compiled_evidence(dataclasses.replace(SMALL, num_layers=8), "v5e:2x2", explorers=8)
