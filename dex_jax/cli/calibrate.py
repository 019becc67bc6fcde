"""`python -m dex_jax.cli.calibrate`: measures the device at hand for the planner, with this library's programs.

    python -m dex_jax.cli.calibrate --model smollm2-135m --output cpu.json

Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import math
import sys

from dex_jax.cli.common import add_model
from dex_jax.errors import DexError, exit_code
from dex_jax.hardware import write_hardware

ROWS, LONG = (1, 2, 4, 8, 16, 32), 2048


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.cli.calibrate", description=__doc__.splitlines()[0])
    add_model(p.add_argument)
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="R", help="row counts (%(default)s)")
    p.add_argument("--long", type=int, default=LONG, metavar="S", help="longer cache that is measured (%(default)s)")
    p.add_argument("--memory", type=float, metavar="GB", help="of the device, which is asked unless it is given")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements of each figure (%(default)s)")
    p.add_argument("--least", type=float, default=0.05, metavar="SECONDS", help="of each measurement (%(default)s)")
    p.add_argument("--output", required=True, metavar="FILE.json", help="for plan --hardware")
    args = p.parse_args(argv)
    return exit_code(lambda: _run(args), "Stopped; nothing is written.")


def _run(args: argparse.Namespace) -> None:
    from dex_jax.evaluation.planner.calibrate import SHORT, calibrate, summary
    from dex_jax.evaluation.planner.timed_programs import Timer
    from dex_jax.evaluation.planner.workload import config_of
    from dex_jax.language_model import resolve_dtype

    rows = sorted(set(args.rows))
    if rows[0] < 1 or rows[-1] > SHORT or args.repeats < 1 or args.least <= 0 or args.long <= SHORT:
        raise DexError(f"--rows must be 1 to {SHORT}, --repeats at least 1, --least above 0, --long above {SHORT}")
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise DexError(f"--memory must be above 0, not {args.memory:g}")
    found = calibrate(
        config_of(args.model),
        resolve_dtype(args.dtype),
        rows=rows,
        long=args.long,
        memory=None if args.memory is None else args.memory * 1e9,
        timer=Timer(args.repeats, args.least),
        notify=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_hardware(args.output, found)
    print(summary(found))


if __name__ == "__main__":
    sys.exit(main())
