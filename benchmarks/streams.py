"""One user's prompts in a row: what a store of the earlier ones brings, quarter by quarter.

    python benchmarks/streams.py --humaneval HumanEval.jsonl.gz --spec-bench question_240.jsonl --output results/streams

Every prompt is answered by AR, by the default method and by the default method with a store, in turns, and the tokens
are compared. Times are those of whole calls without the prompt, so that looking up, choosing and storing are in them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from measuring import Figures, arguments, machine

import dex_jax
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.evaluation.check import compare
from dex_jax.io.whole_files import write_whole
from dex_jax.plot.colors import SERIES
from dex_jax.plot.figures import new_figure, png, quiet_axes
from dex_jax.prompt_files import read_prompts
from dex_jax.tables import markdown

CODE = """def has_close_elements(numbers, threshold):
    for i, first in enumerate(numbers):
        for j, second in enumerate(numbers):
            if i != j and abs(first - second) < threshold:
                return True
    return False


def longest(strings):
    best = ""
    for each in strings:
        if len(each) > len(best):
            best = each
    return best
"""
EDITS = """Rename the function longest to longest_string.
Add a docstring to every function.
Rename the parameter threshold to limit.
Make has_close_elements return False for an empty list.
Add a comment above every loop.
Add type hints.
Make longest return None for an empty list.
Add a function shortest below longest.
Rename each to item.
Add a main block that prints longest(['a', 'bb']).""".splitlines()
LONG = "Write a very long story about a lighthouse keeper, chapter by chapter."
AR, PLAIN, STORED, ALL = "AR", "default", "with a store", "all"


def streams(humaneval: Sequence[Any], spec_bench: Sequence[Any]) -> dict[str, tuple[list[Any], int]]:
    """Name -> (prompts in their order, new tokens of each answer)."""
    edits = [f"Here is a Python file:\n\n```python\n{CODE}```\n\n{edit} Answer with the whole file." for edit in EDITS]
    mixed = list(spec_bench[:: max(1, len(spec_bench) // 40)][:40])
    return {
        "60 of HumanEval": (list(humaneval[:60]), 128),
        "ten edits of a file": (edits, 384),
        "40 of Spec-Bench": (mixed, 128),
        "one long answer": ([LONG], 4000),
        "20 of HumanEval, then 20 of Spec-Bench": ([*humaneval[60:80], *mixed[1::2]], 128),
    }


def answers(lm: Any, prompt: Any, new_tokens: int, store: dex_jax.TextStore) -> dict[str, dict[str, Any]]:
    """What each way took for one prompt."""
    ways = {AR: {"method": dex_jax.AR()}, PLAIN: {}, STORED: {"store": store}}
    outputs: dict[str, dex_jax.Output] = {}
    found: dict[str, dict[str, Any]] = {}
    for way, options in ways.items():
        begin = time.perf_counter()
        output = outputs[way] = dex_jax.generate(lm, [prompt], max_new_tokens=new_tokens, **options)
        seconds = time.perf_counter() - begin - output.stats.prefill_seconds - output.stats.compile_seconds
        (check,) = compare(lm, output, outputs[AR])
        ticks = None if output.stats.ticks is None else int(output.stats.ticks[0])
        same = bool(check.identical or check.is_tie(str(lm.dtype)))
        found[way] = {"tokens": int(output.lengths[0]), "ticks": ticks, "seconds": seconds, "identical": same}
    return found


def quarters(runs: dict[str, Any], name: str) -> dict[str, tuple[float, ...]]:
    """Of a stream's quarters and of ALL: tokens a tick and times over AR's, both ways, and times over each other."""
    of_stream = [run for key, run in runs.items() if key.startswith(f"{name};")]
    found, every = {}, np.arange(len(of_stream))
    parts = np.array_split(every, min(4, len(of_stream)))
    for label, part in [*((f"{n} of {len(parts)}", part) for n, part in enumerate(parts, 1)), (ALL, every)]:
        total: dict[str, dict[str, float]] = {}
        for way in (AR, PLAIN, STORED):
            chosen = [of_stream[at][way] for at in part]
            total[way] = {
                "tokens": sum(run["tokens"] - 1 for run in chosen),
                "ticks": sum(run["ticks"] or run["tokens"] - 1 for run in chosen),
                "seconds": sum(run["seconds"] for run in chosen),
            }
        a_tick = [total[way]["tokens"] / total[way]["ticks"] for way in (PLAIN, STORED)]
        over = [total[a]["seconds"] / total[b]["seconds"] for a, b in ((AR, PLAIN), (AR, STORED), (PLAIN, STORED))]
        found[label] = (*a_tick, *over)
    return found


def table(of_stream: dict[str, tuple[float, ...]], name: str) -> str:
    """One line a quarter."""
    header = ["quarter", "tokens a tick", "the same, store", "over AR", "the same, store", "store over default"]
    lines = [[label, *(f"{each:.2f}" for each in figures)] for label, figures in of_stream.items()]
    return f"{name}\n\n{markdown(header, lines)}"


def draw(of_streams: dict[str, dict[str, tuple[float, ...]]], path: str) -> None:
    """Tokens a tick, default and with a store, quarter by quarter, a panel a stream."""
    figure = new_figure(2.6 * len(of_streams), 2.6)
    for axes, (name, found) in zip(np.ravel(figure.subplots(1, len(of_streams))), of_streams.items(), strict=True):
        quiet_axes(axes)
        for way, label in enumerate((PLAIN, STORED)):
            shown = {part: figures[way] for part, figures in found.items() if part != ALL}
            axes.plot(list(shown), list(shown.values()), "o-", color=SERIES[way], label=label)
        axes.set_title(name, fontsize=8)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("tokens a tick")
    figure.axes[0].legend(fontsize="small")
    write_whole(path, png(figure))


def parser() -> argparse.ArgumentParser:
    found = arguments(__doc__, weights=None)
    found.add_argument("--humaneval", required=True, metavar="FILE", help="the prompts of HumanEval")
    found.add_argument("--spec-bench", required=True, metavar="FILE", help="the questions of Spec-Bench")
    return found


def run(args: argparse.Namespace) -> None:
    """Answers all streams and writes."""
    remember_compilations()
    lm = dex_jax.load(args.model, weights=args.weights)
    found = streams(read_prompts(args.humaneval), read_prompts(args.spec_bench))
    figures = Figures(args.output, machine(model=args.model, dtype=str(lm.dtype), weights=lm.weights_kind))
    for name, (prompts, new_tokens) in found.items():
        answers(lm, prompts[0], new_tokens, dex_jax.TextStore())  # compiles
        store = dex_jax.TextStore()
        for number, prompt in enumerate(prompts, 1):
            figures.add(f"{name}; {number}", answers(lm, prompt, new_tokens, store))
    wrong = sum(not run[way]["identical"] for run in figures.runs.values() for way in (AR, PLAIN, STORED))
    of_streams = {name: quarters(figures.runs, name) for name in found}
    if args.output is not None:
        draw(of_streams, f"{args.output}.png")
    pages = [table(each, name) for name, each in of_streams.items()]
    figures.publish("# Streams", *pages, f"Answers with other tokens than AR's: {wrong}.")


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
