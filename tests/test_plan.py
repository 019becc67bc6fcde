"""Hardware descriptions, machines measured, candidates, recommendations, and the planner's commands."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.small_models import LLAMA

from dex_jax.cli import calibrate as command
from dex_jax.cli import plan
from dex_jax.config import ExitsConfig
from dex_jax.decoding.methods import even_depths
from dex_jax.errors import DexError
from dex_jax.evaluation.planner import calibrate, cost_model, predictions, timed_programs, workload
from dex_jax.evaluation.planner.cost_model import Setting
from dex_jax.evaluation.planner.ead_profile import EAD, FORMAT, Profile, Ticks
from dex_jax.hardware import DEVICES, LINKS, Measured, hardware, read_hardware, write_hardware
from dex_jax.nn.exits import exit_parameters
from dex_jax.nn.transformer import parameter_shapes

ASSUMED = "a profile"
LLAMA_70B = workload.SHAPES["llama-2-70b"]
EARLY = Profile(80, EAD((10, 40, 80), (0.6, 0.2, 0.2)), {}, assumption="most tokens are there early")
LATE = Profile(80, EAD((79, 80), (0.05, 0.95)), {}, assumption="hardly any token is there early")


def _setting(text: str, exits: str = "linear:8192", **more) -> Setting:
    return Setting(workload.work_of(LLAMA_70B), workload.described_exits(exits, LLAMA_70B), hardware(text), **more)


def test_names_of_hardware() -> None:
    one, eight, sixteen = hardware("h100"), hardware("h100x8"), hardware("h100x16")
    assert (one.count, one.hosts, eight.hosts, sixteen.hosts, sixteen.per_host) == (1, 1, 1, 2, 8)
    assert eight.link is LINKS["nvlink4"]
    assert sixteen.between(8) is LINKS["nvlink4"]
    assert sixteen.between(9) is LINKS["infiniband"]
    assert hardware("v5ex16").hosts == 1
    apart = hardware("v5ex8,hosts=8,network=dcn,link=pcie4,price=1.5")
    assert (apart.hosts, apart.network, apart.link) == (8, LINKS["dcn"], LINKS["pcie4"])
    assert apart.device.price == 1.5
    assert hardware("h100,count=4").count == 4
    assert set(DEVICES) == {"h100", "h200", "a100", "a100-40", "t4", "l4", "v5e", "v5p", "v6e", "cpu"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1000", "'h1000' is unknown: write NAME or NAMExCOUNT"),
        ("h100x0", "whole count of at least 1, not 0"),
        ("h100x8,hosts=3", "8 devices do not spread evenly over 3 hosts"),
        ("h100x8,link=rope", "there is no link 'rope'"),
        ("h100x8,price=cheap", "the price 'cheap' is no number"),
        ("none.json", "none.json cannot be read as hardware"),
    ],
)
def test_bad_hardware(text: str, message: str) -> None:
    with pytest.raises(DexError, match=message):
        hardware(text)


def test_hardware_is_written_and_read(tmp_path) -> None:
    curve = ((1.0, 1e-9), (8.0, 2e-9))
    measured = Measured({"unrolled": curve}, curve, curve, curve, {"unrolled": 1e-5}, 1e-4)
    found = hardware("cpux2")
    found = dataclasses.replace(found, device=dataclasses.replace(found.device, measured=measured))
    file = tmp_path / "here.json"
    write_hardware(file, found)
    assert read_hardware(file) == found == hardware(str(file))
    more = hardware(f"{file},count=4,hosts=2,network=dcn")
    assert (more.count, more.hosts, more.network.name) == (4, 2, "dcn")
    file.write_text(file.read_text().replace('"cache"', '"cash"'))
    with pytest.raises(DexError, match="calibrate write it"):
        read_hardware(file)
    with pytest.raises(DexError, match="cannot be written"):
        write_hardware(file / "here.json", found)


def parameters(work: workload.Work) -> int:
    return work.layers * work.layer + work.embeddings + work.width


def test_counts_are_those_of_the_model() -> None:
    for config in (LLAMA, dataclasses.replace(LLAMA, tied=False, qk_norm=True)):
        work = workload.work_of(config)
        assert parameters(work) == sum(math.prod(shape) for shape in parameter_shapes(config).values())
    assert parameters(workload.work_of(LLAMA_70B)) == pytest.approx(69e9, rel=0.01)
    assert parameters(workload.work_of(workload.SHAPES["qwen3-32b"])) == pytest.approx(32.8e9, rel=0.01)
    work = workload.work_of(LLAMA)
    assert [work.divisible(t) for t in (1, 2, 4)] == [True, True, False]


def test_exits_are_counted() -> None:
    config = ExitsConfig("attn", (1, 2), LLAMA.width, draft_size=20)
    found = workload.exit_work(config, LLAMA)
    sizes = {name: math.prod(shape) for name, (shape, _) in exit_parameters(config).items()}
    context = sum(size for name, size in sizes.items() if name.startswith("context."))
    assert found.shared == context > 0
    assert 2 * found.own == sum(sizes.values()) - context
    assert (found.columns, found.previous) == (20, True)
    # What a committed position is read with: its features, then its key and value (with the query, one kernel).
    assert found.committed == sizes["context.enter"] + sizes["context.layer.qkv"]
    assert workload.described_exits("linear", LLAMA).committed == 0
    assert workload.described_exits("shared", LLAMA) == workload.exit_work(None, LLAMA)
    assert workload.described_exits("some/folder", LLAMA) is None
    for text in ("linear:x", "linear:49"):
        with pytest.raises(DexError, match="no draft vocabulary of 1 to 48 tokens"):
            workload.described_exits(text, LLAMA)


def test_a_model_can_be_a_config_file(tmp_path) -> None:
    file = tmp_path / "config.json"
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 100}
    file.write_text(json.dumps(sizes | {"model_type": "llama", "intermediate_size": 128}))
    assert workload.config_of(str(file)).num_layers == 3
    assert workload.config_of("Llama-2-70B") is LLAMA_70B
    with pytest.raises(DexError, match=r"none.json cannot be read"):
        workload.config_of(str(tmp_path / "none.json"))
    for content in ("[1]", "{", "[" * 10_000, '{"model_type": "llama", "hidden_size": "64"}'):
        file.write_text(content)
        with pytest.raises(DexError, match=r"config.json.*: give a model's config.json|config.json of .*hidden_size"):
            workload.config_of(str(file))
    with pytest.raises(DexError, match="To plan from shapes alone, name one of llama-2-7b"):
        workload.config_of("no such model")


def test_dex_is_recommended_where_it_pays_and_not_where_not() -> None:
    """Over a slow network with early exits; not within NVLink, and not when exits know nothing."""
    slow = "h100x8,hosts=8,network=dcn"
    assert predictions.plan(_setting(slow), EARLY).choice.method == "dex"
    assert predictions.plan(_setting("h100x8"), EARLY).choice.method != "dex"
    late = predictions.plan(_setting(slow), LATE)
    assert not late.choice.method.startswith("dex")
    assert late.sentence.startswith("One explorer or none: ")
    assert late.choice is late.best_other
    nothing = predictions.plan(_setting("t4"), EARLY)
    assert nothing.choice is None
    assert not any(p.fits for p in nothing.predictions)
    assert nothing.sentence.startswith("Nothing fits: the least is ")


def test_every_way_is_there() -> None:
    s = _setting("h100x8", batch=4)
    found = predictions.plan(s, EARLY)
    methods = {p.method for p in found.predictions}
    assert methods == {"ar", "ar tensor", "ar pipelined", "ar replicas", "layerskip", "dex", "dex one device"}
    # Two H100s hold the model, so there are four replicas, each with one of the four sequences.
    replicas = next(p for p in found.predictions if p.method == "ar replicas")
    assert (replicas.tensor, replicas.devices) == (2, 8)
    assert replicas.detail == "AR, 4 of 4 replicas busy, 1 sequences each"
    assert predictions.smallest_tensor(s) == 2
    # A token of one of four sequences takes 8 devices a quarter of a step.
    assert replicas.device_seconds == pytest.approx(8 * replicas.step.total / 4)
    assert replicas.dollars_per_million == pytest.approx(4.0 * replicas.device_seconds * 1e6 / 3600)
    fitting = [p.tokens_per_second for p in found.predictions if p.fits]
    assert fitting == sorted(fitting, reverse=True)
    meshes = {(p.stages, p.tensor) for p in found.predictions if p.method == "dex"}
    assert {(2, 1), (8, 1), (2, 4), (4, 2)} <= meshes
    assert all(stages * tensor <= 8 and tensor in (1, 2, 4, 8) for stages, tensor in meshes)


DRAFTS = (Ticks((80,), 8, 2.5, 1.0, 2), Ticks((80,), 16, 2.5, 1.0, 8), Ticks(even_depths(4, 80), 16, 0.8, 0.4, 8))


def _with_drafts(text: str, **more) -> tuple[Setting, Profile]:
    s = dataclasses.replace(_setting(text, **more), drafter=workload.described_exits("mlp:8192", LLAMA_70B))
    return s, dataclasses.replace(EARLY, drafts=DRAFTS)


def test_one_explorer_runs_wherever_ar_does_and_explorers_with_drafts_beside_those_without() -> None:
    s, profile = _with_drafts("h100x8")
    found = predictions.plan(s, profile).predictions
    ways = {
        kind: {(p.method.removeprefix(kind), p.stages, p.tensor) for p in found if p.method.startswith(kind)}
        for kind in ("ar", "trees")
    }
    assert ways["ar"] == ways["trees"]
    # Both trees bring as much, and the first drafts fewer levels.
    assert {p.rows for p in found if p.method.startswith("trees")} == {8}
    (piped,) = [p for p in found if (p.method, p.stages) == ("trees pipelined", 8)]
    assert piped.step == cost_model.pipelined_step(s, 8, 1, DRAFTS[0])
    assert piped.tokens_per_second == pytest.approx(2.5 / piped.step.total)
    assert piped.detail == "trees of 8 rows, pipeline of 8 stages"
    (explorers,) = [p for p in found if "with drafts" in p.detail and (p.method, p.tensor) == ("dex", 2)]
    assert explorers.step == cost_model.tick(s, DRAFTS[2], 2)
    assert explorers.detail == "DEX-1/4 with drafts, exits at 20 40 60, 16 rows, mesh stage=4,tensor=2"
    assert explorers.tokens_a_step == 0.8
    assert {p.detail for p in predictions.dex(s, profile, [4], [16])} >= {explorers.detail}


STEPS = ((1.0, 43.65e-3), (2.0, 43.68e-3), (4.0, 54.09e-3), (8.0, 66.11e-3), (16.0, 104.14e-3))
"""Seconds of a step of SmolLM2-135M in float32 by its rows on one core, as the two processes below measured it
(decoding/costs.py) and chose their rows by it."""

OF_TREES, OF_EXPLORERS = (3.75, 1.306, 0.98), (8.17, 0.716, 0.61)
"""Rows run, levels drafted and share of commits a tick: counted on the prompts below with these costs, where ticks were
theirs in all answers. A stage of several explorers runs one row, eight or all, whatever a cohort keeps."""


def test_it_predicts_what_two_processes_measured() -> None:
    """Speeds over AR's pipeline within 15%, of all prompts together and of their median."""
    content = json.loads((Path(__file__).parents[1] / "results/two_processes_drafts.json").read_text())
    runs, depths = list(content["runs"].values()), tuple(content["about"]["depths"])
    names = {"trees in a pipeline": OF_TREES, "explorers without drafts": None, "explorers with drafts": OF_EXPLORERS}
    work = workload.work_of(workload.config_of("smollm2-135m"))
    size = 4 * (work.layers * work.layer + work.vocabulary * work.width)
    curve = tuple((rows, seconds / size) for rows, seconds in STEPS)
    # A tick's bookkeeping as it was seen in a profile of one; messages of two processes.
    measured = Measured({"unrolled": curve}, curve[:1], curve, curve, {"unrolled": 0.0}, 5e-5, 2e-3)
    core = dataclasses.replace(DEVICES["cpu"][0], measured=measured)
    two = dataclasses.replace(hardware("cpu,count=2"), device=core)
    exits, drafter = workload.exits_of("default", "smollm2-135m"), workload.drafter_of("smollm2-135m")
    s = Setting(work, exits, two, context=256, drafter=drafter)
    plain, tokens = cost_model.pipelined_step(s, 2).total, sum(run["tokens"] for run in runs)
    for name, counted in names.items():
        pace = tokens / sum(run["ticks"][name] for run in runs)
        rows, levels, commits = counted or (1, None, pace)
        if name == "trees in a pipeline":
            step = cost_model.pipelined_step(s, 2, trees=Ticks(depths[-1:], rows, pace, commits, levels))
        else:
            step = cost_model.tick(s, Ticks(depths, rows, pace, commits, levels))
        together = [sum(run["seconds"][each] for run in runs) for each in ("AR", name)]
        median = statistics.median(run["seconds"]["AR"] / run["seconds"][name] for run in runs)
        assert pace * plain / step.total == pytest.approx(together[0] / together[1], rel=0.15), name
        assert pace * plain / step.total == pytest.approx(median, rel=0.15), name


@settings(max_examples=20)
@given(st.floats(0.0, 1.0), st.sampled_from(["h100x8", "h100x8,hosts=8,network=dcn", "v6ex16"]))
def test_earlier_tokens_never_make_dex_slower(share: float, text: str) -> None:
    def best(early: float) -> float:
        profile = Profile(80, EAD((10, 80), (early, 1 - early)), {}, assumption="two depths")
        return max(p.tokens_per_second for p in predictions.dex(_setting(text), profile, explorers=[2, 4, 8]))

    assert best(share) <= best(min(1.0, share + 0.1)) * (1 + 1e-9)


def _assumed(tmp_path) -> str:
    file = tmp_path / "assumed.json"
    ead = {"depths": [20, 80], "share": [0.5, 0.5]}
    file.write_text(json.dumps({"format": FORMAT, "assumption": "half are there by 20", "layers": 80, "ead": ead}))
    return str(file)


def test_the_command_prints_json_and_tables(tmp_path, capsys) -> None:
    arguments = ["--model", "llama-2-70b", "--exits", "shared", "--profile", _assumed(tmp_path), "--json"]
    assert plan.main([*arguments, "--hardware", "h100x8", "--explorers", "4", "8", "--rows", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommendation"].startswith(("Several explorers", "One explorer or none"))
    explored = [p for p in found["predictions"] if p["method"] == "dex"]
    assert {(p["stages"], p["rows"]) for p in explored} == {(4, 2), (8, 2)}
    for p in explored:
        assert p["tokens_per_second"] == pytest.approx(p["tokens_a_step"] / sum(p["step"].values()))
        assert p["capacity"] == 2 * p["stages"]
    arguments = ["--model", "llama-2-70b", "--exits", "linear:8192", "--profile", _assumed(tmp_path)]
    assert plan.main([*arguments, "--hardware", "h100x8,hosts=8,network=dcn"]) == 0
    text = capsys.readouterr().out
    assert "knows no ticks with drafts" in text
    assert all(words in text for words in ("EAD assumed, not measured", "Several explorers: DEX-1/"))


def test_packed_weights_take_fewer_bytes(tmp_path, capsys) -> None:
    arguments = ["--model", "llama-2-70b", "--exits", "shared", "--profile", _assumed(tmp_path), "--json"]

    def ar(weights: str) -> dict:
        assert plan.main([*arguments, "--hardware", "h200x1", "--weights", weights]) == 0
        return next(p for p in json.loads(capsys.readouterr().out)["predictions"] if p["method"] == "ar")

    dense, packed = ar("dense"), ar("int8")
    assert (dense["fits"], packed["fits"]) == (False, True)
    assert packed["bytes_per_device"] < 0.51 * dense["bytes_per_device"]
    assert packed["step"]["layers"] < 0.51 * dense["step"]["layers"]
    assert packed["tokens_per_second"] > 1.8 * dense["tokens_per_second"]
    curve = ((1.0, 1e-9), (8.0, 2e-9))
    measured = dataclasses.replace(
        hardware("cpu").device, measured=Measured({"unrolled": curve}, *[curve] * 3, {}, 0.0)
    )
    write_hardware(tmp_path / "here.json", dataclasses.replace(hardware("cpu"), device=measured))
    assert plan.main([*arguments, "--hardware", str(tmp_path / "here.json"), "--weights", "int8"]) == 2
    assert "calibrated with dense weights" in capsys.readouterr().err
    # The file's 4 and 8 bits.
    assert 0.6 < workload.packed_bytes("smollm2-135m", "stored", "gpu") < 0.8
    assert 1 < workload.packed_bytes("smollm2-135m", "int8", "tpu") < 1.01
    assert workload.packed_bytes("smollm2-135m", "dense", "gpu") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "say for what to plan"),
        (["--hardware", "h100"], "ticks follow from an EAD profile"),
        (["--hardware", "h100", "--profile", ASSUMED, "--weights", "stored"], "does not say how weights are stored"),
        (["--hardware", "h100", "--profile", "none.json"], "none.json cannot be read"),
    ],
)
def test_the_command_refuses_bad_input(flags: list[str], message: str, tmp_path, capsys) -> None:
    given = [_assumed(tmp_path) if flag == ASSUMED else flag for flag in flags]
    assert plan.main(["--model", "llama-2-70b", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_all_that_the_planner_reads_is_measured(tmp_path, monkeypatch) -> None:
    """In no time, as the command writes and reads it."""
    file = tmp_path / "here.json"
    monkeypatch.setattr(calibrate, "UNCACHED", 1e5)
    two = dataclasses.replace(LLAMA, num_layers=2)
    monkeypatch.setattr("dex_jax.evaluation.planner.workload.config_of", lambda source: two)
    monkeypatch.setattr(calibrate, "device_memory", lambda device: None)
    arguments = ["--rows", "1", "4", "--repeats", "2", "--least", "0.001", "--long", "128", "--output", str(file)]
    assert command.main([*arguments, "--memory", "1.5"]) == 0
    machine = hardware(str(file))
    measured = machine.device.measured
    assert set(measured.layer) == set(measured.layer_seconds) == {"unrolled"}
    for curve in (*measured.layer.values(), measured.cache, measured.head, measured.exits):
        assert [rows for rows, _ in curve] == [1.0, 4.0]
        assert all(math.isfinite(seconds) and seconds >= 0 for _, seconds in curve)
    assert all(seconds > 0 for _, seconds in (*measured.head, *measured.exits))
    assert min(*measured.layer_seconds.values(), measured.tick_seconds) > 0
    assert measured.drafts_seconds >= 0
    assert (machine.device.itemsize, machine.device.memory) == (4, 1.5e9)
    # Bytes and operations a second, not billions of them: more cannot be said of 100 kB on a busy machine.
    assert machine.device.bandwidth > 1e6
    assert machine.device.flops > 1e6


def test_rounds_are_not_optimised_away() -> None:
    """A hundred times the rounds take longer: no round's work is hoisted out of the loop."""
    wide = dataclasses.replace(LLAMA, width=256, num_heads=8, head_dim=32, mlp_width=1024)
    seconds = {}

    def few_and_many(run) -> float:
        for rounds in (1, 4, 400):
            begin = time.perf_counter()
            jax.block_until_ready(run(rounds))
            seconds[rounds] = time.perf_counter() - begin
        return seconds[400]

    timed_programs.rows_seconds(wide, jnp.dtype(jnp.float32), 2, 64, few_and_many)
    assert seconds[400] > 3 * seconds[4]


def test_rounds_go_on_from_where_the_last_call_ended() -> None:
    """The program is given the state and keeps no copy of it; what the caller has stays the caller's."""
    start = jnp.zeros(3)
    again = timed_programs._repeated(lambda step, x: x + step, jnp.float32(2), start)
    first = again(2)
    assert again(3).tolist() == [10.0] * 3
    assert first.is_deleted()
    assert start.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "0"], "--rows must be 1 to 64"),
        (["--model", "no such model"], "names no model"),
        ([], "does not say how much memory it has: give --memory GB"),
    ],
)
def test_bad_calibrations(flags: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    """On a device that keeps its memory to itself."""
    monkeypatch.setattr(calibrate, "device_memory", lambda device: None)
    file = tmp_path / "here.json"
    assert command.main([*flags, "--output", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()
