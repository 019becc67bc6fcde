"""Does a gain hold across prompt templates? Statistics over items x templates.

Items are resampled as clusters: an item keeps its values of every template. Bounds are simultaneous over all templates.
Costs are depth-side: layers run one after the other.

Letters: N items, G templates, M methods.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from dex_jax.errors import DexError
from studies.bench.resampling import LEVEL, RESAMPLES, Interval, bootstrap, ratio_of_sums, simultaneous
from studies.bench.runs import Run

WORST_OVER_MEDIAN = 0.85
"""What the worst template must keep of the median one for a gain to hold."""

LOOPING = 0.2
"""An answer of which more 4-grams than this share occurred before goes round in circles."""

LEAST_DECODING = 0.2
"""Of a template's answers, the share that must have something to decode before a figure is made of them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """What every method came to on every item in every template of one task; NaN where there is nothing.

    Attributes:
      task: its name.
      templates: G names.
      items: N ids.
      costs: method -> [N, G], layers run one after the other; NaN for answers of one token, which decode nothing.
      prompt_tokens, new_tokens: [N, G].
      repeated: [N, G], share of repeated 4-grams.
      parsed, correct: [N, G], 0 or 1.
      chance: of the task.
      dtype: in which the answers were made.
    """

    task: str
    templates: tuple[str, ...]
    items: tuple[str, ...]
    costs: dict[str, np.ndarray]
    prompt_tokens: np.ndarray
    new_tokens: np.ndarray
    repeated: np.ndarray
    parsed: np.ndarray
    correct: np.ndarray
    chance: float
    dtype: str

    @property
    def rivals(self) -> tuple[str, ...]:
        """Methods beside AR and DEX."""
        return tuple(name for name in self.costs if name not in ("ar", "dex"))

    @property
    def decoding(self) -> np.ndarray:
        """[G] bool: the templates in which enough answers have something to decode."""
        return np.mean(~np.isnan(self.costs["ar"]), axis=0) >= LEAST_DECODING

    def only(self, columns: np.ndarray) -> Grid:
        """The grid of some templates, [G] bool."""
        names = ("prompt_tokens", "new_tokens", "repeated", "parsed", "correct")
        return dataclasses.replace(
            self,
            templates=tuple(name for name, kept in zip(self.templates, columns, strict=True) if kept),
            costs={method: cost[:, columns] for method, cost in self.costs.items()},
            **{name: getattr(self, name)[:, columns] for name in names},
        )

    def without(self, drop: np.ndarray) -> Grid:
        """The grid with the costs of some answers, [N, G] bool, left out of every method."""
        return dataclasses.replace(self, costs={m: np.where(drop, np.nan, c) for m, c in self.costs.items()})


def grids(runs: Iterable[Run], dtype: str | None = None) -> list[Grid]:
    """The grid of each task, of reported depth-side runs; the first dtype that answers were made in unless told.

    Raises:
      DexError: no answer of AR.
    """
    chosen = [run for run in runs if run.kind == "depth" and run.split == "report"]
    plain = [run for run in chosen if run.method == "ar"]
    if not plain:
        raise DexError("there are no answers of AR among the runs: run the study first")
    dtype = plain[0].dtype if dtype is None else dtype
    found = []
    for task in dict.fromkeys(run.task for run in plain):
        ours = [run for run in chosen if run.task == task and run.dtype == dtype]
        # Counts of the loop itself check the forced ones, and are there for a few answers only.
        ours = [run for run in ours if run.method == "ar" or run.counted == "forced"]
        if ours:
            found.append(_grid(task, ours, dtype))
    return found


def _grid(task: str, runs: Sequence[Run], dtype: str) -> Grid:
    templates = tuple(dict.fromkeys(run.template for run in runs))
    items = tuple(sorted({run.prompt_id for run in runs}))
    row, column = {name: i for i, name in enumerate(items)}, {name: i for i, name in enumerate(templates)}

    def blank() -> np.ndarray:
        return np.full((len(items), len(templates)), np.nan)

    costs = {method: blank() for method in dict.fromkeys(run.method for run in runs)}
    names = ("prompt_tokens", "new_tokens", "repeated", "parsed", "correct")
    fields = {name: blank() for name in names}
    for run in runs:
        at = row[run.prompt_id], column[run.template]
        if run.new_tokens > 1 and run.layer_steps is not None:
            costs[run.method][at] = run.layer_steps
        if run.method == "ar":
            for name in names:
                value = getattr(run, name)
                fields[name][at] = np.nan if value is None else value
    # A comparison needs all methods.
    missing = np.any([np.isnan(cost) for cost in costs.values()], axis=0)
    costs = {method: np.where(missing, np.nan, cost) for method, cost in costs.items()}
    chance = next((run.chance for run in runs if run.chance is not None), float("nan"))
    return Grid(task, templates, items, costs, **fields, chance=chance, dtype=dtype)


def relative(values: np.ndarray) -> np.ndarray:
    """Each template's ratio of sums over the median of all templates': values [R, N, G, 2] -> [R, G]."""
    ratios = ratio_of_sums(values)
    return ratios / np.median(ratios, axis=-1, keepdims=True)


def over_best(values: np.ndarray) -> np.ndarray:
    """The cheapest rival over DEX in each template: values [R, N, G, 1 + rivals], DEX first -> [R, G]."""
    sums = np.nansum(values, axis=1)
    dex = sums[..., 0]
    return np.where(dex > 0, np.min(sums[..., 1:], axis=-1) / np.where(dex > 0, dex, 1), np.nan)


@dataclasses.dataclass(frozen=True)
class Spread:
    """One method's speedup over AR across templates, depth-side.

    Attributes:
      each: of every template, bounds simultaneous.
      lowest, median, highest: over templates.
      worst_over_median: with an interval of its own.
      relative: each template over the median, bounds simultaneous.
    """

    each: tuple[Interval, ...]
    lowest: float
    median: float
    highest: float
    worst_over_median: Interval
    relative: tuple[Interval, ...]


def spread(grid: Grid, method: str, resamples: int = RESAMPLES) -> Spread:
    """The spread of a method over AR."""
    values = np.stack([grid.costs["ar"], grid.costs[method]], axis=-1)
    each = simultaneous(values, ratio_of_sums, resamples=resamples)
    worst = bootstrap(values, lambda drawn: np.min(relative(drawn), axis=-1), resamples=resamples)
    found = [interval.value for interval in each]
    return Spread(
        tuple(each),
        min(found),
        float(np.median(found)),
        max(found),
        worst,
        tuple(simultaneous(values, relative, resamples=resamples)),
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Whether DEX's gain holds across templates.

    Attributes:
      holds: both conditions, in simultaneous 95% bounds over all templates.
      keeps: the lowest bound of a template over the median one; at least WORST_OVER_MEDIAN to hold.
      beats: the lowest bound of the best rival's cost over DEX's; above 1 to hold, None without a rival.
      over_rival: the ratio in each template, bounds simultaneous; None without a rival.
    """

    holds: bool
    keeps: float
    beats: float | None
    over_rival: tuple[Interval, ...] | None


def verdict(grid: Grid, resamples: int = RESAMPLES) -> Verdict:
    """Judges one task; without a rival nothing holds, as a depth-side figure over AR cannot be below 1.

    Templates whose answers have nothing to decode must have been left out, and then nothing can be said to hold in all.
    """
    keeps = min(interval.low for interval in spread(grid, "dex", resamples).relative)
    if not grid.rivals:
        return Verdict(False, keeps, None, None)
    values = np.stack([grid.costs[name] for name in ("dex", *grid.rivals)], axis=-1)
    over = simultaneous(values, over_best, resamples=resamples)
    beats = min(interval.low for interval in over)
    return Verdict(keeps >= WORST_OVER_MEDIAN and beats > 1, keeps, beats, tuple(over))


def ranking_agreement(grid: Grid) -> tuple[float, float] | None:
    """(mean, lowest) Kendall's tau between the rankings of methods in every two templates; None if none is defined.

    AR is left out: DEX cannot be below it, so that pair would agree by construction.
    """
    from scipy import stats

    totals = {method: np.nansum(cost, axis=0) for method, cost in grid.costs.items()}
    scores = np.array([totals["ar"] / total for method, total in totals.items() if method != "ar"])
    if len(scores) < 2 or scores.shape[1] < 2:
        return None
    taus = [
        stats.kendalltau(scores[:, a], scores[:, b]).statistic
        for a, b in itertools.combinations(range(scores.shape[1]), 2)
    ]
    taus = [float(tau) for tau in taus if not np.isnan(tau)]
    return (float(np.mean(taus)), min(taus)) if taus else None


def explained(values: np.ndarray, predictors: Sequence[np.ndarray]) -> tuple[float, float]:
    """(R squared, adjusted for the number of predictors) of a linear fit of values [n] by predictors [n].

    NaN values are left out; both are NaN where there are too few points.
    """
    kept = ~np.isnan(values)
    target = values[kept]
    columns = [np.asarray(p, np.float64)[kept] for p in predictors]
    # A predictor that is the same everywhere explains nothing.
    design = np.stack([np.ones(len(target)), *(p for p in columns if len(p) and np.ptp(p) > 0)], axis=1)
    free, total = len(target) - design.shape[1], float(np.sum((target - target.mean()) ** 2)) if len(target) else 0.0
    if free < 1 or total == 0:
        return float("nan"), float("nan")
    fit, *_ = np.linalg.lstsq(design, target, rcond=None)
    share = 1 - float(np.sum((target - design @ fit) ** 2)) / total
    return share, 1 - (1 - share) * (len(target) - 1) / free


def explained_by_length(grid: Grid, method: str) -> dict[str, tuple[float, float]]:
    """How much of a method's speedup over AR the lengths of prompt and answer explain: over templates, over answers."""
    speedup = np.nansum(grid.costs["ar"], axis=0) / np.nansum(grid.costs[method], axis=0)
    means = [np.nanmean(grid.prompt_tokens, axis=0), np.nanmean(grid.new_tokens, axis=0)]
    single = (grid.costs["ar"] / grid.costs[method]).reshape(-1)
    lengths = [grid.prompt_tokens.reshape(-1), grid.new_tokens.reshape(-1)]
    return {"templates": explained(speedup, means), "answers": explained(single, lengths)}


def accuracy(grid: Grid) -> list[Interval]:
    """Share of right answers in each template, bounds simultaneous; what could not be parsed is wrong.

    Where none of n answers is right (or all are), resamples do not vary. There the upper (lower) bound is the exact one
    of a binomial share, 1 - a^(1/n) (a^(1/n)), about 3/n where a = 5%; a is 5% over G, so that templates hold together.
    """
    found = simultaneous(grid.correct, lambda values: np.nanmean(values, axis=1))
    answers = np.maximum(np.sum(~np.isnan(grid.correct), axis=0), 1)
    unseen = 1 - ((1 - LEVEL) / len(found)) ** (1 / answers)
    # Bounds as wide on both sides know nothing of where a share ends.
    return [
        each._replace(
            low=1 - most if each.value == 1 else max(each.low, 0.0),
            high=most if each.value == 0 else min(each.high, 1.0),
        )
        for each, most in zip(found, map(float, unseen), strict=True)
    ]


def paired_accuracy(grid: Grid, other: Grid) -> Interval | None:
    """The other dtype's accuracy minus the grid's on answers that both have, items resampled; None without any."""
    items = [item for item in grid.items if item in other.items]
    templates = [name for name in grid.templates if name in other.templates]
    if not items or not templates:
        return None

    def of(grid: Grid) -> np.ndarray:
        rows, columns = [grid.items.index(i) for i in items], [grid.templates.index(t) for t in templates]
        return grid.correct[np.ix_(rows, columns)]

    difference = of(other) - of(grid)
    if np.isnan(difference).all():
        return None
    return bootstrap(difference, lambda values: np.nanmean(values, axis=(1, 2)))
