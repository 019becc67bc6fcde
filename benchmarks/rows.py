"""How ticks per token grow as a stage has fewer rows, on SmolLM2-135M: the loop itself, and its replay.

    python benchmarks/rows.py --data HumanEval.jsonl.gz question_240.jsonl --prompts 10 --output results/rows

Prompts are answered once. The texts are teacher-forced, which gives the ticks of rows that never prune, and replayed
with the scores that exits gave (dex_jax/evaluation/replay.py) for every cap; then the loop runs on the same prompts
with the caps of --loop-rows. K whose even grid the shipped exits do not hold get the nearest trained depths, and above
their number the model's own head, unless --exits names others (such as those of configs/smollm2_135m_k15.py). This
counts and times nothing. What OUTPUT.json holds is not run again, so it can be stopped and started at any time, and
each K may come from a call of its own, with its own --exits.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import dex_jax
from dex_jax.cli.decode import remember_compilations
from dex_jax.cli.train_results import answered, write_json
from dex_jax.decoding.exits import ResolvedExits, resolve_method
from dex_jax.decoding.output import ticks_of
from dex_jax.evaluation.exit_forcing import measure
from dex_jax.evaluation.exit_metrics import figures_of, predicted_exits, shared_exits
from dex_jax.evaluation.replay import Table, replay, table_of
from dex_jax.lattice import default_rows, full_rows
from dex_jax.nn.exits import heads_of
from dex_jax.plot.colors import SERIES
from dex_jax.plot.figures import new_figure
from dex_jax.tables import markdown

CAPS = [1, 2, 4, 8, 16, 32]
MOST_ABOVE = 0.03
"""Asked of the default rows with trained exits at K = 10: ticks at most this much above those of the uncapped count."""


def teacher_forced(lm: Any, resolved: ResolvedExits, texts: list) -> tuple[dict[str, Any], Table]:
    """(ticks per token of one grid with rows that never prune, and the exits behind them; what `replay` takes)."""
    depths = resolved.schedule.depths
    exits = resolved.trained or shared_exits(lm, depths[:-1])
    heads = heads_of(exits.config, exits.parameters, jnp.float32)
    measured = measure(lm, heads, exits.vocabulary, texts, explorers=(), depths=[depths])
    found = {
        "depths": depths,
        "exits": resolved.source,
        "never_prunes": figures_of(measured).grids[0].ticks_per_token,
        "forced": [row.tolist() for row in predicted_exits(measured, depths)],
        "replayed": {},
    }
    return found, table_of(measured, depths)


def counted(
    lm: Any,
    resolved: ResolvedExits,
    rows: int,
    texts: list,
    forced: list[list[int]],
    args: argparse.Namespace,
    found: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The loop itself on some texts' prompts: its ticks, and how many more than rows that never prune would take.

    Yields what is found after each batch; `found` is what an earlier run had got to, or empty.
    """
    method = dex_jax.Dex(depths=resolved.schedule.depths, rows=rows)
    count = min(args.loop_texts or len(texts), len(texts))
    # Files are mixed, so that a part of the texts stands for all.
    chosen = np.random.default_rng(0).permutation(len(texts))[:count].tolist()
    sums = {name: found.get(name, 0) for name in ("ticks", "uncapped", "tokens", "identical", "of")}
    while sums["of"] < count:
        part = chosen[sums["of"] : sums["of"] + args.batch]
        out = dex_jax.generate(
            lm,
            [texts[i][0] for i in part],
            method=method,
            exits=resolved.trained or "shared",
            max_new_tokens=min(args.loop_tokens or args.max_new_tokens, args.max_new_tokens),
        )
        for i, row, length in zip(part, out.tokens, out.lengths.tolist(), strict=True):
            sums["identical"] += row[:length].tolist() == list(texts[i][1])[:length]
            sums["uncapped"] += ticks_of(np.asarray(forced[i][:length]), length, resolved.schedule.stages)
        sums["ticks"] += int(np.sum(out.stats.ticks))
        sums["tokens"] += int(np.sum(out.lengths - 1))
        sums["of"] += len(part)
        rates = {"ticks_per_token": sums["ticks"] / sums["tokens"], "above": sums["ticks"] / sums["uncapped"] - 1}
        yield sums | rates | {"complete": sums["of"] >= count}


def of_other_exits(grids: dict[str, Any], resolved: dict[int, ResolvedExits]) -> list[str]:
    """Sentences about K whose figures, kept from an earlier call, are of other exits than this one's."""
    return [
        f"K = {stages} there is of {kept['exits']} exits, not of {each.source}"
        for stages, each in resolved.items()
        if (kept := grids.get(str(stages))) and kept["exits"] != each.source
    ]


def caps_of(stages: int, args: argparse.Namespace) -> list[int]:
    """The caps that are replayed."""
    return sorted({min(cap, full_rows(stages)) for cap in args.replay_rows})


def page(found: dict[str, Any]) -> str:
    """Markdown of what OUTPUT.json holds."""
    grids = dict(sorted(found["grids"].items(), key=lambda item: int(item[0])))
    about = found["about"]
    parts = [
        "# How many rows a stage",
        f"Ticks per token as rows a stage shrink, on {about['texts']} prompts ({', '.join(about['data'])}), "
        f"{about['max_new_tokens']} new tokens, greedy, {about['dtype']}. A cap "
        "costs ticks, never tokens. Written by `python benchmarks/rows.py --data ... --output results/rows` with "
        f"--explorers {' '.join(grids)} and the --loop-rows below, over several calls.",
        *_of_the_loop(grids, found["loop"]),
        "Ticks per token by replaying teacher-forced texts with the scores that exits gave. What exits say on wrong "
        "branches is an assumption there (`UNSURE` in `dex_jax/evaluation/replay.py`).",
        _table(grids, {stages: grid["replayed"] for stages, grid in grids.items()}),
        "![ticks above those of rows that never prune](rows.png)",
        markdown(
            ["K", "exits", "exit depths"],
            [[k, str(g["exits"]), " ".join(map(str, g["depths"]))] for k, g in grids.items()],
        ),
        *verdict(found),
    ]
    return "\n\n".join(parts) + "\n"


def verdict(found: dict[str, Any]) -> list[str]:
    """What the figures say of the default."""
    sentences = []
    runs = [run for by_rows in found["loop"].values() for run in by_rows.values()]
    if runs:
        same, of = sum(run["identical"] for run in runs), sum(run["of"] for run in runs)
        sentences.append(f"Tokens of the loop were AR's in {same} of {of} texts.")
    for stages in sorted(found["grids"], key=int):
        rows = default_rows(int(stages))
        loop, replayed = found["loop"].get(stages, {}), found["grids"][stages]["replayed"]
        run = loop.get(str(rows)) or replayed.get(str(rows))
        if run is None:
            continue
        how = "replayed" if str(rows) not in loop else f"counted on {run['of']} prompts"
        asked = ""
        if int(stages) == 10:
            holds = "holds" if run["above"] <= MOST_ABOVE else "DOES NOT HOLD"
            asked = f" (meant to take at most {MOST_ABOVE:.0%} more: {holds})"
        sentences.append(f"K = {stages}: the default, {rows} rows, takes {run['above']:+.1%} ticks{asked}, {how}.")
    return ["- " + "\n- ".join(sentences)]


def _of_the_loop(grids: dict[str, Any], loop: dict[str, Any]) -> list[str]:
    if not any(loop.values()):
        return []
    return [
        "Ticks per token of the loop itself; in brackets how many more than those of rows that never prune "
        "(teacher-forced, with DECS) on the same texts, and how many texts those are: ticks of different texts say "
        "nothing about one another, nor about the column of rows that never prune. `*`: the default rows.",
        _table(grids, loop),
    ]


def _table(grids: dict[str, Any], found: dict[str, Any]) -> str:
    caps = sorted({int(cap) for stages in grids for cap in found.get(stages, {})})
    rows = []
    for stages, grid in grids.items():
        cells = []
        for cap in caps:
            run = found.get(stages, {}).get(str(cap))
            if run is None:
                cells.append("")
                continue
            of = f" of {run['of']}" if "of" in run else ""
            mark = " *" if cap == default_rows(int(stages)) else ""
            cells.append(f"{run['ticks_per_token']:.3f} ({run['above']:+.1%}{of}){mark}")
        rows.append([stages, f"{grid['never_prunes']:.3f}", *cells])
    return markdown(["K", "never prunes", *(f"{cap} rows" for cap in caps)], rows)


def draw(found: dict[str, Any], path: Path) -> None:
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    for color, stages in zip(SERIES, sorted(found["grids"], key=int), strict=False):
        grid = found["grids"][stages]
        loop = {"marker": "o", "label": f"K = {stages}, {grid['exits']} exits"}
        for runs, style in (
            (grid["replayed"], {"linestyle": ":", "linewidth": 1}),
            (found["loop"].get(stages, {}), loop),
        ):
            points = sorted((int(cap), run["above"]) for cap, run in runs.items())
            if points:
                axes.plot(*zip(*points, strict=True), color=color, **style)
        if not found["loop"].get(stages):
            axes.plot([], color=color, linestyle=":", label=loop["label"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(CAPS, [str(cap) for cap in CAPS])
    axes.set_xlabel("rows a stage (dotted: replayed)")
    axes.set_ylabel("ticks above those of rows that never prune")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=10, help="of each file, evenly spread (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--explorers", type=int, nargs="+", default=[5, 8, 10, 15, 30], metavar="K")
    parser.add_argument("--loop-rows", type=int, nargs="*", default=[8, 4, 16, 2, 1, 32], metavar="W")
    parser.add_argument("--loop-texts", type=int, metavar="N", help="the loop runs on so many of the prompts (all)")
    parser.add_argument("--loop-tokens", type=int, metavar="N", help="and makes so many tokens (--max-new-tokens)")
    parser.add_argument("--replay-rows", type=int, nargs="*", default=CAPS, metavar="W")
    parser.add_argument("--batch", type=int, default=5, help="prompts that the loop decodes together (%(default)s)")
    parser.add_argument("--cache", default="runs/rows_answers.json", help="answers, not to be published (%(default)s)")
    parser.add_argument("--output", required=True, help="OUTPUT.json, .md and .png")
    args = parser.parse_args()
    store = Path(args.output + ".json")
    remember_compilations()
    lm = dex_jax.load(args.model)
    texts = [text for group in answered(args, lm).values() for text in group]
    about = {
        "data": [Path(path).name for path in args.data],
        "texts": len(texts),
        "max_new_tokens": args.max_new_tokens,
        "dtype": str(lm.dtype),
    }
    found: dict[str, Any] = {"about": about, "grids": {}, "loop": {}}
    if store.exists():
        kept = json.loads(store.read_text())
        if kept["about"] != about:
            print(f"error: {store} holds figures of {kept['about']}: name another --output", file=sys.stderr)
            return 2
        found = kept
    begin = time.perf_counter()

    def keep(line: str) -> None:
        write_json(str(store), found)
        print(f"{time.perf_counter() - begin:6.0f} s  {line}", file=sys.stderr, flush=True)

    resolved = {
        k: resolve_method(dex_jax.Dex(explorers=k), args.exits, lm.config, lm.fingerprint) for k in args.explorers
    }
    if others := of_other_exits(found["grids"], resolved):
        print(f"error: {store}: {'; '.join(others)}: name another --output", file=sys.stderr)
        return 2
    tables = {}
    for stages, each in resolved.items():
        if str(stages) not in found["grids"]:
            found["grids"][str(stages)], tables[stages] = teacher_forced(lm, each, texts)
            keep(f"K = {stages}: teacher-forced, {found['grids'][str(stages)]['never_prunes']:.3f} ticks a token")
    for rows in args.loop_rows:
        for stages, each in resolved.items():
            cap = min(rows, full_rows(stages))
            mine = found["loop"].setdefault(str(stages), {})
            before = mine.get(str(cap), {})
            if before.get("complete"):
                continue
            forced = found["grids"][str(stages)]["forced"]
            for run in counted(lm, each, cap, texts, forced, args, before):
                mine[str(cap)] = run
                keep(f"K = {stages}, {cap} rows, {run['of']} texts: {run['ticks_per_token']:.3f}, {run['above']:+.1%}")
    for stages, each in resolved.items():
        grid = found["grids"][str(stages)]
        for cap in caps_of(stages, args):
            if str(cap) not in grid["replayed"]:
                if stages not in tables:
                    tables[stages] = teacher_forced(lm, each, texts)[1]
                ticks = replay(tables[stages], cap).ticks_per_token
                grid["replayed"][str(cap)] = {"ticks_per_token": ticks, "above": ticks / grid["never_prunes"] - 1}
                keep(f"K = {stages}, {cap} rows: replayed, {ticks:.3f} ticks a token")
    text = page(found)
    Path(args.output + ".md").write_text(text, encoding="utf-8")
    draw(found, Path(args.output + ".png"))
    print(text)
    return 0 if all(run["identical"] == run["of"] for each in found["loop"].values() for run in each.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
