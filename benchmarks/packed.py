"""What packed weights bring on a CPU: AR and what runs where nothing is asked for, on dense weights and as stored.

    python benchmarks/packed.py --data HumanEval.jsonl.gz question_240.jsonl --llama-python PYTHON \\
        --output results/packed

All decode the same prompts in turns, greedy, in float32, and must give the same tokens. With --llama-python so does
llama.cpp on the same file, by the llama-cpp-python of another Python, best built with GGML_NATIVE=ON; it rounds
activations, so that its texts are others. Steps over all layers are timed apart from decoding, by their rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import Figures, arguments, in_turns, machine, quartiles, read_ids
from outside import Outside

import dex_jax
from dex_jax import cache
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.nn.forward import run_tree
from dex_jax.nn.weights import merge_model
from dex_jax.sampling import best_column
from dex_jax.tables import markdown

ROWS, LENGTH = (1, 2, 4, 8, 16), 256
KINDS = ("dense", "stored")
PLAIN, CHOSEN, LLAMA, READ = "AR", "what is chosen", "llama.cpp", "read of all weights"


def steps(models: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step over all layers and the final logits, by rows, and of a plain read of as many bytes."""
    measures = {}
    for kind, lm in models.items():
        memory = cache.allocate(lm.config, lm.layout, 1, LENGTH, 0, lm.dtype)

        def run(weights: Any, memory: Any, token: jax.Array, lm: Any = lm) -> jax.Array:
            model, among = (
                merge_model(lm.config, lm.layout, weights),
                jnp.tril(jnp.ones((1, *token.shape[1:] * 2), bool)),
            )
            position = token + LENGTH // 2
            hidden, _ = run_tree(model, memory, token, position, among, position[:, 0])
            return best_column(model.logits(hidden)[0])

        for rows in ROWS:
            token = jnp.zeros((1, rows), jnp.int32)
            program = jax.jit(run).lower(lm.weights, memory, token).compile()
            arguments = (lm.weights, memory, token)
            measures[f"{kind}, {rows}"] = lambda program=program, arguments=arguments: seconds(program, *arguments)
        # XLA's fastest read: maxima of floats, as many arrays as there are weights.
        numbers = [jnp.ones(leaf.nbytes // 4, jnp.float32) for leaf in jax.tree.leaves(lm.weights)]
        read = jax.jit(lambda arrays: [jnp.max(each) for each in arrays]).lower(numbers).compile()
        measures[f"{kind}, {READ}"] = lambda read=read, numbers=numbers: seconds(read, numbers)
    return in_turns(measures, rounds)


def seconds(program: Any, *arguments: Any) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - begin


def answers(
    models: dict[str, Any], ids: list[int], args: argparse.Namespace, outside: Outside | None
) -> dict[str, Any]:
    """One prompt's seconds a token by every way to decode it, and whether our tokens are equal."""
    tokens: dict[str, list[int]] = {}

    def ours(kind: str, name: str) -> float:
        method = dex_jax.AR() if name == PLAIN else None
        out = dex_jax.generate(models[kind], [ids], method=method, max_new_tokens=args.max_new_tokens)
        tokens[f"{kind}, {name}"] = out.tokens[0, : out.lengths[0]].tolist()
        return out.stats.decode_seconds / max(1, int(out.lengths[0]) - 1)

    measures: dict[str, Any] = {
        f"{kind}, {name}": lambda kind=kind, name=name: ours(kind, name) for kind in models for name in (PLAIN, CHOSEN)
    }
    if outside is not None:

        def theirs() -> float:
            found = outside.run(ids, args.max_new_tokens)
            tokens[LLAMA] = found["tokens"]
            return found["decode_seconds"] / (args.max_new_tokens - 1)

        measures[LLAMA] = theirs
    times = in_turns(measures, args.rounds)
    first = tokens[f"dense, {PLAIN}"]
    return {
        "seconds": {name: float(np.median(found)) for name, found in times.items()},
        "identical": all(found == first for name, found in tokens.items() if name != LLAMA),
        "llama.cpp's too": tokens[LLAMA][: len(first)] == first if outside is not None else None,
    }


def page(runs: dict[str, Any], times: dict[str, list[float]]) -> list[str]:
    """Tokens a second and ratios of one prompt each; steps by rows."""
    names = list(next(iter(runs.values()))["seconds"])
    over = [f"dense, {PLAIN}", f"stored, {PLAIN}", LLAMA]

    def ratio(name: str, other: str) -> str:
        each = (run["seconds"] for run in runs.values())
        return quartiles(found[other] / found[name] for found in each) if other in names else ""

    def speed(name: str) -> str:
        return quartiles((1 / run["seconds"][name] for run in runs.values()), 1)

    cells = [[name, speed(name), *(ratio(name, other) for other in over)] for name in names]
    median = {name: 1e3 * float(np.median(found)) for name, found in times.items()}
    rows = [
        [kind, f"{median[f'{kind}, {READ}']:.1f}", *(f"{median[f'{kind}, {n}']:.1f}" for n in ROWS)] for kind in KINDS
    ]
    same = sum(run["identical"] for run in runs.values())
    return [
        markdown(["weights, method", "tokens a second", *(f"over {other}" for other in over)], cells),
        f"Our tokens are equal on {same} of {len(runs)} prompts.",
        markdown(["weights", f"{READ}, ms", *(f"step of {n} rows, ms" for n in ROWS)], rows),
    ]


def parser() -> argparse.ArgumentParser:
    return arguments(__doc__, data=None, prompts=6, rounds=3, max_new_tokens=128, llama_python=None)


def run(args: argparse.Namespace) -> int:
    """Measures what is missing and writes; 1 where tokens differ."""
    remember_compilations()
    models = {kind: dex_jax.load(args.model, dtype="float32", weights=kind) for kind in KINDS}
    prompts = read_ids(models["dense"], args.data, args.prompts)
    outside = Outside(args.llama_python, args.model, models["dense"].source) if args.llama_python else None
    settings = {name: getattr(args, name) for name in ("rounds", "max_new_tokens")}
    settings["model"] = Path(args.model).name if args.model.endswith(".gguf") else args.model
    about = machine(dtype="float32", data=[Path(path).name for path in args.data], **settings)
    figures = Figures(args.output, about | (outside.versions if outside else {}))
    for name, ids in prompts.items():
        if name not in figures.runs:
            figures.add(name, answers(models, ids, args, outside))
    if outside is not None:
        outside.close()
    runs = {name: run for name, run in figures.runs.items() if name != "steps"}
    if "steps" not in figures.runs:
        figures.add("steps", steps(models, 9))
    figures.publish("# Packed weights", *page(runs, figures.runs["steps"]))
    return 0 if all(run["identical"] for run in runs.values()) else 1


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args), "Stopped. The same command goes on from here."))
