"""How long the first token takes after prompts of several lengths, programs compiled, here and in other libraries.

    python benchmarks/first_token.py --rounds 9 --transformers-python PYTHON --llama-python PYTHON \\
        --output results/first_token

All take turns at batch 1 in float32; llama.cpp, on the same file, rounds activations. The reading is the same for every
method. The peak of this process's memory after all lengths, weights apart, stands under the table.
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
OURS, TRANSFORMERS, LLAMA = "dex_jax", "transformers", "llama.cpp"


def ours(lm: Any, ids: list[int]) -> float:
    """Seconds from a prompt to its first token."""
    out = dex_jax.generate(lm, [ids], method=dex_jax.AR(), exits="shared", max_new_tokens=2)
    return out.stats.prefill_seconds


def page(times: dict[str, list[float]], lengths: list[int], others: list[str]) -> str:
    """Seconds by length, and how often ours fits into others'."""
    rows = []
    for length in lengths:
        own = times[f"{OURS} {length}"]
        rows.append([str(length), quartiles(own)])
        for other in (times[f"{name} {length}"] for name in others):
            rows[-1] += [quartiles(other), quartiles(y / x for x, y in zip(own, other, strict=True))]
    columns = [column for name in others for column in (f"{name}, s", f"speed over {name}")]
    return markdown(["tokens", "dex_jax, s: median (quartiles)", *columns], rows)


def parser() -> argparse.ArgumentParser:
    made = arguments(__doc__, weights=None, rounds=9, transformers_python=None, llama_python=None)
    made.add_argument("--lengths", type=int, nargs="+", default=[*LENGTHS], metavar="N", help="of prompts, in tokens")
    return made


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    remember_compilations()
    lm = dex_jax.load(args.model, dtype="float32", weights=args.weights)
    others = {}
    if args.transformers_python:
        others[TRANSFORMERS] = Outside(args.transformers_python, args.model)
    if args.llama_python:
        others[LLAMA] = Outside(args.llama_python, args.model, lm.source)
    about = machine(dtype="float32", weights=lm.weights_kind, rounds=args.rounds)
    for other in others.values():
        about |= other.versions
    figures = Figures(args.output, about)
    measures: dict[str, Any] = {}
    for length in args.lengths:
        ids = np.random.default_rng(length).integers(100, lm.config.vocab_size, length).tolist()
        measures[f"{OURS} {length}"] = functools.partial(ours, lm, ids)
        for name, other in others.items():
            measures[f"{name} {length}"] = lambda ids=ids, other=other: other.run(ids, 1)["prefill_seconds"]
    times = in_turns(measures, args.rounds)
    for other in others.values():
        other.close()
    for name, found in times.items():
        figures.add(name, {"median": statistics.median(found), "seconds": found})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    apart = (peak - lm.parameter_bytes) / 1e9
    figures.add("peak memory without weights, GB", apart)
    table = page(times, args.lengths, [*others])
    figures.publish("# The first token", table, f"Peak memory without weights: {apart:.2f} GB.")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
