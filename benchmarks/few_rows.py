"""Why nn.layers.linear multiplies few rows as it does on CPUs: the same product in five forms, interleaved.

    python benchmarks/few_rows.py

The chain is the four projections of 30 layers of SmolLM2-135M in float32, without attention; for the last form weights
are kept in bfloat16.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp

from dex_jax.nn.few_rows import few_rows_product, ready

LAYERS = 30
SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))
ROUNDS = 11


def rows_times_kernel(x, w):
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def kernel_times_columns(x, w):
    return (w @ x.T).T


def kernel_times_columns_kept(x, w):
    return jax.lax.optimization_barrier(w @ jax.lax.optimization_barrier(x.T)).T


def few_rows_product_bfloat16(x, w):
    return few_rows_product(x, w)


FORMS = [rows_times_kernel, kernel_times_columns, kernel_times_columns_kept]
if ready():
    FORMS += [few_rows_product, few_rows_product_bfloat16]


def chain(form):
    def run(weights, x):
        for qkv, out, gate_up, down in weights:
            x = x + form(form(x, qkv)[:, :576], out)
            gate, up = jnp.split(form(x, gate_up), 2, axis=1)
            x = 0.5 * (x + form(gate * up, down))
        return x

    return jax.jit(run)


def main() -> None:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    weights = [[jax.random.normal(k, s) * 0.02 for k, s in zip(keys, SHAPES, strict=True)] for _ in range(LAYERS)]
    kept = jax.tree.map(lambda weight: weight.astype(jnp.bfloat16), weights)
    cases = {
        (form.__name__, rows): (chain(form), jnp.ones((rows, 576))) for rows in (1, 2, 4, 8, 12, 16) for form in FORMS
    }
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for round_number in range(ROUNDS + 1):
        for case, (run, x) in cases.items():
            begin = time.perf_counter()
            run(kept if case[0] == few_rows_product_bfloat16.__name__ else weights, x).block_until_ready()
            if round_number:
                times[case].append((time.perf_counter() - begin) * 1e3)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32, median ms of {ROUNDS} interleaved rounds")
    for (form, rows), values in times.items():
        print(f"{rows} rows  {form:<26} {statistics.median(values):6.1f}  (min {min(values):.1f})")


if __name__ == "__main__":
    main()
