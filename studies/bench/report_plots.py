"""Plots of a benchmark: speedups by method and task, against K, and where tokens become available."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dex_jax.io.whole_files import write_whole
from dex_jax.plot.charts import draw_shares, speedup_by_k
from dex_jax.plot.colors import SERIES
from dex_jax.plot.figures import FAINT, INK, new_figure, png, quiet_axes
from studies.bench import comparison as c
from studies.bench.runs import Run

AXES = {
    "depth": "depth-side speedup over AR (counts)",
    "wall": "wall-clock speedup over AR, one device",
    "work": "layer x row evaluations over AR's",
}


OF_DEX, OF_RIVALS = SERIES[0], SERIES[1]


def draw(runs: Sequence[Run], folder: str | Path, explorers: int | None = None) -> list[Path]:
    """Draws what there are runs for as PNG files into a folder; returns the files.

    `explorers` is K of the DEX that stands beside its rivals; None is the first.

    Raises:
      DexError: no matplotlib, or a folder that cannot be written.
    """
    plots: dict[str, Callable[[], Any]] = {
        "speedup_depth": lambda: speedups(runs, "depth", explorers),
        "speedup_wall": lambda: speedups(runs, "wall", explorers),
        "work": lambda: speedups(runs, "work", explorers),
        "speedup_by_k": lambda: against_explorers(runs),
        "ead": lambda: available(runs, explorers),
    }
    files = []
    for name, make in plots.items():
        figure, file = make(), Path(folder) / f"{name}.png"
        if figure is not None:
            write_whole(file, png(figure))
            files.append(file)
    return files


def speedups(runs: Sequence[Run], kind: str, explorers: int | None = None) -> Any:
    """A row for each method and a panel for each task, with intervals; None without runs of that kind.

    Of DEX with several K the one with `explorers`, or else the first, stands here; `against_explorers` has them all.
    """
    table = c.costs(runs, kind)
    names = c.main_methods(table, explorers)
    if "ar" not in table or not names:
        return None
    tasks = c.tasks_of(table)
    figure = new_figure(2.6 + 1.75 * len(tasks), 1.1 + 0.36 * len(names))
    every, widest = figure.subplots(1, len(tasks), sharey=True, sharex=True, squeeze=False)[0], 1.0
    for axes, task in zip(every, tasks, strict=True):
        quiet_axes(axes)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        for place, name in enumerate(names):
            found = c.speedup(table, *(("ar", name) if kind != "work" else (name, "ar")), task)
            if found is None:
                continue
            widest = max(widest, found.high)
            axes.barh(place, found.value, 0.68, color=_color(name))
            axes.plot([found.low, found.high], [place, place], color=INK, linewidth=1.2)
            axes.annotate(
                f"{found.value:.2f}", (found.high, place), (4, -3), textcoords="offset points", fontsize=8, color=INK
            )
        count = sum(task in (c.ALL, prompt[0]) for prompt in table["ar"])
        axes.set_title(f"{task}, {count} prompts", fontsize=9, color=INK, loc="left")
    every[0].set_xlim(0, 1.3 * widest)  # of all panels, with room for the figures
    every[0].set_yticks(range(len(names)), [_label(name) for name in names])
    every[0].invert_yaxis()
    figure.supxlabel(f"{AXES[kind]}: median, 95% interval", fontsize=9, color=INK)
    return figure


def _color(name: str) -> str:
    """DEX, rivals and bounds."""
    if name.startswith("oracle"):
        return FAINT
    return OF_DEX if name.startswith("dex") else OF_RIVALS


def _label(name: str) -> str:
    method, _, setting = name.partition(" ")
    shown = " ".join(part for part in setting.split() if not part.startswith("explorers="))
    words = f"{method}\n{shown.replace('draft_length', 'draft')}" if shown else method
    return f"{words} (no decoder)" if method == "oracle" else words


def against_explorers(runs: Sequence[Run]) -> Any:
    """Depth-side speedup against K with its interval; None with fewer than two K."""
    found = c.by_explorers(c.costs(runs, "depth"))
    if len(found) < 2:
        return None
    figure = speedup_by_k({"DEX": {k: each.value for k, each in found.items()}})
    low, high = ([getattr(each, end) for each in found.values()] for end in ("low", "high"))
    figure.axes[0].fill_between(list(found), low, high, color=SERIES[0], alpha=0.18, linewidth=0)
    return figure


def available(runs: Sequence[Run], explorers: int | None = None) -> Any:
    """A histogram of earliest available depths for each task; None without exits."""
    found = c.availability(runs, explorers)
    if not found:
        return None
    first = next(iter(found.values()))
    figure = new_figure(max(4.5, 1.2 + 0.45 * len(first.depths)), 1.0 + 1.7 * len(found))
    every = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (task, each) in zip(every, found.items(), strict=True):
        draw_shares(axes, each.depths, each.shares)
        title = f"{task}: {each.tokens:,} tokens, mean depth {each.mean:.1f} of {each.depths[-1]}"
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.margins(y=0.15)
    oracle = first.name.startswith("oracle")
    every[-1].set_xlabel(
        "earliest available depth (layers)" if oracle else f"exit that first gave the token ({first.name})"
    )
    return figure
