"""Which K, grid and rows to choose on some hardware, or not to use DEX at all.

    python -m dex_jax.evaluation.planner.plan --model smollm2-135m --profile profile.json --hardware cpu.json
    python -m dex_jax.evaluation.planner.plan --model llama-2-70b --exits linear:8192 --profile assumed.json \\
        --hardware h100x8
    python -m dex_jax.evaluation.planner.plan --model llama-2-70b --compile-for v5p:2x2x2 --explorers 8

Nothing is loaded and nothing is run: predictions follow from shapes, an EAD profile and the cost model, whose
assumptions stand in `cost_model`. --compile-for also compiles for a TPU that need not be there (needs libtpu).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from dex_jax.errors import DexError, exit_code
from dex_jax.evaluation.planner import cost_model
from dex_jax.evaluation.planner.cost_model import Setting
from dex_jax.evaluation.planner.ead_profile import Profile
from dex_jax.evaluation.planner.hardware import DEVICES, hardware
from dex_jax.evaluation.planner.predictions import Plan, Prediction, others, plan, prediction
from dex_jax.evaluation.planner.workload import SHAPES, ExitWork, config_of, described_exits, exit_work, work_of

BATCHES = (1, 2, 4, 8, 16, 32, 64)

PART_NAMES = ("layers", " width", "  head", " exits", "  comm", " fixed")
"""Of the fields of Parts."""

NO_TERMINAL = 180
"""Columns of what goes to a file or a pipe."""


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = argparse.ArgumentParser(
        prog="python -m dex_jax.evaluation.planner.plan",
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 2 bad input.",
    )
    add = p.add_argument_group("what is decoded").add_argument
    add("--model", default="smollm2-135m", help=f"alias, directory, file, hub id, config.json, or {', '.join(SHAPES)}")
    add("--exits", default="default", help='file, folder, "default", or a description: KIND or KIND:DRAFT VOCABULARY')
    add("--profile", metavar="FILE", help="of python -m dex_jax.evaluation.planner.profile, or an assumed one")
    add("--batch", type=int, default=1, metavar="B", help="sequences (%(default)s)")
    add("--context", type=int, default=1024, metavar="S", help="positions attended to, or cache length (%(default)s)")
    add("--layout", choices=["unrolled", "stacked"], default="unrolled", help="of the weights (%(default)s)")
    add = p.add_argument_group("on what").add_argument
    names = ", ".join(DEVICES)
    add("--hardware", metavar="NAMExCOUNT|FILE", help=f"{names}, or a file of calibrate; then ,hosts=N,link=NAME,...")
    add = p.add_argument_group("which").add_argument
    add("--explorers", type=int, nargs="+", metavar="K", help="consider these (all of the profile)")
    add("--rows", type=int, nargs="+", metavar="W", help="consider these (all of the profile)")
    add = p.add_argument_group("what is shown").add_argument
    add("--top", type=int, default=12, metavar="N", help="so many of the fastest (%(default)s)")
    add("--batches", action="store_true", help="also what a token costs from batch 1 to 64")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add = p.add_argument_group("compiled evidence").add_argument
    add("--compile-for", metavar="TOPOLOGY", help="as v5e:2x4, v6e:2x4 or v5p:2x2x2: compile a tick, AR and tensor AR")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    args = parser().parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else NO_TERMINAL)
    return exit_code(lambda: run(args, console))


def run(args: argparse.Namespace, console: Console) -> None:
    """Plans as the flags say and prints it.

    Raises:
      DexError: flags that do not go together, or what they name cannot be read.
    """
    from dex_jax.evaluation.planner.ead_profile import read_profile

    if min(args.batch, args.context, args.top) < 1:
        raise DexError("--batch, --context and --top must be at least 1")
    if args.hardware is None and args.compile_for is None:
        raise DexError(f"say for what to plan: --hardware with one of {', '.join(DEVICES)}, or --compile-for")
    if args.hardware is not None and args.profile is None:
        raise DexError(
            "ticks follow from an EAD profile: give --profile (python -m dex_jax.evaluation.planner.profile writes one)"
        )
    config = config_of(args.model)
    report: dict[str, Any] = {"model": args.model}
    if args.hardware is not None:
        found = hardware(args.hardware)
        s = Setting(work_of(config), exits_of(args.exits, args.model), found, args.batch, args.context, args.layout)
        profile = read_profile(args.profile)
        chosen = plan(s, profile, explorers=args.explorers, rows=args.rows)
        report |= {
            "setting": dataclasses.asdict(s),
            "assumption": profile.assumption,
            "recommendation": chosen.sentence,
        }
        report["predictions"] = [each.to_json() for each in chosen.predictions]
        costs = cost_by_batch(s, chosen, profile) if args.batches else None
        if costs is not None:
            report["by_batch"] = {str(b): [p.to_json() for p in each] for b, each in costs.items()}
        if not args.json:
            show(console, s, profile.assumption, chosen, args.top, costs)
    if args.compile_for is not None:
        from dex_jax.evaluation.planner.compiled import compiled_evidence, evidence_table

        evidence = compiled_evidence(
            config,
            args.compile_for,
            explorers=(args.explorers or [8])[0],
            rows=(args.rows or [None])[0],
            batch=args.batch,
            context=args.context,
            notify=lambda line: print(line, file=sys.stderr, flush=True),
        )
        report["compiled"] = [dataclasses.asdict(each) for each in evidence]
        if not args.json:
            console.print(evidence_table(evidence))
    if args.json:
        print(json.dumps(report, allow_nan=False))


def exits_of(text: str, model: str) -> ExitWork:
    """Shapes of the exits that the flag names.

    Raises:
      DexError: no such exits.
    """
    from dex_jax.decoding.exits import default_exits
    from dex_jax.io import open_checkpoint
    from dex_jax.io.exits_file import load_exits

    config = config_of(model)
    described = described_exits(text, config)
    if described is not None:
        return described
    if text == "default":
        if model.lower() in SHAPES or model.endswith(".json"):
            return exit_work(None, config)
        shipped = default_exits(open_checkpoint(model).fingerprint())
        return exit_work(None if shipped is None else shipped.config, config)
    exits = load_exits(text).config
    if exits.width != config.width:
        raise DexError(f"the exits in {text} are for a model of width {exits.width}, and {model} has {config.width}")
    return exit_work(exits, config)


def cost_by_batch(s: Setting, chosen: Plan, profile: Profile) -> dict[int, list[Prediction]]:
    """For each batch the best DEX of this plan, with its mesh, grid and rows, beside all other ways that fit."""
    found = {}
    for batch in BATCHES:
        larger = dataclasses.replace(s, batch=batch)
        rows = [p for p in others(larger, profile) if p.fits]
        best = chosen.best_dex
        if best is not None and best.method == "dex":
            ticks = profile.ticks(best.depths, best.rows)
            assert ticks is not None  # the plan is of this profile
            step = cost_model.tick(larger, best.depths, best.rows, ticks, best.tensor)
            size = cost_model.bytes_per_device(larger, best.stages, best.tensor, rows=best.rows, depths=best.depths)
            shape = (best.stages, best.tensor)
            made = prediction(larger, "dex", shape, best.depths, best.rows, step, best.tokens_a_step, size, best.detail)
            rows += [made] * made.fits
        found[batch] = sorted(rows, key=lambda p: -p.tokens_per_second)
    return found


def show(
    console: Console,
    s: Setting,
    assumption: str | None,
    chosen: Plan,
    top: int,
    costs: dict[int, list[Prediction]] | None = None,
) -> None:
    """Prints tables and the recommendation."""
    console.print(f"{s.hardware.name}; batch {s.batch}, context {s.context}, exits {s.exits.name}")
    if assumption is not None:
        console.print(f"EAD assumed, not measured: {assumption}")
    shown = list(chosen.predictions[:top])
    # Each way appears once at least.
    for method in dict.fromkeys(p.method for p in chosen.predictions):
        if method not in {p.method for p in shown}:
            shown.append(next(p for p in chosen.predictions if p.method == method))
    console.print(predictions_table(shown))
    if costs is not None:
        console.print(costs_table(costs))
    console.print(chosen.sentence)


def predictions_table(predictions: list[Prediction]) -> Table:
    """One line a way: speed, step, and what takes its time."""
    table = Table(box=None, pad_edge=False)
    table.add_column("way", overflow="fold", ratio=1)
    for name in ("tok/s", "step ms", "tok/step", "GB/device", "% " + " ".join(PART_NAMES), "$/M tok"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in predictions:
        parts = " ".join(f"{100 * value / p.step.total:6.0f}" for value in dataclasses.astuple(p.step))
        price = "-" if p.dollars_per_million is None else f"{p.dollars_per_million:.2f}"
        speed = f"{p.tokens_per_second:.1f}" if p.fits else "too big"
        size = f"{p.bytes_per_device / 1e9:.2f}"
        table.add_row(p.detail, speed, f"{p.step.total * 1e3:.3f}", f"{p.tokens_a_step:.2f}", size, parts, price)
    return table


def costs_table(costs: dict[int, list[Prediction]]) -> Table:
    """Speed and cost of a token from batch 1 to 64: latency is bought with throughput."""
    title = "tokens a second of one sequence, then dollars for a million tokens (or device milliseconds for one)"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("way", overflow="fold")
    for batch in costs:
        table.add_column(f"B = {batch}", justify="right", no_wrap=True)
    methods = dict.fromkeys((p.method, p.stages, p.tensor) for each in costs.values() for p in each)
    for key in methods:
        cells, name = [], ""
        for each in costs.values():
            found = next((p for p in each if (p.method, p.stages, p.tensor) == key), None)
            if found is None:
                cells.append("-")
                continue
            name = f"{found.method}, {found.stages} x {found.tensor}"
            price = found.dollars_per_million
            cost = f"{found.device_seconds * 1e3:.2f} ms" if price is None else f"${price:.2f}"
            cells.append(f"{found.tokens_per_second:.0f}, {cost}")
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
