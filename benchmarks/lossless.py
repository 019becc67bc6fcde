"""DEX against transformers' greedy tokens, and its ticks against the teacher-forced count, on SmolLM2-135M.

    python benchmarks/lossless.py --output results/lossless        # every K; more than an hour on two cores; resumes
    python benchmarks/lossless.py --explorers 3 5 --prompts 6      # less

The prompts and transformers' float32 tokens are in tests/goldens/smollm2.json. Exits are "shared", batches of 6. With
rows that never prune ticks must equal the teacher-forced count; above that number of stages they may only be larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from measuring import Figures, arguments, machine

import dex_jax
from dex_jax.cli.common import remember_compilations
from dex_jax.decoding.counting import ticks_of
from dex_jax.errors import exit_code
from dex_jax.forced import forced_exits
from dex_jax.lattice import full_rows
from dex_jax.tables import markdown

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "smollm2.json"
BATCH = 6
ROWS: dict[int, str | int] = {6: "full", 10: 8, 30: 8}
"""K -> rows a stage that are not the default's: 32 rows of 30 stages would take hours, and 8 are a cap to see too."""


def run_batch(lm, explorers: int, prompts: list[dict], new_tokens: int) -> dict:
    """One batch: whether tokens are transformers', and ticks beside the teacher-forced count."""
    method = dex_jax.Dex(explorers=explorers, rows=ROWS.get(explorers), draft=False)
    ids = [each["prompt_ids"] for each in prompts]
    out = dex_jax.generate(lm, ids, method=method, exits="shared", max_new_tokens=new_tokens)
    tokens = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]
    plan = out.stats.plan
    exits = [forced_exits(lm, each, row, plan) for each, row in zip(ids, tokens, strict=True)]
    return {
        "explorers": explorers,
        "rows": plan.rows,
        "identical": [row == each["new_tokens"] for row, each in zip(tokens, prompts, strict=True)],
        "ticks": out.stats.ticks.tolist(),
        "forced_ticks": [ticks_of(each, len(each), explorers) for each in exits],
    }


def never_prunes(run: dict) -> bool:
    return run["rows"] >= full_rows(run["explorers"])


def holds(run: dict) -> bool:
    """What must be true of a batch."""
    ticks, forced = np.array(run["ticks"]), np.array(run["forced_ticks"])
    return all(run["identical"]) and bool((ticks == forced).all() if never_prunes(run) else (ticks >= forced).all())


def table(runs: dict[str, dict]) -> str:
    rows = []
    for explorers in sorted({run["explorers"] for run in runs.values()}):
        mine = [run for run in runs.values() if run["explorers"] == explorers]
        same, ticks, forced = (
            np.concatenate([run[name] for run in mine]) for name in ("identical", "ticks", "forced_ticks")
        )
        prunes = "yes" if never_prunes(mine[0]) else "no"
        counts = [f"{same.sum()} of {len(same)}", str(ticks.sum()), str(forced.sum())]
        rows.append([str(explorers), str(mine[0]["rows"]), prunes, *counts, f"{ticks.sum() / forced.sum() - 1:.1%}"])
    header = ["K", "rows a stage", "never prunes", "identical to transformers", "ticks", "teacher-forced", "above"]
    return markdown(header, rows)


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, weights=None, prompts=18)
    flags.add_argument("--explorers", type=int, nargs="+", default=[1, 3, 5, 6, 10, 30], metavar="K")
    return flags


def run(args: argparse.Namespace) -> int:
    """Decodes what is missing and writes the page; 1 where a promise does not hold."""
    remember_compilations()
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    prompts = golden["prompts"][: args.prompts]
    lm = dex_jax.load(args.model, dtype="float32", weights=args.weights)
    figures = Figures(args.output, machine(dtype="float32"))
    for explorers in args.explorers:
        for at in range(0, len(prompts), BATCH):
            name = f"K = {explorers}, from prompt {at + 1}"
            if name not in figures.runs:
                figures.add(name, run_batch(lm, explorers, prompts[at : at + BATCH], golden["max_new_tokens"]))
    figures.publish(
        "# Same tokens, counted ticks",
        f"{len(prompts)} prompts, at most {golden['max_new_tokens']} tokens each, greedy, exits of kind `shared`: "
        "against transformers' tokens, and against the ticks of the same texts run through the model once.",
        table(figures.runs),
    )
    return 0 if all(map(holds, figures.runs.values())) else 1


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
