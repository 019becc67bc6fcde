"""Why nn.layers.linear multiplies few rows as it does on CPUs: the same product in five forms, in turns.

    python benchmarks/few_rows.py --output results/few_rows

The chain is the four projections of 30 layers of SmolLM2-135M in float32, without attention; for the last form weights
are kept in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from measuring import Figures, arguments, in_turns, machine

from dex_jax.errors import exit_code
from dex_jax.nn.few_rows import few_rows_product, ready
from dex_jax.tables import markdown

LAYERS = 30
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
ROWS = (1, 2, 4, 8, 12, 16)
KEPT = "C++, weights in bfloat16"
FORMS = {
    "rows x weights": lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
    "weights x columns": lambda x, w: (w @ x.T).T,
    "weights x columns, kept": lambda x, w: jax.lax.optimization_barrier(w @ jax.lax.optimization_barrier(x.T)).T,
}
if ready():
    FORMS |= {"C++": few_rows_product, KEPT: few_rows_product}


def chain(form, weights, x):
    """x [rows, 576] through all projections, by one form of the product."""
    for qkv, out, gate_up, down in weights:
        x = x + form(form(x, qkv)[:, :576], out)
        gate, up = jnp.split(form(x, gate_up), 2, axis=1)
        x = 0.5 * (x + form(gate * up, down))
    return x


def timed(run, weights, x) -> float:
    begin = time.perf_counter()
    run(weights, x).block_until_ready()
    return time.perf_counter() - begin


def parser() -> argparse.ArgumentParser:
    return arguments(__doc__, rounds=11)


def run(args: argparse.Namespace) -> None:
    """Measures and writes."""
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    weights = [[jax.random.normal(k, s) * 0.02 for k, s in zip(keys, SHAPES, strict=True)] for _ in range(LAYERS)]
    half = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), weights)
    programs = {name: jax.jit(functools.partial(chain, form)) for name, form in FORMS.items()}
    cases = {
        f"{name}, {rows}": functools.partial(timed, program, half if name == KEPT else weights, jnp.ones((rows, 576)))
        for name, program in programs.items()
        for rows in ROWS
    }
    times = in_turns(cases, args.rounds)
    figures = Figures(args.output, machine(rounds=args.rounds))
    for name, found in times.items():
        figures.add(name, {"median_ms": 1e3 * statistics.median(found), "least_ms": 1e3 * min(found)})
    cells = [[name, *(f"{figures.runs[f'{name}, {rows}']['median_ms']:.1f}" for rows in ROWS)] for name in FORMS]
    figures.publish("# Products of few rows", markdown(["form, ms", *(f"{rows} rows" for rows in ROWS)], cells))


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
