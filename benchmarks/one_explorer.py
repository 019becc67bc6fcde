"""AR, one explorer with drafts, auto and explorers side by side, and transformers: tokens a second on some prompts.

    python benchmarks/one_explorer.py --data HumanEval.jsonl.gz question_240.jsonl --transformers-python PYTHON \\
        --output results/one_explorer/greedy
    python benchmarks/one_explorer.py --data question_240.jsonl --batch 1 4 --context 64 400 --explorers 5 \\
        --output results/one_explorer/auto

Every group of prompts is decoded --rounds times by each, in turns; a first time, which compiles, is not counted.
"One explorer" runs all rows of the drafter's tree in every tick, "auto" what it chooses for this device. With --context
prompts are all of one length, each with what stands before it in its file, and nothing ends at an EOS. Tokens must be
AR's, or the program ends with 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
from typing import Any

import numpy as np
from measuring import Figures, arguments, in_turns, machine, quartiles, read_ids
from outside import Outside

import dex_jax
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.tables import markdown


def cut(ids: dict[str, list[int]], length: int) -> dict[str, list[int]]:
    """Each prompt with what stands before it, cut to `length` tokens; where that is too little it is left out."""
    text: list[int] = []
    found = {}
    for name, each in ids.items():
        text += each
        if len(text) >= length:
            found[name] = text[-length:]
    return found


def measure(lm: Any, prompts: list[list[int]], methods: dict[str, Any], args: argparse.Namespace, outside: Any) -> dict:
    """One group of prompts: seconds a token of the whole group by method, tokens a tick, whether tokens are AR's."""
    out: dict[str, dex_jax.Output] = {}

    def decode(name: str) -> float:
        exits = "shared" if name == "ar" else args.exits
        options = {"exits": exits, "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
        out[name] = dex_jax.generate(lm, prompts, method=methods[name], **options)
        return out[name].stats.decode_seconds / max(1, int((out[name].lengths - 1).sum()))

    times = in_turns({name: lambda name=name: decode(name) for name in methods}, args.rounds)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    tokens = int((out["ar"].lengths - 1).sum())
    if outside is not None and tokens:  # asked once, as it takes longest
        seconds["transformers"] = outside.run(prompts[0], tokens + 1)["decode_seconds"] / tokens
    ticks = {name: found.stats.ticks for name, found in out.items() if found.stats.plan.method != "ar"}
    return {
        "tokens": tokens,
        "seconds_a_token": seconds,
        "tokens_a_tick": {name: tokens / int(each.sum()) for name, each in ticks.items() if each is not None},
        "identical": all(np.array_equal(out["ar"].tokens, each.tokens) for each in out.values()),
        "choice": str(out["auto"].stats.plan.choice),
    }


def table(runs: dict[str, dict]) -> str:
    """A line for each size and method: medians over groups of prompts, with quartiles."""
    sizes: dict[tuple[int, int], list[dict]] = {}
    for run in runs.values():
        if run["tokens"]:
            sizes.setdefault((run["context"], run["batch"]), []).append(run)
    rows = []
    for (context, batch), group in sizes.items():
        for name in group[0]["seconds_a_token"]:
            own = [run["seconds_a_token"][name] for run in group]
            over = {
                other: [run["seconds_a_token"][other] / mine for run, mine in zip(group, own, strict=True)]
                for other in ("ar", "transformers")
                if other in group[0]["seconds_a_token"]
            }
            a_tick = [run["tokens_a_tick"][name] for run in group if name in run["tokens_a_tick"]]
            rows.append(
                [
                    name,
                    str(batch),
                    str(context or "as asked"),
                    f"{1 / statistics.median(own):.1f}",
                    quartiles(over["ar"]),
                    f"{min(over['ar']):.2f}; {max(over['ar']):.2f}",
                    f"{statistics.median(over['transformers']):.2f}" if "transformers" in over else "-",
                    f"{statistics.median(a_tick):.2f}" if a_tick else "-",
                ]
            )
    header = ["method", "batch", "prompt", "tokens/s", "over AR", "worst; best", "over transformers", "tokens a tick"]
    return markdown(header, rows)


def words(runs: dict[str, dict]) -> str:
    """What auto loses to the best of the others, and whether tokens are AR's."""
    over = []
    for run in runs.values():
        others = [value for name, value in run["seconds_a_token"].items() if name not in ("auto", "transformers")]
        over.append(run["seconds_a_token"]["auto"] / min(others))
    return (
        f"Auto's time over the best of the others': median {statistics.median(over):.2f}, worst {max(over):.2f}. "
        f"Tokens are AR's in {sum(run['identical'] for run in runs.values())} of {len(runs)} groups of prompts."
    )


def parser() -> argparse.ArgumentParser:
    shared = {"prompts": 10, "rounds": 3, "max_new_tokens": 128, "exits": "default", "transformers_python": None}
    flags = arguments(__doc__, weights=None, data=None, **shared)
    flags.add_argument("--dtype", help="of weights and caches (the device's default)")
    flags.add_argument("--temperature", type=float, default=0.0)
    flags.add_argument("--batch", type=int, nargs="+", default=[1], metavar="B")
    flags.add_argument(
        "--context", type=int, nargs="+", default=[0], metavar="N", help="tokens of prompts (as they are)"
    )
    flags.add_argument("--explorers", type=int, nargs="*", default=[], metavar="K", help="also K stages side by side")
    return flags


def run(args: argparse.Namespace) -> int:
    """Measures what is missing and writes the page; 1 where tokens are not AR's."""
    remember_compilations()
    lm = dex_jax.load(args.model, dtype=args.dtype, weights=args.weights)
    asked = read_ids(lm, args.data, args.prompts)
    methods = {"ar": dex_jax.AR(), "one explorer": dex_jax.Dex(explorers=1), "auto": dex_jax.Dex()}
    methods |= {f"K = {k}": dex_jax.Dex(explorers=k) for k in args.explorers}
    outside = Outside(args.transformers_python, args.model) if args.transformers_python else None
    kept = ("model", "exits", "prompts", "rounds", "max_new_tokens", "temperature", "explorers")
    versions = outside.versions if outside else {}
    figures = Figures(args.output, machine(dtype=str(lm.dtype), **{k: getattr(args, k) for k in kept}) | versions)
    for context, batch in itertools.product(args.context, args.batch):
        ids = list((cut(asked, context) if context else asked).items())
        if context:  # a model that knows no EOS
            lm.config, lm.tokenizer = dataclasses.replace(lm.config, eos_ids=()), None
        for start in range(0, len(ids), batch):
            group = ids[start : start + batch]
            name = f"{group[0][0]}, batch {len(group)}, context {context}"
            if name not in figures.runs:
                found = measure(lm, [each for _, each in group], methods, args, outside if batch == 1 else None)
                figures.add(name, {"context": context, "batch": len(group)} | found)
    if outside:
        outside.close()
    figures.publish("# One explorer and auto", table(figures.runs), words(figures.runs))
    return 0 if all(each["identical"] for each in figures.runs.values()) else 1


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
