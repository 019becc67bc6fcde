"""The tokens a second of AR and of the default on several forms of weights, and of other libraries.

    python benchmarks/speed.py --data HumanEval.jsonl.gz question_240.jsonl --weights dense stored \\
        --llama-python PYTHON --output results/packed
    python benchmarks/speed.py --lengths 50 131 754 1000 --weights stored --max-new-tokens 2 \\
        --transformers-python PYTHON --output results/first_token

All decode the same prompts in turns, of --data or random ones of some --lengths; a first time, which compiles, is not
counted. Our tokens must be the first AR's, or the exit code is 1. llama.cpp rounds activations: its texts differ.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from measuring import Figures, arguments, in_turns, machine, main, quartiles, read_ids
from outside import Outside

import dex_jax
from dex_jax.cli.common import WEIGHTS
from dex_jax.tables import markdown


def measure(models: dict[str, Any], others: dict[str, Outside], ids: list[list[int]], args: argparse.Namespace) -> Any:
    """Measure (seconds to the first token, seconds a token) by way on some prompts, and whether tokens are AR's."""
    tokens: dict[str, Any] = {}

    def ours(name: str, kind: str, method: Any) -> tuple[float, float]:
        options = {"exits": args.exits, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        out = dex_jax.generate(models[kind], ids, method=method, **options)
        tokens[name] = out.tokens
        return out.stats.prefill_seconds, out.stats.decode_seconds / max(1, int((out.lengths - 1).sum()))

    def theirs(name: str) -> tuple[float, float]:
        found = others[name].run(ids[0], args.max_new_tokens)
        return found["prefill_seconds"], found["decode_seconds"] / (args.max_new_tokens - 1)

    measures: dict[str, Any] = {}
    for kind in models:
        for way, method in {"AR": dex_jax.AR(), "default": None}.items():
            name = f"{kind}, {way}"
            measures[name] = lambda name=name, kind=kind, method=method: ours(name, kind, method)
    measures |= {name: lambda name=name: theirs(name) for name in others}
    seconds = in_turns(measures, args.rounds)
    first = next(iter(tokens.values()))
    return {"seconds": seconds, "identical": all(np.array_equal(first, each) for each in tokens.values())}


def table(runs: dict[str, Any], at: int, unit: str) -> str:
    """Format a line for each way and size of prompts: seconds to the first token (0) or tokens a second (1)."""
    cells, names = [], list(next(iter(runs.values()))["seconds"])
    bases = [name for name in names if not name.endswith("default")]
    for size in dict.fromkeys(name.split(";")[0] for name in runs):
        group = [list(run["seconds"].values()) for name, run in runs.items() if name.split(";")[0] == size]
        seconds = dict(zip(names, np.array(group)[:, :, at].T, strict=True))
        for name, own in seconds.items():
            slower = sum(own > seconds.get(name.replace("default", "AR"), own))
            ratios = [quartiles(seconds[base] / own) for base in bases]
            cells.append([size, name, quartiles(1 / own if at else own), *ratios, f"{slower} of {len(own)}"])
    return markdown(["prompts", "weights, method", unit, *(f"over {base}" for base in bases), "slower than AR"], cells)


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, data=[], prompts=5, rounds=2, max_new_tokens=128, exits="default")
    flags.add_argument("--lengths", type=int, nargs="+", default=[], help="of random prompts, in tokens")
    flags.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["stored"], help="(%(default)s)")
    flags.add_argument("--batch", type=int, default=1, help="prompts that are decoded together (%(default)s)")
    flags.add_argument("--dtype", default="float32", help="(%(default)s)")
    flags.add_argument("--temperature", type=float, default=0.0, help="(%(default)s)")
    flags.add_argument("--llama-python", metavar="PYTHON", help="one that has llama-cpp-python")
    flags.add_argument("--transformers-python", metavar="PYTHON", help="one that has transformers on torch")
    return flags


def run(args: argparse.Namespace) -> int:
    """Measure what is missing and write the page; return 1 where tokens are not AR's."""
    models = {kind: dex_jax.load(args.model, dtype=args.dtype, weights=kind) for kind in args.weights}
    lm = models[args.weights[0]]
    others = {"llama.cpp": Outside(args.llama_python, lm.source)} if args.llama_python else {}
    others |= {"transformers": Outside(args.transformers_python, args.model)} if args.transformers_python else {}
    versions = {name: version for other in others.values() for name, version in other.versions.items()}
    figures = Figures(args.output, machine(args, **versions))
    random = np.random.default_rng(0)
    groups = {f"{n} tokens": [random.integers(100, lm.config.vocab_size, n).tolist()] for n in args.lengths}
    asked = list(read_ids(lm, args.data, args.prompts).items())
    for at in range(0, len(asked), args.batch):
        some = asked[at : at + args.batch]
        groups[f"batches of {len(some)}; {some[0][0]}"] = [ids for _, ids in some]
    figures.each(groups, lambda ids: measure(models, others, ids, args))
    same = sum(run["identical"] for run in figures.runs.values())
    shown = table(figures.runs, 0, "first token, s") if args.lengths else table(figures.runs, 1, "tokens a second")
    figures.publish("# Speed", shown, f"Tokens are AR's in {same} of {len(figures.runs)} groups of prompts.")
    return 0 if same == len(figures.runs) else 1


if __name__ == "__main__":
    main(run, parser())
