"""What the planner's programs print: profiles and predictions as tables in markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dex_jax.evaluation.planner.ead_profile import Profile
from dex_jax.evaluation.planner.predictions import Prediction
from dex_jax.tables import markdown


def profile_table(profile: Profile) -> str:
    """One table by depth, one by grid."""
    ead, about = profile.ead, profile.about
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
            f"{grid.ticks_per_token:.3f}",
            "-" if grid.real is None else f"{grid.real.depth_side_speedup:.2f} ({grid.real.rows} rows)",
            " ".join(f"{share:.2f}" for share in grid.exits),
        ]
        for grid in profile.grids
    ]
    header = ["K", "depths", "grid's bound", "teacher-forced, DECS", "ticks per token", "real loop", "tokens by exit"]
    return "\n\n".join(
        [
            f"{about['tokens']} tokens of {about['texts']} texts; mean EAD {ead.mean:.2f} of {profile.layers} layers, "
            f"oracle speedup {ead.oracle_speedup:.2f}",
            markdown(["depth", "EAD here", "by here", "agreement"], by_depth),
            markdown(header, by_grid),
        ]
    )


def predictions_table(predictions: Sequence[Prediction]) -> str:
    """One line a way: speed, step, and what takes its time."""
    parts = ["layers", "width", "head", "exits", "comm", "fixed"]
    rows = []
    for p in predictions:
        price = "-" if p.dollars_per_million is None else f"{p.dollars_per_million:.2f}"
        speed = f"{p.tokens_per_second:.1f}" if p.fits else "too big"
        shares = [f"{100 * value / p.step.total:.0f}" for value in dataclasses.astuple(p.step)]
        size = f"{p.bytes_per_device / 1e9:.2f}"
        rows.append([p.detail, speed, f"{p.step.total * 1e3:.3f}", f"{p.tokens_a_step:.2f}", size, *shares, price])
    return markdown(["way", "tok/s", "step ms", "tok/step", "GB/device", *(f"% {n}" for n in parts), "$/M tok"], rows)
