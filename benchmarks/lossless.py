"""DEX against transformers' greedy tokens, and its ticks against the teacher-forced count, on SmolLM2-135M.

    python benchmarks/lossless.py                                  # every K; more than an hour on two cores
    python benchmarks/lossless.py --explorers 3,5 --prompts 6      # less
    python benchmarks/lossless.py --output results/lossless           # writes results/lossless.md and .json, resumes

The prompts and transformers' float32 tokens are in tests/goldens/smollm2.json (tests/reference/make_goldens.py made
them). Exits are "shared", batches of 6. With rows that never prune ticks must equal the teacher-forced count; above
that number of stages they may only be larger.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import dex_jax
from dex_jax.evaluation.forced import forced_ticks
from dex_jax.lattice import full_rows

LEAD = (
    "# Same tokens, counted ticks\n\n"
    "18 prompts, at most 64 tokens each, in batches of 6, greedy, float32, exits of kind `shared`: against "
    "transformers' tokens, and against the ticks of the same texts run through the model once (teacher-forced, rows "
    "that never prune). Written by `python benchmarks/lossless.py --output results/lossless`.\n\n"
)

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "smollm2.json"
BATCH = 6
ROWS: dict[int, str | int] = {6: "full", 10: 8, 30: 8}
"""K -> rows a stage that are not the default's: 32 rows of 30 stages would take hours, and 8 are a cap to see too."""


def run_batch(lm, explorers: int, prompts: list[dict], new_tokens: int) -> dict:
    """One batch: whether tokens are transformers', and ticks beside the teacher-forced count."""
    method = dex_jax.Dex(explorers=explorers, rows=ROWS.get(explorers))
    begin = time.perf_counter()
    out = dex_jax.generate(
        lm, [p["prompt_ids"] for p in prompts], method=method, exits="shared", max_new_tokens=new_tokens
    )
    tokens = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]
    schedule = out.stats.schedule
    pairs = zip(prompts, tokens, strict=True)
    forced = [forced_ticks(lm, p["prompt_ids"], row, schedule) for p, row in pairs]
    return {
        "explorers": explorers,
        "rows": schedule.rows,
        "identical": [row == p["new_tokens"] for row, p in zip(tokens, prompts, strict=True)],
        "ticks": out.stats.ticks.tolist(),
        "forced_ticks": forced,
        "seconds": time.perf_counter() - begin,
    }


def summarise(runs: list[dict]) -> str:
    lines = [
        "| K | rows a stage | never prunes | identical to transformers | ticks | teacher-forced ticks | above |",
        "|---|---|---|---|---|---|---|",
    ]
    for explorers in sorted({run["explorers"] for run in runs}):
        mine = [run for run in runs if run["explorers"] == explorers]
        same, of = sum(sum(run["identical"]) for run in mine), sum(len(run["identical"]) for run in mine)
        ticks, forced = sum(sum(run["ticks"]) for run in mine), sum(sum(run["forced_ticks"]) for run in mine)
        rows = mine[0]["rows"]
        exact = "yes" if rows >= full_rows(explorers) else "no"
        lines.append(
            f"| {explorers} | {rows} | {exact} | {same} of {of} | {ticks} | {forced} | {ticks / forced - 1:.1%} |"
        )
    return "\n".join(lines) + "\n"


def holds(run: dict) -> bool:
    """What must be true of a batch."""
    ticks, forced = np.array(run["ticks"]), np.array(run["forced_ticks"])
    exact = run["rows"] >= full_rows(run["explorers"])
    return all(run["identical"]) and bool((ticks == forced).all() if exact else (ticks >= forced).all())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--explorers", default="1,3,5,6,10,30", help="comma-separated K (%(default)s)")
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json; runs found there are kept")
    args = parser.parse_args()

    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    prompts = golden["prompts"][: args.prompts]
    store = args.output.with_suffix(".json") if args.output else None
    runs = json.loads(store.read_text(encoding="utf-8"))["runs"] if store and store.exists() else []
    done = {(run["explorers"], run["first_prompt"]) for run in runs}
    lm = dex_jax.load("smollm2-135m", dtype="float32")
    todo = [(int(k), at) for k in args.explorers.split(",") for at in range(0, len(prompts), BATCH)]
    for explorers, at in todo:
        if (explorers, at) in done:
            continue
        run = {"first_prompt": at} | run_batch(lm, explorers, prompts[at : at + BATCH], golden["max_new_tokens"])
        runs.append(run)
        print(f"K = {explorers}, prompts {at + 1} to {at + len(run['ticks'])}: {run['seconds']:.0f} s", file=sys.stderr)
        if store:
            store.parent.mkdir(parents=True, exist_ok=True)
            device = f"{jax.devices()[0].device_kind}, float32, jax {jax.__version__}"
            store.write_text(json.dumps({"device": device, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    text = summarise(runs)
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(LEAD + text, encoding="utf-8")
    return 0 if all(map(holds, runs)) else 1


if __name__ == "__main__":
    sys.exit(main())
