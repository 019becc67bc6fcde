"""What a drafter's parts bring: its input of the position before ("fused"), training ahead; and what attention would.

    python benchmarks/drafter_kinds.py --folder runs/drafter_kinds --data HumanEval.jsonl.gz \\
        --data question_240.jsonl --output results/serial/drafter_kinds

Trains exits at depth 0 of SmolLM2-135M on --tokens tokens each, data as in the first run of
configs/smollm2_135m_drafter.py, and measures them as `train_exits.py evaluate` does. With one drafted token a
round emits 1 + agreement tokens. Of drafters that learn to go on from their own outputs it also gives the agreement of
every draft step over the last 20 steps of the training. What is trained is kept in --folder.
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
from dex_jax.cli.train_results import answered
from dex_jax.evaluation.exit_metrics import grouped_figures
from dex_jax.nn.exits import heads_of
from dex_jax.training.exit_training import train_exits
from dex_jax.training.journal import read_journal

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "smollm2_135m_drafter.py"


def variants(config) -> dict:
    """Row -> configuration of a training."""
    fused = config.exits
    alone = dataclasses.replace(fused, fused=False)
    attn = dataclasses.replace(alone, kind="attn", heads=9, head_dim=64, window=64)
    ahead = dataclasses.replace(config.options, draft_steps=4)
    once = dataclasses.replace(ahead, draft_steps=1, own_outputs=0.0)
    return {
        "token alone (mlp)": dataclasses.replace(config, exits=alone, options=once),
        "token and the position before (mlp, fused)": dataclasses.replace(config, exits=fused, options=once),
        "with attention (attn)": dataclasses.replace(config, exits=attn, options=once),
        "mlp, fused, trained on 4 steps of its own outputs": dataclasses.replace(config, exits=fused, options=ahead),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the trainings, one each")
    parser.add_argument("--tokens", type=int, default=51_200, help="of each training (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=range(1, 5), type=int, help="which drafters (default: all)")
    parser.add_argument("--data", action="append", required=True, metavar="FILE", help="prompts to measure on")
    parser.add_argument("--prompts", type=int, default=20, help="of each file, evenly spread (%(default)s)")
    parser.add_argument("--cache", help="keeps answers, as train_exits.py evaluate --cache")
    parser.add_argument("--output", type=Path, help="writes OUTPUT.md and OUTPUT.json; rows found there are kept")
    args = parser.parse_args()
    store = args.output.with_suffix(".json") if args.output else None
    rows = json.loads(store.read_text(encoding="utf-8"))["rows"] if store and store.exists() else {}
    config = runpy.run_path(str(CONFIG))["first"]
    lm = dex_jax.load(config.model, "float32")
    groups = answered(argparse.Namespace(**vars(args), max_new_tokens=96, batch=8), lm)
    steps = -(-args.tokens // (config.train.batch * config.chunk))
    train = dataclasses.replace(config.train, steps=steps, warmup_steps=steps // 10, eval_every=None)
    for number, (name, each) in enumerate(variants(config).items(), 1):
        if name in rows or number not in (args.rows or [number]):
            continue
        folder = args.folder / "".join(c if c.isalnum() else "_" for c in name)
        each = dataclasses.replace(each, train=train, evaluation_texts=0)
        exits = train_exits(each, lm, folder, tell=functools.partial(print, file=sys.stderr))
        heads = heads_of(exits.config, exits.parameters, jnp.float32)
        found = grouped_figures(lm, heads, exits.vocabulary, groups, explorers=())
        rows[name] = {group: round(figures.agreement[0], 4) for group, figures in found.items()}
        last = [line for line in read_journal(folder) if line["kind"] == "train"][-1]
        ahead = [value for key, value in last.items() if key.startswith("agreement_draft")]
        rows[name]["training"] = ", ".join(f"{value:.3f}" for value in ahead) or "-"
        if store:
            about = f"{jax.devices()[0].device_kind}, float32, jax {jax.__version__}, {args.prompts} prompts a file"
            content = {"device": about, "tokens": args.tokens, "rows": rows}
            store.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    header = [group for group in next(iter(rows.values())) if group != "training"]
    titles = [*header, "tokens a round, one drafted", "draft steps in training"]
    lines = ["| drafter | " + " | ".join(titles) + " |", "|" + "---|" * (len(titles) + 1)]
    for name in filter(rows.__contains__, variants(config)):
        shares = " | ".join(f"{rows[name][group]:.3f}" for group in header)
        lines.append(f"| {name} | {shares} | {1 + rows[name][header[-1]]:.2f} | {rows[name]['training']} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
