"""`python -m studies.reproduction DIR ...`: the paper's claims beside what folders of results say.

The paper's text is not at hand: its claims are those of its abstract and of summaries of it (arXiv 2606.29223).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dex_jax.errors import exit_code
from dex_jax.io.whole_files import write_whole
from dex_jax.tables import markdown
from studies.bench import comparison as c
from studies.bench.resampling import Interval
from studies.bench.results import read_results, read_study, seen_in_training
from studies.bench.runs import Run

FINEST = 8
"""The K up to which the paper finds finer grids better."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
      what: in words.
      paper: its figure, in words.
      low, high: what a measured ratio is held against; infinite where the claim has no such end.
      rival: the method that DEX is compared with; None for the claim about K.
      certain: whether a ratio of at least 1 is so by construction, and shows nothing.
    """

    what: str
    paper: str
    low: float
    high: float
    rival: str | None
    certain: bool = False


CLAIMS = (
    Claim("DEX over LayerSkip at its best setting", "1.3 to 1.6", 1.3, 1.6, "layerskip"),
    Claim("DEX over AdaDecode", "1.2 to 1.5", 1.2, 1.5, "adadecode"),
    Claim("DEX over DEL", "1.2 to 1.5", 1.2, 1.5, "del"),
    Claim("exploring all exits over first and last alone", "better", 1.0, float("inf"), "dex_single_exit", True),
    Claim("DECS over none", "5% to 10% better", 1.05, 1.1, "dex_no_decs", True),
    Claim(f"finer grids are better up to K = {FINEST}", "yes", 1.0, float("inf"), None),
)


def page(studies: Sequence[tuple[Sequence[Run], dict[str, Any]]]) -> str:
    """The page in markdown: a table of claims, a column for each (runs, settings) of a folder."""
    names = [_name(study) for _, study in studies]
    tables = [c.costs(runs, "depth") for runs, _ in studies]
    rows = []
    for claim in CLAIMS:
        cells = [_cell(claim, table, study) for table, (_, study) in zip(tables, studies, strict=True)]
        rows.append([claim.what, claim.paper, *cells])
    grids = [c.grids(runs) for runs, _ in studies]
    parts = [
        "# The paper's claims",
        "All figures of this page are depth-side: layers run one after the other, AR's or a rival's over DEX's, the "
        "same exits, the same prompts. They are counts, not times. Medians over prompts, 95% intervals by resampling "
        "prompts. The claims are those of the abstract of arXiv 2606.29223 and of summaries of it. "
        "This page is made by `python -m studies.reproduction`; no figure is typed in.",
        markdown(["claim", "paper", *names], rows),
    ]
    for name, (runs, study), table, depths in zip(names, studies, tables, grids, strict=True):
        about = f"{_about(runs)} {seen_in_training(study)}".strip()
        parts += [f"## {name}", _words(table, study, depths), about]
    return "\n\n".join(parts) + "\n"


def _name(study: dict[str, Any]) -> str:
    exits, model = study.get("exits", "default"), Path(str(study.get("model", "a model")))
    # "model" is what a training calls its checkpoint, whichever it is.
    name = "/".join(model.parts[-2:]) if model.name == "model" else model.name
    return name + ("" if exits == "default" else f", exits {Path(exits).name}")


def _over(claim: Claim, table: c.Costs, study: dict[str, Any]) -> list[tuple[str, Interval]]:
    """(rival, its cost over DEX's), of every setting of the rival that was reported."""
    dex = c.main_dex(table, study.get("explorers"))
    if dex is None or claim.rival is None:
        return []
    found = [(rival, c.speedup(table, rival, dex)) for rival in c.of_method(table, claim.rival)]
    return [(rival, interval) for rival, interval in found if interval is not None]


def _cell(claim: Claim, table: c.Costs, study: dict[str, Any]) -> str:
    if claim.rival is None:
        grids = c.by_explorers(table)
        return ", ".join(f"K = {k}: {each.value:.2f}" for k, each in grids.items()) or "not measured"
    return "; ".join(str(interval) for _, interval in _over(claim, table, study)) or "not measured"


def _words(table: c.Costs, study: dict[str, Any], depths: dict[int, tuple[int, ...]]) -> str:
    """A line for each claim: what was measured against what the paper says."""
    lines, dex = [], c.main_dex(table, study.get("explorers"))
    for claim in CLAIMS:
        if claim.rival is None:
            lines += _finer(claim, table, depths)
            continue
        for rival, interval in _over(claim, table, study):
            more = "; below 1 it cannot be, as DEX proposes all that the other does" if claim.certain else ""
            lines.append(f"- {claim.what} ({dex} against {rival}): {verdict(claim, interval)}{more}.")
    return "\n".join(lines)


def verdict(claim: Claim, interval: Interval) -> str:
    """A measured ratio against the paper's range, in words."""
    there = f"{interval}, the paper says {claim.paper}"
    if claim.low <= interval.value <= claim.high:
        sure = "" if claim.low <= interval.low and interval.high <= claim.high else ", though not all of its interval"
        return f"as claimed: {there}{sure}"
    below = interval.value < claim.low
    close = interval.high >= claim.low if below else interval.low <= claim.high
    return f"{'below' if below else 'above'} the claim{', within its interval' if close else ''}: {there}"


def _finer(claim: Claim, table: c.Costs, depths: dict[int, tuple[int, ...]]) -> list[str]:
    gains = {k: each.value for k, each in c.by_explorers(table).items() if k <= FINEST}
    longest = {k: max(b - a for a, b in itertools.pairwise((0, *found))) for k, found in depths.items()}
    # A tick of a grid that is not even takes as long as its longest stage: it is no finer than that.
    uneven = [k for k in gains if longest[k] > -(-depths[k][-1] // k)]
    upto = [k for k in gains if k not in uneven]
    if len(upto) < 2:
        return []
    names = [f"dex explorers={k}" for k in upto]
    over = [c.speedup(table, before, name) for before, name in itertools.pairwise(names)]
    steps = [(k, each) for k, each in zip(upto[1:], over, strict=True) if each is not None]
    worse = [f"{k} ({each})" for k, each in steps if each.value < 1]
    unsure = [str(k) for k, each in steps if each.value >= 1 and each.low <= 1]
    said = f"as claimed, over K = {', '.join(map(str, upto))}"
    if worse:
        said = f"not so here, over the grid before gained less than 1: K = {', '.join(worse)}"
    elif unsure:
        said += f", though K = {', '.join(unsure)} cannot be told from the grid before"
    left = "".join(f"; K = {k} is left out, as its exits leave a stage of {longest[k]} layers" for k in uneven)
    return [f"- {claim.what}: {said}{left}."]


def _about(runs: Sequence[Run]) -> str:
    plain = [run for run in runs if run.method == "ar" and run.kind == "depth" and run.split == "report"]
    tasks = ", ".join(f"{sum(run.task == task for run in plain)} of {task}" for task in {run.task: 0 for run in plain})
    first = plain[0] if plain else runs[0]
    limits = f"at most {first.max_new_tokens} new tokens each"
    return f"{len(plain)} prompts ({tasks}), {limits}, {first.device}, {first.dtype}."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    p = argparse.ArgumentParser(prog="python -m studies.reproduction", description=__doc__.splitlines()[0])
    p.add_argument("folders", nargs="+", metavar="DIR", help="of benchmarks, a column each")
    p.add_argument("--output", metavar="FILE.md", help="where the page goes (stdout)")
    args = p.parse_args(argv)

    def run() -> None:
        text = page([(read_results(folder), read_study(folder)) for folder in args.folders])
        if args.output is None:
            sys.stdout.write(text)
        else:
            write_whole(args.output, text)

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
