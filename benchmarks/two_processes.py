"""DEX-1/2 against pipelined AR on the same two processes, a core each, each holding a part of the layers.

    python -m dex_jax.evaluation.calibrate --together 2 --output cpu2.json
    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --prompts 10 --batch 1 8 \\
        --depths 20,30 --hardware cpu2.json --output results/two_processes

The two talk over loopback by jax.distributed, as processes on two hosts would. AR is the pipeline of the library: a
stage whose turn it is not computes nothing, and each hands its hidden states on once. Both methods decode the same
prompts in turns, so that they see the same machine, and must give the same tokens; the first time, which compiles, does
not count. Beside each gain: what the ticks alone would give if a tick took as much of a step as the larger part has of
the weights that a step reads, and with --hardware what the cost model predicts, with links as they are measured here.

--latency MS delays every message of the two by so many milliseconds, in network namespaces of their own that
benchmarks/delayed_link.py joins; where the machine has none of this, a line says so. Groups of prompts that OUTPUT.json
holds are not measured again. Nothing else should run meanwhile.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from delayed_link import ADDRESSES, DelayedLink, alone
from two_processes_page import further, page, predictions

from dex_jax.cli.arguments import depths
from dex_jax.errors import DexError

FOREVER = 2**30
STREAMED = 1e9
"""Bytes that the bandwidth is measured over: more than a processor's caches hold."""


def pinned(
    core: int, arguments: list[str], env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.Popen:
    """This file as a process of its own on one core, run by the command `prefix`.

    Its threads do not interrupt one another (SCHED_BATCH). A message that comes in while the one that computes is
    sending would otherwise wake gloo's, which then polls a socket that the other has locked until its time is over.
    """
    before = os.sched_getaffinity(0)
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        # A child inherits what holds at the moment it is started in.
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        return subprocess.Popen(
            [*prefix, sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=env
        )
    finally:
        os.sched_setscheduler(0, policy, priority)
        os.sched_setaffinity(0, before)


# What two busy cores share.


def stream(begin: float, seconds: float) -> dict[str, float]:
    """Bytes a second that this process reads, and operations a second that it does, from `begin` (of time.time) on."""
    vector = np.ones(int(STREAMED / 4), np.float32)
    square = np.ones((512, 512), np.float32)
    found = {}
    for number, (name, work, size) in enumerate(
        (("bytes", lambda: vector @ vector, STREAMED), ("operations", lambda: square @ square, 2 * 512.0**3))
    ):
        work()
        time.sleep(max(0.0, begin + 2 * number * seconds - time.time()))
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            work()
            count += 1
        found[name] = count * size / (time.perf_counter() - start)
    return found


def sharing(cores: list[int], seconds: float) -> dict[str, list[dict[str, float]]]:
    """`stream` by one process, and by two at once: figures of each."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    found = {}
    for name, chosen in (("alone", cores[:1]), ("together", cores[:2])):
        begin = time.time() + 3
        started = [pinned(core, ["--stream", f"{begin},{seconds}"], env) for core in chosen]
        found[name] = [json.loads(process.communicate()[0]) for process in started]
    return found


# The two processes.


def work(task: dict[str, Any]) -> None:
    """What each of the two does: measures the links, then every group of prompts; process 0 prints a line for each."""
    import jax

    import dex_jax
    from dex_jax.cli.decode import remember_compilations
    from dex_jax.decoding.output import Output
    from dex_jax.distributed import is_first, join

    join()
    remember_compilations()
    layout = dex_jax.Staged(tuple(task["depths"])) if task["depths"] else None
    lm = dex_jax.load(task["model"], "float32", mesh="stage=2", layout=layout)
    assert lm.mesh is not None
    assert isinstance(lm.layout, dex_jax.Staged)
    assert len(jax.local_devices()) == 1

    def say(**what: Any) -> None:
        if is_first():
            print(json.dumps(what), flush=True)

    say(links=links(lm.mesh, lm.config.width))
    methods = {"ar": (dex_jax.AR(), "shared"), "dex": (dex_jax.Dex(depths=lm.layout.depths), task["exits"])}

    def decode(name: str, prompts: list[list[int]]) -> Output:
        method, exits = methods[name]
        options = {"method": method, "exits": exits, "max_new_tokens": task["max_new_tokens"]}
        (out,) = collections.deque(dex_jax.stream(lm, prompts, ticks_per_update=FOREVER, **options), maxlen=1)
        return out

    for batch, start in task["groups"]:
        prompts = task["prompts"][start : start + batch]
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        out = {}
        for number in range(task["rounds"] + 1):
            for name in methods if number % 2 else reversed(methods):
                out[name] = decode(name, prompts)
                if number:
                    seconds[name].append(out[name].stats.decode_seconds)
        schedule = out["dex"].stats.schedule
        say(
            batch=batch,
            start=start,
            seconds={name: statistics.median(times) for name, times in seconds.items()},
            steps=int(out["ar"].lengths.max()) - 1,
            ticks=int(out["dex"].stats.ticks.max()),
            tokens=int((out["ar"].lengths - 1).sum()),
            ticks_of_all=int(out["dex"].stats.ticks.sum()),
            identical=bool(np.array_equal(out["ar"].tokens, out["dex"].tokens)),
            prompt_tokens=max(map(len, prompts)),
            depths=schedule.depths,
            rows=schedule.rows,
            exits=str(out["dex"].stats.exits_source),
        )


def links(mesh: Any, width: int, repeats: int = 200) -> dict[str, float]:
    """Seconds of one message from each to the other, of a gather and of a sum of a few numbers; bytes a second."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def timed(exchange: Any, count: int, repeats: int) -> float:
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
        return min(times)

    def permute(x: Any) -> Any:
        return jax.lax.ppermute(x, "stage", [(0, 1), (1, 0)])

    large = 1 << 20
    small = timed(permute, width, repeats)
    return {
        "permute": small,
        "gather": timed(lambda x: jax.lax.all_gather(x[0], "stage")[:1], 4, repeats),
        "sum": timed(lambda x: jax.lax.psum(x, "stage") / 2, 4, repeats),
        "bandwidth": 4 * large / max(timed(permute, large, 5) - small, 1e-9),
    }


def pair(file: str) -> int:
    """Starts the two on the first two cores and passes on what process 0 prints."""
    cores = sorted(os.sched_getaffinity(0))
    latency = json.loads(Path(file).read_text())["latency"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"{ADDRESSES[0] if latency else '127.0.0.1'}:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    # When this process is told to end, so are they.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as ends:
        line = ends.enter_context(DelayedLink(latency / 1e3)) if latency else None
        both = []
        for i in range(2):
            env = base | {"JAX_PROCESS_ID": str(i)}
            both.append(pinned(cores[i], ["--work", file], env, prefix=line.prefix(i) if line else ()))
            # They take the gentler signal for a warning.
            ends.callback(both[i].kill)
            if line:
                line.attach(i, both[i].pid)
        assert both[0].stdout is not None
        for said in both[0].stdout:
            print(said, end="", flush=True)
        return max(abs(process.wait()) for process in both)


def lines_of(command: list[str]) -> Iterator[dict[str, Any]]:
    """What a command prints of itself; it does not outlive its reader.

    Raises:
      DexError: it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            # The library below says on stdout too whom it has connected to.
            if line.startswith("{"):
                yield json.loads(line)
        if process.wait():
            raise DexError("one of the two processes has failed; what was measured before is kept")
    finally:
        process.terminate()


def measure(args: argparse.Namespace, found: dict[str, Any], prompts: list[list[int]]) -> None:
    """Runs what is missing and keeps every group as it comes."""
    from dex_jax.cli.train_results import write_json

    for latency in args.latency:
        known = {(g["batch"], g["start"]) for g in found["groups"] if g["latency"] == latency}
        wanted = [(batch, start) for batch in args.batch for start in range(0, len(prompts) - batch + 1, batch)]
        groups = [group for group in wanted if group not in known]
        if not groups:
            continue
        try:
            prefix = alone() if latency else []
        except DexError as error:
            found["skipped"][str(latency)] = str(error)
            print(
                f"skipped: {latency:g} ms of added latency, which this machine does not allow ({error})",
                file=sys.stderr,
            )
            continue
        found["skipped"].pop(str(latency), None)
        options = {name: getattr(args, name) for name in ("model", "exits", "depths", "max_new_tokens", "rounds")}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(options | {"latency": latency, "prompts": prompts, "groups": groups}, file)
            file.flush()
            command = [*prefix, sys.executable, __file__, "--pair", file.name]
            begin, done = time.perf_counter(), 0
            for said in lines_of(command):
                if "links" in said:
                    found["links"][str(latency)] = said["links"]
                    continue
                found["groups"].append(said | {"latency": latency, "max_new_tokens": args.max_new_tokens})
                write_json(args.output + ".json", found)
                done += 1
                left = (time.perf_counter() - begin) / done * (len(groups) - done)
                gain = said["seconds"]["ar"] / said["seconds"]["dex"]
                print(f"{latency:g} ms, batch {said['batch']}: gain {gain:.2f}; {left:.0f} s left", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default")
    parser.add_argument("--data", nargs="+", metavar="FILE")
    parser.add_argument("--prompts", type=int, default=10, help="of each file, evenly spread (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--depths", type=depths, metavar="X,...", help="of the two exits; even unless given")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at a time (%(default)s)")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 1, 2, 5], metavar="MS", help="(%(default)s)")
    parser.add_argument("--hardware", metavar="FILE", help="of calibrate --together 2, for predictions")
    parser.add_argument("--alone", metavar="FILE", help="of taskset -c 0 calibrate: one core while the other waits")
    parser.add_argument("--profile", metavar="FILE", help="predict the speeds of --further with its ticks")
    parser.add_argument("--further", metavar="FILE", help="write what validate_plan --further reads")
    parser.add_argument("--output", help="OUTPUT.json, .md")
    for name in ("--stream", "--pair", "--work"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.stream:
            print(json.dumps(stream(*map(float, args.stream.split(",")))))
            return 0
        if args.pair:
            return pair(args.pair)
        if args.work:
            work(json.loads(Path(args.work).read_text()))
            return 0
        return run(args)
    except DexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    from dex_jax.cli.train_results import spread, write_json
    from dex_jax.language_model import outline
    from dex_jax.training.prompt_files import read_prompts

    if not (args.data and args.output):
        raise DexError("give prompts with --data and a place for what is found with --output")
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise DexError("this needs two cores, and a system that pins processes to them, such as Linux")
    lm = outline(args.model, "float32")
    files = [spread(read_prompts(path), args.prompts) for path in args.data]
    # Files take turns, so that every batch is of all of them.
    prompts = [lm.encode(each) for together in itertools.zip_longest(*files) for each in together if each is not None]
    about = {name: getattr(args, name) for name in ("model", "exits", "depths", "max_new_tokens", "rounds", "prompts")}
    about["depths"] = args.depths and list(args.depths)
    about["data"] = [Path(path).name for path in args.data]
    store = Path(args.output + ".json")
    found: dict[str, Any] = {"about": about, "groups": [], "links": {}, "skipped": {}, "sharing": None}
    if store.exists():
        found = json.loads(store.read_text())
        if found["about"] != about:
            raise DexError(f"{store} holds figures of {found['about']}: name another --output")
    if found["sharing"] is None:
        found["sharing"] = sharing(sorted(os.sched_getaffinity(0)), 2.0)
        write_json(str(store), found)
    measure(args, found, prompts)
    if not found["groups"]:
        raise DexError("nothing was measured")
    found["rows"] = predictions(found, args.hardware, args.model, args.profile, args.alone)
    write_json(str(store), found)
    if args.further:
        further(found["rows"], args.further)
    text = page(found, found["rows"])
    Path(args.output + ".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(group["identical"] for group in found["groups"]) else 1


if __name__ == "__main__":
    sys.exit(main())
