"""Drafters compared in the rounds that auto chooses, in wall-clock time, with one measurement of what rows cost.

    python benchmarks/drafters.py --exits NAME=TREES NAME=TREES --data HumanEval.jsonl.gz --data question_240.jsonl \\
        --output results/serial/drafters

TREES is what `train_exits.py tree` has made of a drafter. auto measures rows anew for each. Measured minutes apart, the
same rows differ by as much as drafters do, and then one of them runs more rows than another: here all rest on the
lowest figure for each number of rows. Every prompt is decoded --rounds times by AR and with each drafter, in turns; the
first time, which compiles, is not counted. Tokens must be AR's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

import dex_jax
from dex_jax.cli.decode import remember_compilations
from dex_jax.cli.train_results import spread
from dex_jax.decoding.auto import candidates
from dex_jax.decoding.costs import StepCosts, step_costs
from dex_jax.evaluation.resampling import bootstrap, ratios
from dex_jax.nn import few_rows
from dex_jax.training.prompt_files import read_prompts

LENGTH = 512
"""Cache positions that costs are measured with: as many as most of these prompts and their texts need."""


def shared_costs(measured: dict[str, StepCosts]) -> dict[str, StepCosts]:
    """The lowest cost of each number of rows and of a round for all; drafting a level stays a drafter's own."""
    seconds = tuple(np.min([each.seconds for each in measured.values()], axis=0).tolist())
    a_round = min(each.round for each in measured.values())
    return {name: dataclasses.replace(each, seconds=seconds, round=a_round) for name, each in measured.items()}


def measure(lm, ids: list[int], methods: dict, args: argparse.Namespace) -> dict | None:
    """Seconds a token and tokens a round of each method; None for a text of one token."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    out = {}
    for number in range(args.rounds + 1):
        for name, (method, exits) in methods.items():
            out[name] = dex_jax.generate(lm, [ids], method=method, exits=exits, max_new_tokens=args.max_new_tokens)
            after_first = int(out[name].lengths[0]) - 1
            if after_first == 0:
                return None
            times[name] += [out[name].stats.decode_seconds / after_first] if number else []
    rounds = {name: each.stats.rounds for name, each in out.items()}
    return {
        "seconds_a_token": {name: statistics.median(found) for name, found in times.items()},
        "tokens_a_round": {name: after_first / int(found[0]) for name, found in rounds.items() if found is not None},
        "identical": all(np.array_equal(out["ar"].tokens, each.tokens) for each in out.values()),
    }


def table(runs: list[dict], names: list[str], costs: dict[str, StepCosts]) -> str:
    """Markdown, a row each drafter; the last column is its speed over the first one's."""
    lines = ["| drafter | a level drafted, ms | tokens a round | over AR, median | over the first (95%) |"]
    lines.append("|---|---|---|---|---|")
    seconds = {name: np.array([run["seconds_a_token"][name] for run in runs]) for name in ("ar", *names)}
    for name in names:
        # All tokens over all rounds would count long texts more: every prompt counts alike.
        rounds = len(runs) / sum(1 / run["tokens_a_round"][name] for run in runs)
        over = np.median(seconds["ar"] / seconds[name])
        found = bootstrap(ratios(seconds[names[0]], seconds[name]))
        first = "-" if name == names[0] else f"{found.value:.3f} ({found.low:.3f} - {found.high:.3f})"
        lines.append(f"| {name} | {1e3 * costs[name].drafting:.2f} | {rounds:.2f} | {over:.2f} | {first} |")
    a_step = costs[names[0]]
    rows = ", ".join(f"{1e3 * a_step.step(n):.1f} of {n}" for n in a_step.rows)
    same = sum(run["identical"] for run in runs)
    lines.append(f"\nMilliseconds of a step by its rows: {rows}. {len(runs)} prompts; identical to AR: {same}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", nargs="+", required=True, metavar="NAME=EXITS", help="drafters; the first to beat")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=10, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", help="OUTPUT.json keeps every prompt, OUTPUT.md the table")
    args = parser.parse_args()
    remember_compilations()
    lm = dex_jax.load(args.model)
    exits = {name: dex_jax.load_exits(file) for name, file in (each.split("=", 1) for each in args.exits)}
    shapes = lm.config, lm.layout, lm.dtype
    costs = shared_costs({name: step_costs(*shapes, 1, LENGTH, each) for name, each in exits.items()})
    methods: dict = {"ar": (dex_jax.AR(), "shared")}
    for name, each in exits.items():
        chosen = candidates(costs[name], each, None, *shapes)
        methods[name] = (next(found.method for found in chosen if isinstance(found.method, dex_jax.Dex)), each)
    runs = []
    for path in args.data:
        for prompt in spread(read_prompts(path), args.prompts):
            run = measure(lm, lm.encode(prompt), methods, args)
            runs += [] if run is None else [run]
            print(Path(path).name, len(runs), json.dumps(run), file=sys.stderr, flush=True)
    text = table(runs, list(exits), costs)
    print(text)
    if args.output:
        about = {"device": f"{jax.devices()[0].device_kind}, {lm.dtype}", "jax": jax.__version__}
        about["few_rows"] = few_rows.language()
        about["costs"] = {name: dataclasses.asdict(each) for name, each in costs.items()}
        about["options"] = {name: getattr(args, name) for name in ("exits", "prompts", "rounds", "max_new_tokens")}
        Path(args.output + ".json").write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
        Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0 if all(run["identical"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
