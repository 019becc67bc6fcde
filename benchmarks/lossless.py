"""A comparison of DEX with transformers' greedy tokens, and of its ticks with teacher-forced ones, on SmolLM2-135M.

    python benchmarks/lossless.py --output results/lossless     # every K; more than an hour on two cores
    python benchmarks/lossless.py --explorers 3 5 --prompts 6   # less

The prompts and transformers' float32 tokens are in tests/goldens/smollm2.json. Exits are "shared", batches of 6. With
rows that never prune ticks must equal the teacher-forced count; with fewer rows they may only be larger.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, arguments, machine, main

import dex_jax
from dex_jax.decoding.forced import forced_exits
from dex_jax.decoding.record import ticks_of
from dex_jax.lattice import full_rows
from dex_jax.tables import markdown

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "goldens" / "smollm2.json"
BATCH = 6
ROWS: dict[int, str | int] = {6: "full", 10: 8, 30: 8}
"""The rows a stage by K where they are not the default: 32 rows of 30 stages take hours, and 8 show a cap too."""


def decoded(lm: Any, explorers: int, new_tokens: int, prompts: list[dict]) -> dict[str, Any]:
    """Decode one batch: whether tokens are transformers', and ticks beside the teacher-forced count."""
    method = dex_jax.Dex(explorers=explorers, rows=ROWS.get(explorers), draft=False)
    ids = [each["prompt_ids"] for each in prompts]
    out = dex_jax.generate(lm, ids, method=method, exits="shared", max_new_tokens=new_tokens)
    tokens, plan = [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)], out.stats.plan
    exits = [forced_exits(lm, each, row, plan) for each, row in zip(ids, tokens, strict=True)]
    forced = [ticks_of(each, len(each), explorers) for each in exits]
    same = [row == each["new_tokens"] for row, each in zip(tokens, prompts, strict=True)]
    about = {"explorers": explorers, "rows": plan.rows}
    return about | {"identical": same, "ticks": out.stats.ticks.tolist(), "forced_ticks": forced}


def holds(run: dict[str, Any]) -> bool:
    """Return whether a batch's tokens are transformers' and its ticks the forced ones, or no fewer if it may prune."""
    ticks, forced = np.array(run["ticks"]), np.array(run["forced_ticks"])
    never_prunes = run["rows"] >= full_rows(run["explorers"])
    return all(run["identical"]) and bool((ticks == forced if never_prunes else ticks >= forced).all())


def run(args: argparse.Namespace) -> int:
    """Decode what is missing and write the page; return 1 where a promise does not hold."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    prompts, new_tokens = golden["prompts"][: args.prompts], golden["max_new_tokens"]
    lm = dex_jax.load(args.model, dtype="float32")
    figures, rows = Figures(args.output, machine(args)), []
    for k in args.explorers:
        some = {f"K = {k}, from prompt {at + 1}": prompts[at : at + BATCH] for at in range(0, len(prompts), BATCH)}
        found = [*figures.each(some, functools.partial(decoded, lm, k, new_tokens)).values()]
        same, ticks, forced = (sum(sum(x[n]) for x in found) for n in ("identical", "ticks", "forced_ticks"))
        above = f"{ticks / forced - 1:.1%}"
        rows.append([str(k), str(found[0]["rows"]), f"{same} of {len(prompts)}", str(ticks), str(forced), above])
    header = ["K", "rows a stage", "identical to transformers", "ticks", "teacher-forced", "above"]
    words = f"At most {new_tokens} tokens of each prompt, greedy."
    figures.publish("# Same tokens, counted ticks", words, markdown(header, rows))
    return 0 if all(map(holds, figures.runs.values())) else 1


if __name__ == "__main__":
    flags = arguments(__doc__, prompts=18)
    flags.add_argument("--explorers", type=int, nargs="+", default=[1, 3, 5, 6, 10, 30], metavar="K")
    main(run, flags)
