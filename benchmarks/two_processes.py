"""DEX-1/2 against pipelined AR on the same two processes, a core each, each holding half of the layers.

    python -m dex_jax.evaluation.calibrate --together 2 --output cpu2.json
    python benchmarks/two_processes.py --data HumanEval.jsonl.gz question_240.jsonl --prompts 10 --batch 1 8 \\
        --latency 0 1 2 5 --hardware cpu2.json --output docs/two_processes

The two talk over loopback by jax.distributed, as processes on two hosts would. AR is the pipeline of the library: a
stage whose turn it is not computes nothing, and each hands its hidden states on once. Both methods decode the same
prompts in turns, so that they see the same machine, and must give the same tokens; the first time, which compiles, does
not count. Beside each gain: what the ticks alone would give if a tick took half of a step, and with --hardware what the
cost model predicts, with links as they are measured here.

--latency MS delays every message of the two by so many milliseconds, in a network namespace of their own whose loopback
has a netem queue; where the machine has none of this, a line says so. Groups of prompts that OUTPUT.json holds are not
measured again. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import platform
import shutil
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

from dex_jax.errors import DexError

FOREVER = 2**30
STREAMED = 256e6
"""Bytes that the bandwidth is measured over: more than a processor's caches hold."""


def pinned(core: int, arguments: list[str], env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
    """This file as a process of its own on one core."""
    before = os.sched_getaffinity(0)
    # A child inherits the affinity of the moment it is started in.
    os.sched_setaffinity(0, {core})
    try:
        return subprocess.Popen(
            [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=env, **options
        )
    finally:
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
    lm = dex_jax.load(task["model"], "float32", mesh="stage=2")
    assert lm.mesh is not None
    assert len(jax.local_devices()) == 1

    def say(**what: Any) -> None:
        if is_first():
            print(json.dumps(what), flush=True)

    say(links=links(lm.mesh, lm.config.width))
    methods = {"ar": (dex_jax.AR(), "shared"), "dex": (dex_jax.Dex(explorers=2), task["exits"])}

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    both = [pinned(cores[i], ["--work", file], base | {"JAX_PROCESS_ID": str(i)}) for i in range(2)]
    # When this process is told to end, so are they.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        assert both[0].stdout is not None
        for line in both[0].stdout:
            print(line, end="", flush=True)
        return max(abs(process.wait()) for process in both)
    finally:
        for process in both:
            # They take the gentler signal for a warning.
            process.kill()


def delayed(milliseconds: float) -> list[str]:
    """A prefix that runs a command where every message over loopback takes so much longer; [] for none.

    Raises:
      DexError: the machine has no namespaces or no netem.
    """
    if not milliseconds:
        return []
    if platform.system() != "Linux" or not all(map(shutil.which, ("unshare", "ip", "tc"))):
        raise DexError("unshare, ip and tc of Linux are needed, and one of them is missing")
    script = f'ip link set lo up && tc qdisc add dev lo root netem delay {milliseconds}ms limit 100000 && exec "$@"'
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    prefix = ["unshare", *user, "--net", "sh", "-c", script, "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if tried.returncode:
        raise DexError((tried.stderr.strip() or "the namespace cannot be made").splitlines()[-1])
    return prefix


# What comes of it.


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """95% of the medians of samples drawn anew from the prompts."""
    random = np.random.default_rng(0)
    medians = np.median(random.choice(values, (draws, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def predictions(found: dict[str, Any], hardware_file: str | None, model: str, profile_file: str | None) -> list[dict]:
    """A row for each latency and batch: gains measured and predicted; times of a step and a tick with --hardware."""
    rows = []
    keys = sorted({(group["latency"], group["batch"]) for group in found["groups"]})
    for latency, batch in keys:
        mine = [group for group in found["groups"] if (group["latency"], group["batch"]) == (latency, batch)]
        gains = [group["seconds"]["ar"] / group["seconds"]["dex"] for group in mine]
        steps, ticks = (sum(group[name] for group in mine) for name in ("steps", "ticks"))
        row = {
            "latency": latency,
            "batch": batch,
            "groups": len(mine),
            "gain": statistics.median(gains),
            "interval": interval(gains),
            "worst": min(gains),
            "step": sum(group["seconds"]["ar"] for group in mine) / steps,
            "tick": sum(group["seconds"]["dex"] for group in mine) / ticks,
            "ticks_a_step": ticks / steps,
            "by_ticks": 2 * steps / ticks,
            "identical": sum(group["identical"] for group in mine),
            "ticks_per_token": sum(group["ticks_of_all"] for group in mine) / sum(group["tokens"] for group in mine),
            "predicted": None,
        }
        if hardware_file is not None:
            link = found["links"][str(latency)]
            row["predicted"] = predicted(row, mine, link, hardware_file, model, profile_file)
            if not latency:
                row["later"] = {
                    added: predicted(
                        row,
                        mine,
                        link | {"permute": link["permute"] + float(added) / 1e3},
                        hardware_file,
                        model,
                        profile_file,
                    )
                    for added in found["skipped"]
                }
        rows.append(row)
    return rows


def predicted(
    row: dict[str, Any], groups: list[dict], link: dict[str, float], hardware_file: str, model: str, profile: str | None
) -> dict[str, float]:
    """What the cost model says of a step of the pipeline and of a tick, in seconds, and the gain that follows.

    Also of the pipeline that cuts its batch into as many parts as is fastest, which the library does not have.
    """
    from dex_jax.decoding.exits import resolve_method
    from dex_jax.decoding.methods import Dex
    from dex_jax.decoding.session import capacity_for, prompt_bucket
    from dex_jax.evaluation import cost_model
    from dex_jax.evaluation.ead_profile import read_profile
    from dex_jax.evaluation.hardware import Link, hardware
    from dex_jax.evaluation.workload import exit_work, work_of
    from dex_jax.language_model import outline

    lm = outline(model, "float32")
    exits = groups[0]["exits"]
    trained = resolve_method(Dex(explorers=2), exits, lm.config, lm.fingerprint).trained
    measured = Link("measured", link["permute"], link["bandwidth"])
    machine = dataclasses.replace(hardware(hardware_file), count=2, hosts=2, link=measured, network=measured)
    contexts = [prompt_bucket(g["prompt_tokens"]) + capacity_for(g["max_new_tokens"]) for g in groups]
    s = cost_model.Setting(
        work_of(lm.config),
        exit_work(None if trained is None else trained.config, lm.config),
        machine,
        batch=row["batch"],
        context=round(statistics.mean(contexts)),
    )
    depths, rows = tuple(groups[0]["depths"]), groups[0]["rows"]
    known = None if profile is None else read_profile(profile).ticks(depths, rows)
    ticks = known or cost_model.Ticks(row["ticks_per_token"])
    step = cost_model.pipelined_step(s, 2, most_parts=1).total
    tick = cost_model.tick(s, depths, rows, ticks).total
    return {
        "step": step,
        "tick": tick,
        "gain": step / (tick * row["ticks_a_step"]),
        "cut_step": cost_model.pipelined_step(s, 2).total,
        "ticks_per_token": ticks.per_token,
    }


def further(rows: list[dict], path: str) -> None:
    """The configurations without added latency, for `validate_plan --further`."""
    compared = []
    for row in rows:
        if row["latency"] or row["predicted"] is None:
            continue
        batch, guess = row["batch"], row["predicted"]
        for name, key, tokens, expected in (
            ("pipelined AR", "step", 1.0, 1.0),
            ("DEX-1/2", "tick", 1 / row["ticks_per_token"], 1 / guess["ticks_per_token"]),
        ):
            compared.append(
                {
                    "name": f"{name}, batch {batch}, two processes",
                    "predicted_seconds": guess[key],
                    "measured_seconds": row[key],
                    "predicted_speed": batch * expected / guess[key],
                    "measured_speed": batch * tokens / row[key],
                }
            )
    Path(path).write_text(json.dumps(compared, indent=1) + "\n", encoding="utf-8")


def not_measured(skipped: dict[str, str], rows: list[dict]) -> list[str]:
    """What is said of latencies that the machine cannot add."""
    from dex_jax.evaluation.exit_report import markdown

    if not skipped:
        return []
    reasons = "; ".join(sorted(set(skipped.values())))
    parts = [f"Added latency of {', '.join(skipped)} ms was not measured: this machine does not allow it ({reasons})."]
    guesses = [
        [added, str(row["batch"]), *(f"{guess[key] * 1e3:.1f}" for key in ("step", "tick")), f"{guess['gain']:.2f}"]
        for row in rows
        for added, guess in row.get("later", {}).items()
    ]
    if guesses:
        parts += [
            "The cost model predicts for it:",
            markdown(["ms added", "batch", "step ms", "tick ms", "gain"], guesses),
        ]
    return parts


def page(found: dict[str, Any], rows: list[dict]) -> str:
    """Markdown."""
    from dex_jax.evaluation.exit_report import markdown

    alone, together = found["sharing"]["alone"][0], found["sharing"]["together"]
    shared = [
        [name, f"{alone[key] / 1e9:.1f}", *(f"{each[key] / 1e9:.1f}" for each in together), f"{ratio:.2f}"]
        for name, key in (("GB/s read", "bytes"), ("Gflop/s", "operations"))
        for ratio in [sum(each[key] for each in together) / alone[key]]
    ]
    about = found["about"]
    table, guesses = [], []
    for row in rows:
        low, high = row["interval"]
        guess = row["predicted"]
        where = [f"{row['latency']:g}", str(row["batch"])]
        gain = f"**{row['gain']:.2f}** ({low:.2f} - {high:.2f})"
        counts = [f"{row['ticks_per_token']:.2f}", f"{row['by_ticks']:.2f}"]
        model = "-" if guess is None else f"{guess['gain']:.2f} ({row['gain'] / guess['gain'] - 1:+.0%})"
        times = [f"{row['step'] * 1e3:.1f}", f"{row['tick'] * 1e3:.1f}"]
        same = f"{row['identical']} of {row['groups']}"
        table.append([*where, str(row["groups"]), gain, f"{row['worst']:.2f}", *counts, model, *times, same])
        if guess is not None:
            guesses.append([*where, *(f"{guess[key] * 1e3:.1f}" for key in ("step", "tick", "cut_step"))])
    header = ["ms added", "batch", "groups", "gain (95%)", "worst", "ticks a token", "ticks predict", "model predicts"]
    parts = [
        "# Two processes: DEX-1/2 against pipelined AR",
        f"Two processes on a core each, float32, each with half of {about['model']}'s layers; exits "
        f"{found['groups'][0]['exits']}, {about['max_new_tokens']} new tokens, greedy, both methods in turns, median "
        f"of {about['rounds']}; gain: AR's time over DEX's for the same tokens, median of groups of prompts. "
        "Written by `python benchmarks/two_processes.py`.",
        markdown([*header, "step ms", "tick ms", "identical"], table),
        "*Ticks predict*: the gain if a tick took half of a step. *Model predicts*: the cost model with the measured "
        "link; in brackets what was measured beside it.",
        *not_measured(found["skipped"], rows),
        "What two busy cores share, each figure by a process pinned to its core:",
        markdown(["", "alone", "first of two", "second of two", "both over one"], shared),
        "Messages between the two:",
        markdown(
            ["ms added", "permute us", "gather us", "sum us", "GB/s"],
            [
                [
                    latency,
                    *(f"{link[key] * 1e6:.0f}" for key in ("permute", "gather", "sum")),
                    f"{link['bandwidth'] / 1e9:.2f}",
                ]
                for latency, link in found["links"].items()
            ],
        ),
    ]
    if guesses:
        parts += [
            "Predicted milliseconds. A pipeline that cuts its batch in two would keep both processes busy; the "
            "library's does not, and the last column says what that would come to.",
            markdown(["ms added", "batch", "step", "tick", "step, batch cut"], guesses),
        ]
    return "\n\n".join(parts) + "\n"


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
            prefix = delayed(latency)
        except DexError as error:
            found["skipped"][str(latency)] = str(error)
            print(
                f"skipped: {latency:g} ms of added latency, which this machine does not allow ({error})",
                file=sys.stderr,
            )
            continue
        options = {name: getattr(args, name) for name in ("model", "exits", "max_new_tokens", "rounds")}
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(options | {"prompts": prompts, "groups": groups}, file)
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
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at a time (%(default)s)")
    parser.add_argument("--latency", type=float, nargs="+", default=[0, 1, 2, 5], metavar="MS", help="(%(default)s)")
    parser.add_argument("--hardware", metavar="FILE", help="of calibrate --together 2, for predictions")
    parser.add_argument("--profile", metavar="FILE", help="predict with its ticks instead of the measured ones")
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
    prompts = [lm.encode(prompt) for path in args.data for prompt in spread(read_prompts(path), args.prompts)]
    about = {name: getattr(args, name) for name in ("model", "exits", "max_new_tokens", "rounds", "prompts")}
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
    found["rows"] = predictions(found, args.hardware, args.model, args.profile)
    write_json(str(store), found)
    if args.further:
        further(found["rows"], args.further)
    text = page(found, found["rows"])
    Path(args.output + ".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(group["identical"] for group in found["groups"]) else 1


if __name__ == "__main__":
    sys.exit(main())
