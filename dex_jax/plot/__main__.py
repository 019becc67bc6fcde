"""`python -m dex_jax.plot --prompt "..."`: decodes a prompt and draws its lattice over ticks into a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dex_jax.decoding.methods import Dex
from dex_jax.decoding.trace import trace
from dex_jax.errors import DexError, exit_code
from dex_jax.language_model import load
from dex_jax.plot.figures import new_figure
from dex_jax.plot.over_ticks import TICKS, lattice

FORMATS = (".png", ".svg", ".pdf")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.plot", description=__doc__)
    add = p.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to answer")
    add("--output", default="lattice.png", metavar="FILE", help=f"{', '.join(FORMATS)} (%(default)s)")
    add("--model", default="smollm2-135m", help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--dtype", help="float32, bfloat16 or float16; default: what suits the device")
    add("--exits", default="default", metavar="EXITS", help='"default", "shared", a file or a folder (%(default)s)')
    add("--explorers", type=int, default=5, metavar="K", help="number of exit depths (%(default)s)")
    add("--max-new-tokens", type=int, default=24, metavar="N", help="%(default)s")
    add("--ticks", type=int, nargs=2, default=(0, TICKS), metavar=("FIRST", "LAST"), help=f"which to draw (0 {TICKS})")
    add("--no-candidates", action="store_true", help="only the upper part, how nodes climb")
    add("--no-chat", action="store_true", help="use the prompt as it is, without the chat template")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input."""
    args = parser().parse_args(arguments)
    return exit_code(lambda: _draw(args))


def _draw(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.suffix not in FORMATS:
        raise DexError(f"pictures are written as {', '.join(FORMATS)}, not to {output}: name it so")
    new_figure(1, 1)  # without matplotlib, say so before the model is loaded
    lm = load(args.model, args.dtype)
    options = {"exits": args.exits, "max_new_tokens": args.max_new_tokens, "chat": not args.no_chat}
    recorded = trace(lm, args.prompt, method=Dex(explorers=args.explorers, schedule="parallel"), **options)
    figure = lattice(recorded, tuple(args.ticks), candidates=not args.no_candidates)
    try:
        figure.savefig(output)
    except OSError as error:
        raise DexError(f"the picture cannot be written to {output}: {error.strerror or error}") from error
    print(output)


if __name__ == "__main__":
    sys.exit(main())
