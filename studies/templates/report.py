"""`python -m studies.templates.report DIR`: summary.md and a plot of a template study, from its results.

The headline is the median over templates with the least and the most, never the best one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.errors import DexError
from dex_jax.io.whole_files import write_whole
from dex_jax.plot.figures import png
from dex_jax.tables import markdown
from studies.bench.results import read_results, read_study, seen_in_training
from studies.bench.runs import Run
from studies.flags import run_report, tell
from studies.templates import statistics as s

SUMMARY = "summary.md"
PLOT = "template_spread.png"

LARGE = 1e9
"""Parameters below which a model settles nothing about large ones."""


def write(folder: str | Path, plots: bool = True) -> list[Path]:
    """Writes summary.md and the plot beside the results in `folder`; returns both files.

    Raises:
      DexError: no or damaged results, no matplotlib, or a folder that cannot be written.
    """
    runs, study = read_results(folder), read_study(folder)
    if study.get("benchmark") != "templates":
        raise DexError(f"{folder} holds no template study: python -m studies.bench.report reads other benchmarks")
    text, files = summary(runs, study), [Path(folder) / SUMMARY]
    if plots:
        text += f"\n![Depth-side speedup over AR by template]({PLOT})\n"
        files.append(Path(folder) / PLOT)
        write_whole(files[1], png(draw(s.grids(runs, study["dtype"]))))
    write_whole(files[0], text)
    return files


def summary(runs: Sequence[Run], study: dict[str, Any]) -> str:
    """The report in markdown."""
    found = s.grids(runs, study["dtype"])
    dtypes = [d for d in dict.fromkeys(run.dtype for run in runs) if d != study["dtype"]]
    first = next(run for run in runs if run.method == "ar")
    sizes = ", ".join(f"{len(g.items)} items x {len(g.templates)} templates of {g.task}" for g in found)
    dropped = sum(study["too_long"].values())
    long = f" {dropped} items longer than {study['longest_prompt']} tokens in some template were left out."
    about = (
        f"{study['model']} ({study['parameters'] / 1e6:.0f}M parameters), {study['dtype']}, greedy, at most "
        f"{study['max_new_tokens']} new tokens; {sizes}.{long if dropped else ''} Exits: {study['exits']}, not tuned "
        f"on any template. Device {first.device}; {', '.join(f'{k} {v}' for k, v in first.versions.items())}."
    )
    parts = ["# Prompt templates", f"{about} {seen_in_training(study)}".rstrip()]
    for grid in found:
        others = [other for dtype in dtypes for other in s.grids(runs, dtype) if other.task == grid.task]
        parts += [f"## {grid.task}", *_task(grid, [run for run in runs if run.task == grid.task], others)]
    parts += ["## How to read this", *NOTES]
    if study["parameters"] < LARGE:
        parts.append(
            f"A model of {study['parameters'] / 1e6:.0f}M parameters cannot settle what large models do. "
            "The same command takes any model."
        )
    return "\n\n".join(parts) + "\n"


NOTES = (
    "Depth-side figures count layers that run one after the other; they are no times. DEX's take one device a "
    "stage and free heads. They cannot be below 1, so a figure above 1 is no evidence: only comparisons are.",
    "DEX and LayerSkip are counted along AR's answers. That is exact for rows that never prune, but for drafts "
    "after a wrong one in LayerSkip, which are all counted; the ratio of layer steps above says how much that is.",
)


def _task(grid: s.Grid, runs: Sequence[Run], others: Sequence[s.Grid]) -> list[str]:
    """One task's part: the claim, the templates one by one, the spread over them, quality, what checks the counts."""
    kept = grid.decoding
    some = grid.only(kept)
    names = [name for name in ("dex", *grid.rivals) if name in grid.costs] if kept.any() else []
    spreads = {name: s.spread(some, name) for name in names}
    left_out = [name for name, decodes in zip(grid.templates, kept, strict=True) if not decodes]
    parts = ["\n".join(_claims(some, spreads, runs, left_out)), _table(grid, some.templates, spreads)]
    if spreads:
        parts += ["Over templates (layers of AR over the method's, run one after the other):", _spreads(some, spreads)]
    if names and (tau := s.ranking_agreement(some)) is not None:
        ranked = ", ".join(name for name in grid.costs if name != "ar")
        parts.append(
            f"Ranking of {ranked}: Kendall's tau between every two templates is {tau[0]:.2f} on average and "
            f"{tau[1]:.2f} at least."
        )
    return [*parts, _quality(grid, others), _checks(grid, runs)]


def _of(low: float, middle: float, high: float) -> str:
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _claims(grid: s.Grid, spreads: dict[str, s.Spread], runs: Sequence[Run], left_out: Sequence[str]) -> Iterator[str]:
    for name, found in spreads.items():
        over = _of(found.lowest, found.median, found.highest)
        yield f"- **{_label(name)} over AR, depth-side: {over}** (median [min, max] over templates)"
    if "dex" in spreads:
        rivals = f"the best of {', '.join(grid.rivals)}"
        if len(grid.rivals) == 1:
            rivals = f"{grid.rivals[0]}, the only rival that ran"
        judged = s.verdict(grid)
        if judged.over_rival is not None:
            each = [interval.value for interval in judged.over_rival]
            yield f"- **DEX over {rivals}: {_of(min(each), float(np.median(each)), max(each))}**" + _setting(runs)
        yield f"- {_sentence(judged, rivals, bool(left_out))}"
    if left_out:
        yield (
            f"- Left out of all speedups: {', '.join(left_out)}, where fewer than {s.LEAST_DECODING:.0%} of answers "
            "have a second token."
        )


def _setting(runs: Sequence[Run]) -> str:
    for run in runs:
        if (run.split, run.method) == ("report", "layerskip"):
            exit, drafts = run.setting["exit"], run.setting["draft_length"]
            return f" (LayerSkip at exit {exit}, {drafts} drafts, chosen on other items)"
    return ""


def _sentence(judged: s.Verdict, rivals: str, some_left_out: bool) -> str:
    """Whether it holds, and by how much."""
    if judged.beats is None:
        return "No rival ran. A depth-side figure over AR cannot be below 1 and is no evidence: nothing is claimed."
    if math.isnan(judged.keeps) or math.isnan(judged.beats):
        return "Not shown to hold across templates: too few answers with something to decode for any bounds."
    found = (
        "in bounds of 95% for all templates at once, for each of the two by itself, the worst template keeps at least "
        f"{judged.keeps:.2f} of the median one (asked: {s.WORST_OVER_MEDIAN}), and DEX over {rivals} is at least "
        f"{judged.beats:.2f} in every template (asked: above 1)"
    )
    if judged.holds and not some_left_out:
        return f"**Holds across templates**, depth-side: {found}. Nothing is claimed about wall-clock time."
    return f"Not shown to hold across templates: {found}."


def _table(grid: s.Grid, decoding: Sequence[str], spreads: dict[str, s.Spread]) -> str:
    right = s.accuracy(grid)
    header = ["template", "prompt", "answer", *(f"{_label(name)} over AR" for name in spreads)]
    rows = []
    for i, name in enumerate(grid.templates):
        lengths = [f"{np.nanmean(x[:, i]):.0f}" for x in (grid.prompt_tokens, grid.new_tokens)]
        at = decoding.index(name) if name in decoding else None
        cells = ["-" if at is None else str(found.each[at]) for found in spreads.values()]
        repeats = grid.repeated[:, i]
        share = f"{np.nanmean(repeats):.2f}" if not np.isnan(repeats).all() else "-"
        rows.append([name, *lengths, *cells, str(right[i]), f"{np.nanmean(grid.parsed[:, i]):.2f}", share])
    return (
        f"{markdown([*header, 'accuracy', 'parsed', 'repeated'], rows)}\n\n"
        "Lengths in tokens; bounds hold together for all templates of a column with 95%. Accuracy is of "
        f"the generated answers, chance {grid.chance:.2f}; one that could not be parsed counts as wrong."
    )


def _spreads(grid: s.Grid, spreads: dict[str, s.Spread]) -> str:
    looping = np.nan_to_num(grid.repeated) > s.LOOPING
    calm = grid.without(looping)

    def row(label: str, grid: s.Grid, name: str, found: s.Spread) -> list[str]:
        numbers = (found.lowest, found.median, found.highest, found.highest - found.lowest)
        shares = s.explained_by_length(grid, name)
        r2 = ["-" if math.isnan(share) else f"{share:.2f} ({adjusted:.2f})" for share, adjusted in shares.values()]
        return [label, *(f"{x:.2f}" for x in numbers), str(found.worst_over_median), *r2]

    rows = []
    for name, found in spreads.items():
        rows.append(row(_label(name), grid, name, found))
        if looping.any() and calm.decoding.all():
            rows.append(row(f"{_label(name)}, no loops", calm, name, s.spread(calm, name)))
    header = ["", "min", "median", "max", "max - min", "worst / median", "R2, templates", "R2, answers"]
    return (
        f'{markdown(header, rows)}\n\n"No loops" leaves out the {looping.mean():.0%} of answers of which more than '
        f"{s.LOOPING:.0%} of 4-grams occurred before. R2: share of the variance that the lengths of prompt and answer "
        "explain in a linear fit, between the templates' means and between single answers (in brackets: adjusted)."
    )


def _quality(grid: s.Grid, others: Sequence[s.Grid]) -> str:
    each = [interval.value for interval in s.accuracy(grid)]
    lines = [
        f"Quality: accuracy {_of(min(each), float(np.median(each)), max(each))} (median [min, max] over "
        f"templates), chance {grid.chance:.2f}; {1 - np.nanmean(grid.parsed):.0%} of answers could not be parsed."
    ]
    if "dex" in grid.costs:
        lines.append(
            "DEX's answers are AR's, token for token, so its accuracy is the same number and no second measurement."
        )
    for other in others:
        if (found := s.paired_accuracy(grid, other)) is not None:
            lines.append(
                f"{other.dtype} minus {grid.dtype}, same answers, items resampled: {found.value:+.3f} "
                f"[{found.low:+.3f}, {found.high:+.3f}] ({found.items} items)."
            )
    if not others:
        lines.append("No second dtype ran (--second-dtype): what another one does to quality is not known here.")
    return " ".join(lines)


def _checks(grid: s.Grid, runs: Sequence[Run]) -> str:
    forced = {place(run): run for run in runs if run.counted == "forced"}
    lines = []
    for name in ("dex", *grid.rivals):
        loops = [run for run in runs if run.counted == "loop" and run.method == name and place(run) in forced]
        if loops:
            theirs = [forced[place(run)] for run in loops]
            same = sum(run.exits == other.exits for run, other in zip(loops, theirs, strict=True))
            steps, counted = (sum(run.layer_steps or 0 for run in each) for each in (loops, theirs))
            lines.append(
                f"{_label(name)}: {sum(bool(run.match) for run in loops)} of {len(loops)} texts are AR's, exits as "
                f"counted in {same}, layer steps over those counted {f'{steps / counted:.4f}' if counted else '-'}."
            )
    if not lines:
        return "The loops themselves were not run (--loop-share 0): nothing checks the counts."
    return "The loops themselves, on a random share of the answers: " + " ".join(lines)


def place(run: Run) -> tuple[Any, ...]:
    """What a loop's run and the count along the same answer have in common."""
    return run.name, run.split, run.task, run.template, run.prompt_id, run.dtype


def _label(name: str) -> str:
    return {"dex": "DEX", "ar": "AR", "layerskip": "LayerSkip"}.get(name, name)


def draw(found: Sequence[s.Grid]) -> Any:
    """The spread over templates: a panel for each task, every method's speedup over AR with simultaneous bounds.

    Raises:
      DexError: no matplotlib.
    """
    from dex_jax.plot.colors import SERIES
    from dex_jax.plot.figures import FAINT, INK, new_figure, quiet_axes

    found = [grid.only(grid.decoding) for grid in found]
    most = max(len(grid.templates) for grid in found)
    figure = new_figure(5.2 * len(found), 1.4 + 0.32 * most)
    for number, grid in enumerate(found, 1):
        axes = figure.add_subplot(1, len(found), number)
        quiet_axes(axes)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        names = [name for name in ("dex", *grid.rivals) if name in grid.costs and grid.templates]
        spreads = {name: s.spread(grid, name) for name in names}
        leading = spreads[names[0]].each if names else ()
        order = np.argsort([each.value for each in leading], kind="stable") if leading else range(len(grid.templates))
        for place, name in enumerate(names):
            color, shift = SERIES[place % len(SERIES)], (place - (len(names) - 1) / 2) * 0.22
            across = [spreads[name].each[i] for i in order]
            heights = np.arange(len(order)) + shift
            axes.hlines(
                heights, [x.low for x in across], [x.high for x in across], color=color, linewidth=1.6, alpha=0.6
            )
            own = spreads[name]
            label = f"{_label(name)}: {_of(own.lowest, own.median, own.highest)}"
            axes.plot([x.value for x in across], heights, "o", color=color, markersize=4.5, label=label)
            axes.axvline(spreads[name].median, color=color, linewidth=0.9, alpha=0.5)
        axes.set_yticks(range(len(order)), [grid.templates[i] for i in order])
        axes.set_xlabel("layers of AR over the method's (depth-side, no time)", fontsize=8, color=INK)
        title = f"{grid.task}, {len(grid.items)} items: median [min, max] over templates"
        axes.set_title(title, fontsize=9, color=INK, loc="left", pad=8 + 12 * ((len(names) + 1) // 2))
        if names:
            # Above the panel: inside, rows reach into every corner.
            axes.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    return run_report(argv, "studies.templates.report", __doc__, lambda folder, plots: tell(write(folder, plots), ()))


if __name__ == "__main__":
    sys.exit(main())
