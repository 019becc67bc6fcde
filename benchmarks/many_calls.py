"""The memory of a process after many different calls of `generate`, and the number of programs they compiled.

    python benchmarks/many_calls.py --calls 180

Calls draw batches of 1 to 4, prompts of 5 to 300 tokens, answers of 1 to 32, one of five methods and one of three
temperatures; the model is SmolLM2-135M. Figures are the system's: resident memory now, and the most there was.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

import jax
import numpy as np

import dex_jax

METHODS = (
    None,
    dex_jax.AR(),
    dex_jax.Dex(explorers=1),
    dex_jax.Dex(explorers=3),
    dex_jax.Dex(explorers=5, draft=False),
)
TEMPERATURES = (0.0, 0.0, 0.7, 1.0)
COMPILING = "/jax/core/compile/backend_compile_duration"
"""The event of every program that XLA compiles or JAX finds in its cache, even those of a single operation."""


def resident() -> float:
    """Return the GB of memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def main() -> None:
    """Run the calls and print a line after some of them."""
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--calls", type=int, default=180, help="(%(default)s)")
    flags.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    args = flags.parse_args()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    lm = dex_jax.load(args.model)
    random, started = np.random.default_rng(0), time.perf_counter()
    print(f"loaded: {resident():.2f} GB")
    for call in range(1, args.calls + 1):
        lengths = random.integers(5, 301, random.integers(1, 5))
        prompts = [random.integers(100, lm.config.vocab_size, length).tolist() for length in lengths]
        dex_jax.generate(
            lm,
            prompts,
            method=METHODS[random.integers(len(METHODS))],
            max_new_tokens=int(random.integers(1, 33)),
            temperature=float(random.choice(TEMPERATURES)),
            top_k=int(random.choice([0, 40])) or None,
            seed=call,
        )
        if call in (1, 5, 20, 60, args.calls):
            most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            programs, seconds = compiled.count(COMPILING), time.perf_counter() - started
            print(
                f"{call} calls: {resident():.2f} GB, at most {most:.2f}; {programs} programs; {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
