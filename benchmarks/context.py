"""What a token costs as the context grows and as the batch grows: AR, a DEX tick on one device, serial rounds.

    python benchmarks/context.py --data question_240.jsonl HumanEval.jsonl.gz --output results/context

For each context and batch all three decode after the same prompts, cut from the files' prompts one after the other, a
few steps each in turns, so that they see the same machine. A step is an AR step, a tick of all stages side by side, or
a serial round. What OUTPUT.json holds is not measured again. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dex_jax
from dex_jax.cli.decode import remember_compilations
from dex_jax.cli.train_results import write_json
from dex_jax.decoding.exits import resolve_method
from dex_jax.decoding.session import PROGRAMS, Session
from dex_jax.plot.colors import SERIES
from dex_jax.plot.figures import new_figure
from dex_jax.tables import markdown
from dex_jax.training.prompt_files import read_prompts

NEW_TOKENS = 128
FOREVER = 2**30
METHODS = {
    "AR": (dex_jax.AR(), 4),
    "DEX-1/5 tick": (dex_jax.Dex(explorers=5), 8),
    "serial round": (dex_jax.Dex(schedule="serial"), 2),
}
"""Methods, and how many steps of each run in one turn."""


def prompts_of(ids: list[int], context: int, batch: int) -> list[list[int]]:
    """`batch` prompts of `context` tokens from one long text, as far apart as it allows."""
    if len(ids) < context:
        raise dex_jax.DexError(f"the files hold {len(ids)} tokens, fewer than a context of {context}: give more --data")
    starts = np.linspace(0, len(ids) - context, batch).astype(int)
    return [ids[start : start + context] for start in starts]


def measure(lm: Any, prompts: list[list[int]], exits: str, turns: int) -> dict[str, dict[str, float]]:
    """Median seconds of a step, and tokens that a sequence gains by it, of every method."""
    sessions = {}
    for name, (method, _) in METHODS.items():
        resolved = resolve_method(method, exits, lm.config, lm.fingerprint)
        session = Session(lm, prompts, resolved.schedule, NEW_TOKENS, None, resolved.trained)
        # An EOS ends nothing here.
        session.limits = session.limits._replace(eos_ids=jnp.asarray([-1], jnp.int32))
        session.prefill()
        sessions[name] = session
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(turns + 1):
        for name, (_, steps) in METHODS.items():
            begin = time.perf_counter()
            record = sessions[name].advance(steps)
            if turn and not record.done.any():
                times[name].append((time.perf_counter() - begin) / steps)
    found = {}
    for name, session in sessions.items():
        # A few steps say how long they take, and too little of how many tokens they bring.
        record = session.advance(FOREVER)
        tokens = float(np.sum(record.lengths - 1) / np.sum(record.ticks))
        step = statistics.median(times[name])
        found[name] = {"step": step, "tokens_a_step": tokens, "turns": len(times[name])}
    for program in PROGRAMS:
        program.forget()
    return found


def page(found: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for key, run in sorted(found["runs"].items(), key=lambda item: tuple(map(int, item[0].split("x")))):
        context, batch = key.split("x")
        cells = [f"{each['step'] * 1e3:.1f}" for each in run.values()]
        cells += [f"{each['step'] / each['tokens_a_step'] / int(batch) * 1e3:.1f}" for each in run.values()]
        rows.append([context, batch, *cells])
    header = ["context", "batch", *(f"{name}, ms" for name in METHODS)]
    header += [f"ms a token, {name.split()[0]}" for name in METHODS]
    return (
        f"# What a token costs by context and batch\n\nMedians on {found['about']['device']}, in turns; written by "
        "`python benchmarks/context.py`. A step is one of a whole batch, and *ms a token* counts the tokens of all "
        "sequences. A DEX tick here runs all five stages on one device, which is not what DEX is for: it shows what "
        "the lattice and the exits add.\n\n"
        f"{markdown(header, rows)}\n\n![ms a token](context.png)\n"
    )


def draw(found: dict[str, Any], path: Path) -> None:
    figure = new_figure(9, 4.5)
    runs = {tuple(map(int, key.split("x"))): run for key, run in found["runs"].items()}
    first = min(context for context, _ in runs)
    panels = (
        ("context, batch 1", sorted(key for key in runs if key[1] == 1), 0),
        (f"batch, context {first}", sorted(key for key in runs if key[0] == first), 1),
    )
    for number, (label, keys, across) in enumerate(panels):
        axes = figure.add_subplot(1, 2, number + 1)
        for color, name in zip(SERIES, METHODS, strict=False):
            each = [runs[key][name] for key in keys]
            height = [e["step"] / e["tokens_a_step"] / key[1] * 1e3 for key, e in zip(keys, each, strict=True)]
            axes.plot([key[across] for key in keys], height, color=color, marker="o", label=name.split()[0])
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.set_ylabel("ms a token")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--exits", default="default")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 4096], metavar="S")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="B")
    parser.add_argument("--turns", type=int, default=6, help="measurements of each (%(default)s)")
    parser.add_argument("--output", required=True, help="OUTPUT.json, .md and .png")
    args = parser.parse_args()
    try:
        return run(args)
    except dex_jax.DexError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    store = Path(args.output + ".json")
    remember_compilations()
    lm = dex_jax.load(args.model)
    device = f"{jax.devices()[0].device_kind}, {lm.dtype}, jax {jax.__version__}"
    about = {"device": device, "exits": str(args.exits), "data": [Path(path).name for path in args.data]}
    found: dict[str, Any] = {"about": about, "runs": {}}
    if store.exists():
        found = json.loads(store.read_text())
        if found["about"] != about:
            raise dex_jax.DexError(f"{store} holds figures of {found['about']}: name another --output")
    texts = [prompt for path in args.data for prompt in read_prompts(path)]
    ids = [token for prompt in texts for token in lm.encode(prompt)]
    todo = [(context, batch) for context in args.context for batch in args.batch]
    todo = [pair for pair in sorted(todo, key=np.prod) if f"{pair[0]}x{pair[1]}" not in found["runs"]]
    begin, positions, all_positions = time.perf_counter(), 0, sum(context * batch for context, batch in todo)
    for context, batch in todo:
        found["runs"][f"{context}x{batch}"] = measure(lm, prompts_of(ids, context, batch), args.exits, args.turns)
        write_json(str(store), found)
        positions += context * batch
        left = (time.perf_counter() - begin) / positions * (all_positions - positions)
        print(f"context {context}, batch {batch}: measured; about {left:.0f} s left", file=sys.stderr, flush=True)
        Path(args.output + ".md").write_text(page(found), encoding="utf-8")
        draw(found, Path(args.output + ".png"))
    print(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
