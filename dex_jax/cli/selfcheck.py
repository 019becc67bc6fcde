"""The command line of `python -m dex_jax.selfcheck`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from dex_jax.cli.common import add_model
from dex_jax.errors import exit_code
from dex_jax.progress import notify, phases


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    p = argparse.ArgumentParser(
        prog="python -m dex_jax.selfcheck",
        description="Checks depth exploration decoding on this device and times it; takes about two minutes.",
    )
    p.add_argument("--quick", action="store_true", help="tokens and ticks only, in about half a minute")
    add_model(p.add_argument)
    p.add_argument("--json", action="store_true", help="print one JSON object instead of the block")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where a check fails, 2 for bad input."""
    args = parser().parse_args(arguments)
    return exit_code(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    with phases():
        notify("importing JAX")
        from dex_jax import selfcheck
        from dex_jax.language_model import load

        check = selfcheck.quick_check if args.quick else selfcheck.selfcheck
        report = check(load(args.model, args.dtype, weights=args.weights))
    print(report.json() if args.json else report.text())
    return 0 if report.holds else 1
