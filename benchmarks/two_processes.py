"""Drafts and explorers on two processes with a core each, the smallest real mesh there is, against AR on the same.

    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --depths 18,30 \\
        --output results/two_processes
    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --mesh tensor=2 \\
        --output results/two_tensor

On `stage=2` these are AR in a pipeline, one explorer's trees in the same pipeline, and two explorers without and with
drafts; on `tensor=2` AR and one explorer, of a model that gets heads of zeros where two devices cannot share its own.
All decode the same prompts in turns, and must give the same tokens. A run that was stopped goes on. Nothing else should
run meanwhile.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
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
from dex_jax.io.save import save_model
from dex_jax.tables import markdown

FOREVER, CACHE = 2**30, 256
"""Ticks between two updates; cache positions that trees are chosen for."""
AR, TREES, SILENT, DEX = "AR", "one explorer's trees", "explorers without drafts", "explorers with drafts"


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
    """What each of the two does: measures every prompt; process 0 prints a line for each."""
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
    chosen, _ = settle(dex_jax.Dex(), task["exits"], *about, lm.mesh, lm.packing)
    tree = chosen.draft if isinstance(chosen, dex_jax.Dex) else True
    # Both draft the same trees, and choose from them by the same costs.
    methods: dict[str, Any] = {AR: dex_jax.AR(), TREES: dex_jax.Dex(explorers=1, draft=tree)}
    if len(lm.layout.depths) > 1:
        methods |= {SILENT: dex_jax.Dex(depths=lm.layout.depths, draft=False), DEX: chosen}
    out: dict[str, Output] = {}

    def decode(name: str, ids: list[int]) -> float:
        options = {"method": methods[name]} | {each: task[each] for each in ("max_new_tokens", "exits")}
        (out[name],) = collections.deque(dex_jax.stream(lm, [ids], ticks_per_update=FOREVER, **options), maxlen=1)
        return out[name].stats.decode_seconds

    for ids in task["prompts"]:
        times = in_turns({name: lambda name=name, ids=ids: decode(name, ids) for name in methods}, task["rounds"])
        say(
            {
                "tokens": int((out[AR].lengths - 1).sum()),
                "seconds": {name: statistics.median(found) for name, found in times.items()},
                "ticks": {name: int(each.stats.ticks.sum()) for name, each in out.items()},
                "rows": {name: each.stats.plan.rows for name, each in out.items()},
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


def with_even_heads(model: str, exits: str, folder: str) -> dict[str, str]:
    """Writes a model with one more group of heads, all zeros, which changes no number; its name and its exits'."""
    import dex_jax
    from dex_jax.io.exits_file import DEFAULTS
    from dex_jax.nn.weights import canonical_weights

    lm = dex_jax.load(model, "float32", weights="dense")
    groups, width = lm.config.num_kv_heads, lm.config.head_dim
    share = lm.config.num_heads // groups
    weights = canonical_weights(lm.config, lm.layout, lm.weights)
    for name, kernel in weights.items():
        if name.endswith(".qkv"):
            parts = np.split(kernel, [share * groups * width, (share + 1) * groups * width])
            more = [np.pad(x, ((0, n * width), (0, 0))) for x, n in zip(parts, (share, 1, 1), strict=True)]
            weights[name] = np.concatenate(more)
        elif name.endswith(".out"):
            weights[name] = np.pad(kernel, ((0, 0), (0, share * width)))
    config = dataclasses.replace(lm.config, num_heads=share * (groups + 1), num_kv_heads=groups + 1)
    save_model(folder, config, weights)
    drafter = DEFAULTS / f"{lm.fingerprint}.drafter.safetensors"
    return {"model": folder, "exits": str(drafter) if exits == "default" else exits}


def page(runs: dict[str, Any], mesh: str) -> list[str]:
    """Each method's time over AR's and over the pipeline that runs trees, for the same tokens."""
    each, cells = list(runs.values()), []
    tokens, same = sum(run["tokens"] for run in each), sum(run["identical"] for run in each)
    for name in each[0]["seconds"]:
        gains = [quartiles(run["seconds"][over] / run["seconds"][name] for run in each) for over in (AR, TREES)]
        ticks = sum(run["ticks"][name] for run in each)
        tick = 1e3 * sum(run["seconds"][name] for run in each) / ticks
        cells.append([name, str(each[0]["rows"][name]), *gains, f"{ticks / tokens:.2f}", f"{tick:.1f}"])
    header = ["method", "rows", "speed over AR", f"over {TREES}", "ticks a token", "ms a tick"]
    return [
        f"# Two processes, {mesh}",
        "Two processes on a core each, float32, greedy. Speeds are wall-clock: medians over prompts, quartiles in "
        f"brackets. Tokens are AR's in {same} of {len(each)} answers.",
        markdown(header, cells),
    ]


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, data=None, prompts=10, rounds=3, max_new_tokens=96, weights=None, exits="default")
    flags.add_argument("--mesh", choices=["stage=2", "tensor=2"], default="stage=2", help="(%(default)s)")
    flags.add_argument("--depths", type=depths, metavar="X,...", help="of the two exits; even unless given")
    return flags


def run(args: argparse.Namespace) -> int:
    """Measures what is missing and writes the page; 1 where tokens differ."""
    from dex_jax.language_model import outline

    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise DexError("this needs two cores, and a system that pins processes to them, such as Linux")
    cores = sorted(os.sched_getaffinity(0))
    lm = outline(args.model, "float32")
    kept = ("model", "weights", "exits", "mesh", "depths", "max_new_tokens", "rounds")
    settings = {name: getattr(args, name) for name in kept}
    figures = Figures(args.output, machine(data=[Path(path).name for path in args.data], **settings))
    asked = read_ids(lm, args.data, args.prompts)
    wanted = {name: ids for name, ids in asked.items() if name not in figures.runs}
    with tempfile.TemporaryDirectory() as folder:
        if args.mesh == "tensor=2" and lm.config.num_kv_heads % 2:
            settings |= with_even_heads(args.model, args.exits, f"{folder}/model")
        told = both(settings | {"prompts": list(wanted.values())}, cores) if wanted else []
        for name, said in zip(wanted, told, strict=True):
            figures.add(name, said)
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
