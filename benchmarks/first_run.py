"""How long first and second runs of decode.py take, in CPU-seconds: each in a process of its own, caches as they come.

    python benchmarks/first_run.py --output results/first_run

Packages are installed and the model is there; the cache folder begins empty and is kept from run to run. CPU-seconds
are those of the process and of its own children, the C++ compiler among them, and hardly depend on what else runs. The
last line is a prompt of a length that a running process has not seen before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import Figures, arguments, machine

from dex_jax.errors import exit_code
from dex_jax.tables import markdown

PROMPT = ["--prompt", "Why is the sky blue?"]
FEW = ["--max-new-tokens", "32"]
RUNS = {
    "first, cold caches": [*PROMPT, *FEW],
    "second, the same": [*PROMPT, *FEW],
    "another number of tokens": [*PROMPT, "--max-new-tokens", "100"],
    "another prompt": ["--prompt", "Name three rivers of Africa and say where each of them ends, please.", *FEW],
    "three prompts": [*PROMPT, "--prompt", "Write a limerick.", "--prompt", "What is a prime number?", *FEW],
    "four samples": [*PROMPT, *FEW, "--num-samples", "4"],
    "with a temperature": [*PROMPT, *FEW, "--temperature", "0.8"],
    "with another temperature and top-p": [*PROMPT, *FEW, "--temperature", "0.6", "--top-p", "0.9"],
}
NEW_LENGTH = """
import sys, time
import dex_jax
lm = dex_jax.load(sys.argv[1])
for length in (20, 100):
    begin = time.process_time(), time.perf_counter()
    dex_jax.generate(lm, [list(range(100, 100 + length))], max_new_tokens=8)
print(time.process_time() - begin[0], time.perf_counter() - begin[1])
"""


def main(argv: list[str] | None = None) -> int:
    """Runs with command-line arguments; returns the exit code."""
    return exit_code(lambda: run(arguments(__doc__).parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Measures what OUTPUT.json has not, and writes the page."""
    figures = Figures(args.output, machine(model=args.model))
    with tempfile.TemporaryDirectory() as caches:
        # One without the others would find other caches than they did.
        for name, flags in RUNS.items() if set(RUNS) - set(figures.runs) else ():
            program = [str(Path(__file__).resolve().parents[1] / "decode.py"), "--model", args.model, "--json", *flags]
            cpu, out = measured(program, caches)
            tokens = sum(json.loads(line)["new_tokens"] for line in out.splitlines())
            figures.add(name, {"cpu_seconds": cpu, "tokens": tokens})
    if "a new length of prompt" not in figures.runs:
        with tempfile.TemporaryDirectory() as caches:
            _, out = measured(["-c", NEW_LENGTH, args.model], caches)
            figures.add(
                "a new length of prompt", dict(zip(("cpu_seconds", "seconds"), map(float, out.split()), strict=True))
            )
    rows = [[name, f"{each['cpu_seconds']:.1f}", each.get("tokens", 8)] for name, each in figures.runs.items()]
    figures.publish("# First and second runs", markdown(["run", "CPU-seconds", "tokens"], rows))
    return 0


def measured(command: list[str], caches: str) -> tuple[float, str]:
    """(CPU-seconds, stdout) of this Python with a command and a cache folder."""
    names = {"JAX_COMPILATION_CACHE_DIR", "DEX_JAX_STEP_COSTS"}
    environment = {name: value for name, value in os.environ.items() if name not in names} | {"XDG_CACHE_HOME": caches}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


if __name__ == "__main__":
    sys.exit(main())
