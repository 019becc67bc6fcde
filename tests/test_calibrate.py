"""Calibration and validation of the planner on a tiny model: that they measure what they say, not how fast it is."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from reference.small_models import LLAMA, LetterTokenizer, small_model

from dex_jax.decoding.methods import SPARE
from dex_jax.errors import DexError
from dex_jax.evaluation.planner import calibrate, timed_programs, validate_plan
from dex_jax.evaluation.planner.ead_profile import FORMAT, read_profile
from dex_jax.evaluation.planner.hardware import hardware
from dex_jax.evaluation.planner.timed_programs import Timer
from dex_jax.evaluation.planner.validate_plan import Case, Compared, kendall_tau, verdict_of

QUICK = Timer(repeats=2, least=0.001)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """This machine, measured in no time, as the command writes and reads it."""
    file = tmp_path_factory.mktemp("machine") / "here.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "UNCACHED", 1e5)
        patch.setattr(calibrate, "config_of", lambda source: LLAMA)
        patch.setattr(calibrate, "STAGES", 2)
        arguments = ["--rows", "1", "4", "--repeats", "2", "--least", "0.001", "--long", "128", "--output", str(file)]
        assert calibrate.main(arguments) == 0
    return hardware(str(file))


def test_all_that_the_planner_reads_is_measured(machine) -> None:
    measured = machine.device.measured
    assert set(measured.layer) == set(measured.layer_seconds) == {"unrolled", "scan", "stacked"}
    for curve in (*measured.layer.values(), measured.cache, measured.head, measured.exits):
        assert [rows for rows, _ in curve] == [1.0, 4.0]
        assert all(math.isfinite(seconds) and seconds >= 0 for _, seconds in curve)
    assert all(seconds > 0 for _, seconds in (*measured.head, *measured.exits))
    assert min(*measured.layer_seconds.values(), measured.tick_seconds) > 0
    assert machine.device.itemsize == 4
    # Bytes and operations a second, not billions of them: more cannot be said of 100 kB on a busy machine.
    assert machine.device.bandwidth > 1e6
    assert machine.device.flops > 1e6


def test_a_timer_times_rounds() -> None:
    seen = []

    def run(rounds: int) -> jnp.ndarray:
        seen.append(rounds)
        return jnp.zeros(1)

    assert Timer(3, 1e-3)(run) > 0
    assert seen[:2] == [1, 2]
    assert len(seen) == 5
    assert len(set(seen[2:])) == 1


def test_processes_meet_before_they_measure(tmp_path, monkeypatch) -> None:
    order: list[str] = []
    first, second = (calibrate.Meeting(str(tmp_path), number, 2) for number in (0, 1))

    def run() -> None:
        for _ in range(2):
            first()
            order.append("first")

    other = threading.Thread(target=run)
    other.start()
    time.sleep(0.05)
    assert order == []
    second()
    while not order:
        time.sleep(0.001)
    time.sleep(0.05)
    assert order == ["first"]
    second()
    other.join()
    assert order == ["first", "first"]
    monkeypatch.setattr(calibrate, "PATIENCE", 0.01)
    with pytest.raises(DexError, match="another of the processes has stopped"):
        first()


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

    timed_programs.rows_seconds(wide, timed_programs.Unrolled(), jnp.dtype(jnp.float32), 2, 64, few_and_many)
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
    [
        (["--rows", "0"], "--rows must be 1 to 64"),
        (["--long", "64"], "--long above 64"),
        (["--memory", "0"], "--memory must be above 0, not 0"),
        (["--model", "no such model"], "names no model"),
        (["--together", "9999"], "--together 9999 needs as many cores"),
    ],
)
def test_bad_calibrations(flags: list[str], message: str, tmp_path, capsys) -> None:
    file = tmp_path / "here.json"
    assert calibrate.main([*flags, "--output", str(file)]) == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_memory_that_a_device_keeps_to_itself_is_asked_for(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(calibrate, "device_memory", lambda device: None)
    monkeypatch.setattr(calibrate, "config_of", lambda source: LLAMA)
    monkeypatch.setattr(calibrate, "UNCACHED", 1e5)
    file = tmp_path / "here.json"
    assert calibrate.main(["--output", str(file)]) == 2
    assert "does not say how much memory it has: give --memory GB" in capsys.readouterr().err
    quick = ["--rows", "1", "--repeats", "1", "--least", "0.001", "--long", "128"]
    assert calibrate.main([*quick, "--memory", "1.5", "--output", str(file)]) == 0
    assert hardware(str(file)).device.memory == 1.5e9


def test_kendalls_tau_by_hand() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # Of six pairs one disagrees.
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # Tau-b with one tie: five pairs agree, out of sqrt(5 x 6).
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(30))
    assert math.isnan(kendall_tau([1, 1], [1, 2]))


def test_a_verdict_by_hand() -> None:
    rows = [
        Compared("a", 1.1, 1.0, 30.0, 20.0),
        Compared("b", 0.9, 1.0, 20.0, 25.0),
        Compared("c", 1.0, 1.0, 10.0, 5.0),
    ]
    found = verdict_of(rows)
    assert found.largest_error == pytest.approx(0.1)
    assert found.tau == pytest.approx(1 / 3)
    # "a" is predicted to be the fastest and makes 20 where "b" makes 25.
    assert found.regret == pytest.approx(0.25)
    assert not found.holds
    assert verdict_of(rows[1:]).holds
    assert "DOES NOT HOLD" in validate_plan.table(found)
    with pytest.raises(DexError, match="at least two"):
        verdict_of(rows[:1])


CASES = (Case(0), Case(2, batch=2), Case(0, layout="stacked"), Case(2, layout="stacked"))


def _files(tmp_path, machine) -> tuple[str, str, str]:
    from dex_jax.evaluation.planner.hardware import write_hardware

    profile = {
        "format": FORMAT,
        "assumption": "a quarter by layer 2",
        "layers": 4,
        "ead": {"depths": [2, 4], "share": [0.25, 0.75]},
    }
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    write_hardware(tmp_path / "here.json", machine)
    (tmp_path / "prompts.txt").write_text("ABC\nDEFG\nBAD\n")
    return str(tmp_path / "profile.json"), str(tmp_path / "here.json"), str(tmp_path / "prompts.txt")


def test_the_validation_measures_every_case(tmp_path, machine, monkeypatch, capsys) -> None:
    lm = small_model(dataclasses.replace(LLAMA, eos_ids=(3,)), tokenizer=LetterTokenizer())
    monkeypatch.setattr("dex_jax.language_model.load", lambda *args: lm)
    monkeypatch.setattr("dex_jax.cli.common.remember_compilations", lambda: None)
    monkeypatch.setattr(
        validate_plan.compare, "__kwdefaults__", validate_plan.compare.__kwdefaults__ | {"cases": CASES}
    )
    profile, here, prompts = _files(tmp_path, machine)
    further = tmp_path / "further.json"
    further.write_text(json.dumps([dataclasses.asdict(Compared("two processes", 1.0, 1.0, 0.1, 0.1))]))
    arguments = ["--profile", profile, "--hardware", here, "--data", prompts, "--exits", "shared"]
    more = ["--max-new-tokens", "6", "--rounds", "2", "--further", str(further), "--output", str(tmp_path / "out.json")]
    assert validate_plan.main([*arguments, *more]) in (0, 1)
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in written["rows"]] == [*(case.name for case in CASES), "two processes"]
    for row in written["rows"]:
        assert row["measured_seconds"] > 0
        assert row["predicted_seconds"] > 0
    # AR gives a token a step; a batch of two gives twice as many.
    plain = written["rows"][0]
    assert plain["measured_speed"] == pytest.approx(1 / plain["measured_seconds"])
    assert "Kendall's tau" in capsys.readouterr().out
    assert lm.layout == validate_plan.Unrolled()


def test_runs_do_not_end_at_an_eos() -> None:
    config = dataclasses.replace(LLAMA, eos_ids=tuple(range(LLAMA.vocab_size)))
    lm = small_model(config)
    schedule = validate_plan.AR().schedule_for(4)
    seconds, tokens, length = validate_plan.Runner(lm, schedule, None, [[1, 2]], 2, 5)(0)
    assert (tokens, length) == (1.0, 16 + 64 + SPARE)
    assert seconds > 0


def test_bad_validations(tmp_path, machine, capsys) -> None:
    profile, here, prompts = _files(tmp_path, machine)
    arguments = ["--profile", profile, "--hardware", here, "--data", prompts]
    for flags, message in (
        (["--rounds", "0"], "must be at least 1"),
        (["--data", str(tmp_path / "none.txt")], "none.txt"),
        (["--hardware", "none.json"], "cannot be read as hardware"),
    ):
        assert validate_plan.main([*arguments, *flags]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "further.json").write_text("[{}]")
    with pytest.raises(DexError, match="is no list of objects with name, predicted_seconds"):
        validate_plan.read_further(str(tmp_path / "further.json"))
    measured = dataclasses.replace(read_profile(profile), assumption=None)
    s = validate_plan.Setting(validate_plan.work_of(LLAMA), validate_plan.exit_work(None, LLAMA), machine)
    schedule = validate_plan.Dex(explorers=3).schedule_for(4)
    with pytest.raises(DexError, match="lacks DEX-1/3"):
        validate_plan.predict(s, measured, Case(3), schedule)
