"""The depth-side speedup of DEX with drafts by the number of explorers: it counts ticks and measures no time.

    python benchmarks/depth_side.py --data HumanEval.jsonl.gz question_240.jsonl --output results/depth_side

One explorer's tree, pipelined over K devices, takes K ticks for each of its own, so its tokens a tick are the speedup
of that pipeline, the rival of K explorers with drafts on the same devices. Tokens must be AR's.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from measuring import Figures, arguments, machine, main, read_ids

import dex_jax
from dex_jax.decoding.check import compare
from dex_jax.decoding.plan import resolve
from dex_jax.tables import markdown


def run(args: argparse.Namespace) -> int:
    """Decode what is missing and write the page; return 1 where tokens are not AR's."""
    lm = dex_jax.load(args.model, dtype="float32")
    options = {"exits": args.exits, "max_new_tokens": args.max_new_tokens}
    figures = Figures(args.output, machine(args))
    # One explorer takes the tree that several take, so that all run the same drafter over the same rows.
    tree = resolve(dex_jax.Dex(explorers=2), args.exits, lm.config, lm.fingerprint).drafts
    methods = {k: dex_jax.Dex(explorers=k) for k in args.explorers} | {1: dex_jax.Dex(explorers=1, draft=tree)}

    def counted(ids: list[int]) -> dict[str, Any]:
        plain, found, same = dex_jax.generate(lm, [ids], method=dex_jax.AR(), **options), {}, True
        for k, method in methods.items():
            out = dex_jax.generate(lm, [ids], method=method, **options)
            (check,) = compare(lm, out, plain)
            found[str(k)] = [k * (int(out.lengths[0]) - 1), int(out.stats.ticks[0])]
            same = same and bool(check.identical or check.is_tie(str(lm.dtype)))
        return {"counts": found, "identical": same}

    runs = figures.each(read_ids(lm, args.data, args.prompts), counted)
    kinds, means, rows = sorted({name.split(" ")[0] for name in runs}), {}, []
    for k in sorted(methods):
        found = {kind: [run["counts"][str(k)] for name, run in runs.items() if name.startswith(kind)] for kind in kinds}
        each = [work / ticks for work, ticks in (np.sum(found[kind], axis=0) for kind in kinds)]
        means[k] = np.mean(each)
        rows.append([str(k), *(f"{x:.2f}" for x in [*each, means[k], means[k] / means[1]])])
    same = sum(run["identical"] for run in runs.values())
    header = ["K", *kinds, "mean", "over the pipeline that runs trees"]
    words = f"Tokens are AR's in {same} of {len(runs)} answers."
    figures.publish("# Depth-side speedup", markdown(header, rows), words)
    return 0 if same == len(runs) else 1


if __name__ == "__main__":
    flags = arguments(__doc__, data=[], prompts=40, max_new_tokens=96, exits="default")
    flags.add_argument("--explorers", type=int, nargs="+", default=[2, 5, 10], metavar="K")
    main(run, flags)
