"""The EAD profile of a model and its exits: from what exits said along texts, with tables and pictures.

What drafts bring no text says ahead: ticks with them are counted in the loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.decoding.dex.trees import known_trees
from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import Dex
from dex_jax.decoding.resolve import find_exits
from dex_jax.evaluation.planner.ead_profile import CAP_LOSS, EAD, GridProfile, Profile, Ticks
from dex_jax.forced.counts import dex_counts
from dex_jax.forced.figures import figures_of
from dex_jax.forced.run import Forced
from dex_jax.forced.texts import Text, batches
from dex_jax.io.exits_file import TrainedExits
from dex_jax.io.whole_files import write_whole
from dex_jax.language_model import LanguageModel
from dex_jax.plot.charts import speedup_by_k
from dex_jax.plot.figures import INK, new_figure, png
from dex_jax.tables import markdown


def ticks_with_drafts(
    lm: LanguageModel,
    exits: TrainedExits,
    texts: Sequence[Text],
    grids: Sequence[tuple[int, ...]] = (),
    *,
    max_new_tokens: int = 96,
    batch: int = 8,
) -> tuple[Ticks, ...]:
    """What ticks with drafts come to, for one explorer and for each grid, with each tree that is known of exit 0.

    Tokens are the texts', so nothing but ticks is counted, of all texts together.

    Args:
      lm: the model.
      exits: at depths below L; exit 0 is what ships for the model.
      texts: their prompts are answered.
      grids: depths x_1 < ... < x_K = L each.
      max_new_tokens: of each answer.
      batch: prompts of similar length answered at a time.

    Raises:
      DexError: as `dex_jax.generate`.
    """
    drafter, prompts = find_exits(exits, lm.fingerprint).drafter, [list(prompt) for prompt, _ in texts]
    found = []
    for depths in ((lm.config.num_layers,), *grids):
        for tree in known_trees(drafter):
            one = len(depths) == 1  # which has no exits at depths
            method = Dex(explorers=1, draft=tree.shape) if one else Dex(depths=depths, draft=tree.shape)
            options: dict[str, Any] = {"method": method, "exits": "default" if one else exits}
            tokens = ticks = commits = rows = 0
            for chosen in batches([len(prompt) for prompt in prompts], batch):
                asked = [prompts[i] for i in chosen]
                out = generate(lm, asked, max_new_tokens=max_new_tokens, **options)
                rows = out.stats.schedule.rows
                assert out.stats.ticks is not None
                ticks += int(out.stats.ticks.sum())
                tokens += int((out.lengths - 1).sum())
                # A commit emits a path, of which exit 0 gave all but one token.
                commits += int((out.stats.exits[:, 1:] > 0).sum())
            if ticks:
                levels = tree.shape.drafted if drafter is not None else 0
                found.append(Ticks(depths, rows, tokens / ticks, commits / ticks, levels))
    return tuple(found)


def profile_of(
    measured: Forced,
    groups: Mapping[str, Forced],
    *,
    about: Mapping[str, Any] | None = None,
    drafts: Sequence[Ticks] = (),
) -> Profile:
    """The profile of a measurement of all texts, with the EAD of each group of them; `about` is noted.

    `drafts` are of `ticks_with_drafts`.
    """
    figures, ead = figures_of(measured), _ead(measured)
    grids = tuple(
        GridProfile(
            depths=depths,
            exits=_by_exit([count.exits for count in dex_counts(measured, depths)], len(depths)),
            ticks_per_token=grid.ticks_per_token,
            depth_side_speedup=grid.depth_side_speedup,
            resolution_bound=ead.resolution_bound(depths),
        )
        for depths, grid in zip(measured.grids, figures.grids, strict=True)
    )
    return Profile(
        layers=measured.layers,
        ead=ead,
        agreement=dict(zip(figures.depths, figures.agreement, strict=True)),
        grids=grids,
        cap_loss=CAP_LOSS,
        about={"texts": figures.texts, "tokens": figures.tokens} | dict(about or {}),
        groups={name: _ead(group) for name, group in groups.items()},
        drafts=tuple(drafts),
    )


def profile_table(profile: Profile) -> str:
    """One table by depth, one by grid, and one of ticks with drafts."""
    ead, about = profile.ead, profile.about
    agreement = {depth: f"{share:.3f}" for depth, share in profile.agreement.items()}
    by_depth = [
        [str(depth), f"{share:.3f}", f"{total:.3f}", agreement.get(depth, "-")]
        for depth, share, total in zip(ead.depths, ead.share, np.cumsum(ead.share), strict=True)
    ]
    by_grid = [
        [
            str(grid.stages),
            " ".join(map(str, grid.depths)),
            f"{grid.resolution_bound:.2f}",
            f"{grid.depth_side_speedup:.2f}",
            f"{grid.ticks_per_token:.3f}",
            " ".join(f"{share:.2f}" for share in grid.exits),
        ]
        for grid in profile.grids
    ]
    header = ["K", "depths", "grid's bound", "teacher-forced, DECS", "ticks per token", "tokens by exit"]
    parts = [
        f"{about['tokens']} tokens of {about['texts']} texts; mean EAD {ead.mean:.2f} of {profile.layers} layers, "
        f"oracle speedup {ead.oracle_speedup:.2f}",
        markdown(["depth", "EAD here", "by here", "agreement"], by_depth),
        markdown(header, by_grid),
    ]
    if profile.drafts:
        by_tree = [
            [
                str(len(ticks.depths)),
                " ".join(map(str, ticks.depths)),
                f"{ticks.rows:g}",
                f"{ticks.levels:g}",
                f"{ticks.tokens:.3f}",
                f"{ticks.depth_side_speedup:.2f}",
            ]
            for ticks in profile.drafts
        ]
        header = ["K", "depths", "rows", "levels drafted", "tokens a tick, drafts", "depth-side speedup"]
        parts.append(markdown(header, by_tree))
    return "\n\n".join(parts)


def figures(profile: Profile) -> dict[str, Any]:
    """Pictures, matplotlib Figures: "ead", tokens by earliest available depth; "speedup", by K beside what bounds it.

    Raises:
      DexError: no matplotlib.
    """
    grids = sorted(profile.grids, key=lambda grid: grid.stages)
    return {"ead": _ead_bars(profile.groups or {"all": profile.ead}), "speedup": _speedups(profile.ead, grids)}


def draw(profile: Profile, folder: str | Path) -> list[Path]:
    """Writes the pictures as PNG files into a folder, and returns these; a DexError where that cannot be done."""
    files = []
    for name, figure in figures(profile).items():
        files.append(Path(folder) / f"{name}.png")
        write_whole(files[-1], png(figure))
    return files


def _ead_bars(groups: dict[str, EAD]) -> Any:
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for number, (name, ead) in enumerate(groups.items()):
        at = np.arange(len(ead.depths)) + (number - (len(groups) - 1) / 2) * width
        axes.bar(at, ead.share, width, label=f"{name}, mean {ead.mean:.1f}")
    depths = next(iter(groups.values())).depths
    axes.set_xticks(np.arange(len(depths)), [str(depth) for depth in depths])
    axes.set_xlabel("depth")
    axes.set_ylabel("share of tokens first available here")
    axes.legend()
    return figure


def _speedups(ead: EAD, grids: list[GridProfile]) -> Any:
    series = {
        "EAD rounded up to the grid": {grid.stages: grid.resolution_bound for grid in grids},
        "teacher-forced ticks, DECS": {grid.stages: grid.depth_side_speedup for grid in grids},
    }
    figure = speedup_by_k({name: speedups for name, speedups in series.items() if speedups})
    (axes,) = figure.axes
    axes.axhline(ead.oracle_speedup, color=INK, linewidth=0.8, linestyle="--", label="oracle: L over mean EAD")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _ead(measured: Forced) -> EAD:
    return EAD((*measured.depths, measured.layers), figures_of(measured).ead)


def _by_exit(texts: Sequence[np.ndarray], stages: int) -> tuple[float, ...]:
    """Share of tokens after the first by exit [K]."""
    found = np.bincount(np.concatenate([exits[1:] for exits in texts]) - 1, minlength=stages)
    return tuple((found / max(found.sum(), 1)).tolist())
