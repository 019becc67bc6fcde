"""The benchmark's file of results, and what is said of them: work, speedups, intervals, tokens that are not AR's."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax.errors import DexError
from studies.bench import comparison as c
from studies.bench import resampling
from studies.bench.results import Results, read_results, to_line
from studies.bench.runs import Run, repeated, run_of, work_of

RUN = Run(
    kind="wall",
    method="layerskip",
    task="gsm8k",
    prompt_id="17",
    model="m",
    tokens=[5, 6, 7],
    prompt_tokens=9,
    setting={"exit": 12, "draft_length": 4},
    exits=[-1, 1, 2],
    depths=[12, 30],
    seconds=0.5,
    match=False,
    first_divergence=1,
    margin=1e-6,
    tie=True,
    versions={"jax": "0.10.2"},
)


def test_every_field_survives_the_file(tmp_path) -> None:
    results = Results(tmp_path, {"model": "m"})
    results.add(RUN)
    results.add(RUN)
    results.add(dataclasses.replace(RUN, round=1))
    results.close()
    assert read_results(tmp_path) == [RUN, dataclasses.replace(RUN, round=1)]
    assert set(json.loads(to_line(RUN))) == {field.name for field in dataclasses.fields(Run)}
    again = Results(tmp_path, {"model": "m"})
    assert RUN.key in again.done
    assert dataclasses.replace(RUN, setting={"exit": 6, "draft_length": 4}).key not in again.done
    again.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "line 2 of .*results.jsonl is no JSON"),
        ({"task": None}, r"line 2 of .* at task"),
        ({"tokens": [1, "a"]}, r"line 2 of .* at tokens"),
        ({"kind": "speed"}, "line 2 of .* at kind .*'speed'"),
        ({"kind": "depth"}, 'line 2 of .* kind "depth" has no seconds'),
        ({"surprise": 1}, 'a field "surprise" that the schema does not know'),
    ],
)
def test_a_damaged_line_is_named(change, says, tmp_path) -> None:
    line = change if isinstance(change, str) else json.dumps(dataclasses.asdict(RUN) | change)
    (tmp_path / "results.jsonl").write_text(f"{to_line(RUN)}\n{line}\n", encoding="utf-8")
    with pytest.raises(DexError, match=says):
        read_results(tmp_path)


def test_a_line_cut_off_by_a_kill_is_written_again(tmp_path) -> None:
    results = Results(tmp_path, {})
    results.add(RUN)
    results.close()
    with results.path.open("ab") as file:
        file.write(to_line(dataclasses.replace(RUN, round=1))[:50].encode())
    assert read_results(tmp_path) == [RUN]
    again = Results(tmp_path, {})
    again.add(dataclasses.replace(RUN, round=2))
    again.close()
    assert [run.round for run in read_results(tmp_path)] == [0, 2]


@pytest.fixture(scope="module")
def plain():
    """AR on two prompts, which end where they are told to."""
    lm = small_model(dataclasses.replace(LLAMA, num_layers=1, eos_ids=()))
    return dex_jax.generate(lm, [[3, 1, 4], [1, 5]], method=dex_jax.AR(), max_new_tokens=10)


def test_kinds_are_not_mixed(plain) -> None:
    counted = dataclasses.replace(RUN, kind="depth", seconds=None, layer_steps=60, work=90)
    assert (counted.cost("depth"), counted.cost("work"), counted.cost("wall")) == (60, 90, None)
    with pytest.raises(DexError, match="time them one at a time"):
        run_of(plain, 0, kind="wall")


def test_work_is_that_of_all_rows_in_all_layers(plain) -> None:
    """Of the other methods as test_bench.py has run them."""
    for row in range(2):
        run = run_of(plain, row, kind="depth", method="m", task="t", prompt_id="1", model="random")
        assert run.tokens == plain.tokens[row].tolist()
        assert run.work == run.layer_steps == 9
    schedule = dex_jax.Dex(explorers=1).schedule_for(2)
    assert work_of(schedule, 10, {"ticks": 5}) == 2 * schedule.rows * 5 > 2 * 5


def test_repeated_grams() -> None:
    assert repeated([1, 2, 3]) is None
    assert repeated([1, 2, 3, 4]) == 0
    assert repeated([7] * 13) == 0.9


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    samples = np.random.default_rng(3).normal(0, 1, (100, 40))
    found = [resampling.bootstrap(values) for values in samples]
    assert 88 <= sum(each.low <= 0 <= each.high for each in found) <= 99
    assert resampling.bootstrap(np.array([np.nan, 3.0])) == (3, 3, 3, 1)


PLAIN = Run("depth", "ar", "a", "0", "m", [1] * 11, 3, layer_steps=300, dtype="float32")


def runs(method: str, steps: list[int], task: str = "a", **fields) -> list[Run]:
    """One run a prompt, with so many layer steps."""
    return [
        dataclasses.replace(PLAIN, method=method, task=task, prompt_id=str(i), layer_steps=each, **fields)
        for i, each in enumerate(steps)
    ]


def test_a_speedup_is_the_median_of_ratios_on_one_prompt() -> None:
    table = c.costs([*runs("ar", [300, 300, 300]), *runs("del", [100, 200, 300, 50])], "depth")
    found = c.speedup(table, "ar", "del")
    assert (found.value, found.items) == (1.5, 3)
    assert c.speedup(table, "ar", "layerskip") is None
    assert c.speedup(table, "ar", "del", "b") is None
    assert c.tasks_of(table) == ["a"]
    # Neither tuning runs nor answers of one token are part of it.
    assert c.costs([*runs("ar", [0], tokens=[1]), *runs("ar", [300], split="tune")], "depth") == {}
    both = c.costs([*runs("ar", [300]), *runs("ar", [300], "b")], "depth")
    assert c.tasks_of(both) == ["a", "b", "all"]


@pytest.mark.parametrize(
    ("fields", "sentences"),
    [
        ({"match": True}, 0),
        ({"match": False, "first_divergence": 4, "margin": 0.2, "tie": False}, 4),
        ({"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True, "dtype": "bfloat16"}, 0),
        # All four prompts part by rounding alone: in float32 that is no rounding.
        ({"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True}, 1),
    ],
)
def test_what_fails_a_benchmark(fields, sentences) -> None:
    assert len(c.mismatches(runs("dex", [1, 1, 1, 1], **fields))) == sentences


def test_one_prompt_may_part_by_rounding() -> None:
    parted = {"match": False, "first_divergence": 4, "margin": 1e-6, "tie": True}
    made = [*runs("dex", [1], **parted), *runs("del", [1], **parted), *runs("dex", [1] * 20, "b", match=True)]
    assert c.mismatches(made) == []
    assert c.lossless(run for run in made if run.method == "dex") == (21, 20, 1, 0, 4, 1e-6)
    assert c.lossless(runs("ar", [1])) is None
