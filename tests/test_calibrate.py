"""Calibration on a tiny model: that it measures what it says, not how fast it is."""

from __future__ import annotations

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import pytest
from reference.small_models import LLAMA

from dex_jax.cli import calibrate as command
from dex_jax.evaluation.planner import calibrate, timed_programs
from dex_jax.hardware import hardware


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """This machine, measured in no time, as the command writes and reads it."""
    file = tmp_path_factory.mktemp("machine") / "here.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "UNCACHED", 1e5)
        patch.setattr("dex_jax.evaluation.planner.workload.config_of", lambda source: LLAMA)
        patch.setattr(calibrate, "STAGES", 2)
        patch.setattr(calibrate, "device_memory", lambda device: None)
        arguments = ["--rows", "1", "4", "--repeats", "2", "--least", "0.001", "--long", "128", "--output", str(file)]
        assert command.main([*arguments, "--memory", "1.5"]) == 0
    return hardware(str(file))


@pytest.mark.slow
def test_all_that_the_planner_reads_is_measured(machine) -> None:
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
    again = timed_programs._repeated(lambda step: lambda x: x + step, jnp.float32(2), start)
    first = again(2)
    assert again(3).tolist() == [10.0] * 3
    assert first.is_deleted()
    assert start.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--rows", "0"], "--rows must be 1 to 64"), (["--model", "no such model"], "names no model")],
)
def test_bad_calibrations(flags: list[str], message: str, tmp_path, capsys) -> None:
    file = tmp_path / "here.json"
    assert command.main([*flags, "--output", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_memory_that_a_device_keeps_to_itself_is_asked_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(calibrate, "device_memory", lambda device: None)
    monkeypatch.setattr("dex_jax.evaluation.planner.workload.config_of", lambda source: LLAMA)
    assert command.main(["--output", str(tmp_path / "here.json")]) == 2
    assert "does not say how much memory it has: give --memory GB" in capsys.readouterr().err
