"""Statistics of the template study: against slow twins and scipy, and on simulated data whose truth is known."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from reference import template_twin as twin
from scipy import stats

from dex_jax.errors import DexError
from studies.bench.resampling import simultaneous
from studies.bench.results import read_results, read_study
from studies.bench.runs import Run
from studies.templates import report as template_report
from studies.templates import statistics as s

AR_STEPS = 30.0


def grid(
    items: int = 40, templates: int = 5, *, worst: float = 1.0, rival: float = 1.4, seed: int = 0, noise=0.1
) -> s.Grid:
    """Simulated counts: DEX is 2 times as fast as AR, `worst` times that in the last template; the rival is `rival`
    times slower than DEX."""
    rng = np.random.default_rng(seed)
    new_tokens = rng.integers(10, 49, (items, templates)).astype(float)
    ar = AR_STEPS * (new_tokens - 1)
    speed = np.full(templates, 2.0)
    speed[-1] *= worst
    ease = np.exp(noise * rng.standard_normal((items, 1)))  # an item is easy in every template
    dex = ar / speed / ease / np.exp(noise * rng.standard_normal(ar.shape))
    other = dex * rival * np.exp(noise * rng.standard_normal(ar.shape))
    correct = (rng.random(ar.shape) < 0.4).astype(float)
    return s.Grid(
        "mmlu",
        tuple(f"t{i}" for i in range(templates)),
        tuple(f"i{i}" for i in range(items)),
        {"ar": ar, "dex": dex, "layerskip": other},
        prompt_tokens=rng.integers(50, 200, ar.shape).astype(float),
        new_tokens=new_tokens,
        repeated=rng.random(ar.shape) * 0.4,
        parsed=np.ones(ar.shape),
        correct=correct,
        chance=0.25,
        dtype="float32",
    )


def runs_of(found: s.Grid) -> list[Run]:
    """The runs that a grid is made of."""
    runs = []
    for (i, item), (t, template) in itertools.product(enumerate(found.items), enumerate(found.templates)):
        fields = {name: float(getattr(found, name)[i, t]) for name in ("repeated", "parsed", "correct")}
        shared = {"task": found.task, "prompt_id": item, "model": "random", "template": template, "device": "cpu"}
        shared |= {"tokens": [1] * int(found.new_tokens[i, t]), "prompt_tokens": int(found.prompt_tokens[i, t])}
        for method, cost in found.costs.items():
            own = {"setting": {"exit": 3, "draft_length": 2} if method == "layerskip" else {}}
            own |= {"counted": "loop" if method == "ar" else "forced"}
            own |= {"layer_steps": None if np.isnan(cost[i, t]) else cost[i, t]}
            runs.append(Run("depth", method, chance=found.chance, dtype=found.dtype, **fields, **shared, **own))
    return runs


STUDY = {
    "benchmark": "templates",
    "model": "random",
    "parameters": 2e9,
    "dtype": "float32",
    "max_new_tokens": 48,
    "longest_prompt": 512,
    "too_long": {"mmlu": 2},
    "exits": "shared",
}


def alone() -> s.Grid:
    """Simulated counts without a rival."""
    found = grid()
    return dataclasses.replace(found, costs={name: found.costs[name] for name in ("ar", "dex")})


@pytest.mark.parametrize(
    ("found", "holds", "keeps", "beats"),
    [
        (grid(), True, (0.85, 1), (1, 2)),
        (grid(worst=0.7), False, (0, 0.75), (1, 2)),  # one bad template is enough
        (grid(rival=1.0), False, (0.85, 1), (0, 1)),
        (grid(items=8, rival=1.05, noise=0.3), False, (0, 1), (0, 1)),  # not surely above 1 in every template
        (alone(), False, (0.85, 1), None),
    ],
)
def test_a_gain_holds_or_not(found, holds, keeps, beats):
    judged = s.verdict(found)
    assert judged.holds == holds
    assert keeps[0] < judged.keeps < keeps[1]
    assert judged.beats is None if beats is None else beats[0] < judged.beats < beats[1]
    said = template_report.summary(runs_of(found), STUDY)
    assert ("**Holds across templates**, depth-side" in said) == holds
    assert ("nothing is claimed" in said) == (beats is None)
    spread = s.spread(found, "dex", 10)
    headline = next(line for line in said.split("\n") if line.startswith("- **DEX over AR"))
    assert f"{spread.median:.2f} [{spread.lowest:.2f}, {spread.highest:.2f}]" in headline


def test_verdict_equals_the_slow_one():
    found = grid(items=12, templates=4)
    found.costs["dex"][3, 1] = np.nan
    found = s._grid("mmlu", runs_of(found), "float32")  # what is missing in one method is missing in all
    ar, dex, rival = (found.costs[name].tolist() for name in ("ar", "dex", "layerskip"))
    judged = s.verdict(found, resamples=60)
    keeps = twin.lowest_bound(lambda items: twin.relative(ar, dex, items), 12, 60, 0.95, seed=0)
    beats = twin.lowest_bound(lambda items: twin.over_best(dex, [rival], items), 12, 60, 0.95, seed=0)
    assert judged.keeps == pytest.approx(keeps, rel=1e-9)
    assert judged.beats == pytest.approx(beats, rel=1e-9)


def test_spread_is_of_sums():
    found = grid(items=6, templates=3)
    spread = s.spread(found, "dex", resamples=50)
    sums = [found.costs["ar"][:, t].sum() / found.costs["dex"][:, t].sum() for t in range(3)]
    assert [interval.value for interval in spread.each] == pytest.approx(sums)
    assert (spread.lowest, spread.median, spread.highest) == pytest.approx((min(sums), np.median(sums), max(sums)))
    assert spread.worst_over_median.value == pytest.approx(min(sums) / np.median(sums))
    assert spread.worst_over_median.low <= spread.worst_over_median.value <= 1


def test_simultaneous_bounds_hold_together_as_often_as_they_say():
    rng, trials, held, alone = np.random.default_rng(1), 150, 0, 0
    for trial in range(trials):
        values = rng.standard_normal((100, 8)) + rng.standard_normal((100, 1))
        bounds = simultaneous(values, lambda v: v.mean(axis=1), resamples=200, seed=trial)
        held += all(b.low <= 0 <= b.high for b in bounds)
        half = 1.96 * values.std(axis=0) / 100**0.5
        alone += bool(np.all(np.abs(values.mean(axis=0)) <= half))
    assert held / trials > 0.9
    assert alone < held  # bounds of one template at a time do not hold together


def test_ranking_agreement_equals_counting_and_scipy():
    found = grid(items=4, templates=4, rival=1.02, noise=0.6)
    methods = [cost for name, cost in found.costs.items() if name != "ar"]
    scores = [[np.nansum(found.costs["ar"][:, t]) / np.nansum(c[:, t]) for c in methods] for t in range(4)]
    taus = [twin.kendall(a, b) for a, b in itertools.combinations(scores, 2)]
    theirs = [stats.kendalltau(a, b).statistic for a, b in itertools.combinations(scores, 2)]
    assert taus == pytest.approx(theirs)
    assert len({round(tau, 6) for tau in taus}) > 1
    mean, least = s.ranking_agreement(found)
    assert (mean, least) == pytest.approx((np.mean(taus), min(taus)))


def test_what_lengths_explain():
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal(50), rng.standard_normal(50)
    share, adjusted = s.explained(2 * x - z, [x, z])
    assert (share, adjusted) == pytest.approx((1.0, 1.0))
    y = x + rng.standard_normal(50)
    share, adjusted = s.explained(y, [x])
    assert share == pytest.approx(stats.linregress(x, y).rvalue ** 2)
    assert adjusted == pytest.approx(1 - (1 - share) * 49 / 48)
    assert s.explained(y, [x, np.ones(50)])[0] == pytest.approx(share)  # what never changes explains nothing
    assert np.isnan(s.explained(np.array([1.0, 2.0]), [np.array([1.0, 2.0])])[0])
    noisy = np.append(y, np.nan)
    assert s.explained(noisy, [np.append(x, 3.0)])[0] == pytest.approx(share)


def test_looping_answers_are_left_out_of_every_method():
    found = grid()
    looping = found.repeated > s.LOOPING
    calm = found.without(looping)
    for cost in calm.costs.values():
        assert np.isnan(cost[looping]).all()
        assert not np.isnan(cost[~looping]).any()


def test_templates_without_decoding_are_told_apart():
    found = grid()
    costs = {name: cost.copy() for name, cost in found.costs.items()}
    for cost in costs.values():
        cost[:33, 1] = np.nan  # 7 of 40 answers are left
        cost[:30, 2] = np.nan
    found = dataclasses.replace(found, costs=costs)
    assert found.decoding.tolist() == [True, False, True, True, True]
    some = found.only(found.decoding)
    assert some.templates == ("t0", "t2", "t3", "t4")
    assert not np.isnan([interval.low for interval in s.spread(some, "dex", 100).each]).any()
    text = template_report.summary(runs_of(found), STUDY)
    assert "Left out of all speedups: t1" in text
    assert "Holds across templates" not in text


def test_paired_accuracy_of_two_dtypes():
    one = grid()
    other = dataclasses.replace(one, correct=np.where(np.arange(40)[:, None] < 4, 0.0, one.correct), dtype="bfloat16")
    # Only of items that both have.
    other = dataclasses.replace(other, items=(*one.items[:30], *(f"else{i}" for i in range(10))))
    found = s.paired_accuracy(one, other)
    assert found.items == 30
    assert found.value == pytest.approx(-one.correct[:4].sum() / (30 * 5))
    assert found.low <= found.value <= found.high <= 0
    assert s.paired_accuracy(one, dataclasses.replace(other, items=tuple(f"x{i}" for i in range(40)))) is None


def test_none_of_some_answers_right_is_not_surely_none():
    one = grid(items=40, templates=5)
    correct = one.correct.copy()
    correct[:, 0], correct[:, 1] = 0, 1
    correct[30:, 1] = np.nan
    none, every, *_ = s.accuracy(dataclasses.replace(one, correct=correct))
    assert (none.low, every.high) == (0, 1)
    # As unlikely as 5% shared by five templates: none of 40, all of 30.
    assert (1 - none.high) ** 40 == pytest.approx(0.01)
    assert every.low**30 == pytest.approx(0.01)


def test_grids_are_made_of_runs():
    found = grid(items=5, templates=3)
    runs = runs_of(found)
    # Neither the loops' own counts nor tuning runs nor other dtypes belong to the figures.
    stray = [
        dataclasses.replace(next(r for r in runs if r.method == "dex"), counted="loop", layer_steps=1),
        dataclasses.replace(runs[0], split="tune", layer_steps=1),
        dataclasses.replace(runs[0], dtype="bfloat16", layer_steps=1),
    ]
    (again,) = s.grids([*runs, *stray], "float32")
    assert again.templates == found.templates
    assert again.items == found.items
    for name in found.costs:
        np.testing.assert_allclose(again.costs[name], found.costs[name])
    for name in ("prompt_tokens", "new_tokens", "repeated", "correct"):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name))
    with pytest.raises(DexError, match="no answers of AR"):
        s.grids([run for run in runs if run.method != "ar"])


def test_the_committed_page_is_that_of_the_committed_runs():
    folder = Path(__file__).resolve().parents[1] / "results" / "templates_study"
    found = template_report.summary(read_results(folder), read_study(folder))
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith(found.rstrip())
