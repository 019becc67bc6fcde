"""DEX-1/2 against the pipeline that runs AR, on two processes with a core each: the smallest real mesh there is.

    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --depths 20,30 --batch 1 8 \\
        --output results/two_processes

Both methods decode groups of prompts in turns on the same two processes, and must give the same tokens. Beside their
times: what two busy cores share, and what a message takes. A run that was stopped goes on. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, arguments, in_turns, machine, read_ids

from dex_jax.cli.common import depths
from dex_jax.errors import DexError, exit_code
from dex_jax.tables import markdown

FOREVER = 2**30
STREAMED = 1e9
"""Bytes that the bandwidth is measured over: more than a processor's caches hold."""


def pinned(core: int, arguments: list[str], env: dict[str, str]) -> subprocess.Popen:
    """This file as a process of its own on one core.

    Its threads do not interrupt one another (SCHED_BATCH). A message that comes in while the one that computes is
    sending would otherwise wake gloo's, which then polls a socket that the other has locked until its time is over.
    """
    before = os.sched_getaffinity(0)
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        # A child inherits what holds at the moment it is started in.
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=env)
    finally:
        os.sched_setscheduler(0, policy, priority)
        os.sched_setaffinity(0, before)


# What two busy cores share.


def stream(begin: float, seconds: float) -> dict[str, float]:
    """Bytes a second that this process reads, and operations a second that it does, from `begin` (of time.time) on."""
    vector = np.ones(int(STREAMED / 4), np.float32)
    square = np.ones((512, 512), np.float32)
    kinds = {"GB/s read": (lambda: vector @ vector, STREAMED), "Gflop/s": (lambda: square @ square, 2 * 512.0**3)}
    found = {}
    for number, (name, (repeat, size)) in enumerate(kinds.items()):
        repeat()
        time.sleep(max(0.0, begin + 2 * number * seconds - time.time()))
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            repeat()
            count += 1
        found[name] = count * size / 1e9 / (time.perf_counter() - start)
    return found


def sharing(cores: list[int], seconds: float) -> list[list[str]]:
    """A line of `stream`'s figures each: by one process alone, by each of two at once, and both over one."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = []
    for chosen in (cores[:1], cores[:2]):
        begin = time.time() + 3
        started = [pinned(core, ["--stream", f"{begin},{seconds}"], env) for core in chosen]
        found += [json.loads(process.communicate()[0]) for process in started]
    alone, one, other = found
    return [
        [name, *(f"{each[name]:.1f}" for each in found), f"{(one[name] + other[name]) / alone[name]:.2f}"]
        for name in alone
    ]


# The two processes.


def work(task: dict[str, Any]) -> None:
    """What each of the two does: measures the links, then every group of prompts; process 0 prints a line for each."""
    import jax

    import dex_jax
    from dex_jax.cli.common import remember_compilations
    from dex_jax.decoding.output import Output
    from dex_jax.distributed import is_first, join

    join()
    remember_compilations()
    layout = dex_jax.Staged(tuple(task["depths"])) if task["depths"] else None
    lm = dex_jax.load(task["model"], "float32", mesh="stage=2", layout=layout)
    assert lm.mesh is not None
    assert isinstance(lm.layout, dex_jax.Staged)
    assert len(jax.local_devices()) == 1

    def say(what: Any) -> None:
        if is_first():
            print(json.dumps(what), flush=True)

    say(links(lm.mesh, lm.config.width))
    methods = {"ar": (dex_jax.AR(), "shared"), "dex": (dex_jax.Dex(depths=lm.layout.depths), task["exits"])}
    out: dict[str, Output] = {}

    def decode(name: str, prompts: list[list[int]]) -> float:
        method, exits = methods[name]
        options = {"method": method, "exits": exits, "max_new_tokens": task["max_new_tokens"]}
        (out[name],) = collections.deque(dex_jax.stream(lm, prompts, ticks_per_update=FOREVER, **options), maxlen=1)
        return out[name].stats.decode_seconds

    for prompts in task["groups"]:
        times = in_turns({name: lambda name=name, p=prompts: decode(name, p) for name in methods}, task["rounds"])
        ticks, lengths = out["dex"].stats.ticks, out["ar"].lengths
        say(
            {
                "batch": len(prompts),
                "seconds": {name: statistics.median(found) for name, found in times.items()},
                "steps": int(lengths.max()) - 1,
                "ticks": int(ticks.max()),
                "tokens": int((lengths - 1).sum()),
                "ticks_of_all": int(ticks.sum()),
                "identical": bool(np.array_equal(out["ar"].tokens, out["dex"].tokens)),
                "depths": out["dex"].stats.schedule.depths,
            }
        )


def links(mesh: Any, width: int, repeats: int = 200) -> dict[str, float]:
    """Microseconds of one message from each to the other, of a gather and of a sum of a few numbers."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def timed(exchange: Any, count: int) -> float:
        def run(x: Any) -> Any:
            return jax.lax.fori_loop(0, repeats, lambda _, x: exchange(x), x)

        spec = PartitionSpec("stage")
        mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        x = jax.jit(lambda: jnp.ones((2, count)), out_shardings=NamedSharding(mesh, spec))()
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            jax.block_until_ready(mapped(x))
            times.append((time.perf_counter() - begin) / repeats)
        return 1e6 * min(times)

    return {
        "permute": timed(lambda x: jax.lax.ppermute(x, "stage", [(0, 1), (1, 0)]), width),
        "gather": timed(lambda x: jax.lax.all_gather(x[0], "stage")[:1], 4),
        "sum": timed(lambda x: jax.lax.psum(x, "stage") / 2, 4),
    }


def both(task: dict[str, Any], cores: list[int]) -> Iterator[dict[str, Any]]:
    """Runs a task on two processes and passes on what process 0 prints.

    Raises:
      DexError: one of them fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    # When this process is told to end, so are they.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, contextlib.ExitStack() as ends:
        json.dump(task, file)
        file.flush()
        started = []
        for i in range(2):
            started.append(pinned(cores[i], ["--work", file.name], env | {"JAX_PROCESS_ID": str(i)}))
            ends.callback(started[i].kill)  # they take the gentler signal for a warning
        assert started[0].stdout is not None
        for line in started[0].stdout:
            if line.startswith("{"):  # gloo says on stdout too whom it has connected to
                yield json.loads(line)
        if max(abs(process.wait()) for process in started):
            raise DexError("one of the two processes has failed; what was measured before is kept")


# The page.


def largest_part(model: str, stages: list[int]) -> float:
    """Of the weights that a step reads, the share of the fuller stage; the last one has the unembedding too."""
    from dex_jax.evaluation.planner.workload import work_of
    from dex_jax.language_model import outline

    work = work_of(outline(model, "float32").config)
    parts = work.layer * np.diff([0, *stages]) + np.array([*[0] * (len(stages) - 1), work.vocabulary * work.width])
    return float(parts.max() / parts.sum())


def row(groups: list[dict], model: str) -> dict[str, Any]:
    """What groups of one size come to: the gain in time, that before the first sequence of a batch ends, and counts."""
    from dex_jax.evaluation.bench.resampling import bootstrap

    steps, ticks = (sum(group[name] for group in groups) for name in ("steps", "ticks"))
    gains = [group["seconds"]["ar"] / group["seconds"]["dex"] for group in groups]
    paces = [(g["ticks"] / g["steps"]) * (g["tokens"] / g["ticks_of_all"]) for g in groups]
    return {
        "gain": bootstrap(np.array(gains)),
        "going": bootstrap(np.array(gains) * np.array(paces)),
        "worst": min(gains),
        "ticks_a_token": sum(group["ticks_of_all"] for group in groups) / sum(group["tokens"] for group in groups),
        "by_ticks": steps / ticks / largest_part(model, groups[0]["depths"]),
        "step_ms": 1e3 * sum(group["seconds"]["ar"] for group in groups) / steps,
        "tick_ms": 1e3 * sum(group["seconds"]["dex"] for group in groups) / ticks,
        "identical": f"{sum(group['identical'] for group in groups)} of {len(groups)}",
    }


def page(runs: dict[str, Any], model: str) -> list[str]:
    """The tables and what their columns mean."""
    groups = [run for run in runs.values() if "batch" in run]
    cells = []
    for batch in sorted({group["batch"] for group in groups}):
        found = row([group for group in groups if group["batch"] == batch], model)
        counts = (f"{found[name]:.2f}" for name in ("worst", "ticks_a_token", "by_ticks"))
        times = (f"{found[name]:.1f}" for name in ("step_ms", "tick_ms"))
        cells.append([str(batch), str(found["gain"]), str(found["going"]), *counts, *times, found["identical"]])
    header = ["batch", "gain (95%)", "all going on", "worst", "ticks a token", "ticks predict", "step ms", "tick ms"]
    link = runs["links"]
    return [
        "# Two processes: DEX-1/2 against pipelined AR",
        f"Two processes on a core each, float32, greedy; stages of {model} end at depths "
        f"{', '.join(map(str, groups[0]['depths']))}, and the last has the unembedding too. Gain: AR's time over "
        "DEX's for the same tokens, median of groups of prompts with a 95% interval.",
        markdown([*header, "identical"], cells),
        "*All going on*: a batch ends with its slowest sequence; this is the gain while all of its sequences go on, as "
        "in a server that fills the places of those that end. *Ticks predict*: the gain if a tick took as much of a "
        "step as the fuller stage has of the weights, with exits and messages that cost nothing.",
        "What two busy cores share, each figure by a process pinned to its core:",
        markdown(["", "alone", "first of two", "second of two", "both over one"], runs["sharing"]),
        "Microseconds of a message between the two: "
        + ", ".join(f"{key} {value:.0f}" for key, value in link.items())
        + ".",
    ]


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, data=None, prompts=10, rounds=3, max_new_tokens=96, exits="default")
    flags.add_argument("--depths", type=depths, metavar="X,...", help="of the two exits; even unless given")
    flags.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="prompts at a time (%(default)s)"
    )
    return flags


def run(args: argparse.Namespace) -> int:
    """Measures what is missing and writes the page; 1 where tokens differ."""
    from dex_jax.language_model import outline

    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise DexError("this needs two cores, and a system that pins processes to them, such as Linux")
    cores = sorted(os.sched_getaffinity(0))
    lm = outline(args.model, "float32")
    files = [list(read_ids(lm, [path], args.prompts).items()) for path in args.data]
    # Files take turns, so that every batch is of all of them.
    prompts = [each for together in itertools.zip_longest(*files) for each in together if each is not None]
    settings = {name: getattr(args, name) for name in ("model", "exits", "depths", "max_new_tokens", "rounds")}
    figures = Figures(args.output, machine(data=[Path(path).name for path in args.data], **settings))
    if "sharing" not in figures.runs:
        figures.add("sharing", sharing(cores, 2.0))
    wanted = {}
    for batch in args.batch:
        for start in range(0, len(prompts) - batch + 1, batch):
            name = f"{prompts[start][0]}, batch {batch}"
            wanted |= {} if name in figures.runs else {name: [ids for _, ids in prompts[start : start + batch]]}
    if wanted:
        told = both(settings | {"groups": list(wanted.values())}, cores)
        for name, said in zip(["links", *wanted], told, strict=True):
            figures.add(name, said)
    if not any("batch" in each for each in figures.runs.values()):
        raise DexError("there are fewer prompts than --batch asks for: raise --prompts")
    figures.publish(*page(figures.runs, args.model))
    return 0 if all(each["identical"] for each in figures.runs.values() if "batch" in each) else 1


def main() -> int:
    # What the processes that it starts are asked for.
    match sys.argv[1:]:
        case ["--stream", when]:
            print(json.dumps(stream(*map(float, when.split(",")))))
            return 0
        case ["--work", file]:
            work(json.loads(Path(file).read_text(encoding="utf-8")))
            return 0
    args = parser().parse_args()
    return exit_code(lambda: run(args), "Stopped. The same command goes on from here.")


if __name__ == "__main__":
    sys.exit(main())
