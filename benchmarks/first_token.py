"""How long the first token takes after prompts of several lengths, programs compiled: dex_jax, XLA alone, transformers.

    python benchmarks/first_token.py --rounds 9 --transformers-python PYTHON --output results/first_token

All take turns at batch 1 in float32. The reading is the same for every method. The peak of this process's memory after
all lengths, weights apart, stands under the table.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import sys
from typing import Any

import jax
import numpy as np
from measuring import Figures, arguments, in_turns, machine, quartiles
from outside import Outside

import dex_jax
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.tables import markdown

LENGTHS = (20, 41, 131, 300, 754, 1000)
OURS, OUTSIDE = "dex_jax", "transformers"


def ours(lm: Any, ids: list[int]) -> float:
    """Seconds from a prompt to its first token."""
    out = dex_jax.generate(lm, [ids], method=dex_jax.AR(), exits="shared", max_new_tokens=2)
    return out.stats.prefill_seconds


def page(times: dict[str, list[float]], lengths: list[int]) -> str:
    """Seconds by length, and how often ours fits into transformers'."""
    rows = []
    for length in lengths:
        own, other = times[f"{OURS} {length}"], times.get(f"{OUTSIDE} {length}")
        compared = ["", ""]
        if other is not None:
            compared = [quartiles(other), quartiles(y / x for x, y in zip(own, other, strict=True))]
        rows.append([str(length), quartiles(own), *compared])
    return markdown(["tokens", "dex_jax, s: median (quartiles)", "transformers, s", "speed over transformers"], rows)


def parser() -> argparse.ArgumentParser:
    made = arguments(__doc__, weights=None, rounds=9, transformers_python=None)
    made.add_argument("--lengths", type=int, nargs="+", default=[*LENGTHS], metavar="N", help="of prompts, in tokens")
    return made


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    remember_compilations()
    lm = dex_jax.load(args.model, dtype="float32", weights=args.weights)
    outside = Outside(args.transformers_python, args.model) if args.transformers_python else None
    figures = Figures(args.output, machine(dtype="float32", rounds=args.rounds) | (outside.versions if outside else {}))
    measures: dict[str, Any] = {}
    for length in args.lengths:
        ids = np.random.default_rng(length).integers(100, lm.config.vocab_size, length).tolist()
        measures[f"{OURS} {length}"] = functools.partial(ours, lm, ids)
        if outside is not None:
            measures[f"{OUTSIDE} {length}"] = lambda ids=ids: outside.run(ids, 1)["prefill_seconds"]
    times = in_turns(measures, args.rounds)
    if outside is not None:
        outside.close()
    for name, found in times.items():
        figures.add(name, {"median": statistics.median(found), "seconds": found})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    apart = (peak - lm.parameter_bytes) / 1e9
    figures.add("peak memory without weights, GB", apart)
    figures.publish("# The first token", page(times, args.lengths), f"Peak memory without weights: {apart:.2f} GB.")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
