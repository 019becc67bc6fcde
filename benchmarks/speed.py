"""What one step takes: a plain read of all weights, AR's step, ticks of one and of five explorers, transformers.

    python benchmarks/speed.py --rounds 9 --transformers-python PYTHON --output results/speed

All take turns on one prompt at batch 1, with the exits that ship, and nothing ends at an EOS. How long the first token
takes is what benchmarks/first_token.py measures, how long a first run, benchmarks/first_run.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from measuring import Figures, arguments, in_turns, machine, quartiles
from outside import Outside

import dex_jax
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.tables import markdown

PROMPT = "Tell me a short story about a clockmaker who is afraid of silence."
READ, AR, ONE, TICK, OUTSIDE = (
    "read of all weights",
    "AR step",
    "tick of one explorer",
    "DEX-1/5 tick",
    "transformers, a token",
)
RATIOS = {
    "AR step over a read of all weights": (AR, READ),
    "tick of one explorer over an AR step": (ONE, AR),
    "DEX-1/5 tick over an AR step": (TICK, AR),
    "transformers' token over an AR step": (OUTSIDE, AR),
}


def measures(lm: Any, ids: list[int], new_tokens: int, outside: Outside | None) -> dict[str, Any]:
    """Name -> what measures the seconds of one step once."""
    # A maximum, the fastest of the reads tried: a sum over the same arrays takes a tenth longer.
    read = jax.jit(lambda arrays: [jnp.max(each) for each in arrays])

    def stream() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(read(jax.tree.leaves(lm.weights)))
        return time.perf_counter() - begin

    def step(method: Any, count: str) -> float:
        exits = "shared" if isinstance(method, dex_jax.AR) else "default"
        stats = dex_jax.generate(lm, [ids], method=method, exits=exits, max_new_tokens=new_tokens).stats
        return stats.decode_seconds / (new_tokens - 1 if count == "tokens" else int(getattr(stats, count)[0]))

    found = {
        READ: stream,
        AR: lambda: step(dex_jax.AR(), "tokens"),
        ONE: lambda: step(dex_jax.Dex(explorers=1), "ticks"),
        TICK: lambda: step(dex_jax.Dex(explorers=5, draft=False), "ticks"),
    }
    if outside is not None:
        found[OUTSIDE] = lambda: outside.run(ids, new_tokens)["decode_seconds"] / (new_tokens - 1)
    return found


def page(times: dict[str, list[float]]) -> list[str]:
    """The table of steps in milliseconds, and that of ratios within a round."""
    steps = [[name, quartiles((1e3 * each for each in found), 1)] for name, found in times.items()]
    ratios = [
        [name, quartiles(x / y for x, y in zip(times[a], times[b], strict=True))]
        for name, (a, b) in RATIOS.items()
        if a in times
    ]
    header = "median (quartiles)"
    return [markdown(["step", f"ms, {header}"], steps), markdown(["ratio within a round", header], ratios)]


def parser() -> argparse.ArgumentParser:
    return arguments(__doc__, weights=None, rounds=9, max_new_tokens=64, transformers_python=None)


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    remember_compilations()
    lm = dex_jax.load(args.model, dtype="float32", weights=args.weights)
    ids = lm.encode(PROMPT)
    # A model that knows no EOS: every run does the same work.
    lm.config, lm.tokenizer = dataclasses.replace(lm.config, eos_ids=()), None
    outside = Outside(args.transformers_python, args.model) if args.transformers_python else None
    about = machine(dtype="float32", rounds=args.rounds, max_new_tokens=args.max_new_tokens)
    figures = Figures(args.output, about | (outside.versions if outside else {}))
    times = in_turns(measures(lm, ids, args.max_new_tokens, outside), args.rounds)
    if outside is not None:
        outside.close()
    for name, found in times.items():
        figures.add(name, {"median_ms": 1e3 * statistics.median(found), "seconds": found})
    figures.publish("# Speed", *page(times))


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
