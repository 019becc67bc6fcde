"""`python -m studies.bench.report DIR`: summary.md and plots of a benchmark, from its results.jsonl alone."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.errors import DexError, exit_code
from dex_jax.io.whole_files import write_whole
from dex_jax.tables import markdown
from studies.bench import comparison as c
from studies.bench.contenders import ON_MANY_DEVICES, SWEPT, by_setting
from studies.bench.report_plots import draw
from studies.bench.results import read_results, read_study, seen_in_training
from studies.bench.runs import Run

SUMMARY = "summary.md"

KINDS = {
    "depth": (
        "Depth-side",
        "AR's layers run one after the other over the method's. Counts, not times: what K devices would gain if heads "
        "and communication were free. For DEX it cannot be below 1, so only comparisons say anything.",
    ),
    "work": (
        "Work",
        "The method's layer x row evaluations over AR's: below 1.00 is impossible, more is more computing. DEX side by "
        "side counts all of its rows, live or not; heads are not counted.",
    ),
    "wall": (
        "Wall-clock on one device",
        "AR's seconds over the method's, one sequence at a time, methods in turn (A B B A), prefill and compilation "
        "apart. One explorer explores no depths: it drafts from a drafter at depth 0 and from what the text said "
        "before, which LayerSkip does not.",
    ),
}

PICTURES = {
    "speedup_depth": "Depth-side speedup over AR by method and task",
    "speedup_wall": "Wall-clock speedup over AR by method and task",
    "work": "Work over AR's by method and task",
    "speedup_by_k": "Depth-side speedup of DEX by the number of explorers",
    "ead": "Where tokens become available",
}
"""Names of the plots, and what they show."""

RIVALS = ("layerskip", "adadecode", "del", "dex_single_exit", "dex_no_decs")


def write(folder: str | Path, plots: bool = True) -> list[Path]:
    """Writes summary.md and the plots of a folder of results into it; returns the files.

    Raises:
      DexError: no or damaged results, no matplotlib, or a folder that cannot be written.
    """
    runs, study = read_results(folder), read_study(folder)
    if study.get("benchmark") != "bench":
        raise DexError(f"{folder} holds no results of methods compared")
    text, pictures = summary(runs, study), []
    if plots:
        pictures = draw(runs, folder, study.get("explorers"))
        links = [f"![{PICTURES[picture.stem]}]({picture.name})" for picture in pictures]
        text = "\n\n".join([text.rstrip(), "## Pictures", *links]) + "\n"
    write_whole(Path(folder) / SUMMARY, text)
    return [Path(folder) / SUMMARY, *pictures]


def write_and_tell(folder: str | Path, plots: bool) -> int:
    """Writes as `write` does, prints summary.md, says on stderr what is wrong; returns 1 for wrong tokens, else 0."""
    files, wrong = write(folder, plots), c.mismatches(read_results(folder))
    print(files[0].read_text(encoding="utf-8"))
    print("written: " + ", ".join(map(str, files)), file=sys.stderr)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return 1 if wrong else 0


def summary(runs: Sequence[Run], study: dict[str, Any]) -> str:
    """The report in markdown; equal runs give equal text."""
    parts = [f"# {study.get('model', 'A benchmark')}: {', '.join(study.get('tasks', []))}", _about(runs, study)]
    parts += [_lossless(runs)]
    for kind in KINDS:
        table = c.costs(runs, kind)
        if len(table) > 1 and "ar" in table:
            parts += _speedups(table, kind, study.get("explorers"))
    parts += [*_times(runs), *_explorers(runs), *_available(runs, study.get("explorers")), *_sweeps(runs)]
    return "\n\n".join(parts) + "\n"


def _about(runs: Sequence[Run], study: dict[str, Any]) -> str:
    run = runs[0]
    plain = [each for each in runs if each.method == "ar" and each.kind == "depth" and each.split == "report"]
    lengths = ", ".join(
        f"{sum(each.task == task for each in plain)} of {task}" for task in dict.fromkeys(each.task for each in plain)
    )
    tokens = sum(each.new_tokens for each in plain)
    drawn = "greedy" if run.temperature == 0 else f"sampled at temperature {run.temperature:g}"
    devices = ", ".join(dict.fromkeys(f"{each.device}, {each.dtype}" for each in runs if each.counted == "loop"))
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [
        f"{len(plain)} prompts ({lengths}), {tokens} new tokens of AR, at most {run.max_new_tokens} each, {drawn}; "
        f"{devices}; {versions}.",
        f"Exits: {study.get('exits')}; drafter of one explorer: {study.get('drafter')}.",
        *filter(None, [seen_in_training(study)]),
    ]
    dropped = {task: count for task, count in study.get("too_long", {}).items() if count}
    if dropped:
        lines.append(
            "Too long, and replaced by others: " + ", ".join(f"{n} of {task}" for task, n in dropped.items()) + "."
        )
    lines.append(
        "Speedups are medians over prompts of the ratio on one prompt, with 95% intervals by resampling prompts. The "
        "three kinds of figures below are never mixed. "
        "`python -m studies.bench.report` makes this page again."
    )
    return "\n".join(lines)


def _lossless(runs: Sequence[Run]) -> str:
    wrong = c.mismatches(runs)
    head = "All tokens are AR's, or part from them by rounding alone." if not wrong else "**NOT LOSSLESS.** "
    lines = ["## Losslessness", head + " ".join(f"{each}." for each in wrong[:5])]
    # Settings of a sweep would fill the page: they are told together.
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.counted == "loop":  # what is counted along AR's answers shows nothing
            groups.setdefault(run.method, []).append(run)
    rows = []
    for method, group in groups.items():
        found = c.lossless(group)
        if found is not None:
            first = "" if found.first is None else str(found.first)
            margin = "" if found.margin is None else f"{found.margin:.1e}"
            counts = (found.compared, found.identical, found.ties, found.wrong)
            rows.append([method, *map(str, counts), f"{found.identical / found.compared:.1%}", first, margin])
    header = ["method", "runs", "identical", "by rounding", "wrong", "match rate", "first divergence", "widest margin"]
    return "\n\n".join([*lines, markdown(header, rows)] if rows else lines)


def _speedups(table: c.Costs, kind: str, explorers: int | None) -> list[str]:
    title, meaning = KINDS[kind]
    tasks = c.tasks_of(table)
    names = c.main_methods(table, explorers)

    def cells(base: str, other: str) -> list[str]:
        return [str(c.speedup(table, base, other, task) or "") for task in tasks]

    rows = [[_label(name, kind), *(cells(name, "ar") if kind == "work" else cells("ar", name))] for name in names]
    if kind == "wall":
        rows.insert(0, ["ar, ms a token", *(_milliseconds(table["ar"], task) for task in tasks)])
    parts = [f"## {title}", meaning, markdown([f"over AR, {title.lower()}", *tasks], rows)]
    if kind == "work":
        return parts
    own = [name for name in names if name.split(" ")[0] in ("dex", "dex_one_explorer", "dex_auto")]
    pairs = [(name, rival) for name in own for method in RIVALS for rival in c.of_method(table, method)]
    if kind == "depth":  # DEL is at its best where it is about as good as the best static setting
        pairs += itertools.product(c.of_method(table, "del"), c.of_method(table, "layerskip"))
    if pairs:
        versus = [[f"{name} over {rival}", *cells(rival, name)] for name, rival in pairs]
        parts += [f"One over another, {title.lower()}:", markdown(["", *tasks], versus)]
    return parts


def _label(name: str, kind: str) -> str:
    method = name.split(" ")[0]
    if method == "oracle":
        return f"{name} (no decoder; a bound without DECS)"
    return f"{name} (meant for K devices)" if kind == "wall" and method in ON_MANY_DEVICES else name


def _milliseconds(by: Any, task: str) -> str:
    return f"{1e3 * float(np.median([cost for prompt, cost in by.items() if task in (c.ALL, prompt[0])])):.1f}"


def _times(runs: Sequence[Run]) -> list[str]:
    timed = [run for run in runs if run.kind == "wall" and run.split == "report" and run.new_tokens > 1]
    if not timed:
        return []
    rows = []
    for name in dict.fromkeys(run.name for run in timed):
        group = [run for run in timed if run.name == name]
        speed = np.median([(run.new_tokens - 1) / run.seconds for run in group if run.seconds])
        prefill = np.median([1e3 * run.prefill_seconds for run in group if run.prefill_seconds is not None])
        rows.append([name, str(len(group)), f"{speed:.1f}", f"{prefill:.0f}"])
    header = ["method", "runs", "median tokens a second", "median prefill, ms"]
    return ["Decoding and prefill, apart from one another:", markdown(header, rows)]


def _explorers(runs: Sequence[Run]) -> list[str]:
    table, grids = c.costs(runs, "depth"), c.grids(runs)
    found, tasks = c.by_explorers(table), c.tasks_of(table)
    if len(found) < 2:
        return []
    rows = []
    for k in found:
        cells = [str(c.speedup(table, "ar", f"dex explorers={k}", task) or "") for task in tasks]
        rows.append([str(k), *cells, " ".join(map(str, grids[k]))])
    words = (
        "DEX over AR, depth-side, by the number of explorers. A tick takes as many layers as the longest stage has: "
        "where exits do not stand on the even grid of K, that is more than L / K."
    )
    return ["## Explorers", words, markdown(["K", *tasks, "exit depths"], rows)]


def _available(runs: Sequence[Run], explorers: int | None) -> list[str]:
    found = c.availability(runs, explorers)
    if not found:
        return []
    first = next(iter(found.values()))
    how = (
        "Earliest available depths, as the oracle sees them"
        if first.name.startswith("oracle")
        else f"The exit that first gave each token ({first.name})"
    )
    rows = [
        [task, str(each.tokens), f"{each.mean:.1f}", *(f"{share:.2f}" for share in each.shares)]
        for task, each in found.items()
    ]
    header = ["task", "tokens", "mean depth", *map(str, first.depths)]
    return ["## Where tokens become available", f"{how}: share of tokens by depth.", markdown(header, rows)]


def _sweeps(runs: Sequence[Run]) -> list[str]:
    parts = []
    for name in SWEPT:
        counted = by_setting(runs, name, "depth")
        if not counted:
            continue
        timed = {str(setting): cost for setting, cost in by_setting(runs, name, "wall")}
        rows = [
            [
                ", ".join(f"{field} {value}" for field, value in setting.items()),
                f"{cost:.2f}",
                f"{1e3 * timed[str(setting)]:.1f}" if str(setting) in timed else "",
            ]
            for setting, cost in counted
        ]
        parts += [
            f"## The sweep of {name}",
            "On tuning prompts, of which nothing else is reported; the best by counts is the setting of depth-side "
            "figures, the best by time (if any were timed) that of wall-clock.",
            markdown(["setting", "layer steps a token", "ms a token"], rows),
        ]
    return parts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where tokens are not AR's, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="of the results")
    parser.add_argument("--no-plots", action="store_true", help="no PNG files, and no need of matplotlib")
    args = parser.parse_args(argv)
    return exit_code(lambda: write_and_tell(args.folder, not args.no_plots))


if __name__ == "__main__":
    sys.exit(main())
