"""Drafts and explorers on two processes with a core each, the smallest real mesh there is, against AR on the same.

    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --depths 20,30 \\
        --output results/two_processes
    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --mesh tensor=2 \\
        --output results/two_tensor

On `stage=2` these are AR in a pipeline, one explorer's trees in the same pipeline, and two explorers without and with
drafts; on `tensor=2` AR and one explorer. All decode the same prompts in turns, and must give the same tokens. A run
that was stopped goes on. Nothing else should run meanwhile.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, arguments, in_turns, machine, quartiles, read_ids

from dex_jax.cli.common import depths
from dex_jax.errors import DexError, exit_code
from dex_jax.tables import markdown

FOREVER, CACHE = 2**30, 256
"""Ticks between two updates; cache positions that trees are chosen for."""
AR, TREES, SILENT, DEX = "AR", "trees in a pipeline", "explorers without drafts", "explorers with drafts"


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


def work(task: dict[str, Any]) -> None:
    """What each of the two does: measures every group of prompts; process 0 prints a line for each."""
    import jax

    import dex_jax
    from dex_jax.cli.common import remember_compilations
    from dex_jax.decoding.auto import settle
    from dex_jax.decoding.output import Output
    from dex_jax.distributed import is_first, join

    join()
    remember_compilations()
    layout = dex_jax.Staged(tuple(task["depths"])) if task["depths"] else None
    lm = dex_jax.load(task["model"], "float32", mesh=task["mesh"], layout=layout, weights=task["weights"])
    assert lm.mesh is not None
    assert isinstance(lm.layout, dex_jax.Staged)
    assert len(jax.local_devices()) == 1

    def say(what: Any) -> None:
        if is_first():
            print(json.dumps(what), flush=True)

    about = (lm.config, lm.layout, lm.dtype, lm.fingerprint, 1, CACHE)
    chosen, _ = settle(dex_jax.Dex(), "default", *about, lm.mesh, lm.packing)
    tree = chosen.draft if isinstance(chosen, dex_jax.Dex) else True
    # Both draft the same trees, and choose from them by the same costs.
    methods: dict[str, Any] = {AR: dex_jax.AR(), TREES: dex_jax.Dex(explorers=1, draft=tree)}
    if len(lm.layout.depths) > 1:
        methods |= {SILENT: dex_jax.Dex(depths=lm.layout.depths, draft=False), DEX: chosen}
    out: dict[str, Output] = {}

    def decode(name: str, prompts: list[list[int]]) -> float:
        options = {"method": methods[name], "max_new_tokens": task["max_new_tokens"]}
        (out[name],) = collections.deque(dex_jax.stream(lm, prompts, ticks_per_update=FOREVER, **options), maxlen=1)
        return out[name].stats.decode_seconds

    for prompts in task["groups"]:
        times = in_turns({name: lambda name=name, p=prompts: decode(name, p) for name in methods}, task["rounds"])
        say(
            {
                "batch": len(prompts),
                "tokens": int((out[AR].lengths - 1).sum()),
                "seconds": {name: statistics.median(found) for name, found in times.items()},
                "ticks": {name: int(each.stats.ticks.sum()) for name, each in out.items()},
                "rows": {name: each.stats.schedule.rows for name, each in out.items()},
                "identical": all(bool(np.array_equal(out[AR].tokens, each.tokens)) for each in out.values()),
            }
        )


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


def page(runs: dict[str, Any], mesh: str) -> list[str]:
    """Each method's time over AR's and over the pipeline that runs trees, for the same tokens."""
    cells = []
    for batch in sorted({run["batch"] for run in runs.values()}):
        groups = [run for run in runs.values() if run["batch"] == batch]
        for name in groups[0]["seconds"]:

            def gain(over: str, name: str = name, groups: list[dict[str, Any]] = groups) -> str:
                return quartiles(each["seconds"][over] / each["seconds"][name] for each in groups)

            ticks, tokens = (sum(each["ticks"][name] for each in groups), sum(each["tokens"] for each in groups))
            tick = 1e3 * sum(each["seconds"][name] for each in groups) / ticks
            same = f"{sum(each['identical'] for each in groups)} of {len(groups)}"
            rows = str(groups[0]["rows"][name])
            cells.append([str(batch), name, rows, gain(AR), gain(TREES), f"{ticks / tokens:.2f}", f"{tick:.1f}", same])
    header = ["batch", "method", "rows", "speed over AR", f"over {TREES}", "ticks a token", "ms a tick", "identical"]
    return [
        f"# Two processes, {mesh}",
        "Two processes on a core each, float32, greedy. Speeds are wall-clock: medians over prompts, quartiles in "
        "brackets.",
        markdown(header, cells),
    ]


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, data=None, prompts=10, rounds=3, max_new_tokens=96, weights=None)
    flags.add_argument("--mesh", choices=["stage=2", "tensor=2"], default="stage=2", help="(%(default)s)")
    flags.add_argument("--depths", type=depths, metavar="X,...", help="of the two exits; even unless given")
    flags.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B", help="prompts at a time (%(default)s)")
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
    kept = ("model", "weights", "mesh", "depths", "max_new_tokens", "rounds")
    settings = {name: getattr(args, name) for name in kept}
    figures = Figures(args.output, machine(data=[Path(path).name for path in args.data], **settings))
    wanted = {}
    for batch in args.batch:
        for start in range(0, len(prompts) - batch + 1, batch):
            name = f"{prompts[start][0]}, batch {batch}"
            wanted |= {} if name in figures.runs else {name: [ids for _, ids in prompts[start : start + batch]]}
    if wanted:
        told = both(settings | {"groups": list(wanted.values())}, cores)
        for name, said in zip(wanted, told, strict=True):
            figures.add(name, said)
    if not figures.runs:
        raise DexError("there are fewer prompts than --batch asks for: raise --prompts")
    figures.publish(*page(figures.runs, args.mesh))
    return 0 if all(each["identical"] for each in figures.runs.values()) else 1


def main() -> int:
    if sys.argv[1:2] == ["--work"]:  # one of the processes that it starts
        work(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
        return 0
    args = parser().parse_args()
    return exit_code(lambda: run(args), "Stopped. The same command goes on from here.")


if __name__ == "__main__":
    sys.exit(main())
