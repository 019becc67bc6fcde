"""What the middle exits could add to serial rounds: overruling a drafted token, and a re-draft from their own.

    python benchmarks/second_opinions.py --data HumanEval.jsonl.gz --data question_240.jsonl \\
        --output results/serial/second_opinions

A serial round has all its rows at depth x when an exit there disagrees with the drafter. Its token can only enter the
round as a new row that runs x layers on its own, a step of x / L of the weights, and then goes on with the others. That
pays when it is right so often that the tokens it brings come at less than a round's price for as many:

    P(exit at x is right | no drafted token is) * E  >  x / L * E,    E = tokens a round

for the token itself and what would follow it are worth a round's tokens. So the share in the last column must be above
x / L. Teacher forced over the model's greedy answers; "drafted" is what the drafter's --width best tokens hold, and
exits see the true features of the position before, which flatters them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

import dex_jax
from dex_jax.cli.train_results import answered
from dex_jax.decoding.exits import default_drafter, default_exits
from dex_jax.errors import DexError
from dex_jax.evaluation.exit_forcing import measure
from dex_jax.nn.exits import heads_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", help="at depths; what ships by default")
    parser.add_argument("--drafter", help="an exit at depth 0; what ships by default")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=20, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--width", type=int, default=2, help="drafted tokens a node (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--cache", help="answers, as of train_exits.py evaluate")
    parser.add_argument("--output", help="OUTPUT.json keeps the figures, OUTPUT.md the table")
    args = parser.parse_args()
    lm = dex_jax.load(args.model)
    exits = dex_jax.load_exits(args.exits) if args.exits else default_exits(lm.fingerprint)
    drafter = dex_jax.load_exits(args.drafter) if args.drafter else default_drafter(lm.fingerprint)
    if exits is None or drafter is None:
        raise DexError("no exits or no drafter ship with this model: give --exits and --drafter")
    groups = answered(SimpleNamespace(**vars(args), batch=8), lm)
    texts = [text for group in groups.values() for text in group]

    def said(found, count: int) -> tuple[np.ndarray, np.ndarray]:
        """[X, N, C] best tokens of every depth, and the answers' tokens."""
        heads = heads_of(found.config, found.parameters, jnp.float32)
        measured = measure(lm, heads, found.vocabulary, texts, explorers=(), count=count)
        return np.moveaxis(measured.said.best[:, : len(found.config.depths)], 1, 0), measured.target

    (drafted,), target = said(drafter, args.width)
    opinions, _ = said(exits, 1)
    hit = (drafted == target[:, None]).any(axis=1)
    layers = lm.config.num_layers
    rows = []
    for depth, best in zip(exits.config.depths, opinions[:, :, 0], strict=True):
        right = best == target
        rows.append(
            {
                "depth": depth,
                "agreement": float(right.mean()),
                "right_where_drafts_are_wrong": float(right[~hit].mean()),
                "must_exceed": depth / layers,
            }
        )
    lines = [
        f"{len(target)} tokens; the drafter's best {args.width} hold the token in {hit.mean():.3f} of them.",
        "",
        "| exit at depth | agreement | right where no drafted token is | must be above |",
        "|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            "| {depth} | {agreement:.3f} | {right_where_drafts_are_wrong:.3f} | {must_exceed:.3f} |".format(**row)
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        about = {"prompts": args.prompts, "width": args.width, "tokens": len(target), "drafted": float(hit.mean())}
        Path(args.output + ".json").write_text(json.dumps(about | {"exits": rows}, indent=1) + "\n", encoding="utf-8")
        Path(args.output + ".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
