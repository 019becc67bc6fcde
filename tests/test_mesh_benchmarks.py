"""What the benchmarks of rows, of two processes and of contexts make of their figures."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dex_jax.decoding.exits import ResolvedExits
from dex_jax.decoding.methods import Dex
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
    context, delayed_link, rows = map(benchmark, ("context", "delayed_link", "rows"))
    two_processes, two_processes_page = map(benchmark, ("two_processes", "two_processes_page"))


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
    # Both parts have half of 106,204,800 weights, and one the unembedding of 49,152 x 576 too.
    part = (106_204_800 / 2 + 49_152 * 576) / (106_204_800 + 49_152 * 576)
    assert row["by_ticks"] == pytest.approx(10 / 16 / part, rel=1e-3)
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
    assert "While all of its sequences go on" not in page
    assert "| GB/s read | 2.0 | 1.0 | 1.0 | 1.00 |" in page
    assert "| Gflop/s | 4.0 | 4.0 | 4.0 | 2.00 |" in page
    ahead = row | {"gain": 1.2, "by_ticks": 1.25, "predicted": guess | {"gain": 1.1}}
    said = squeezed(two_processes.page(found, [ahead]))
    assert "DEX is 1.20 times as fast: holds; +9% of what the ticks and the cost model predict: holds." in said
    for change in ({"gain": 0.99}, {"predicted": guess | {"gain": 1.0}}):
        assert "DOES NOT HOLD" in two_processes.page(found, [ahead | change])
    alone = squeezed(two_processes.page(found, [ahead | {"predicted": None}]))
    assert "DEX is 1.20 times as fast: holds; -4% of what ticks alone predict: holds." in alone
    assert "Added latency of 5.0 ms was not measured: this machine does not allow it (no netem)." in page


def test_a_batch_before_its_first_sequence_ends():
    """Two sequences of ten tokens: one takes 10 ticks, one 20, and a tick lasts as long as a step of the pipeline."""
    uneven = group(0.0, 0, 0.5, 1.0, 20) | {"batch": 2, "tokens": 20, "ticks_of_all": 30}
    (row,) = two_processes.predictions({"groups": [uneven], "skipped": {}}, None, "smollm2-135m", None)
    assert (row["gain"], row["going"]) == (pytest.approx(0.5), pytest.approx(1 / 1.5))
    (said,) = two_processes_page.going_on([row])[1:]
    assert said == "- 0 ms added, batch 2: 0.67 times as fast (median of 1 groups)."


def test_a_machine_without_namespaces_is_told_of(monkeypatch):
    monkeypatch.setattr(delayed_link.shutil, "which", lambda name: None)
    with pytest.raises(DexError, match="unshare and ip"):
        delayed_link.alone()


ENDS = """
import socket, subprocess, sys, time
from delayed_link import ADDRESSES, DelayedLink

if sys.argv[1] == "serve":
    listening = socket.create_server((ADDRESSES[0], 5000))
    said, _ = listening.accept()
    said.sendall(said.recv(9))
elif sys.argv[1] == "ask":
    until = time.monotonic() + 30
    while True:
        try:
            said = socket.create_connection((ADDRESSES[0], 5000), timeout=30)
            break
        except ConnectionRefusedError:  # nobody listens yet
            assert time.monotonic() < until
            time.sleep(0.05)
    begin = time.perf_counter()
    said.sendall(b"x")
    assert said.recv(9) == b"x"
    print(socket.gethostname(), time.perf_counter() - begin)
else:
    with DelayedLink(float(sys.argv[1])) as line:
        both = []
        for number, task in enumerate(("serve", "ask")):
            both.append(subprocess.Popen([*line.prefix(number), sys.executable, __file__, task]))
            line.attach(number, both[-1].pid)
        sys.exit(max(process.wait() for process in both))
"""


def test_messages_of_a_delayed_link_take_their_time(tmp_path):
    try:
        prefix = delayed_link.alone()
    except DexError as error:
        pytest.skip(f"this machine has no network namespaces with tun devices: {error}")
    file = tmp_path / "ends.py"
    file.write_text(ENDS)
    env = os.environ | {"PYTHONPATH": str(Path(delayed_link.__file__).parent)}
    command = [*prefix, sys.executable, str(file), "0.1"]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr
    host, seconds = out.stdout.split()
    assert host == delayed_link.ADDRESSES[1]
    assert 0.2 <= float(seconds) < 2


def test_the_default_rows_are_held_against_what_never_prunes():
    grid = {"depths": list(range(3, 31, 3)), "exits": "default", "never_prunes": 4.0, "replayed": {}}
    run = {"ticks_per_token": 4.1, "above": 0.025, "tokens": 10, "identical": 2, "of": 2}
    about = {"texts": 2, "data": ["a.jsonl"], "max_new_tokens": 9, "dtype": "float32"}
    page = squeezed(rows.page({"about": about, "grids": {"10": grid}, "loop": {"10": {"32": run}}}))
    assert "| 10 | 4.000 | 4.100 (+2.5% of 2) * |" in page
    assert "K = 10: the default, 32 rows, takes +2.5% ticks (meant to take at most 3% more: holds)" in page
    worse = run | {"above": 0.05}
    assert "DOES NOT HOLD" in rows.page({"about": about, "grids": {"10": grid}, "loop": {"10": {"32": worse}}})


def test_rows_of_other_exits_are_not_mixed():
    resolved = {k: ResolvedExits(Dex(explorers=k).schedule_for(30), "mine", None) for k in (5, 10)}
    assert rows.of_other_exits({"10": {"exits": "mine"}}, resolved) == []
    (said,) = rows.of_other_exits({"10": {"exits": "default"}, "15": {"exits": "default"}}, resolved)
    assert said == "K = 10 there is of default exits, not of mine"


def test_prompts_of_a_context_lie_apart():
    assert context.prompts_of(list(range(10)), 4, 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    with pytest.raises(DexError, match="hold 10 tokens, fewer than a context of 11"):
        context.prompts_of(list(range(10)), 11, 1)
