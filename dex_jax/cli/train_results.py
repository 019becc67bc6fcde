"""The commands of train_exits.py for trained exits: `export` and `evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dex_jax.errors import DexError

if TYPE_CHECKING:
    from dex_jax.decoding.forced import PromptAndAnswer
    from dex_jax.io.exits_file import TrainedExits
    from dex_jax.language_model import LanguageModel


def export(args: argparse.Namespace) -> None:
    """Write a run's exits to one file and print its size; raise DexError if there are none or writing fails."""
    from dex_jax.io.exits_file import FILE_NAME, check_exits_path, load_exits, save_exits

    folder, output = Path(args.folder), Path(args.output)
    check_exits_path(output)
    if not folder.is_dir():
        raise DexError(f"there is no folder {folder}: give the one of a training, such as runs/smollm2_135m")
    if not (folder / FILE_NAME).is_file():
        raise DexError(f"{folder} holds no exits yet: they are there from the first checkpoint on")
    exits = load_exits(folder)
    save_exits(output, exits, int8=not args.float32)
    form = "float32" if args.float32 else "int8"
    depths = ", ".join(map(str, exits.config.depths))
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {form}, {exits.config.kind} exits at depths {depths}")


def evaluate(args: argparse.Namespace) -> None:
    """Measure exits on the model's greedy answers and print tables; raise DexError if anything is missing or unfit."""
    from dex_jax.io.whole_files import write_json
    from dex_jax.language_model import load
    from dex_jax.training.figures import grouped_figures, tables

    lm = load(args.model, args.dtype, weights=args.weights)
    exits = chosen_exits(args, lm)
    groups = answered(args, lm)
    figures = grouped_figures(lm, exits, groups, batch=args.batch)
    print(tables(figures))
    if args.output is not None:
        about = {"exits": str(args.exits), "model": str(args.model), "max_new_tokens": args.max_new_tokens}
        write_json(args.output, about | {"groups": {name: each.to_json() for name, each in figures.items()}})


def chosen_exits(args: argparse.Namespace, lm: LanguageModel) -> TrainedExits:
    """Return the exits that --exits names, shared ones at depths of even grids; raise DexError if there are none."""
    from dex_jax.io.exits_file import default_exits, load_exits

    if args.exits == "shared":
        from dex_jax.decoding.forced import untrained_exits
        from dex_jax.training.figures import even_grids

        grids = even_grids(lm.config.num_layers)
        return untrained_exits(lm, tuple(sorted({depth for grid in grids for depth in grid[:-1]})))
    exits = default_exits(lm.fingerprint) if args.exits == "default" else load_exits(args.exits)
    if exits is None:
        raise DexError(f"no trained exits ship with {lm.source}: give a folder, a file, or shared")
    if exits.fingerprint != lm.fingerprint:
        print(f"warning: the exits in {exits.source} were trained on another model", file=sys.stderr, flush=True)
    return exits


def answered(args: argparse.Namespace, lm: LanguageModel) -> dict[str, list[PromptAndAnswer]]:
    """Return prompts with the model's answers by the stem of their file, or by its path where stems are equal."""
    from dex_jax.prompt_files import read_prompts
    from dex_jax.training.figures import answers

    stems = [Path(path).name.split(".")[0] for path in args.data]
    names = [path if stems.count(stem) > 1 else stem for path, stem in zip(args.data, stems, strict=True)]
    prompts = {name: spread(read_prompts(path), args.prompts) for name, path in zip(names, args.data, strict=True)}
    return {name: answers(lm, asked, args.max_new_tokens, args.batch) for name, asked in prompts.items()}


def spread(prompts: list[Any], count: int | None) -> list[Any]:
    """Pick `count` prompts at even distances, in order, beginning with the first; all of them for None or too few."""
    if count is None or count >= len(prompts):
        return prompts
    return [prompts[at * len(prompts) // count] for at in range(count)]
