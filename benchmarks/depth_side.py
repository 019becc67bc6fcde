"""Depth-side speedup of DEX with and without drafts, by the number of explorers: counts of ticks, and no times.

    python benchmarks/depth_side.py --data HumanEval.jsonl.gz question_240.jsonl --output results/depth_side

Every answer is compared with AR's tokens. One explorer's tree, pipelined over K devices, takes K ticks for each of its
own, so its tokens a tick are that pipeline's speedup, and the rival of K explorers with drafts on the same devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from measuring import Figures, arguments, machine, read_ids

import dex_jax
from dex_jax.check import compare
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.tables import markdown


def answer(lm: Any, ids: list[int], method: Any, plain: Any, **options: Any) -> dict[str, Any]:
    """One answer's ticks, exits and whether its tokens are those of `plain`."""
    out = dex_jax.generate(lm, [ids], method=method, **options)
    (check,) = compare(lm, out, plain)
    length, plan = int(out.lengths[0]), out.stats.plan
    return {
        "tokens": length,
        "ticks": int(out.stats.ticks[0]),
        "exits": np.bincount(out.stats.exits[0, 1:length], minlength=plan.stages + 1).tolist(),
        "rows": plan.rows,
        "identical": bool(check.identical or check.is_tie(str(lm.dtype))),
    }


def speedup(runs: list[dict[str, Any]], explorers: int) -> float:
    """K (n - 1) / ticks over runs together."""
    return explorers * sum(run["tokens"] - 1 for run in runs) / sum(run["ticks"] for run in runs)


def table(runs: Mapping[str, dict[str, Any]], explorers: list[int]) -> str:
    """One line for each K: drafts on, off, their ratio, and over the pipeline that runs trees; empty where none ran."""
    groups: dict[tuple[int, bool, str], list[dict[str, Any]]] = {}
    for name, run in runs.items():
        k, draft, prompt = name.split("; ")
        groups.setdefault((int(k[4:]), draft == "drafts", prompt.split(" ")[0]), []).append(run)
    kinds = sorted({kind for _, _, kind in groups})

    def cell(k: int, draft: bool, kind: str) -> str:
        return f"{speedup(groups[k, draft, kind], k):.2f}" if (k, draft, kind) in groups else ""

    def mean(k: int, draft: bool) -> str:
        found = [cell(k, draft, kind) for kind in kinds]
        return f"{np.mean([float(each) for each in found]):.2f}" if all(found) else ""

    def over(ours: str, others: str) -> str:
        return f"{float(ours) / float(others):.2f}" if ours and others else ""

    rows = []
    for k in sorted({k for k, _, _ in groups} & set(explorers)):
        with_drafts, without = mean(k, True), mean(k, False)
        each = [cell(k, True, kind) for kind in kinds]
        tree = over(with_drafts, mean(1, True)) if k > 1 else ""
        rows.append([str(k), *each, with_drafts, without, over(with_drafts, without), tree])
    heads = ["K", *kinds, "mean with drafts", "mean without", "drafts over none", "over the pipeline that runs trees"]
    return markdown(heads, rows)


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, weights=None, data=None, prompts=40, max_new_tokens=96, exits="default")
    flags.add_argument("--explorers", type=int, nargs="+", default=[1, 2, 5, 10], metavar="K")
    flags.add_argument("--only-drafts", action="store_true", help="leave out explorers without drafts")
    return flags


def run(args: argparse.Namespace) -> int:
    """Decodes what is missing and writes the page; 1 where tokens are not AR's."""
    remember_compilations()
    lm = dex_jax.load(args.model, dtype="float32", weights=args.weights)
    asked = read_ids(lm, args.data, args.prompts)
    kept = {name: getattr(args, name) for name in ("model", "exits", "prompts", "max_new_tokens")}
    figures = Figures(args.output, machine(**kept))
    one = dex_jax.Dex(explorers=1)
    # The tree that several explorers take, so that both run the same drafter over the same rows.
    one = dataclasses.replace(one, draft=largest_tree(lm, args.exits))
    options = {"exits": args.exits, "max_new_tokens": args.max_new_tokens}
    for prompt, ids in asked.items():
        wanted: dict[str, Any] = {}
        for k in args.explorers:
            wanted[f"K = {k}; drafts; {prompt}"] = one if k == 1 else dex_jax.Dex(explorers=k)
            if not args.only_drafts:
                wanted[f"K = {k}; none; {prompt}"] = dex_jax.Dex(explorers=k, draft=False)
        missing = {name: method for name, method in wanted.items() if name not in figures.runs}
        plain = dex_jax.generate(lm, [ids], method=dex_jax.AR(), **options) if missing else None
        for name, method in missing.items():
            figures.add(name, answer(lm, ids, method, plain, **options))
    same = sum(each["identical"] for each in figures.runs.values())
    words = f"Tokens are AR's, ties of floating point apart, in {same} of {len(figures.runs)} answers."
    figures.publish("# Depth-side speedup", table(figures.runs, args.explorers), words)
    return 0 if same == len(figures.runs) else 1


def largest_tree(lm: Any, exits: str) -> Any:
    """The tree that several explorers draft under a head."""
    from dex_jax.decoding.plan import resolve

    return resolve(dex_jax.Dex(explorers=2), exits, lm.config, lm.fingerprint).drafts


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
