"""Statistics of the template study: on simulated data whose truth is known."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

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


ALONE = {name: grid().costs[name] for name in ("ar", "dex")}


@pytest.mark.parametrize(
    ("found", "holds", "keeps", "beats"),
    [
        (grid(), True, (0.85, 1), (1, 2)),
        (grid(worst=0.7), False, (0, 0.75), (1, 2)),  # one bad template is enough
        (grid(rival=1.0), False, (0.85, 1), (0, 1)),
        (grid(items=8, rival=1.05, noise=0.3), False, (0, 1), (0, 1)),  # not surely above 1 in every template
        (dataclasses.replace(grid(), costs=ALONE), False, (0.85, 1), None),
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


def test_the_committed_page_is_that_of_the_committed_runs():
    folder = Path(__file__).resolve().parents[1] / "results" / "templates_study"
    found = template_report.summary(read_results(folder), read_study(folder))
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith(found.rstrip())
