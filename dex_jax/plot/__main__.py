"""`python -m dex_jax.plot --prompt "..."`: decodes a prompt and draws its lattice over ticks, or its text by depth."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError, exit_code
from dex_jax.progress import notify, phases

FORMATS = {"lattice": (".png", ".svg", ".pdf"), "text": (".svg", ".html")}
WIDTH = 1600
"""Pixels of a PNG."""

UNDATED = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""What would make two files of one picture differ."""


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.plot", description=__doc__)
    add = p.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to answer")
    add("--text", action="store_true", help="draw the answer, each token in the colour of its exit (.svg or .html)")
    add("--output", metavar="FILE", help=".png, .svg or .pdf (lattice.png in the current folder, unless it is there)")
    add("--model", default="smollm2-135m", help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--dtype", help="float32, bfloat16 or float16; default: what suits the device")
    add("--exits", default="default", metavar="EXITS", help='"default", "shared", a file or a folder (%(default)s)')
    add("--explorers", type=int, default=5, metavar="K", help="number of exit depths (%(default)s)")
    add("--no-draft", action="store_true", help="draft nothing before the first layer: the paper's method")
    add("--max-new-tokens", type=int, metavar="N", help="24, of --text 96")
    add("--ticks", type=int, nargs=2, metavar=("FIRST", "LAST"), help="which to draw (0 26)")
    add("--no-candidates", action="store_true", help="only the upper part, how nodes climb")
    add("--no-chat", action="store_true", help="use the prompt as it is, without the chat template")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input."""
    args = parser().parse_args(arguments)
    return exit_code(lambda: _draw(args))


def _draw(args: argparse.Namespace) -> None:
    formats = FORMATS["text" if args.text else "lattice"]
    output = Path(args.output or ("text" if args.text else "lattice") + formats[0])
    if output.suffix not in formats:
        raise DexError(f"this picture is written as {' or '.join(formats)}, not to {output}: name it so")
    if args.output is None and output.exists():
        raise DexError(f"{output} is in this folder already: say with --output where to write")
    with phases() as display:
        notify("importing JAX")
        import dex_jax
        from dex_jax.plot.figures import new_figure

        if not args.text:
            new_figure(1, 1)  # without matplotlib, say so before the model is loaded
        lm = dex_jax.language_model.outline(args.model, args.dtype).load(display.part)
        tokens = args.max_new_tokens or (96 if args.text else 24)
        options = {"exits": args.exits, "max_new_tokens": tokens, "chat": not args.no_chat}
        method = dex_jax.Dex(explorers=args.explorers, draft=not args.no_draft)
        drawn: Any = (dex_jax.generate if args.text else dex_jax.trace)(lm, args.prompt, method=method, **options)
        notify("drawing")
        try:
            if args.text:
                shown = dex_jax.plot.depth_text(drawn)
                output.write_text(shown.html if output.suffix == ".html" else shown.svg(args.prompt), encoding="utf-8")
            else:
                ticks = None if args.ticks is None else tuple(args.ticks)
                figure = dex_jax.plot.lattice(drawn, ticks, candidates=not args.no_candidates)
                figure.savefig(output, dpi=WIDTH / figure.get_figwidth(), metadata=UNDATED.get(output.suffix))
        except OSError as error:
            raise DexError(f"the picture cannot be written to {output}: {error.strerror or error}") from error
    print(f"written: {output.absolute()}")


if __name__ == "__main__":
    sys.exit(main())
