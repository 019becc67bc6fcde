"""`python -m dex_jax.cli.report DIR`: summary.md and plots of a benchmark, from its results.jsonl alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dex_jax.errors import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where tokens are not AR's, 2 for bad input."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.cli.report", description=__doc__.splitlines()[0])
    p.add_argument("folder", help="of a benchmark")
    p.add_argument("--no-plots", action="store_true", help="summary.md alone")
    p.add_argument("--output", metavar="DIR", help="another folder to write into")
    args = p.parse_args(argv)

    def run() -> int:
        from dex_jax.evaluation.bench.comparison import mismatches
        from dex_jax.evaluation.bench.report import write
        from dex_jax.evaluation.bench.results import read_results

        files = write(args.folder, not args.no_plots, args.output)
        wrong = mismatches(read_results(args.folder))
        print("written: " + ", ".join(str(file) for file in files), file=sys.stderr)
        return 1 if wrong else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
