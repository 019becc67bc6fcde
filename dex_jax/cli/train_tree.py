"""`train_exits.py tree`: the trees that pay with one explorer on this device, written into a drafter's file."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dex_jax.cli.common import program
from dex_jax.errors import DexError

if TYPE_CHECKING:
    from dex_jax.evaluation.tree_search import TreeFigures


def tree_parser() -> argparse.ArgumentParser:
    """The parser of `train_exits.py tree`."""
    p = argparse.ArgumentParser(
        prog=program("train_exits.py") + " tree",
        description="Search for the trees that are fastest with one explorer on this device, on answers to prompts of "
        "your choice, and write them into the drafter's file.",
    )
    add = p.add_argument
    add("--exits", required=True, metavar="FROM", help="the drafter: file or folder")
    add("--output", required=True, metavar="OUT.safetensors", help="the drafter with its trees")
    add("--model", default="smollm2-135m", help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--data", nargs="+", required=True, metavar="FILE", help="prompts: .jsonl, .json or .txt")
    add("--prompts", type=int, default=4, metavar="N", help="N prompts of each file, evenly spread (%(default)s)")
    add("--max-prompt-tokens", type=int, default=256, metavar="N", help="longer prompts are left out (%(default)s)")
    add("--max-new-tokens", type=int, default=96, metavar="N", help="of each answer (%(default)s)")
    add("--steps", type=int, default=4, metavar="N", help="at most so many moves for each of --sizes (%(default)s)")
    add("--sizes", type=int, nargs="+", default=[4, 8], metavar="N", help="rows of a tree (4 8)")
    add("--largest", type=int, default=16, metavar="N", help="rows of the one that ticks choose from (%(default)s)")
    add("--float32", action="store_true", help="write full precision; otherwise 8-bit matrices")
    return p


def tree(args: argparse.Namespace) -> None:
    """Searches, prints every tree tried, and writes the drafter with the best ones.

    Raises:
      DexError: a model, a drafter or prompts that are not there or do not fit.
    """
    from dex_jax.cli.common import remember_compilations
    from dex_jax.cli.train_results import spread
    from dex_jax.decoding.dex.trees import with_trees
    from dex_jax.evaluation.tree_search import search_trees
    from dex_jax.io.exits_file import check_exits_path, load_exits, save_exits
    from dex_jax.language_model import load
    from dex_jax.prompt_files import read_prompts

    check_exits_path(args.output)
    if args.prompts < 1 or args.steps < 0:
        raise DexError("--prompts must be at least 1 and --steps at least 0")
    drafter = load_exits(args.exits)
    chosen = [prompt for path in args.data for prompt in spread(read_prompts(path), args.prompts)]
    remember_compilations()
    lm = load(args.model)

    def tell(figures: TreeFigures) -> None:
        print(_line(figures), file=sys.stderr, flush=True)

    prompts = [ids for ids in map(lm.encode, chosen) if len(ids) <= args.max_prompt_tokens]
    if not prompts:
        raise DexError(f"every prompt has more than {args.max_prompt_tokens} tokens: raise --max-prompt-tokens")
    options = {"sizes": args.sizes, "largest": args.largest, "new_tokens": args.max_new_tokens, "steps": args.steps}
    found = search_trees(lm, drafter, prompts, **options, tell=tell)
    save_exits(args.output, with_trees(drafter, [each.tree for each in found]), int8=not args.float32)
    print(f"{args.output}: {_line(found[0])}")


def _line(figures: TreeFigures) -> str:
    shape = figures.tree.shape
    return (
        f"rows a level {', '.join(map(str, shape.widths))}, {shape.drafted} drafted: "
        f"{figures.tree.tokens_a_tick:.2f} tokens a tick of {1000 * figures.tick_seconds:.1f} ms, "
        f"{figures.speedup:.2f} times AR"
    )
