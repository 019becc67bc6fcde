"""A comparison of K explorers with pipelines on emulated devices: processes that wait where a device would run layers.

    python benchmarks/emulated_devices.py --like llama-2-70b --hardware l4x8 --output results/emulated_70b

Each process stands for one device. Real are the program, the processes, their messages and their waiting for one
another, and all that drafts, exits and the lattice take on this machine's cores. Not real is the arithmetic of the
layers: for theirs each stage waits as long as its share of the model's layers takes on the device by the planner's
formula. The tokens come from a small exact model, whose exits and drafter guess right as often as SmolLM2-135M's do.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, in_turns, machine, main, quartiles
from two_processes import AR, DEX, SILENT, TREES, processes

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.hardware import hardware
from dex_jax.planner import SHAPES, Setting
from dex_jax.tables import markdown

LAYERS, SIZE = 8, 512
"""Number of layers of the small model, which the numbers of devices divide; its vocabulary and width, V = D."""

DEPTHS, AGREEMENT = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), (0.37, 0.38, 0.42, 0.48, 0.75, 1.0)
"""The share of tokens that SmolLM2-135M's drafter and exits guess right, by their depth as a share of all layers."""

SECOND = (0.4, 0.25, 0.15, 0.1)
"""The share of the other cases in which the right token is the second, third, fourth and fifth guess."""


def make_model(folder: Path) -> None:
    """Write a model of which every token has one successor, exits at every depth and a drafter into a folder.

    Embeddings are unit vectors and layers add nothing, so that the final logits look the successor up. Exits are linear
    maps, so that they are tables too: each holds, for every token, five guesses with the probabilities that they have.
    """
    import dex_jax
    from dex_jax.io.save import save_model
    from dex_jax.nn.exits import exit_parameters
    from dex_jax.nn.transformer import parameter_shapes

    random = np.random.default_rng(0)
    order = random.permutation(SIZE)
    successor = np.empty(SIZE, int)
    successor[order] = np.roll(order, -1)  # one cycle: no text repeats itself within V tokens
    config = ModelConfig("llama", SIZE, LAYERS, SIZE, 1, 1, 8, 8, 4096, tied=False)
    weights = {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    scale = SIZE**0.5  # by the norm of a unit vector
    weights |= {"embed": np.eye(SIZE, dtype=np.float32), "final_norm": np.ones(SIZE, np.float32)}
    weights["unembed"][successor, np.arange(SIZE)] = 1
    save_model(folder / "model", config, weights)
    lm = dex_jax.load(str(folder / "model"), "float32")

    others = np.stack([random.permutation(SIZE)[:5] for _ in range(SIZE)])
    luck = random.random(SIZE)  # the same at all depths: what a shallow exit knows deeper ones know too

    def guesses(depth: float) -> np.ndarray:
        """Return M, so that a token's column of unembed M holds the logits of its guesses: [D, D]."""
        agreement = np.interp(depth, DEPTHS, AGREEMENT)
        shares = np.array([agreement, *(1 - agreement) * np.array(SECOND)])
        rank = np.searchsorted(np.cumsum(shares), luck)
        left = (1 - shares.sum()) / (SIZE - len(shares))
        table = np.zeros((SIZE, SIZE), np.float32)
        for token in range(SIZE):
            named = [other for other in others[token] if other != successor[token]]
            named.insert(rank[token], successor[token])
            for share, guess in zip(shares, named, strict=False):
                table[guess, token] = np.log(share / left)
        return weights["unembed"].T @ table / scale

    def save(name: str, depths: tuple[int, ...], fused: bool) -> None:
        exits = ExitsConfig("linear", depths, SIZE, fused=fused)
        parameters = {name: np.zeros(shape, np.float32) for name, (shape, _) in exit_parameters(exits).items()}
        parameters["map"][:] = np.stack([guesses(depth / LAYERS) for depth in depths])
        dex_jax.save_exits(folder / name, dex_jax.TrainedExits(exits, parameters, None, lm.fingerprint, {}, "emulated"))

    save(f"{lm.fingerprint}.safetensors", tuple(range(1, LAYERS)), fused=False)
    save(f"{lm.fingerprint}.drafter.safetensors", (0,), fused=True)


def wait_for_layers(setting: Setting) -> list[float]:
    """Let every run of layers take as long as those of the emulated model; return a list that counts the seconds."""
    import jax

    from dex_jax.decoding.dex import network
    from dex_jax.decoding.mesh import device
    from dex_jax.nn.forward import run_rows

    waited = [0.0]

    def sleep(seconds: float, _: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        waited[0] += seconds
        return np.float32(0)

    @functools.wraps(run_rows)
    def waiting(model: Any, memory: Any, x: Any, position: Any, among: Any, prefix: Any, layers: Any, *rest, **more):
        x, fresh = run_rows(model, memory, x, position, among, prefix, layers, *rest, **more)
        seconds = len(layers) / LAYERS * setting.config.num_layers * setting.layer(x.shape[1], 1)
        zero = jax.pure_callback(functools.partial(sleep, seconds), jax.ShapeDtypeStruct((), "float32"), x[0, 0, 0])
        return x + zero, fresh

    network.run_rows = device.run_rows = waiting  # type: ignore[assignment]
    return waited


def work(task: dict[str, Any]) -> None:
    """Decode every prompt with each method in each of the processes; process 0 prints a line for each."""
    import dex_jax
    from dex_jax.distributed import is_first, join, keep_stdout
    from dex_jax.io import exits_file

    keep_stdout()
    join()
    exits_file.DEFAULTS = Path(task["folder"])
    waited = wait_for_layers(Setting(SHAPES[task["like"]], hardware(task["hardware"])))
    devices = task["devices"]
    lm = dex_jax.load(str(Path(task["folder"]) / "model"), "float32", mesh=f"stage={devices}", weights="dense")
    dex = functools.partial(dex_jax.Dex, explorers=devices)
    methods: dict[str, Any] = {AR: dex_jax.AR(), TREES: dex_jax.Dex(explorers=1, rows=task["tree_rows"])}
    methods |= {SILENT: dex(draft=False), DEX: dex(rows=task["rows"])}
    out: dict[str, dex_jax.Output] = {}

    def decode(name: str, ids: list[int]) -> list[float]:
        waited[0] = 0.0
        options = {"method": methods[name], "max_new_tokens": task["max_new_tokens"], "ticks_per_update": 2**30}
        (out[name],) = collections.deque(dex_jax.stream(lm, [ids], **options), maxlen=1)
        return [out[name].stats.decode_seconds, waited[0]]

    for ids in task["ids"]:
        found = in_turns({name: lambda name=name, ids=ids: decode(name, ids) for name in methods}, task["rounds"])
        result = {
            "seconds": {name: seconds for name, (seconds, _) in found.items()},
            "waited": {name: seconds for name, (_, seconds) in found.items()},
            "ticks": {name: int(each.stats.ticks.sum()) for name, each in out.items()},
            "counted": {name: float(each.stats.depth_side_speedup[0]) for name, each in out.items()},
            "identical": all(bool(np.array_equal(out[AR].tokens, each.tokens)) for each in out.values()),
        }
        if is_first():
            print(json.dumps(result), flush=True)


def run(args: argparse.Namespace) -> int:
    """Measure what is missing and write the page; return 1 where tokens differ."""
    figures = Figures(args.output, machine(args))
    devices = hardware(args.hardware).count
    random = np.random.default_rng(1)
    prompts = {f"prompt {i + 1}": random.integers(0, SIZE, 16).tolist() for i in range(args.prompts)}
    wanted = {name: ids for name, ids in prompts.items() if name not in figures.runs}
    with tempfile.TemporaryDirectory() as folder:
        if wanted:
            make_model(Path(folder))
            task = vars(args) | {"ids": list(wanted.values()), "folder": folder, "devices": devices}
            for name, result in zip(wanted, processes(__file__, task, devices), strict=True):
                figures.each({name: result}, lambda result: result)
    each, cells = list(figures.runs.values()), []
    for name in (AR, TREES, SILENT, DEX):
        counted = [run["counted"][name] for run in each]
        gains = [run["seconds"][AR] / run["seconds"][name] for run in each]
        trees = [run["seconds"][TREES] / run["seconds"][name] for run in each]
        tick = [1e3 * run["seconds"][name] / run["ticks"][name] for run in each]
        turns = devices if name in (AR, TREES) else 1  # in a pipeline one stage waits after the other
        over = [run["seconds"][name] / run["waited"][name] / turns for run in each]
        left = [gain / count for gain, count in zip(gains, counted, strict=True)]
        cells.append([name, *(quartiles(values) for values in (counted, gains, left, trees, tick, over))])
    header = ["method", "counted over AR", "measured over AR", "share left", f"over {TREES}", "ms a tick"]
    header.append("over its layers")
    same = sum(run["identical"] for run in each)
    words = (
        f"Emulated: {devices} processes on this machine wait for the layers of {args.like} on {args.hardware}; the "
        f"rest is real. Medians over prompts, quartiles in brackets. Tokens are AR's in {same} of {len(each)} answers."
    )
    figures.publish(f"# {devices} emulated devices", words, markdown(header, cells))
    return 0 if same == len(each) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:  # one of the processes that it starts
        work(json.loads(sys.argv[2]))
    else:
        flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        flags.add_argument("--like", default="llama-2-70b", choices=SHAPES, help="the model whose layers it waits for")
        flags.add_argument("--hardware", default="l4x8", help="the devices that are emulated (%(default)s)")
        flags.add_argument("--output", help="keep figures in OUTPUT.json and tables in OUTPUT.md")
        for name, default, text in (
            ("prompts", 5, "random prompts"),
            ("rounds", 3, "measurements of each, in turns"),
            ("max-new-tokens", 96, "tokens of each answer"),
            ("tree-rows", 16, "rows of one explorer's trees"),
            ("rows", 16, "rows of each explorer with drafts"),
        ):
            flags.add_argument(f"--{name}", type=int, default=default, help=f"{text} (%(default)s)")
        main(run, flags)
