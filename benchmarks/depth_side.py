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
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import exit_code
from dex_jax.evaluation.check import compare
from dex_jax.tables import markdown


def answer(lm: Any, ids: list[int], method: Any, exits: str, new_tokens: int) -> dict[str, Any]:
    """One answer's ticks, exits and whether its tokens are AR's."""
    options: dict[str, Any] = {"exits": exits, "max_new_tokens": new_tokens}
    out = dex_jax.generate(lm, [ids], method=method, **options)
    plain = dex_jax.generate(lm, [ids], method=dex_jax.AR(), **options)
    (check,) = compare(lm, out, plain)
    length, schedule = int(out.lengths[0]), out.stats.schedule
    return {
        "tokens": length,
        "ticks": int(out.stats.ticks[0]),
        "exits": np.bincount(out.stats.exits[0, 1:length], minlength=schedule.stages + 1).tolist(),
        "rows": schedule.rows,
        "identical": bool(check.identical or check.is_tie(str(lm.dtype))),
    }


def speedup(runs: list[dict[str, Any]], explorers: int) -> float:
    """K (n - 1) / ticks over runs together."""
    return explorers * sum(run["tokens"] - 1 for run in runs) / sum(run["ticks"] for run in runs)


def table(runs: Mapping[str, dict[str, Any]], explorers: list[int]) -> str:
    """One line for each K: drafts on, off, their ratio, and over the pipeline that runs trees."""
    groups: dict[tuple[int, bool, str], list[dict[str, Any]]] = {}
    for name, run in runs.items():
        k, draft, prompt = name.split("; ")
        groups.setdefault((int(k[4:]), draft == "drafts", prompt.split(" ")[0]), []).append(run)
    kinds = sorted({kind for _, _, kind in groups})

    def mean(k: int, draft: bool) -> float:
        return float(np.mean([speedup(groups[k, draft, kind], k) for kind in kinds]))

    rows = []
    for k in explorers:
        if any((k, draft, kind) not in groups for draft in (True, False) for kind in kinds):
            continue
        each = [speedup(groups[k, True, kind], k) for kind in kinds]
        tree = f"{mean(k, True) / mean(1, True):.2f}" if (1, True, kinds[0]) in groups and k > 1 else ""
        with_drafts, without = mean(k, True), mean(k, False)
        rows.append([str(k), *(f"{x:.2f}" for x in (*each, with_drafts, without, with_drafts / without)), tree])
    heads = ["K", *kinds, "mean with drafts", "mean without", "drafts over none", "over the pipeline that runs trees"]
    return markdown(heads, rows)


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, data=None, prompts=40, max_new_tokens=96, exits="default")
    flags.add_argument("--explorers", type=int, nargs="+", default=[1, 2, 5, 10], metavar="K")
    return flags


def run(args: argparse.Namespace) -> int:
    """Decodes what is missing and writes the page; 1 where tokens are not AR's."""
    remember_compilations()
    lm = dex_jax.load(args.model, dtype="float32")
    asked = read_ids(lm, args.data, args.prompts)
    kept = {name: getattr(args, name) for name in ("model", "exits", "prompts", "max_new_tokens")}
    figures = Figures(args.output, machine(**kept))
    one = dex_jax.Dex(explorers=1)
    # The tree that several explorers take, so that both run the same drafter over the same rows.
    one = dataclasses.replace(one, draft=largest_tree(lm, args.exits))
    for prompt, ids in asked.items():
        for k in args.explorers:
            for draft in (True, False):
                name = f"K = {k}; {'drafts' if draft else 'none'}; {prompt}"
                if name not in figures.runs:
                    method = one if k == 1 and draft else dex_jax.Dex(explorers=k, draft=draft)
                    figures.add(name, answer(lm, ids, method, args.exits, args.max_new_tokens))
    same = sum(each["identical"] for each in figures.runs.values())
    words = f"Tokens are AR's, ties of floating point apart, in {same} of {len(figures.runs)} answers."
    figures.publish("# Depth-side speedup", table(figures.runs, args.explorers), words)
    return 0 if same == len(figures.runs) else 1


def largest_tree(lm: Any, exits: str) -> Any:
    """The tree that several explorers draft under a head."""
    from dex_jax.decoding.resolve import resolve

    return resolve(dex_jax.Dex(explorers=2), exits, lm.config, lm.fingerprint).schedule.drafts


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args)))
