"""The project's speed table on this machine: AR, a DEX tick, their parts, and transformers, in one interleaved run.

    python benchmarks/speed.py                                        # without transformers
    python benchmarks/speed.py --transformers-python REF/bin/python   # a Python that has torch and transformers
    python benchmarks/speed.py --output results/speed                 # writes results/speed.md and .json

Every round times, one after the other: a plain streaming read of all weights (the maximum of each array, unembedding
included), AR steps, DEX-1/5 ticks, the same ticks with intermediate heads over 256 columns of the unembedding (a tick
"heads apart": their rows and lattice are at least as full, their heads next to free), the lattice alone (a network
that computes nothing), and transformers' generate. Medians over rounds, with the interquartile range. Compilation and
peak memory are measured in processes of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from transformers_worker import Transformers

import dex_jax
from dex_jax.decoding import loop
from dex_jax.decoding.interface import Exits, Network
from dex_jax.decoding.methods import AR, Dex
from dex_jax.decoding.network import transformer_network
from dex_jax.decoding.session import RUN, Session
from dex_jax.language_model import merge_model

LEAD = (
    "# Speed\n\n"
    "What one step takes: `python benchmarks/speed.py --rounds 9 --transformers-python ... --output results/speed`, "
    'SmolLM2-135M, batch 1, all measured in turns. DEX has exits of kind `shared` here. "Intermediate heads apart" is '
    'the same tick with heads that read 256 columns only, "lattice alone" a network that computes nothing.\n\n'
)

PROMPT = "Tell me a short story about a clockmaker who is afraid of silence."
NARROW_COLUMNS = 256
HERE = Path(__file__).resolve().parent


def streaming_read(weights):
    """One jitted function that reads every weight once."""
    leaves = jax.tree.leaves(weights)
    # A maximum, the fastest of the reads tried: a sum over the same arrays takes a tenth longer.
    read = jax.jit(lambda arrays: [jnp.max(a) for a in arrays])
    return lambda: jax.block_until_ready(read(leaves))


class Ticks:
    """Times chunks of ticks of one method, starting a new sequence when one ends."""

    def __init__(self, lm, schedule, run, count: int):
        self.lm, self.schedule, self.run, self.count = lm, schedule, run, count
        self.session = None

    def __call__(self) -> float:
        """Seconds per tick over `count` ticks, all of them with a live sequence."""
        longest = 10 * self.count
        if self.session is None or self.session.tick + self.count > longest:
            ids = [self.lm.encode(PROMPT)]
            self.session = Session(self.lm, ids, self.schedule, longest, None)
            no_eos = jnp.asarray([-1], jnp.int32)
            self.session.limits = self.session.limits._replace(eos_ids=no_eos)
            self.session.prefill()
        session = self.session
        session.tick += self.count
        begin = time.perf_counter()
        session.state = self.run(
            self.lm.weights, session.state, session.limits, None, jnp.int32(session.tick), spec=session.spec
        )
        jax.block_until_ready(session.state)
        return (time.perf_counter() - begin) / self.count


def narrow_heads_run(schedule):
    """run_ticks with intermediate heads over a few columns of the unembedding."""

    @functools.partial(jax.jit, static_argnames="spec", donate_argnums=2)
    def run(weights, heads, state, limits, sampling, until_tick, *, spec):
        model = merge_model(spec.config, spec.layout, weights)
        columns = model.embed[...][:NARROW_COLUMNS]
        ids = jnp.arange(NARROW_COLUMNS, dtype=jnp.int32)
        inverse = jnp.minimum(jnp.arange(spec.config.vocab_size, dtype=jnp.int32), NARROW_COLUMNS)
        exits = Exits(lambda memory, hidden, view: model.normed(hidden[:-1]), lambda f: f @ columns.T, ids, inverse)
        network = transformer_network(model, schedule.depths, exits)
        return loop.run(network, state, limits, sampling, until_tick=until_tick)

    return run


def lattice_alone(lm, schedule, count: int):
    """Seconds per tick of the loop around a network that computes nothing but a spread of cheap logits."""
    width = NARROW_COLUMNS

    def network(table) -> Network:
        def logits(hidden):
            return jnp.sin(hidden[:, :1] * table[None, :])

        return Network(
            vocab_size=width,
            embed=lambda tokens, positions: (tokens[..., None] % 7 + positions[..., None] % 5).astype(jnp.float32),
            advance=lambda memory, hidden, view: (hidden + 1, memory),
            commit=lambda memory, done: memory,
            final=logits,
            exits=Exits(lambda memory, hidden, view: hidden[:-1], logits),
        )

    limits = dex_jax.Limits(jnp.asarray([10**6]), jnp.asarray([-1]))
    table = jnp.arange(width, dtype=jnp.float32)

    @jax.jit
    def start(table):
        shape = {"stages": schedule.stages, "rows": schedule.rows, "capacity": 16}
        return loop.init(network(table), (), jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), limits=limits, **shape)

    @functools.partial(jax.jit, donate_argnums=1)
    def run(table, state, until):
        return loop.run(network(table), state, limits, until_tick=until)

    state, tick = start(table), 0

    def measure() -> float:
        nonlocal state, tick
        tick += count
        begin = time.perf_counter()
        state = jax.block_until_ready(run(table, state, jnp.int32(tick)))
        return (time.perf_counter() - begin) / count

    return measure


def compile_seconds() -> dict[str, float]:
    """Compilation before the first token in a new process: without a cache, then with the one it left."""
    with tempfile.TemporaryDirectory() as cache:
        command = [
            sys.executable,
            str(HERE.parent / "decode.py"),
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "2",
            "--json",
        ]
        environment = os.environ | {"XDG_CACHE_HOME": cache}
        runs = []
        for _ in range(2):
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            runs.append(json.loads(done.stdout)["compile_seconds"])
    return {"first": runs[0], "second": runs[1]}


PEAK_PROGRAM = """
import re, sys
import jax, numpy, flax.nnx
import dex_jax
from dex_jax.decoding.generate import precompile
from dex_jax.language_model import outline
import tokenizers, gguf, jinja2
jax.block_until_ready(jax.numpy.zeros(1) + 1)
def peak():  # not ru_maxrss, which a new process inherits from the one that started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
options = dict(method=dex_jax.Dex(explorers=5), exits="shared", max_new_tokens=64)
model = outline("smollm2-135m", dtype="float32")
precompile(model, [sys.argv[1]], **options)
lm = model.load()
dex_jax.generate(lm, [sys.argv[1]], **options)
print(peak() - before, lm.parameter_bytes)
"""


def peak_memory(cache_bytes: int) -> dict[str, float]:
    """Peak resident memory of what decode.py does above that after imports, over parameters plus caches (Linux)."""
    done = subprocess.run([sys.executable, "-c", PEAK_PROGRAM, PROMPT], capture_output=True, text=True, check=True)
    peak, parameters = map(int, done.stdout.split()[-2:])
    return {"peak_bytes": peak, "needed_bytes": parameters + cache_bytes, "ratio": peak / (parameters + cache_bytes)}


def middle(values: list[float]) -> dict[str, float]:
    low, high = np.percentile(values, [25, 75])
    return {"median_ms": statistics.median(values) * 1e3, "q1_ms": low * 1e3, "q3_ms": high * 1e3}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=15)
    arguments.add_argument("--ticks", type=int, default=16, help="ticks or steps a round")
    arguments.add_argument("--transformers-python", help="a Python with torch and transformers")
    arguments.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json")
    args = arguments.parse_args()

    lm = dex_jax.load("smollm2-135m", dtype="float32")
    ar, dex = AR().schedule_for(lm.config.num_layers), Dex(explorers=5).schedule_for(lm.config.num_layers)
    read = streaming_read(lm.weights)
    measures = {
        "streaming read of the weights": lambda: timed(read),
        "AR step": Ticks(lm, ar, RUN, args.ticks),
        "DEX-1/5 tick": Ticks(lm, dex, RUN, args.ticks),
        "DEX-1/5 tick, intermediate heads apart": Ticks(lm, dex, narrow_heads_run(dex), args.ticks),
        "lattice alone": lattice_alone(lm, dex, 50 * args.ticks),
    }
    worker = None
    if args.transformers_python:
        worker = measures["transformers generate, a token"] = Transformers(args.transformers_python)
    times: dict[str, list[float]] = {name: [] for name in measures}
    for round_number in range(args.rounds + 1):
        for name, measure in measures.items():
            value = measure()
            if round_number:
                times[name].append(value)
    if worker is not None:
        worker.close()

    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(measures["DEX-1/5 tick"].session.state.memory))
    report = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, float32",
        "versions": {"jax": jax.__version__, "dex_jax": dex_jax.__version__}
        | ({} if worker is None else {k: v for k, v in worker.versions.items() if k in ("torch", "transformers")}),
        "rounds": args.rounds,
        "times": {name: middle(values) for name, values in times.items()},
        "ratios": ratios(times),
        "compile_seconds": compile_seconds(),
        "memory": peak_memory(cache_bytes),
    }
    text = table(report)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_suffix(".md").write_text(LEAD + text, encoding="utf-8")
        args.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def timed(run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians over rounds of the ratio within a round."""

    def over(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    found = {
        "AR step over one streaming read": over("AR step", "streaming read of the weights"),
        "DEX-1/5 tick over an AR step, intermediate heads apart": over(
            "DEX-1/5 tick, intermediate heads apart", "AR step"
        ),
        "DEX-1/5 tick over an AR step, heads included": over("DEX-1/5 tick", "AR step"),
        "lattice bookkeeping, share of a tick": over("lattice alone", "DEX-1/5 tick, intermediate heads apart"),
    }
    if "transformers generate, a token" in times:
        found = {"AR against transformers' generate": over("transformers generate, a token", "AR step")} | found
    return found


def table(report: dict) -> str:
    lines = [f"Device: {report['device']}; {report['versions']}; {report['rounds']} interleaved rounds.", ""]
    lines += ["| what | median ms | quartiles |", "|---|---|---|"]
    for name, t in report["times"].items():
        lines.append(f"| {name} | {t['median_ms']:.2f} | {t['q1_ms']:.2f} - {t['q3_ms']:.2f} |")
    lines += ["", "| ratio, median over rounds | |", "|---|---|"]
    lines += [f"| {name} | {value:.3g} |" for name, value in report["ratios"].items()]
    compiled, memory = report["compile_seconds"], report["memory"]
    seconds = f"{compiled['first']:.1f} s; {compiled['second']:.1f} s"
    lines.append(f"| compilation before the first token; second run with the persistent cache | {seconds} |")
    lines.append(f"| peak memory above that after imports, over parameters plus caches | {memory['ratio']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
