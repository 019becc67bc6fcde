"""The flags of decode.py and the prompts that they name; nothing here imports JAX."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dex_jax.cli.common import add_model, depths, program, whole
from dex_jax.decoding.request import AR, MOST_ROWS, MOST_SEEDS, Dex, Request
from dex_jax.errors import DexError
from dex_jax.foreign import reading
from dex_jax.prompt_files import lines_of, read_prompts

if TYPE_CHECKING:
    from dex_jax.io.prompts import Prompt

EPILOG = """\
examples:
  %(prog)s --prompt "Why is the sky blue?"
  %(prog)s --prompt "Write a limerick" --explorers 10 --no-draft --color-depth
  %(prog)s --prompt-file questions.jsonl --json > answers.jsonl
  %(prog)s --model path/to/llama --depths 8,16,32 --prompt "Hi" --check
  %(prog)s --explorers 5 --mesh stage=5 --prompt "Why is the sky blue?"

The text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 --check found a difference,
2 bad input, 130 interrupted.
"""

METHODS = {"dex": Dex, "ar": AR}

MOST_TOKENS = 2**24
"""The largest number of tokens that a flag takes; more is a typing error."""

KINDS: dict[str, Any] = {
    "explorers": int,
    "depths": depths,
    "rows": lambda text: text if text == "full" else whole(1, MOST_ROWS)(text),
    "max_new_tokens": whole(1, MOST_TOKENS),
    "temperature": float,
    "top_k": whole(1, MOST_TOKENS),
    "top_p": float,
    "seed": whole(0, MOST_SEEDS - 1),
    "num_samples": whole(1, MOST_ROWS),
}
"""The functions that parse the values of flags; all others are texts."""


def parser() -> argparse.ArgumentParser:
    """Return the argument parser of decode.py."""
    p = argparse.ArgumentParser(
        prog=program("decode.py"),
        description="Decode a language model with Depth Exploration Decoding: several exit depths are explored at "
        "once and the final layer's token is always the one that is kept, so the text is exactly that of plain "
        "autoregressive decoding.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument_group("model").add_argument
    add_model(add)
    add("--mesh", metavar="AXIS=N,...", help="spread over devices: stage=5, stage=2,tensor=3, data=2,stage=2")
    add("--distributed", action="store_true", help="one of several processes, each started with the same arguments")

    add = p.add_argument_group("prompts").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    add("--prompt-file", metavar="FILE", help="one a line; .jsonl or .json: rows of a data set; -: lines of stdin")
    add("--batch", type=whole(1, MOST_ROWS), metavar="N", help="prompts decoded together (8 on a CPU, all elsewhere)")

    group = p.add_argument_group("method")
    group.add_argument(
        "--method", choices=[*METHODS], default="dex", help="ar: all layers for every token (%(default)s)"
    )
    _add_options(group.add_argument, Dex)
    _add_options(p.add_argument_group("decoding").add_argument, Request)

    add = p.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one JSON object a sequence on stdout, and no text")
    add("--color-depth", action="store_true", help="colour each token by the exit that first gave it")
    add(
        "--player",
        metavar="FILE.html",
        help="write a page that plays the decode; 5 explorers unless you ask for others",
    )
    add("--check", action="store_true", help="decode with plain AR too and compare token by token")
    add("--dry-run", action="store_true", help="print what would be needed of memory, load nothing")
    add("--hardware", metavar="NAME", help="with --dry-run: of one such device, t4, a100-40, h100 or v5e, say")
    return p


def _add_options(add: Any, owner: type) -> None:
    """Add a flag for each field of Request or Dex that has one."""
    for field in dataclasses.fields(owner):
        about, name = field.metadata, field.name
        if about["flag"] is None:
            continue
        if about["off"] is not None:
            add(about["flag"], dest=name, action="store_false", help=about["off"])
            continue
        action = "append" if name == "stop" else "store"
        says = about["says"].split(" In Python")[0].replace("%", "%%")
        add(
            about["flag"], type=KINDS.get(name, str), default=field.default, action=action, metavar=about["metavar"],
            help=says if field.default is None else f"{says} (%(default)s)",
        )  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Tell on stderr which flags are without effect; raise DexError for flags that do not go together."""
    if args.hardware is not None and not args.dry_run:
        raise DexError("--hardware is for estimates: add --dry-run")
    if args.method != "dex":
        for field in dataclasses.fields(Dex):
            if getattr(args, field.name) != field.default:
                raise DexError(f"{field.metadata['flag']} means nothing with --method {args.method}: leave one out")
        if args.draft_model is not None:
            raise DexError(f"--draft-model means nothing with --method {args.method}: leave one out")
    if args.draft_model is not None and args.exits != "default":
        raise DexError("--draft-model stands in the place of --exits: leave one of them out")
    if args.player is not None:
        for flag, given in {"--mesh": args.mesh, "--distributed": args.distributed, "--dry-run": args.dry_run}.items():
            if given:
                raise DexError(f"--player traces on one device that is here: leave {flag} out")
        if args.method != "dex" or args.num_samples > 1 or len(args.prompt) != 1 or args.prompt_file or args.stop:
            raise DexError("--player plays DEX on one --prompt, sampled once and to its end: leave other flags out")
        if Path(args.player).is_dir():
            raise DexError(f"--player writes a file, and {args.player} is a folder: name a file in it")
    filters = [f"--{name}" for name in ("top-k", "top-p") if getattr(args, name.replace("-", "_")) is not None]
    if args.temperature == 0 and filters:
        words = "changes nothing at temperature 0, which is greedy: add --temperature 1, say"
        print(f"{' and '.join(filters)} {words}", file=sys.stderr)


def method_of(args: argparse.Namespace) -> AR | Dex:
    """Return the method that the flags name."""
    owner = METHODS[args.method]
    return owner(**{field.name: getattr(args, field.name) for field in dataclasses.fields(owner)})


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `generate` from the flags, except the method and the draft model, which must be loaded."""
    named = [field.name for field in dataclasses.fields(Request) if field.metadata["flag"] is not None]
    return {name: getattr(args, name) for name in named if name != "draft_model"}


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """Return the prompts of --prompt, then those of --prompt-file; raise DexError if there are none to be read."""
    prompts: list[Prompt] = list(args.prompt)
    if args.prompt_file is not None:
        prompts += _read_prompts(args.prompt_file)
    if not prompts:
        raise DexError('there is no prompt: give --prompt "...", --prompt-file FILE, or --prompt-file - for stdin')
    return prompts


def _read_prompts(name: str) -> Sequence[Prompt]:
    if name != "-":
        return read_prompts(name, other=".txt")
    if sys.stdin is None:
        raise DexError("--prompt-file - reads stdin, and stdin is closed: pipe prompts into it, or name a file")
    with reading("stdin", "pipe UTF-8 into it"):
        prompts = [line for _, line in lines_of(sys.stdin.read())]
    if not prompts:
        raise DexError("stdin holds no prompt: pipe a line for each into it")
    return prompts
