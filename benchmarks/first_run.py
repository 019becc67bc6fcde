"""How long first and second runs of decode.py take, and how much memory one process takes: each run in one of its own.

    python benchmarks/first_run.py --output results/first_run

Packages are installed and the model is there; the cache folder begins empty and is kept from run to run. CPU-seconds
are those of the process and of its own children, the C++ compiler among them, and hardly depend on what else runs.
Memory is what the system gave the process (resident, MB of 10^6 bytes) beyond what it held after imports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measuring import Figures, arguments, machine

from dex_jax.errors import exit_code
from dex_jax.tables import markdown

PROMPT = ["--prompt", "Why is the sky blue?"]
FEW = ["--max-new-tokens", "32"]
RUNS = {
    "first: builds the C++ kernels, measures step costs, compiles": PROMPT,
    "second: finds them on disk": PROMPT,
    "another prompt and number of tokens": ["--prompt", "What is a clock?", "--max-new-tokens", "90"],
    "three prompts": [*PROMPT, "--prompt", "Write a limerick.", "--prompt", "What is a prime number?", *FEW],
    "four samples": [*PROMPT, *FEW, "--num-samples", "4"],
    "with a temperature": [*PROMPT, *FEW, "--temperature", "0.8"],
    "with another temperature and top-p": [*PROMPT, *FEW, "--temperature", "0.6", "--top-p", "0.9"],
}
ONE_PROCESS = """
import json, resource, sys, time
import numpy as np
import dex_jax, jax, dex_jax.cli.decode
from dex_jax.cli.common import remember_compilations

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1e3

jax.jit(lambda x: x + 1)(jax.numpy.zeros(8)).block_until_ready()
remember_compilations()
imports, begin = peak(), time.perf_counter()
lm = dex_jax.load(sys.argv[1])
pieces = dex_jax.stream(lm, ["Why is the sky blue?"], max_new_tokens=128)
next(pieces)
first_text = time.perf_counter() - begin
for _ in pieces:
    pass
peak_above, after_first = peak() - imports, held()
random, longest = np.random.default_rng(0), 0.0
for length in np.linspace(20, 1000, 20).astype(int):
    begin = time.perf_counter()
    dex_jax.generate(lm, [random.integers(100, 40000, length).tolist()], max_new_tokens=32)
    longest = max(longest, time.perf_counter() - begin)
print(json.dumps([first_text, longest, peak_above, after_first, held(), peak() - imports]))
"""
NAMES = (
    "load to the first text, s",
    "the longest of 20 prompts of 20 to 1,000 tokens, s",
    "peak memory of one prompt above that after imports, MB",
    "memory after the first prompt, MB",
    "memory after the 20 prompts, MB",
    "peak memory of all above that after imports, MB",
)


def main(argv: list[str] | None = None) -> int:
    """Runs with command-line arguments; returns the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, whose medians count (%(default)s)")
    return exit_code(lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Measures what OUTPUT.json has not, and writes the page."""
    figures = Figures(args.output, machine(model=args.model))
    for number in range(args.rounds):
        name = f"round {number + 1}"
        if name in figures.runs:
            continue
        with tempfile.TemporaryDirectory() as caches:
            program = [str(Path(__file__).resolve().parents[1] / "decode.py"), "--model", args.model]
            runs = [measured([*program, *flags], caches)[:2] for flags in RUNS.values()]
            one_process = ["-c", ONE_PROCESS, args.model]
            measured(one_process, caches)  # what it compiles is on disk the next time
            figures.add(name, {"runs": runs, "one_process": json.loads(measured(one_process, caches)[2])})
    found = list(figures.runs.values())
    seconds = np.median([each["runs"] for each in found], axis=0)
    memory = np.median([each["one_process"] for each in found], axis=0)
    rows = [[name, *(f"{x:.1f}" for x in each)] for name, each in zip(RUNS, seconds, strict=True)]
    of_one = [[name, f"{x:.1f}" if name.endswith(" s") else f"{x:.0f}"] for name, x in zip(NAMES, memory, strict=True)]
    of_one.append(["memory after the 20 prompts over that after the first", f"{memory[4] / memory[3]:.2f}"])
    tables = (
        markdown(["run", "seconds", "CPU-seconds"], rows),
        markdown(["one process, programs on disk", ""], of_one),
    )
    figures.publish(f"# First and second runs\n\nMedians of {len(found)}.", "\n\n".join(tables))
    return 0


def measured(command: list[str], caches: str) -> tuple[float, float, str]:
    """(seconds, CPU-seconds, stdout) of this Python with a command and a cache folder."""
    names = {"JAX_COMPILATION_CACHE_DIR", "DEX_JAX_STEP_COSTS"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"XDG_CACHE_HOME": caches}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


if __name__ == "__main__":
    sys.exit(main())
