"""Serial rounds against AR and transformers' generate, in wall-clock time, on some prompts of each file.

    python benchmarks/serial.py --data HumanEval.jsonl.gz --data question_240.jsonl --prompts 10 \\
        --transformers-python PYTHON --output docs/serial

Every prompt is decoded --rounds times by each, one after the other, so that all see the same machine; the first time,
which compiles, is not counted. Tokens must be AR's. --transformers-python names a Python with torch and transformers.
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
from dex_jax.training.prompt_files import read_prompts


def measure(lm, batch: list[list[int]], args: argparse.Namespace, worker: Transformers | None) -> dict:
    """One batch of prompts: seconds a token (of the whole batch) by method, rounds, and whether tokens are AR's."""
    methods = {"ar": dex_jax.AR(), "serial": dex_jax.Dex(schedule="serial")}
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "exits": args.exits}
    times: dict[str, list[float]] = {name: [] for name in (*methods, *(["transformers"] if worker else []))}
    out = {}
    for number in range(args.rounds + 1):
        for name, method in methods.items():
            extra = {} if name == "serial" else {"exits": "shared"}
            out[name] = dex_jax.generate(lm, batch, method=method, **(options | extra))
            after_first = int((out[name].lengths - 1).sum())
            if number and after_first:
                times[name].append(out[name].stats.decode_seconds / after_first)
        if worker and number and after_first:
            times["transformers"].append(worker(int(out["ar"].lengths[0]), batch[0]))
    rounds = out["serial"].stats.rounds
    return {
        "tokens": out["ar"].lengths.tolist(),
        "rounds": rounds.tolist(),
        "identical": bool(np.array_equal(out["ar"].tokens, out["serial"].tokens)),
        "seconds_a_token": {name: statistics.median(found) for name, found in times.items() if found},
    }


def table(runs: dict[str, dict]) -> str:
    """Markdown: medians over prompts of what was measured for each."""
    timed = [run for run in runs.values() if run["seconds_a_token"]]
    ratios = [run["seconds_a_token"]["ar"] / run["seconds_a_token"]["serial"] for run in timed]
    per_round = [(sum(run["tokens"]) - len(run["tokens"])) / max(1, sum(run["rounds"])) for run in timed]
    lines = ["| what | |", "|---|---|", f"| prompts (batches) | {len(timed)} |"]
    lines.append(f"| identical to AR | {sum(run['identical'] for run in runs.values())} of {len(runs)} |")
    lines.append(f"| tokens a round, mean; median | {np.mean(per_round):.2f}; {np.median(per_round):.2f} |")
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    lines.append(f"| wall-clock over AR, median (quartiles) | {middle:.2f} ({low:.2f} - {high:.2f}) |")
    lines.append(f"| slower than AR | {np.mean(np.array(ratios) < 1):.0%} of prompts |")
    if "transformers" in timed[0]["seconds_a_token"]:
        for name in ("ar", "serial"):
            over = [run["seconds_a_token"]["transformers"] / run["seconds_a_token"][name] for run in timed]
            lines.append(f"| {name} over transformers' generate, median | {np.median(over):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
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
    lm = dex_jax.load(args.model)
    worker = Transformers(args.transformers_python) if args.transformers_python else None
    runs: dict[str, dict] = {}
    for path in args.data:
        prompts = read_prompts(path)
        count = min(args.prompts, len(prompts))
        ids = [lm.encode(prompts[at * len(prompts) // count]) for at in range(count)]
        for start in range(0, count, args.batch):
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
        about["options"] = {name: getattr(args, name) for name in kept}
        Path(args.output + ".json").write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
        Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0 if all(run["identical"] for run in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
