"""Decoding on a mesh: tokens, ticks and exits are those of one device, and each device holds and sends what it must."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import slow
from environment import flags_for_devices
from mesh_worker import CASES, CHECKPOINTS, IN_CPP, Case
from reference.compiled import Hlo, Instruction
from reference.small_models import LLAMA
from test_few_rows import needs_compiler

from dex_jax.decoding.sizes import cache_length_for
from dex_jax.errors import DexError
from dex_jax.nn import few_rows
from dex_jax.nn.sharding import check_batch, check_model, check_stages, make_mesh, parse_mesh

TESTS = Path(__file__).resolve().parent
DEVICES = 8
WIDTH, VOCABULARY = LLAMA.width, LLAMA.vocab_size
PROMPT = 48
COLLECTIVES = ("collective-permute", "all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-broadcast")

MADE = {"llama_attention_bias": ["4 x cpu:cpu", [2, 4]], "gemma3": ["3 x cpu:cpu", [3, 5, 7]]}
"""The devices that a checkpoint's tokens were made on, and the depths of its stages."""
LATTICES = [n for n, case in CASES.items() if case.method == "dex" and "," not in case.mesh and case.explorers != 1]
"""Cases of a lattice on an axis of stages alone, one explorer on each device or several."""
SEVERAL = "drafts, six on two devices"
QUICK = ("drafts, all axes",)
"""The case that is not slow, as it has all that the others have."""


def cases(names: Iterable[str]) -> list[object]:
    """Return names as parameters, slow but for QUICK."""
    return [name if name in QUICK else slow(name) for name in names]


def run_worker(found: Path, request: pytest.FixtureRequest, known: Iterable[str], **variables: str) -> Path:
    """Run tests/mesh_worker.py for the cases that the tests of this run name, and return the folder of its results."""
    wanted = {getattr(item, "callspec", None) and item.callspec.params.get("name") for item in request.session.items}
    command = [sys.executable, str(TESTS / "mesh_worker.py"), found, *(name for name in known if name in wanted)]
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags_for_devices(DEVICES)}
    subprocess.run(command, env={**os.environ, **flags, **variables}, check=True)
    return found


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    """Return the results of programs that are XLA's alone, as on other devices than CPUs."""
    return run_worker(tmp_path_factory.mktemp("mesh"), request, [*CASES, *CHECKPOINTS], DEX_JAX_NATIVE="0")


@pytest.fixture(scope="module")
def in_cpp(request, tmp_path_factory) -> Path:
    """Return the results of programs that compute products of few rows in C++."""
    return run_worker(tmp_path_factory.mktemp("mesh_cpp"), request, [*IN_CPP, "packed"])


def hlo(folder: Path, case: str, program: str) -> str:
    return (folder / f"{case}.{program}.hlo").read_text()


def instructions(text: str) -> Iterable[Instruction]:
    """Return all instructions of a compiled program."""
    return itertools.chain(*(each.values() for each in Hlo(text).computations.values()))


def collectives(text: str) -> collections.Counter:
    """Count each (operation, bytes of its result on one device) of a compiled program."""
    named = ((each.operation.removesuffix("-start"), each.nbytes) for each in instructions(text))
    return collections.Counter(each for each in named if each[0] in COLLECTIVES)


@pytest.mark.parametrize("name", cases(CASES))
def test_tokens_ticks_and_exits_are_those_of_one_device(folder: Path, name: str) -> None:
    assert_as_one_device(folder, CASES[name])


@pytest.mark.skipif(few_rows.language() != "C++", reason="no C++ compiler on this machine")
@pytest.mark.parametrize("name", cases(IN_CPP))
def test_so_they_are_in_cpp(in_cpp: Path, name: str) -> None:
    assert_as_one_device(in_cpp, IN_CPP[name])
    text = hlo(in_cpp, name, "run_ticks")
    assert all(target in text for target in (few_rows.NORM, few_rows.PRODUCT, few_rows.ATTENTION))
    assert "copy" not in what_makes_caches(text, IN_CPP[name])


def assert_as_one_device(folder: Path, case: Case) -> None:
    result = json.loads((folder / f"{case.name}.json").read_text())
    assert "failed" not in result, result["failed"]
    assert result["mesh"] == result["one"]
    if case.method == "dex" and (case.plan.stages > 1 or case.drafts is not None):
        exits = {exit for row in result["mesh"] for exit in row["exits"]}
        assert len(exits - {-1}) > 1, "every token came from the same exit: this would test nothing"
        assert (0 in exits) == (case.drafts is not None)


@needs_compiler
@pytest.mark.parametrize("name", cases(["packed"]))
def test_packed_weights_lie_on_their_stages_and_give_dense_ones_tokens(in_cpp: Path, name: str) -> None:
    found = json.loads((in_cpp / f"{name}.json").read_text())
    assert found["kind"] == "Q4_1 and Q8_0"
    assert found["stages"] == [[1, 1], [1, 1]]
    for method, tokens in found["tokens"].items():
        assert tokens == found["dense"], method
    in_8_bits = found["int8"]
    assert in_8_bits["tokens"][0] == in_8_bits["tokens"][1]
    # Each device of the mesh rounds its own half of the inputs; one device among several uses XLA, unrounded.
    assert in_8_bits["error"] < 1e-3
    assert in_8_bits["shapes"] == [[160, 64], [160], [64, 80], [64]], "half of 2 x 160 outputs, half of 160 inputs"


@pytest.mark.parametrize("name", cases(CHECKPOINTS))
def test_checkpoints_are_read_onto_a_mesh(folder: Path, name: str) -> None:
    result = json.loads((folder / f"{name}.json").read_text())
    done, total = result["read"]
    assert done == total, "every tensor is read once"
    assert result["error"] < 1e-5
    if CHECKPOINTS[name][1] is not None:
        assert result["tokens"] == result["best"]
        assert result["made"] == MADE[name]


@pytest.mark.parametrize("name", cases(LATTICES))
def test_a_tick_sends_a_cohort_to_the_next_stage_and_shares_proposals(folder: Path, name: str) -> None:
    """A tick has one permute of [B, W, D], one gather of tokens and scores, and others if heads need them."""
    case = CASES[name]
    stages, rows = case.plan.stages, case.plan.rows
    cohort = case.batch * rows * WIDTH * 4
    expected = collections.Counter()
    if parse_mesh(case.mesh)["stage"] > 1:
        expected["collective-permute", cohort] = 1
        expected["all-gather", stages * case.batch * rows * 2 * 4] += 1
        if case.drafts is not None:  # the first device's cohort: six numbers a row, and a bit for each other row
            expected["all-gather", parse_mesh(case.mesh)["stage"] * case.batch * rows * (6 + -(-rows // 32)) * 4] += 1
        exits_ask = case.exits is not None and (case.exits[1] or case.exits[0] == "attn")
        if exits_ask or case.drafts == "drafter":
            expected["all-gather", stages * cohort] += 1
    text = hlo(folder, name, "run_ticks")
    assert few_rows.PRODUCT not in text
    assert collectives(text) == expected
    assert not collectives(hlo(folder, name, "start_decoding"))


@pytest.mark.parametrize("name", cases(["ar"]))
def test_an_ar_step_goes_from_stage_to_stage(folder: Path, name: str) -> None:
    case = CASES[name]
    stages = case.plan.stages
    found = collectives(hlo(folder, name, "run_ticks"))
    gathered = ("all-gather", stages * case.batch * 4)
    assert found == {("collective-permute", case.batch * WIDTH * 4): stages - 1, gathered: 1}
    assert not collectives(hlo(folder, name, "start_decoding"))


@pytest.mark.parametrize("name", cases(["ar", "exits attn", "all axes", SEVERAL]))
def test_no_cache_is_copied(folder: Path, name: str) -> None:
    """Nothing copies them in the loop or before it: caches are donated and written where they lie."""
    assert "copy" not in what_makes_caches(hlo(folder, name, "run_ticks"), CASES[name])


def what_makes_caches(text: str, case: Case) -> list[str]:
    """Return the operations of a compiled program that result in whole caches."""
    shape = (cache_length_for(1, 1, 0, case.batch), case.head_dim)
    found = [each.operation for each in instructions(text) if any(x.dims[-2:] == shape for x in each.results)]
    assert "parameter" in found
    return found


@pytest.mark.parametrize("name", cases(["drafts, exits mlp", "exits attn"]))
def test_only_stages_that_ask_multiply_with_the_draft_unembedding(folder: Path, name: str) -> None:
    """XLA takes products out of loops of one turn, so that a stage would pay for exits that it does not have."""
    program, (_, _, draft) = Hlo(hlo(folder, name, "run_ticks")), CASES[name].exits

    def multiplies(each: Instruction) -> bool:
        return each.operation == "dot" and draft in each.results[0].dims

    def always(computation: str) -> bool:
        """Return whether it multiplies whatever branches its conditionals take."""
        for each in program.computations[computation].values():
            called = [*map(always, [*each.calls, *re.findall(r"to_apply=%?([\w.\-]+)", each.line)])]
            if multiplies(each) or (any(called) and (each.operation != "conditional" or all(called))):
                return True
        return False

    assert any(multiplies(each) for known in program.computations.values() for each in known.values())
    assert not always([*program.computations][-1]), "the entry"


@pytest.mark.parametrize("name", cases(["ar", "exits attn"]))
def test_a_prefill_goes_from_stage_to_stage(folder: Path, name: str) -> None:
    """There are K - 1 permutes of [B, R, D], then one sum that shares the last states and the exits' memory."""
    case = CASES[name]
    stages = case.plan.stages
    found = collectives(hlo(folder, name, "prefill_chunk"))
    assert found.pop(("collective-permute", case.batch * PROMPT * WIDTH * 4)) == stages - 1
    assert {operation for operation, _ in found} == {"all-reduce"}
    shared = case.batch * WIDTH * 4
    if case.exits is not None and case.exits[0] == "attn":
        shared *= 2
        shared += case.batch * 5 * (2 * 2 * 8 + 1) * 4
    assert sum(size * times for (_, size), times in found.items()) == shared


@pytest.mark.parametrize("name", cases(["all axes"]))
def test_a_tensor_axis_sums_twice_a_layer_and_shares_logits_and_a_data_axis_one_number(folder: Path, name: str) -> None:
    case = CASES[name]
    rows = case.batch // 2 * case.plan.rows
    found = collectives(hlo(folder, name, "run_ticks"))
    assert found.pop(("collective-permute", rows * WIDTH * 4)) == 1
    assert found.pop(("all-gather", case.plan.stages * rows * 2 * 4)) == 1
    # Devices agree before the loop and in it whether any sequence goes on.
    assert found.pop(("all-reduce", 4)) == 2
    sums = {size: times for (operation, size), times in found.items() if operation == "all-reduce"}
    logits = {size: times for (operation, size), times in found.items() if operation == "all-gather"}
    assert sum(map(len, (sums, logits))) == len(found)
    # Two layers, each compiled for one row a sequence (W is 1), and the embedding, which is split by tokens.
    assert sums == {rows * WIDTH * 4: 2 * 2 + 1}
    assert max(logits) == rows * VOCABULARY * 4


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("stage=0", "stage=5 or stage=2,tensor=3"),
        ("stage=2,stage=3", "each once"),
        ("stage=two", "with their sizes"),
        ("stage=500", r"needs 500 devices and there are 1 \(cpu\).*device_count=500"),
        ({"tensor": 0}, "'tensor': 0} is no mesh"),
        ({"stage": True}, "'stage': True} is no mesh"),
    ],
)
def test_a_mesh_that_cannot_be_had(wanted: str | dict, sentence: str) -> None:
    with pytest.raises(DexError, match=sentence):
        make_mesh(wanted)


def test_a_mesh_that_does_not_fit() -> None:
    smollm = dataclasses.replace(LLAMA, num_heads=9, num_kv_heads=3, mlp_width=1536)
    mesh = SimpleNamespace(shape={"data": 2, "stage": 3, "tensor": 2})
    with pytest.raises(DexError, match="tensor=2 must divide the model's 9 heads"):
        check_model(mesh, smollm)
    with pytest.raises(DexError, match="3 stages needs as many layers, and the model has 2"):
        check_model(mesh, dataclasses.replace(LLAMA, num_layers=2))
    with pytest.raises(DexError, match="norms all heads together"):
        check_model(mesh, dataclasses.replace(LLAMA, qk_norm=True, qk_norm_whole=True))
    with pytest.raises(DexError, match="the mesh has stage=3 and the plan 5 explorers: every device"):
        check_stages(mesh, 5)
    with pytest.raises(DexError, match="data=2 does not divide the 3 sequences"):
        check_batch(mesh, 3)
