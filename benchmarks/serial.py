"""Serial rounds and "auto" against AR and transformers' generate, in wall-clock time, on some prompts of each file.

    python benchmarks/serial.py --data HumanEval.jsonl.gz --data question_240.jsonl --prompts 10 \\
        --transformers-python PYTHON --output results/serial/greedy

Every prompt is decoded --rounds times by each, one after the other, so that all see the same machine; the first time,
which compiles, is not counted. Tokens must be AR's. "serial" runs all rows of the drafter's tree in every round, "auto"
what it chooses for this device. --transformers-python names a Python with torch and transformers, which is asked once a
prompt, as it takes longest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np
from transformers_worker import Transformers

import dex_jax
from dex_jax.cli.decode import remember_compilations
from dex_jax.cli.train_results import spread
from dex_jax.nn import few_rows
from dex_jax.training.prompt_files import read_prompts


def measure(lm, batch: list[list[int]], args: argparse.Namespace, worker: Transformers | None) -> dict:
    """One batch of prompts: seconds a token (of the whole batch) by method, rounds, and whether tokens are AR's."""
    methods = {"ar": dex_jax.AR(), "serial": dex_jax.Dex(schedule="serial"), "auto": dex_jax.Dex()}
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "exits": args.exits}
    times: dict[str, list[float]] = {name: [] for name in (*methods, *(["transformers"] if worker else []))}
    out = {}
    for number in range(args.rounds + 1):
        for name, method in methods.items():
            extra = {"exits": "shared"} if name == "ar" else {}
            out[name] = dex_jax.generate(lm, batch, method=method, **(options | extra))
            after_first = int((out[name].lengths - 1).sum())
            if number and after_first:
                times[name].append(out[name].stats.decode_seconds / after_first)
        if worker and number == 1 and after_first:
            times["transformers"].append(worker(int(out["ar"].lengths[0]), batch[0]))
    rounds = {name: out[name].stats.rounds for name in ("serial", "auto")}
    return {
        "tokens": out["ar"].lengths.tolist(),
        "rounds": {name: None if found is None else found.tolist() for name, found in rounds.items()},
        "identical": all(np.array_equal(out["ar"].tokens, each.tokens) for each in out.values()),
        "choice": out["auto"].stats.choice,
        "seconds_a_token": {name: statistics.median(found) for name, found in times.items() if found},
    }


def table(runs: dict[str, dict]) -> str:
    """Markdown: medians over prompts of what was measured for each."""
    timed = [run for run in runs.values() if run["seconds_a_token"]]
    found = {name: _cells(timed, name) for name in ("serial", "auto")}
    lines = ["| what | serial | auto |", "|---|---|---|"]
    lines += [f"| {what} | {found['serial'][what]} | {found['auto'][what]} |" for what in found["serial"]]
    if "transformers" in timed[0]["seconds_a_token"]:
        over = [run["seconds_a_token"]["transformers"] / run["seconds_a_token"]["ar"] for run in timed]
        lines.append(f"\nAR over transformers' generate, median: {np.median(over):.2f}.")
    same = sum(run["identical"] for run in runs.values())
    lines.append(f"\n{len(timed)} prompts (batches); identical to AR: {same} of {len(runs)}.")
    return "\n".join(lines) + "\n"


def _cells(timed: list[dict], name: str) -> dict[str, str]:
    ratios = [run["seconds_a_token"]["ar"] / run["seconds_a_token"][name] for run in timed]
    counted = [run for run in timed if run["rounds"][name] is not None]
    after_first = [sum(run["tokens"]) - len(run["tokens"]) for run in counted]
    rounds = [sum(run["rounds"][name]) for run in counted]
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    cells = {
        "tokens a round, all together": f"{sum(after_first) / sum(rounds):.2f}" if counted else "-",
        "median of prompts": f"{np.median(np.divide(after_first, rounds)):.2f}" if counted else "-",
        "wall-clock over AR, median (quartiles)": f"{middle:.2f} ({low:.2f} - {high:.2f})",
        "worst; best": f"{min(ratios):.2f}; {max(ratios):.2f}",
        "slower than AR": f"{np.mean(np.array(ratios) < 1):.0%} of prompts",
    }
    if "transformers" in timed[0]["seconds_a_token"]:
        over = [run["seconds_a_token"]["transformers"] / run["seconds_a_token"][name] for run in timed]
        cells["wall-clock over transformers' generate, median"] = f"{np.median(over):.2f}"
    return cells


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", help="of weights and caches; what the device's default is")
    parser.add_argument("--exits", default="default", help="the drafter; shared for none (%(default)s)")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=10, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--transformers-python", metavar="PYTHON")
    parser.add_argument("--output", help="OUTPUT.json keeps every prompt, OUTPUT.md the table")
    args = parser.parse_args()
    remember_compilations()
    lm = dex_jax.load(args.model, dtype=args.dtype)
    worker = Transformers(args.transformers_python) if args.transformers_python else None
    runs: dict[str, dict] = {}
    for path in args.data:
        ids = [lm.encode(prompt) for prompt in spread(read_prompts(path), args.prompts)]
        for start in range(0, len(ids), args.batch):
            name = f"{Path(path).name.split('.')[0]} {start + 1}"
            runs[name] = measure(lm, ids[start : start + args.batch], args, worker)
            print(name, json.dumps(runs[name]), file=sys.stderr, flush=True)
    text = table(runs)
    print(text)
    if worker:
        worker.close()
    if args.output:
        versions = {"jax": jax.__version__} | (worker.versions if worker else {})
        kept = ("exits", "prompts", "batch", "rounds", "max_new_tokens", "temperature")
        about = {"device": f"{jax.devices()[0].device_kind}, {lm.dtype}", "versions": versions}
        about["few_rows"] = few_rows.language()
        about["options"] = {name: getattr(args, name) for name in kept}
        Path(args.output + ".json").write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
        Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0 if all(run["identical"] for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
