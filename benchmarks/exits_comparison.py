"""Kinds of exits, and sources of data, on equally many tokens; and one training at several of its checkpoints.

    python benchmarks/exits_comparison.py --folder runs/comparison --data HumanEval.jsonl.gz \\
        --data question_240.jsonl --run runs/smollm2_135m --output results/exits_comparison

Trains exits at depths 6, 12, 18 and 24 (the grid of K = 5) of SmolLM2-135M once for each row of the first two tables,
on --tokens tokens, everything else as in configs/smollm2_135m.py; then measures them, and --run's checkpoints, on
evenly spread prompts of each --data file as `train_exits.py evaluate` does. What is trained is kept in --folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import dex_jax
from dex_jax.cli.train_results import answered, exits_of_checkpoint
from dex_jax.config import ExitsConfig
from dex_jax.evaluation.exit_metrics import grouped_figures, shared_exits
from dex_jax.nn.exits import heads_of, select_exits
from dex_jax.training.exit_training import train_exits

LEAD = (
    "# Kinds, sources and amounts of training\n\n"
    "Agreement of exits at four depths of SmolLM2-135M with the last layer, and the depth-side speedup that follows "
    "at K = 5, on greedy answers to held-out prompts (question_240: Spec-Bench's rows of questions, maths and "
    "retrieval). Written by `python benchmarks/exits_comparison.py`, whose docstring has the whole command.\n\n"
)

DEPTHS = (6, 12, 18, 24)
CONFIG = Path(__file__).resolve().parents[1] / "configs" / "smollm2_135m.py"


def variants(first) -> dict[str, dict[str, tuple[ExitsConfig, tuple[str, ...]]]]:
    """Table -> row -> (shapes, data)."""
    attn = dataclasses.replace(first.exits, depths=DEPTHS)
    linear = dataclasses.replace(attn, kind="linear")
    prompts = tuple(name for name in first.data if not name.startswith(("self", "python-stdlib")))
    return {
        "kind": {
            "linear": (linear, first.data),
            "linear, fused": (dataclasses.replace(linear, fused=True), first.data),
            "attn": (attn, first.data),
        },
        "source": {
            "what the model writes itself": (attn, ("self",)),
            "code": (attn, ("python-stdlib",)),
            "prompts of public sets": (attn, prompts),
            "all three": (attn, first.data),
        },
    }


def measured(lm, exits, groups) -> dict:
    """Agreement by depth for each group, and the speedup at K = 5 as it is predicted."""
    heads = heads_of(*select_exits(exits.config, exits.parameters, DEPTHS), jnp.float32)
    found = grouped_figures(lm, heads, exits.vocabulary, groups, explorers=(5,))
    rows = {}
    for name, figures in found.items():
        rows[name] = {
            "agreement": [round(share, 4) for share in figures.agreement],
            "speedup": round(figures.grids[0].depth_side_speedup, 3),
            "draft_share": round(figures.draft_share, 4),
        }
    return rows


def table(title: str, rows: dict[str, dict]) -> str:
    groups = [name for name in next(iter(rows.values()))["groups"] if name != "mean"]
    header = [title, "tokens", *(f"{name}: depth {' / '.join(map(str, DEPTHS))}" for name in groups), "K = 5"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, row in rows.items():
        by_group = [" / ".join(f"{x:.3f}" for x in row["groups"][group]["agreement"]) for group in groups]
        lines.append(
            "| " + " | ".join([name, f"{row['tokens']:,}", *by_group, f"{row['groups']['mean']['speedup']:.2f}"]) + " |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the trainings, one each")
    parser.add_argument("--tokens", type=int, default=51_200, help="of each training (%(default)s)")
    parser.add_argument("--run", type=Path, help="a finished training whose checkpoints are measured too")
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 400], help="of its first training (%(default)s)")
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help="prompts to measure on")
    parser.add_argument("--prompts", type=int, default=40, help="of each file, evenly spread (%(default)s)")
    parser.add_argument("--cache", help="keeps answers, as train_exits.py evaluate --cache")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.md and OUTPUT.json; rows found there are kept")
    args = parser.parse_args()

    store = args.output.with_suffix(".json") if args.output else None
    tables = json.loads(store.read_text(encoding="utf-8"))["tables"] if store and store.exists() else {}
    first = runpy.run_path(str(CONFIG))["first"]
    lm = dex_jax.load(first.model, "float32")
    asked = argparse.Namespace(data=args.data, prompts=args.prompts, cache=args.cache, max_new_tokens=96, batch=8)
    groups = answered(asked, lm)

    def add(title: str, name: str, tokens: int, exits) -> None:
        print(f"measuring {name}", file=sys.stderr)
        tables.setdefault(title, {})[name] = {"tokens": tokens, "groups": measured(lm, exits, groups)}
        if store:
            about = f"{jax.devices()[0].device_kind}, float32, jax {jax.__version__}, {args.prompts} prompts a file"
            store.write_text(json.dumps({"device": about, "tables": tables}, indent=1) + "\n", encoding="utf-8")

    if "shared (not trained)" not in tables.get("kind", {}):
        add("kind", "shared (not trained)", 0, shared_exits(lm, DEPTHS))
    steps = -(-args.tokens // (first.train.batch * first.chunk))
    train = dataclasses.replace(first.train, steps=steps, warmup_steps=steps // 10, eval_every=None)
    made: dict[tuple, tuple[str, str]] = {}
    for title, rows in variants(first).items():
        for name, (shapes, data) in rows.items():
            if name in tables.get(title, {}):
                made.setdefault((shapes, data), (title, name))
                continue
            if (shapes, data) in made:
                # A row of two tables: trained and measured once.
                tables.setdefault(title, {})[name] = tables[made[shapes, data][0]][made[shapes, data][1]]
                continue
            folder = f"{title} {name}".replace(" ", "_").replace(",", "")
            config = dataclasses.replace(first, exits=shapes, data=data, train=train, evaluation_texts=0)
            tell = functools.partial(print, file=sys.stderr)
            add(title, name, args.tokens, train_exits(config, lm, args.folder / folder, tell=tell))
            made[shapes, data] = title, name
    if args.run is not None:
        amount = tables.setdefault("amount", {})
        for step in args.steps:
            exits = exits_of_checkpoint(args.run / "first", step)
            name = f"draft vocabulary {len(exits.vocabulary):,}, stopped early"
            if not any(row["tokens"] == exits.metadata["tokens"] for row in amount.values()):
                add("amount", f"{name} ({step} steps)", exits.metadata["tokens"], exits)
        for folder in (args.run / "first", args.run):
            exits = dex_jax.load_exits(folder)
            before = exits.metadata.get("before", {}).get("tokens", 0)
            name = f"draft vocabulary {len(exits.vocabulary):,}, to the end"
            if name not in amount:
                add("amount", name, exits.metadata["tokens"] + before, exits)
    text = "\n\n".join(table(title, rows) for title, rows in tables.items()) + "\n"
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(LEAD + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
