"""Flags of decode.py and the prompts that they name; nothing here imports JAX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dex_jax
from dex_jax.cli.common import add_model, depths, program, whole
from dex_jax.errors import DexError
from dex_jax.foreign import reading
from dex_jax.prompt_files import lines_of, read_prompts

if TYPE_CHECKING:
    from dex_jax.decoding.methods import Method
    from dex_jax.prompts import Prompt

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

FIELDS = ("explorers", "depths", "rows")
"""Of Dex, each a flag of its name."""

MOST = 4096
"""Rows a stage and continuations a prompt: more is a slip."""

MOST_TOKENS, MOST_SEEDS = 2**24, 2**63 - 1

EXITS_HELP = """exit heads: "default" (what ships for the model), "shared" (the model's own head at every depth; no
drafter), a .safetensors file or a folder of {train}, a folder or hub id of an EAGLE-3 head; they change how fast text
comes, never the text (%(default)s)"""


def parser() -> argparse.ArgumentParser:
    """The argument parser of decode.py."""
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
    add("--exits", default="default", metavar="EXITS", help=EXITS_HELP.format(train=program("train_exits.py")))
    add("--draft-model", metavar="NAME", help="a small model of the same vocabulary that drafts, instead of exits")

    add = p.add_argument_group("prompts").add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    add("--prompt-file", metavar="FILE", help="one a line; .jsonl or .json: rows of a data set; -: lines of stdin")
    add("--no-chat", action="store_true", help="use prompts as they are, without the chat template")

    add = p.add_argument_group("method").add_argument
    add("--method", choices=["dex", "ar"], default="dex", help="ar: all layers for every token (%(default)s)")
    add(
        "--explorers",
        type=int,
        metavar="K",
        help="number of exit depths, evenly spaced (1, or AR where that should be faster; on a mesh its stages; "
        "without drafts 5)",
    )
    add("--depths", type=depths, metavar="X,...,L", help="the exit depths themselves, ending at the last layer")
    add("--rows", type=_rows, metavar="W", help='nodes a stage runs at most; "full", without drafts, never prunes')
    add("--no-draft", action="store_true", help="draft nothing before the first layer: the paper's method")
    add("--no-decs", action="store_true", help="let exits repeat tokens that a node's children already hold")

    add = p.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=whole(1, MOST_TOKENS), default=128, metavar="N", help="%(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (%(default)s)")
    add("--top-k", type=whole(1, MOST_TOKENS), metavar="K", help="keep the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="keep the smallest set of probability P")
    add("--seed", type=whole(0, MOST_SEEDS), default=0, help="row b of the batch uses seed + b (%(default)s)")
    add("--num-samples", type=whole(1, MOST), default=1, metavar="N", help="continuations of each prompt (%(default)s)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")

    add = p.add_argument_group("output").add_argument
    add("--json", action="store_true", help="one JSON object a sequence on stdout, and no text")
    add("--color-depth", action="store_true", help="colour each token by the exit that first gave it")
    add("--check", action="store_true", help="decode with plain AR too and compare token by token")
    add("--dry-run", action="store_true", help="print what would be needed of memory, load nothing")
    add("--hardware", metavar="NAME", help="with --dry-run: of one such device, t4, a100-40, h100 or v5e, say")
    return p


def check_flags(args: argparse.Namespace) -> None:
    """Says on stderr which flags are without effect. DexError: flags that do not go together."""
    if args.hardware is not None and not args.dry_run:
        raise DexError("--hardware is for estimates: add --dry-run")
    for name in (*FIELDS, "no_draft", "no_decs", "draft_model"):
        if args.method == "ar" and getattr(args, name) not in (None, False):
            raise DexError(f"--{name.replace('_', '-')} means nothing with --method ar: leave one of them out")
    if args.draft_model is not None and args.exits != "default":
        raise DexError("--draft-model stands in the place of --exits: leave one of them out")
    filters = [f"--{name}" for name in ("top-k", "top-p") if getattr(args, name.replace("-", "_")) is not None]
    if args.temperature == 0 and filters:
        words = "changes nothing at temperature 0, which is greedy: add --temperature 1, say"
        print(f"{' and '.join(filters)} {words}", file=sys.stderr)


def method_of(args: argparse.Namespace) -> Method:
    """The method that the flags name."""
    if args.method == "ar":
        return dex_jax.AR()
    given: dict[str, Any] = {field: getattr(args, field) for field in FIELDS}
    return dex_jax.Dex(**given, decs=not args.no_decs, draft=not args.no_draft)


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """Prompts of --prompt, then those of --prompt-file. DexError: there are none, or as of `read_prompts`."""
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


def _rows(text: str) -> int | str:
    return text if text == "full" else whole(1, MOST)(text)
