"""A comparison of drafts and explorers with a pipeline of AR on the smallest real mesh, two processes of a core each.

    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --depths 18,30 \\
        --output results/two_processes

These are AR, one explorer's trees in the same pipeline, and two explorers without and with drafts. All decode the same
prompts in turns, in float32 on dense weights, and must give the same tokens. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from measuring import Figures, arguments, in_turns, machine, main, quartiles, read_ids

from dex_jax.cli.common import depths
from dex_jax.errors import DexError
from dex_jax.tables import markdown

FOREVER = 2**30
"""Number of ticks between two updates, so that there are none."""

AR, TREES, SILENT, DEX = "AR", "one explorer's trees", "explorers without drafts", "explorers with drafts"


def work(task: dict[str, Any]) -> None:
    """Measure every prompt in each of the two processes; process 0 prints a line for each."""
    import dex_jax
    from dex_jax.distributed import is_first, join

    join()
    layout = dex_jax.Staged(tuple(task["depths"])) if task["depths"] else None
    lm = dex_jax.load(task["model"], "float32", mesh="stage=2", layout=layout, weights="dense")
    methods: dict[str, Any] = {AR: dex_jax.AR(), TREES: dex_jax.Dex(explorers=1)}
    methods |= {SILENT: dex_jax.Dex(depths=lm.layout.depths, draft=False), DEX: dex_jax.Dex(depths=lm.layout.depths)}
    out: dict[str, dex_jax.Output] = {}

    def decode(name: str, ids: list[int]) -> float:
        options = {"method": methods[name]} | {each: task[each] for each in ("max_new_tokens", "exits")}
        (out[name],) = collections.deque(dex_jax.stream(lm, [ids], ticks_per_update=FOREVER, **options), maxlen=1)
        return out[name].stats.decode_seconds

    for ids in task["ids"]:
        seconds = in_turns({name: lambda name=name, ids=ids: decode(name, ids) for name in methods}, task["rounds"])
        found = {
            "tokens": int((out[AR].lengths - 1).sum()),
            "seconds": seconds,
            "ticks": {name: int(each.stats.ticks.sum()) for name, each in out.items()},
            "rows": {name: each.stats.plan.rows for name, each in out.items()},
            "identical": all(bool(np.array_equal(out[AR].tokens, each.tokens)) for each in out.values()),
        }
        if is_first():
            print(json.dumps(found), flush=True)


def processes(script: str, task: dict[str, Any], count: int = 2) -> Iterator[dict[str, Any]]:
    """Run a task of a script on processes that join one another, and yield the lines that process 0 prints.

    Each has a core of its own as long as there are enough. Raise DexError where one of them fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    # The processes end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as ends:
        # Threads do not interrupt one another (SCHED_BATCH): a message that comes in while another is sent would wake
        # gloo's, which then polls a socket that the other has locked until its time is over.
        batch, started = ["chrt", "--batch", "0", "taskset", "-c"], []
        cores = sorted(os.sched_getaffinity(0))
        for i in range(count):
            own = cores[i] if count <= len(cores) else f"{cores[0]}-{cores[-1]}"
            command = [*batch, str(own), sys.executable, script, "--work", json.dumps(task)]
            own_env = env | {"JAX_PROCESS_ID": str(i)}
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own_env))
            ends.callback(started[i].kill)  # as SIGTERM does not end them at once
        for line in started[0].stdout or ():
            if line.startswith("{"):  # gloo prints its connections on stdout too
                yield json.loads(line)
        if max(abs(process.wait()) for process in started):
            raise DexError("a process failed; what was measured before is kept")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing and write the page; return 1 where tokens differ."""
    from dex_jax.language_model import outline

    figures = Figures(args.output, machine(args))
    asked = read_ids(outline(args.model, "float32"), args.data, args.prompts)
    wanted = {name: ids for name, ids in asked.items() if name not in figures.runs}
    results = processes(__file__, vars(args) | {"ids": list(wanted.values())}) if wanted else []
    for name, result in zip(wanted, results, strict=True):
        figures.each({name: result}, lambda result: result)
    each, cells = list(figures.runs.values()), []
    tokens, same = sum(run["tokens"] for run in each), sum(run["identical"] for run in each)
    for name in each[0]["seconds"]:
        gains = [quartiles(run["seconds"][over] / run["seconds"][name] for run in each) for over in (AR, TREES)]
        ticks = sum(run["ticks"][name] for run in each)
        tick = 1e3 * sum(run["seconds"][name] for run in each) / ticks
        cells.append([name, str(each[0]["rows"][name]), *gains, f"{ticks / tokens:.2f}", f"{tick:.1f}"])
    header = ["method", "rows", "speed over AR", f"over {TREES}", "ticks a token", "ms a tick"]
    words = f"Medians over prompts, quartiles in brackets. Tokens are AR's in {same} of {len(each)} answers."
    figures.publish("# Two processes", words, markdown(header, cells))
    return 0 if same == len(each) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:  # one of the processes that it starts
        work(json.loads(sys.argv[2]))
    else:
        flags = arguments(__doc__, data=[], prompts=5, rounds=3, max_new_tokens=96, exits="default")
        flags.add_argument("--depths", type=depths, metavar="X,...", help="of the two exits; even unless given")
        main(run, flags)
