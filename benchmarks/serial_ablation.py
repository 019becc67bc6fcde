"""What each part of a serial round brings, in tokens a round and in time: width, depth, drafter, lookup.

    python benchmarks/serial_ablation.py --data HumanEval.jsonl.gz --data question_240.jsonl \\
        --output results/serial/ablation

Every tree decodes the same prompts one by one, all trees in turn, --rounds times after one that compiles. AR is among
them; ratios are medians over prompts of AR's seconds a token over the tree's. Tokens must be AR's. What OUTPUT.json
holds is not measured again, so that it can be stopped and started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

import jax
import numpy as np

import dex_jax
from dex_jax.cli.decode import remember_compilations
from dex_jax.cli.train_results import spread
from dex_jax.decoding.auto import with_rungs
from dex_jax.decoding.costs import step_costs
from dex_jax.decoding.exits import default_drafter
from dex_jax.decoding.known_trees import LOOKUP_TREE, known_trees
from dex_jax.decoding.session import PROGRAMS
from dex_jax.errors import DexError
from dex_jax.nn import few_rows
from dex_jax.training.prompt_files import read_prompts

NO_LOOKUP = (0.0,) * 8

COST_LENGTH = 512
"""Cache positions with which the costs are measured that rounds choose by."""


def trees(best: dex_jax.TreeShape, chosen: dex_jax.TreeShape) -> dict[str, dex_jax.TreeShape | None]:
    """Row -> tree; None is AR. `best` is the fastest whose rounds are all alike; those of `chosen` choose."""
    chain = dataclasses.replace(best, widths=(1,) * len(best.widths))
    shorter = {
        f"{levels} drafted level{'s' * (levels > 1)}": dex_jax.TreeShape(
            (*best.widths[:levels], *(1,) * (len(best.widths) - levels)), levels, best.lookup
        )
        for levels in range(1, best.drafted)
    }
    drafts_alone = dex_jax.TreeShape(best.widths[: best.drafted], best.drafted, NO_LOOKUP)
    longer = dex_jax.TreeShape(
        (*best.widths[: best.drafted], 1, *best.widths[best.drafted :]), best.drafted + 1, best.lookup
    )
    wider = dataclasses.replace(best, widths=(best.widths[0] + 2, *best.widths[1:]))
    return {
        "AR": None,
        "the drafter's tree": best,
        "one row a level": chain,
        "two more rows on the first level": wider,
        **shorter,
        f"{best.drafted + 1} drafted levels": longer,
        "no lookup": drafts_alone,
        "lookup alone": LOOKUP_TREE,
        f"rounds choose of {chosen.rows} rows": chosen,
        "they choose rows, not levels": dataclasses.replace(chosen, drafting=0.0),
        "they choose, without lookup": dataclasses.replace(chosen, lookup=NO_LOOKUP),
    }


def measure(lm, drafter, prompt: list[int], shape: dex_jax.TreeShape | None, new_tokens: int) -> tuple:
    """One answer: (seconds a token, tokens after the first, rounds, all tokens)."""
    method = dex_jax.AR() if shape is None else dex_jax.Dex(schedule="serial", tree=shape)
    exits = drafter if shape is not None and shape.drafted else "shared"
    out = dex_jax.generate(lm, [prompt], method=method, exits=exits, max_new_tokens=new_tokens)
    after_first = int(out.lengths[0]) - 1
    rounds = after_first if shape is None else int(out.stats.rounds[0])
    return out.stats.decode_seconds / max(1, after_first), after_first, rounds, out.tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--drafter", help="file; what ships by default")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=6, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--output", help="OUTPUT.json keeps the figures, OUTPUT.md the table")
    args = parser.parse_args()
    remember_compilations()
    lm = dex_jax.load(args.model)
    about = {"device": f"{jax.devices()[0].device_kind}, {lm.dtype}", "jax": jax.__version__}
    about["few_rows"] = few_rows.language()
    drafter = dex_jax.load_exits(args.drafter) if args.drafter else default_drafter(lm.fingerprint)
    if drafter is None:
        raise DexError("no drafter ships with this model: give --drafter")
    known = [tree.shape for tree in known_trees(drafter)]
    costs = step_costs(lm.config, lm.layout, lm.dtype, 1, COST_LENGTH, drafter)
    largest = max(known, key=lambda shape: shape.rows)
    shapes = trees(known[0], with_rungs(costs, largest))
    ids = []
    for path in args.data:
        ids += [lm.encode(prompt) for prompt in spread(read_prompts(path), args.prompts)]
    store = Path(args.output + ".json") if args.output else None
    kept = json.loads(store.read_text(encoding="utf-8")) if store and store.exists() else about | {"prompts": []}
    if kept.get("few_rows", "XLA") != about["few_rows"]:
        raise DexError(f"{store} was begun with products of few rows in another language: name another --output")
    found = kept["prompts"]
    for number, prompt in enumerate(ids[len(found) :], len(found) + 1):
        times: dict[str, list[float]] = {name: [] for name in shapes}
        for repeat in range(args.rounds + 1):
            runs = {name: measure(lm, drafter, prompt, shape, args.max_new_tokens) for name, shape in shapes.items()}
            for name, run in runs.items():
                times[name] += [run[0]] if repeat else []
        same = all(np.array_equal(run[3], runs["AR"][3]) for run in runs.values())
        found.append(
            {"identical": same, "tokens": runs["AR"][1], "rounds": {name: run[2] for name, run in runs.items()}}
            | {"seconds_a_token": {name: statistics.median(each) for name, each in times.items()}}
        )
        for program in PROGRAMS:  # a process can hold only so many; they are on disk
            program.forget()
        print(f"{number} of {len(ids)} prompts", file=sys.stderr, flush=True)
        if store:
            store.write_text(json.dumps(about | {"prompts": found}, indent=1) + "\n", encoding="utf-8")
    timed = [each for each in found if each["tokens"]]
    tokens = sum(each["tokens"] for each in timed)
    lines = ["| what | rows a level | drafted levels | tokens a round | over AR, median |", "|---|---|---|---|---|"]
    for name, shape in shapes.items():
        ratios = [each["seconds_a_token"]["AR"] / each["seconds_a_token"][name] for each in timed]
        per_round = tokens / sum(each["rounds"][name] for each in timed)
        widths, drafted = ("-", "-") if shape is None else (", ".join(map(str, shape.widths)), str(shape.drafted))
        lines.append(f"| {name} | {widths} | {drafted} | {per_round:.2f} | {statistics.median(ratios):.2f} |")
    identical = all(each["identical"] for each in found)
    text = "\n".join(lines) + f"\n\n{len(ids)} prompts; identical to AR: {'all' if identical else 'NOT ALL'}.\n"
    print(text)
    if args.output:
        Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
