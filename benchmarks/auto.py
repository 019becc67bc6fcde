"""What schedule="auto" costs against the best of what it chooses from: batches and contexts, in wall-clock time.

    python benchmarks/auto.py --data question_240.jsonl --output results/serial/auto

Contexts of one length end with a prompt of the file, and nothing ends at an EOS: all texts are as long. AR, serial
rounds, explorers side by side (K of --explorers) and auto decode --texts batches of them --rounds times in turn; the
first time, which compiles, is not counted. Which rounds suit a text is luck, so the times of a batch and length are
those of all its texts together. What OUTPUT.json holds is not measured again: lengths can be added later.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

import dex_jax
from dex_jax.cli.decode import remember_compilations
from dex_jax.nn import few_rows
from dex_jax.training.prompt_files import read_prompts


def cut_prompts(lm, path: str, length: int, count: int) -> list[list[int]]:
    """`count` contexts of `length` tokens: each ends where a prompt of the file ends, with what stands before it."""
    ids: list[int] = []
    ends = []
    for prompt in read_prompts(path):
        ids += lm.encode(prompt)
        ends.append(len(ids))
    long_enough = [end for end in ends if end >= length]
    return [ids[end - length : end] for end in (long_enough[at * len(long_enough) // count] for at in range(count))]


def measure(lm, batches: list[list[list[int]]], args: argparse.Namespace) -> dict:
    """Seconds a token of each sequence by method, over all batches of one size, and what auto chose."""
    methods: dict[str, dex_jax.AR | dex_jax.Dex] = {"auto": dex_jax.Dex(), "ar": dex_jax.AR()}
    methods["serial"] = dex_jax.Dex(schedule="serial")
    methods |= {f"parallel, K = {k}": dex_jax.Dex(explorers=k) for k in args.explorers}
    seconds = dict.fromkeys(methods, 0.0)
    identical, choice, chosen = True, None, None
    for prompts in batches:
        times: dict[str, list[float]] = {name: [] for name in methods}
        tokens = {}
        for number in range(args.rounds + 1):
            for name, method in methods.items():
                out = dex_jax.generate(lm, prompts, method=method, exits=args.exits, max_new_tokens=args.max_new_tokens)
                tokens[name] = out.tokens
                times[name] += [out.stats.decode_seconds / (args.max_new_tokens - 1)] if number else []
                if name == "auto":
                    choice, chosen = out.stats.choice, out.stats.schedule.kind or "ar"
        identical &= all(np.array_equal(found, tokens["ar"]) for found in tokens.values())
        for name, found in times.items():
            seconds[name] += statistics.median(found) / len(batches)
    best = min((name for name in methods if name != "auto"), key=lambda name: seconds[name])
    return {
        "seconds_a_token": seconds,
        "best": best,
        "chosen": chosen,
        "choice": choice,
        "auto_over_best": seconds["auto"] / seconds[best],
        "identical": identical,
    }


def table(runs: list[dict], methods: list[str]) -> str:
    """Markdown, one row a batch and context."""
    header = ["batch", "prompt tokens", *(f"{name}, ms" for name in methods), "chosen", "auto over best"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for run in runs:
        times = [f"{1e3 * run['seconds_a_token'][name]:.1f}" for name in methods]
        cells = [str(run["batch"]), str(run["length"]), *times, run["chosen"], f"{run['auto_over_best']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    worst = max(run["auto_over_best"] for run in runs)
    middle = statistics.median(run["auto_over_best"] for run in runs)
    lines.append(
        f"\nAuto over the best: median {middle:.2f}, worst {worst:.2f}. Times are of one token of each sequence."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default")
    parser.add_argument("--data", required=True, metavar="FILE")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 400, 2000])
    parser.add_argument("--explorers", type=int, nargs="*", default=[2, 5])
    parser.add_argument("--texts", type=int, default=4, help="batches of each size and length (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", help="OUTPUT.json keeps every figure, OUTPUT.md the table")
    args = parser.parse_args()
    remember_compilations()
    lm = dex_jax.load(args.model)
    store = Path(args.output + ".json") if args.output else None
    about = {"device": f"{jax.devices()[0].device_kind}, {lm.dtype}", "jax": jax.__version__}
    about["few_rows"] = few_rows.language()
    kept = json.loads(store.read_text(encoding="utf-8")) if store and store.exists() else about | {"runs": []}
    if kept.get("few_rows", "XLA") != about["few_rows"]:
        parser.error(f"{store} was begun with products of few rows in another language: name another --output")
    runs = kept["runs"]
    sizes = list(itertools.product(args.lengths, args.batches))
    prompts = {(length, batch): cut_prompts(lm, args.data, length, batch * args.texts) for length, batch in sizes}
    # A model that knows no EOS.
    lm.config, lm.tokenizer = dataclasses.replace(lm.config, eos_ids=()), None
    for length, batch in sizes:
        if any((run["length"], run["batch"]) == (length, batch) for run in runs):
            continue
        found = prompts[length, batch]
        run = measure(lm, [found[at :: args.texts] for at in range(args.texts)], args)
        runs = sorted([*runs, {"batch": batch, "length": length} | run], key=lambda run: (run["length"], run["batch"]))
        print(json.dumps(run), file=sys.stderr, flush=True)
        if store:
            store.write_text(json.dumps(about | {"runs": runs}, indent=1) + "\n", encoding="utf-8")
    text = table(runs, list(runs[0]["seconds_a_token"]))
    print(text)
    if args.output:
        Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0 if all(run["identical"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
