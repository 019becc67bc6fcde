"""Figures of a benchmark, all computed from its runs: speedups by method and task, and what stands behind them.

A speedup is a ratio of costs a token on the same prompt, in one kind of figure; told are the median over prompts and a
95% interval by resampling prompts. Prompts whose answer is one token have no decoding and are left out.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from studies.bench.contenders import WITH_DRAFTER
from studies.bench.resampling import Interval, bootstrap, ratios
from studies.bench.runs import Run, reported

TIES_ALLOWED = 0.01
"""In float32: the share of prompts on which any run may part from AR by rounding; more than that is a bug."""

Prompt = tuple[str, str, str]
"""(task, template, prompt id)."""

Costs = Mapping[str, Mapping[Prompt, float]]
"""Name of method and setting -> prompt -> cost a token after the first."""

ALL = "all"


def costs(runs: Iterable[Run], kind: str) -> dict[str, dict[Prompt, float]]:
    """Cost a token of every method on every reported prompt, in one kind of figure; medians over repeated runs.

    One explorer has no depth-side cost: what drafting takes is no layer of the model.
    """
    found: dict[str, dict[Prompt, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in reported(runs, kind):
        if run.new_tokens > 1 and not (kind == "depth" and run.method in WITH_DRAFTER):
            cost = run.cost(kind)
            assert cost is not None
            found[run.name][run.task, run.template, run.prompt_id].append(cost / (run.new_tokens - 1))
    return {name: {prompt: float(np.median(each)) for prompt, each in by.items()} for name, by in found.items()}


def tasks_of(table: Costs) -> list[str]:
    """Tasks in the order of the runs, and "all" if there are several."""
    names = list(dict.fromkeys(task for by in table.values() for task, _, _ in by))
    return [*names, ALL] if len(names) > 1 else names


def speedup(table: Costs, base: str, other: str, task: str = ALL) -> Interval | None:
    """How many times the cost of `other` the cost of `base` is, over the prompts that both have; None without any."""
    shared = [prompt for prompt in table.get(base, {}) if prompt in table.get(other, {}) and task in (ALL, prompt[0])]
    if not shared:
        return None
    return bootstrap(ratios(*(np.array([table[name][prompt] for prompt in shared]) for name in (base, other))))


def of_method(table: Costs, method: str) -> list[str]:
    """Names in a table that are of one method, in the order of the runs."""
    return [name for name in table if name.split(" ")[0] == method]


def main_dex(table: Iterable[str], explorers: int | None = None) -> str | None:
    """The name of the "dex" that stands beside others: with `explorers`, or the first; None without any."""
    grids = [name for name in table if name.split(" ")[0] == "dex"]
    return f"dex explorers={explorers}" if f"dex explorers={explorers}" in grids else next(iter(grids), None)


def main_methods(table: Costs, explorers: int | None = None) -> list[str]:
    """All names but AR's, of "dex" the main one alone; others are of a study of K."""
    main, grids = main_dex(table, explorers), of_method(table, "dex")
    return [name for name in table if name != "ar" and (name == main or name not in grids)]


class Lossless(NamedTuple):
    """Comparison of a method's tokens with AR's, in runs."""

    compared: int
    identical: int
    ties: int
    wrong: int  # part from AR where rounding cannot be the reason
    first: int | None  # the earliest first divergence
    margin: float | None  # the largest top-2 margin at one


def lossless(runs: Iterable[Run]) -> Lossless | None:
    """Comparison of all these runs' tokens, tuning ones included; None where nothing was compared."""
    compared = [run for run in runs if run.match is not None]
    parted = [run for run in compared if not run.match]
    ties = sum(bool(run.tie) for run in parted)
    if not compared:
        return None
    first = min((run.first_divergence for run in parted if run.first_divergence is not None), default=None)
    margin = max((run.margin for run in parted if run.margin is not None), default=None)
    return Lossless(len(compared), len(compared) - len(parted), ties, len(parted) - ties, first, margin)


def mismatches(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run whose tokens are wrong, and one if too many in float32 part by rounding."""
    found = []
    for run in runs:
        if run.match is False and not run.tie:
            margin = "unknown" if run.margin is None else f"{run.margin:.2g} of max |logit|"
            found.append(
                f"{run.name} is not lossless: on {run.task}, prompt {run.prompt_id}, token {run.first_divergence} is "
                f"not AR's, whose top-2 margin there is {margin}"
            )
    exact = [run for run in runs if run.match is not None and run.dtype == "float32"]
    prompts = {(run.task, run.template, run.prompt_id) for run in exact}
    ties = {(run.task, run.template, run.prompt_id) for run in exact if run.tie}
    if len(ties) > max(1, TIES_ALLOWED * len(prompts)):
        found.append(
            f"{len(ties)} of {len(prompts)} prompts part from AR in float32 by rounding: more than 1% is a bug"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Availability:
    """At which depth tokens were first available."""

    name: str  # of the method whose `exits` say so
    depths: tuple[int, ...]  # ascending, ending at L
    shares: tuple[float, ...]  # of tokens after the first, by depth
    tokens: int  # how many there are

    @property
    def mean(self) -> float:
        """Mean depth."""
        return float(np.dot(self.shares, self.depths))


def grids(runs: Iterable[Run]) -> dict[int, tuple[int, ...]]:
    """K -> exit depths of the reported runs of DEX."""
    return {len(run.depths): tuple(run.depths) for run in reported(runs, "depth") if run.method == "dex" and run.depths}


def availability(runs: Iterable[Run], explorers: int | None = None) -> dict[str, Availability]:
    """Task -> depths, of the oracle if it ran (true earliest available depths), else of DEX with DECS.

    Of DEX with several K that with `explorers`, or the first.
    """
    chosen = [run for run in reported(list(runs), "depth") if run.exits and run.depths]
    oracle = [run for run in chosen if run.method == "oracle"]
    pool = oracle or [run for run in chosen if run.method == "dex"]
    if not pool:
        return {}
    name = main_dex([run.name for run in pool], explorers) or pool[0].name
    pool = [run for run in pool if run.name == name]
    found = {}
    for task in dict.fromkeys(run.task for run in pool):
        group = [run for run in pool if run.task == task]
        assert group[0].depths is not None
        exits = np.concatenate([np.asarray(run.exits)[1:] for run in group])
        counts = np.bincount(exits[exits > 0], minlength=len(group[0].depths) + 1)[1:]
        if counts.sum():
            shares = tuple(float(share) for share in counts / counts.sum())
            found[task] = Availability(name, tuple(group[0].depths), shares, int(counts.sum()))
    return found


def by_explorers(table: Costs) -> dict[int, Interval]:
    """K -> depth-side speedup of DEX over AR, over all prompts, K ascending."""
    found = {}
    for name in of_method(table, "dex"):
        explorers = name.partition("explorers=")[2]
        interval = speedup(table, "ar", name)
        if explorers.isdigit() and interval is not None:
            found[int(explorers)] = interval
    return dict(sorted(found.items()))
