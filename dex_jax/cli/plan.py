"""Which K, grid and rows to choose on some hardware, with drafts or without, or no explorers at all.

    python -m dex_jax.cli.plan --model smollm2-135m --profile profile.json --hardware cpu.json
    python -m dex_jax.cli.plan --model llama-2-70b --exits linear:8192 --profile assumed.json \\
        --hardware h100x8

Nothing is loaded and nothing is run: predictions follow from shapes, an EAD profile and the cost model, whose
assumptions stand in `cost_model`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from dex_jax.errors import DexError, exit_code
from dex_jax.hardware import DEVICES, hardware, platform_of

if TYPE_CHECKING:
    from dex_jax.evaluation.planner.predictions import Plan, Prediction


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = argparse.ArgumentParser(
        prog="python -m dex_jax.cli.plan",
        description=__doc__.splitlines()[0],
        epilog="Exit codes: 0 done, 2 bad input.",
    )
    add = p.add_argument_group("what is decoded").add_argument
    add("--model", default="smollm2-135m", help="alias, directory, file, hub id, config.json, or as llama-2-70b")
    add("--exits", default="default", help='file, folder, "default", or a description: KIND or KIND:DRAFT VOCABULARY')
    add("--profile", metavar="FILE", help="of python -m dex_jax.cli.profile, or an assumed one")
    add("--weights", choices=["stored", "int8", "dense"], help="what the model's weights are kept as (dense)")
    add("--batch", type=int, default=1, metavar="B", help="sequences (%(default)s)")
    add("--context", type=int, default=1024, metavar="S", help="positions attended to, or cache length (%(default)s)")
    add = p.add_argument_group("on what").add_argument
    names = ", ".join(DEVICES)
    add("--hardware", metavar="NAMExCOUNT|FILE", help=f"{names}, or a file of calibrate; then ,hosts=N,link=NAME,...")
    add = p.add_argument_group("which").add_argument
    add("--explorers", type=int, nargs="+", metavar="K", help="consider these (all of the profile)")
    add("--rows", type=int, nargs="+", metavar="W", help="consider these (all of the profile)")
    add = p.add_argument_group("what is shown").add_argument
    add("--top", type=int, default=12, metavar="N", help="so many of the fastest (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Plans as the flags say and prints it. DexError: they do not go together, or name what cannot be read."""
    from dex_jax.evaluation.planner.cost_model import Setting
    from dex_jax.evaluation.planner.ead_profile import read_profile
    from dex_jax.evaluation.planner.predictions import plan, predictions_table
    from dex_jax.evaluation.planner.workload import config_of, drafter_of, exits_of, packed_bytes, work_of

    if min(args.batch, args.context, args.top) < 1:
        raise DexError("--batch, --context and --top must be at least 1")
    if args.hardware is None:
        raise DexError(f"say for what to plan: --hardware with one of {', '.join(DEVICES)}, or a file of calibrate")
    if args.profile is None:
        raise DexError("ticks follow from an EAD profile: give --profile (python -m dex_jax.cli.profile writes one)")
    work, found = work_of(config_of(args.model)), hardware(args.hardware)
    exits, drafter = exits_of(args.exits, args.model), drafter_of(args.model)
    packed = packed_bytes(args.model, args.weights, platform_of(found.device.name))
    if packed is not None and found.device.measured is not None:
        raise DexError(f"{args.hardware} was calibrated with dense weights: leave --weights out, or name a device")
    s = Setting(work, exits, found, args.batch, args.context, drafter, packed)
    profile = read_profile(args.profile)
    chosen = plan(s, profile, explorers=args.explorers, rows=args.rows)
    if args.json:
        report: dict[str, Any] = {
            "model": args.model,
            "setting": dataclasses.asdict(s),
            "assumption": profile.assumption,
            "recommendation": chosen.sentence,
            "predictions": [each.to_json() for each in chosen.predictions],
        }
        print(json.dumps(report, allow_nan=False))
        return
    print(f"{s.hardware.name}; batch {s.batch}, context {s.context}, exits {s.exits.name}")
    if profile.assumption is not None:
        print(f"EAD assumed, not measured: {profile.assumption}")
    if not profile.drafts:
        print("The profile knows no ticks with drafts: the pipeline that runs trees, a rival to beat, is left out.")
    print(f"\n{predictions_table(shown(chosen, args.top))}\n\n{chosen.sentence}")


def shown(chosen: Plan, top: int) -> list[Prediction]:
    """The fastest predictions, and each way once at least."""
    found = list(chosen.predictions[:top])
    for each in chosen.predictions:
        if each.method not in {p.method for p in found}:
            found.append(each)
    return found


if __name__ == "__main__":
    sys.exit(main())
