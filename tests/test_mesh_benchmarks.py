"""What the benchmarks of rows, of two processes and of contexts make of their figures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from dex_jax.errors import DexError
from dex_jax.evaluation.validate_plan import read_further


def benchmark(name: str):
    """The module of a benchmark."""
    file = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).resolve().parents[1] / "benchmarks")
    context, rows, two_processes = map(benchmark, ("context", "rows", "two_processes"))


def squeezed(page: str) -> str:
    """Without what pads the cells of tables."""
    return " ".join(page.split())


def group(latency: float, start: int, ar: float, dex: float, ticks: int) -> dict:
    return {
        "latency": latency, "batch": 1, "start": start, "seconds": {"ar": ar, "dex": dex}, "steps": 10, "ticks": ticks,
        "tokens": 10, "ticks_of_all": ticks, "identical": True, "prompt_tokens": 20, "depths": [15, 30], "rows": 1,
        "exits": "default", "max_new_tokens": 11,
    }  # fmt: skip


def test_gains_of_two_processes_beside_what_is_predicted(tmp_path):
    links = {"0.0": {"permute": 1e-4, "gather": 1e-4, "sum": 2e-4, "bandwidth": 1e9}}
    groups = [group(0.0, i, ar, 0.5, 16) for i, ar in enumerate((0.6, 0.7, 0.5))]
    found = {"groups": groups, "links": links, "skipped": {"5.0": "no netem"}, "about": {}, "sharing": None}
    (row,) = two_processes.predictions(found, "cpu", "smollm2-135m", None)
    assert row["gain"] == pytest.approx(1.2)
    assert row["interval"][0] <= row["gain"] <= row["interval"][1]
    assert (row["interval"], row["worst"]) == ((pytest.approx(1.0), pytest.approx(1.4)), pytest.approx(1.0))
    assert row["by_ticks"] == pytest.approx(2 * 10 / 16)
    assert (row["step"], row["tick"]) == (pytest.approx(0.06), pytest.approx(1.5 / 48))
    guess, later = row["predicted"], row["later"]["5.0"]
    assert guess["gain"] == pytest.approx(guess["step"] / (1.6 * guess["tick"]))
    # Two messages a step, and three a tick with exits that read the position before.
    assert later["step"] - guess["step"] == pytest.approx(2 * 0.005)
    assert later["tick"] - guess["tick"] == pytest.approx(3 * 0.005)
    # One stage of the pipeline computes at a time; after a miss so does one of DEX's.
    (aside,) = two_processes.predictions(found, "cpu", "smollm2-135m", None, "h100")
    assert aside["predicted"]["step"] < guess["step"] / 10
    assert guess["tick"] / 2 < aside["predicted"]["tick"] < guess["tick"]
    two_processes.further([row], str(tmp_path / "further.json"))
    ar, dex = read_further(str(tmp_path / "further.json"))
    assert ar.measured_speed == pytest.approx(1 / 0.06)
    assert dex.measured_speed == pytest.approx(30 / 1.5)
    found["about"] = {"model": "m", "max_new_tokens": 11, "rounds": 3}
    found["sharing"] = {
        "alone": [{"bytes": 2e9, "operations": 4e9}],
        "together": [{"bytes": 1e9, "operations": 4e9}] * 2,
    }
    page = squeezed(two_processes.page(found, [row]))
    assert "| GB/s read | 2.0 | 1.0 | 1.0 | 1.00 |" in page
    assert "| Gflop/s | 4.0 | 4.0 | 4.0 | 2.00 |" in page
    assert "DEX is 1.20 times as fast, -4% of what ticks predict" in page
    ahead = row | {"gain": 1.2, "by_ticks": 1.25, "predicted": guess | {"gain": 1.1}}
    said = squeezed(two_processes.page(found, [ahead]))
    assert "DEX is 1.20 times as fast, -4% of what ticks predict, +9% of what the cost model predicts: holds." in said
    for change in ({"gain": 0.99}, {"by_ticks": 1.5}, {"predicted": guess | {"gain": 1.0}}):
        assert "DOES NOT HOLD" in two_processes.page(found, [ahead | change])
    assert "Added latency of 5.0 ms was not measured: this machine does not allow it (no netem)." in page


def test_a_machine_without_namespaces_is_told_of(monkeypatch):
    assert two_processes.delayed(0) == []
    monkeypatch.setattr(two_processes.shutil, "which", lambda name: None)
    with pytest.raises(DexError, match="unshare, ip and tc"):
        two_processes.delayed(1.0)


def test_the_default_rows_are_held_against_what_never_prunes():
    grid = {"depths": list(range(3, 31, 3)), "exits": "default", "never_prunes": 4.0, "replayed": {}}
    run = {"ticks_per_token": 4.1, "above": 0.025, "tokens": 10, "identical": 2, "of": 2}
    about = {"texts": 2, "data": ["a.jsonl"], "max_new_tokens": 9, "dtype": "float32"}
    page = squeezed(rows.page({"about": about, "grids": {"10": grid}, "loop": {"10": {"32": run}}}))
    assert "| 10 | 4.000 | 4.100 (+2.5% of 2) * |" in page
    assert "K = 10: the default, 32 rows, takes +2.5% ticks (meant to take at most 3% more: holds)" in page
    worse = run | {"above": 0.05}
    assert "DOES NOT HOLD" in rows.page({"about": about, "grids": {"10": grid}, "loop": {"10": {"32": worse}}})


def test_prompts_of_a_context_lie_apart():
    assert context.prompts_of(list(range(10)), 4, 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(DexError, match="hold 10 tokens, fewer than a context of 11"):
        context.prompts_of(list(range(10)), 11, 1)
