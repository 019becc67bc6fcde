"""`python -m dex_jax.evaluation.planner.profile`: the EAD profile of a model and its exits on prompts of your choice.

Lets the model answer prompts greedily, runs the texts once, teacher-forced, and writes when tokens become available,
what an oracle and each grid could make of it, the ticks that follow, and what capped rows cost (`replay`). With
--real-loop the decode loop itself runs on the same prompts. The planner reads the file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dex_jax.decoding.output import ticks_of
from dex_jax.errors import DexError, exit_code
from dex_jax.evaluation.exit_forcing import Measurement
from dex_jax.evaluation.exit_metrics import figures_of, predicted_exits
from dex_jax.evaluation.planner.ead_profile import EAD, CappedRows, GridProfile, Profile, RealLoop
from dex_jax.evaluation.planner.replay import Replay, replay, table_of
from dex_jax.lattice import full_rows

if TYPE_CHECKING:
    from dex_jax.io.exits_file import TrainedExits
    from dex_jax.language_model import LanguageModel

EXPLORERS = (2, 3, 4, 5, 6, 8, 10, 15)
ROWS = (1, 2, 4, 8, 16, 32)
REPLAYED_TOKENS = 2000


def profile_of(
    measured: Measurement,
    groups: dict[str, Measurement],
    *,
    rows: Sequence[int] = ROWS,
    replayed_tokens: int = REPLAYED_TOKENS,
    about: dict[str, Any] | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> Profile:
    """The profile of a measurement.

    Args:
      measured: all texts.
      groups: name -> the texts of each group.
      rows: caps to replay; those above what a grid can fill come to that number.
      replayed_tokens: texts are replayed until they hold this many tokens.
      about: what to note.
      notify: told what is going on.
    """
    figures = figures_of(measured)
    ead = _ead(measured)
    few = measured.of(_texts_holding(measured.lengths, replayed_tokens))
    grids = []
    for depths, grid in zip(measured.grids, figures.grids, strict=True):
        notify(f"replaying K = {len(depths)} ({', '.join(map(str, depths))})")
        table, full = table_of(few, depths), full_rows(len(depths))
        counts = sorted({min(count, full) for count in rows})
        replays = {count: replay(table, count) for count in counts}
        # A share of the texts is replayed; what a cap adds is applied to the count over all of them.
        base = sum(ticks_of(exits, len(exits), len(depths)) for exits in predicted_exits(few, depths))
        capped = tuple(
            CappedRows(count, grid.ticks_per_token * (found.ticks / base), *_counts(found))
            for count, found in replays.items()
        )
        grids.append(
            GridProfile(
                depths=depths,
                exits=_by_exit(predicted_exits(measured, depths), len(depths)),
                ticks_per_token=grid.ticks_per_token,
                depth_side_speedup=grid.depth_side_speedup,
                resolution_bound=ead.resolution_bound(depths),
                capped=capped,
            )
        )
    return Profile(
        layers=measured.layers,
        ead=ead,
        agreement=dict(zip(figures.depths, figures.agreement, strict=True)),
        grids=tuple(grids),
        about={"texts": figures.texts, "tokens": figures.tokens} | (about or {}),
        groups={name: _ead(group) for name, group in groups.items()},
    )


def _ead(measured: Measurement) -> EAD:
    return EAD((*measured.depths, measured.layers), figures_of(measured).ead)


def _texts_holding(lengths: Sequence[int], tokens: int) -> list[int]:
    """As few evenly spread texts as hold so many tokens; all of them if none do."""
    count = len(lengths)
    spreads = ([number * count // few for number in range(few)] for few in range(1, count + 1))
    return next((chosen for chosen in spreads if sum(lengths[i] for i in chosen) >= tokens), list(range(count)))


def _by_exit(texts: Sequence[np.ndarray], stages: int) -> tuple[float, ...]:
    """Share of tokens after the first by exit [K]."""
    found = np.bincount(np.concatenate([exits[1:] for exits in texts]) - 1, minlength=stages)
    return tuple(float(x) for x in found / max(found.sum(), 1))


def _counts(found: Replay) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...], tuple[float, ...]]:
    """(used, widest, asked) as plain numbers."""
    used = tuple(tuple(map(float, row)) for row in found.used)
    return used, tuple(map(float, found.widest)), tuple(map(float, found.asked))


def real_loop(
    lm: LanguageModel, exits: TrainedExits | str, prompts: list[list[int]], depths: tuple[int, ...], new_tokens: int
) -> RealLoop:
    """Runs the loop on prompts, with the default rows.

    Args:
      lm: the model.
      exits: as of `dex_jax.generate`.
      prompts: token ids.
      depths: the grid.
      new_tokens: of each answer.
    """
    from dex_jax.decoding.generate import generate
    from dex_jax.decoding.methods import Dex

    ticks = tokens = rows = 0
    for prompt in prompts:
        out = generate(lm, [prompt], method=Dex(depths=depths), exits=exits, max_new_tokens=new_tokens)
        ticks += int(np.asarray(out.stats.ticks)[0])
        tokens += int(out.lengths[0]) - 1
        rows = out.stats.schedule.rows
    return RealLoop(rows, ticks / max(tokens, 1), len(depths) * tokens / max(ticks, 1))


def table(profile: Profile) -> str:
    """Markdown: one table by depth, one by grid, one by rows."""
    from dex_jax.tables import markdown

    ead = profile.ead
    by_depth = [
        [
            str(depth),
            f"{share:.3f}",
            f"{total:.3f}",
            f"{profile.agreement[depth]:.3f}" if depth in profile.agreement else "-",
        ]
        for depth, share, total in zip(ead.depths, ead.share, np.cumsum(ead.share), strict=True)
    ]
    by_grid = [
        [
            str(grid.stages),
            " ".join(map(str, grid.depths)),
            f"{grid.resolution_bound:.2f}",
            f"{grid.depth_side_speedup:.2f}",
            "-" if grid.real is None else f"{grid.real.depth_side_speedup:.2f} ({grid.real.rows} rows)",
            " ".join(f"{share:.2f}" for share in grid.exits),
        ]
        for grid in profile.grids
    ]
    caps = sorted({capped.rows for grid in profile.grids for capped in grid.capped})
    by_rows = []
    for grid in profile.grids:
        found = {capped.rows: capped.ticks_per_token for capped in grid.capped}
        cells = [f"{found[count]:.3f}" if count in found else "" for count in caps]
        by_rows.append([str(grid.stages), f"{grid.ticks_per_token:.3f}", *cells])
    about = profile.about
    return "\n\n".join(
        [
            f"{about['tokens']} tokens of {about['texts']} texts; mean EAD {ead.mean:.2f} of {profile.layers} layers, "
            f"oracle speedup {ead.oracle_speedup:.2f}",
            markdown(["depth", "EAD here", "by here", "agreement"], by_depth),
            markdown(["K", "depths", "grid's bound", "teacher-forced, DECS", "real loop", "tokens by exit"], by_grid),
            "Ticks per token by rows a stage, replayed:",
            markdown(["K", "never prunes", *map(str, caps)], by_rows),
        ]
    )


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    from dex_jax.cli.common import depths
    from dex_jax.language_model import DTYPES

    p = argparse.ArgumentParser(
        prog="python -m dex_jax.evaluation.planner.profile", description=__doc__.splitlines()[0]
    )
    add = p.add_argument
    add("--exits", default="default", help='folder, file, "default" or "shared" (then every layer is an exit)')
    add("--depths", type=depths, metavar="X,...", help="of shared exits (every layer)")
    add("--model", default="smollm2-135m", help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--dtype", choices=list(DTYPES), help="float32 on CPUs, bfloat16 on GPUs and TPUs unless given")
    add("--data", nargs="+", required=True, metavar="FILE", help="prompts: .jsonl, .json or .txt, each a group")
    add("--prompts", type=int, metavar="N", help="N prompts of each file, evenly spread (all)")
    add("--max-new-tokens", type=int, default=96, metavar="N", help="of each answer (%(default)s)")
    add("--batch", type=int, default=8, metavar="B", help="prompts at a time (%(default)s)")
    add("--cache", metavar="FILE.json", help="keep answers there, as train_exits.py evaluate does")
    add("--explorers", type=int, nargs="+", default=list(EXPLORERS), metavar="K", help="even grids (%(default)s)")
    add("--grid", type=depths, nargs="+", default=[], metavar="X,...", help="further grids, as 6,12,30")
    add("--rows", type=int, nargs="+", default=list(ROWS), metavar="W", help="caps to replay (%(default)s)")
    add("--replay-tokens", type=int, default=REPLAYED_TOKENS, metavar="N", help="tokens to replay (%(default)s)")
    add("--real-loop", type=int, default=0, metavar="N", help="also run the loop on N prompts of each file (0)")
    add("--output", required=True, metavar="FILE.json", help="where the profile goes")
    add("--plots", metavar="FOLDER", help="also draw it (needs matplotlib)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args), "Stopped. Answers are kept where --cache says.")


def run(args: argparse.Namespace) -> None:
    """Measures and writes, as the flags say.

    Raises:
      DexError: numbers below 1, or a model, exits, prompts or grids that are not there or do not fit.
    """
    import dataclasses

    import jax.numpy as jnp

    from dex_jax.cli.common import remember_compilations
    from dex_jax.cli.train_results import answered, chosen_exits
    from dex_jax.evaluation.exit_forcing import measure
    from dex_jax.evaluation.planner.profile_plots import draw
    from dex_jax.io.whole_files import write_json
    from dex_jax.language_model import load
    from dex_jax.nn.exits import heads_of

    for name in ("prompts", "max_new_tokens", "batch", "replay_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise DexError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.max_new_tokens < 2:
        raise DexError("--max-new-tokens must be at least 2: the first token comes of the prompt alone")
    if args.real_loop < 0:
        raise DexError(f"--real-loop must be at least 0, not {args.real_loop}")
    if min(args.rows) < 1 or min(args.explorers) < 1:
        raise DexError("--rows and --explorers must be at least 1 each")
    remember_compilations()
    lm = load(args.model, args.dtype)
    if args.exits == "shared" and args.depths is None:
        args.depths = tuple(range(1, lm.config.num_layers))
    exits = chosen_exits(args, lm)
    texts = answered(args, lm)
    heads = heads_of(exits.config, exits.parameters, jnp.float32)
    _say(f"teacher-forcing {sum(map(len, texts.values()))} texts")
    every = [text for group in texts.values() for text in group]
    measured = measure(lm, heads, exits.vocabulary, every, explorers=args.explorers, depths=args.grid, batch=args.batch)
    if not measured.grids:
        raise DexError("the exits serve none of these --explorers: name others, or give their depths with --grid")
    groups, start = {}, 0
    for name, group in texts.items():
        groups[name] = measured.of(range(start, start + len(group)))
        start += len(group)
    about = {"model": args.model, "exits": str(args.exits), "max_new_tokens": args.max_new_tokens}
    profile = profile_of(measured, groups, rows=args.rows, replayed_tokens=args.replay_tokens, about=about, notify=_say)
    if args.real_loop:
        chosen = [list(prompt) for group in texts.values() for prompt, _ in group[: args.real_loop]]
        grids = []
        for grid in profile.grids:
            _say(f"the loop itself: K = {grid.stages}, {len(chosen)} prompts")
            source = "shared" if args.exits == "shared" else exits
            grids.append(
                dataclasses.replace(grid, real=real_loop(lm, source, chosen, grid.depths, args.max_new_tokens))
            )
        profile = dataclasses.replace(profile, grids=tuple(grids))
    write_json(args.output, profile.to_json())
    print(table(profile))
    if args.plots is not None:
        for file in draw(profile, args.plots):
            _say(f"drawn: {file}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
