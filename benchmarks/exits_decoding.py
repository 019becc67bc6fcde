"""Trained exits at work: DEX with its default rows on some prompts of each file, against AR.

    python benchmarks/exits_decoding.py --data HumanEval.jsonl.gz --data question_240.jsonl --prompts 8 \
        --output docs/exits_decoding

Tokens must be AR's on every prompt. Ticks are those of the lattice as it ran, cap included. Finished prompts are kept,
so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import dex_jax
from dex_jax.training.prompt_files import read_prompts


def decode(lm, prompt: list[int], exits: str, explorers: int, new_tokens: int) -> dict:
    """One prompt: ticks, tokens, and whether they are AR's."""
    plain = dex_jax.generate(lm, [prompt], method=dex_jax.AR(), max_new_tokens=new_tokens)
    out = dex_jax.generate(lm, [prompt], method=dex_jax.Dex(explorers), exits=exits, max_new_tokens=new_tokens)
    return {
        "tokens": int(out.lengths[0]),
        "ticks": int(out.stats.ticks[0]),
        "rows": out.stats.schedule.rows,
        "identical": bool(np.array_equal(out.tokens, plain.tokens)),
        "exits": out.stats.exits[0, 1 : out.lengths[0]].tolist(),
    }


def table(found: dict[str, dict], explorers: list[int], groups: list[str]) -> str:
    """Markdown: depth-side speedup by group and K, and whether texts were identical."""
    lines = [
        "| prompts | K | rows | prompts tried | identical to AR | depth-side speedup |",
        "|---|---|---|---|---|---|",
    ]
    for k in explorers:
        speedups = []
        for group in groups:
            runs = [run for key, run in found.items() if key.startswith(f"{group}/{k}/") and run["tokens"] > 1]
            if not runs:
                continue
            ticks, after_first = sum(run["ticks"] for run in runs), sum(run["tokens"] - 1 for run in runs)
            speedups.append(k * after_first / ticks)
            same = sum(run["identical"] for run in runs)
            lines.append(f"| {group} | {k} | {runs[0]['rows']} | {len(runs)} | {same} | {speedups[-1]:.2f} |")
        if len(speedups) > 1:
            lines.append(f"| mean | {k} | | | | {np.mean(speedups):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=8, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--explorers", default="5,10")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", required=True, help="OUTPUT.json keeps every prompt, OUTPUT.md the table")
    args = parser.parse_args()
    explorers = [int(k) for k in args.explorers.split(",")]
    kept = Path(args.output + ".json")
    found = json.loads(kept.read_text()) if kept.exists() else {}
    lm = dex_jax.load(args.model)
    groups = [Path(path).name.split(".")[0] for path in args.data]
    for group, path in zip(groups, args.data, strict=True):
        prompts = read_prompts(path)
        chosen = np.linspace(0, len(prompts) - 1, args.prompts).round().astype(int)
        for number in chosen:
            ids = lm.encode(prompts[number])
            for k in explorers:
                key = f"{group}/{k}/{number}"
                if key not in found:
                    found[key] = decode(lm, ids, args.exits, k, args.max_new_tokens)
                    kept.write_text(json.dumps(found) + "\n")
                    print(key, {name: found[key][name] for name in ("tokens", "ticks", "identical")}, flush=True)
    text = table(found, explorers, groups)
    Path(args.output + ".md").write_text(text)
    print(text)
    return 0 if all(run["identical"] for run in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
