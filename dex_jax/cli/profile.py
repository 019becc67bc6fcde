"""`python -m dex_jax.cli.profile`: the EAD profile of a model and its exits on prompts of your choice.

Lets the model answer prompts greedily, runs the texts once, teacher-forced, and writes when tokens become available,
what an oracle and each grid could make of it, and the ticks that follow; with --drafts it also counts the ticks of
explorers with drafts, which no text says ahead. The planner reads the file.
"""

from __future__ import annotations

import argparse
import sys

from dex_jax.cli.common import add_model, depths, remember_compilations, whole
from dex_jax.cli.train_arguments import add_answers
from dex_jax.errors import DexError, exit_code
from dex_jax.progress import phases

EXPLORERS = (2, 3, 4, 5, 6, 8, 10, 15)


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.cli.profile", description=__doc__.splitlines()[0])
    add = p.add_argument
    add("--exits", default="default", help='folder, file, "default" or "shared" (then every layer is an exit)')
    add("--depths", type=depths, metavar="X,...", help="of shared exits (every layer)")
    add_model(add)
    add_answers(add)
    add("--explorers", type=whole(1, 4096), nargs="+", default=list(EXPLORERS), metavar="K", help="grids (%(default)s)")
    add("--grid", type=depths, nargs="+", default=[], metavar="X,...", help="further grids, as 6,12,30")
    add("--drafts", action="store_true", help="count ticks with drafts too, of one explorer and of each grid")
    add("--output", required=True, metavar="FILE.json", help="where the profile goes")
    add("--plots", metavar="FOLDER", help="also draw it (needs matplotlib)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args), "Stopped. Answers are kept where --cache says.")


def run(args: argparse.Namespace) -> None:
    """Measures and writes, as the flags say. DexError: a model, exits, prompts or grids are not there or do not fit."""
    from dex_jax.cli.train_results import answered, chosen_exits
    from dex_jax.evaluation.planner.profile import draw, profile_of, profile_table, ticks_with_drafts
    from dex_jax.forced.run import measure
    from dex_jax.io.whole_files import write_json
    from dex_jax.language_model import load

    remember_compilations()
    with phases():
        lm = load(args.model, args.dtype, weights=args.weights)
    if args.exits == "shared" and args.depths is None:
        args.depths = tuple(range(1, lm.config.num_layers))
    exits = chosen_exits(args, lm)
    texts = answered(args, lm)
    _say(f"teacher-forcing {sum(map(len, texts.values()))} texts")
    every = [text for group in texts.values() for text in group]
    measured = measure(lm, exits, every, explorers=args.explorers, depths=args.grid, batch=args.batch)
    if not measured.grids:
        raise DexError("the exits serve none of these --explorers: name others, or give their depths with --grid")
    groups, start = {}, 0
    for name, group in texts.items():
        groups[name] = measured.of(range(start, start + len(group)))
        start += len(group)
    about = {"model": args.model, "exits": str(args.exits), "max_new_tokens": args.max_new_tokens}
    if args.drafts:
        _say(f"decoding with drafts, {1 + len(measured.grids)} grids")
    options = {"max_new_tokens": args.max_new_tokens, "batch": args.batch}
    drafts = ticks_with_drafts(lm, exits, every, measured.grids, **options) if args.drafts else ()
    profile = profile_of(measured, groups, about=about, drafts=drafts)
    write_json(args.output, profile.to_json())
    print(profile_table(profile))
    if args.plots is not None:
        for file in draw(profile, args.plots):
            _say(f"drawn: {file}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
