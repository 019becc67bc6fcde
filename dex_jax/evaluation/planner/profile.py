"""The EAD profile of a model and its exits: from what exits said along texts, and from the decode loop itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import Dex
from dex_jax.evaluation.planner.ead_profile import CAP_LOSS, EAD, GridProfile, Profile, RealLoop
from dex_jax.forced.counts import dex_counts
from dex_jax.forced.figures import figures_of
from dex_jax.forced.run import Forced
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel


def profile_of(measured: Forced, groups: Mapping[str, Forced], *, about: Mapping[str, Any] | None = None) -> Profile:
    """The profile of a measurement of all texts, with the EAD of each group of them; `about` is noted."""
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
    )


def with_real_loop(
    profile: Profile, lm: LanguageModel, exits: TrainedExits | str, prompts: Sequence[list[int]], new_tokens: int
) -> Profile:
    """The profile with what the loop itself comes to on prompts (token ids), with its default rows, for each grid."""
    return dataclasses.replace(
        profile,
        grids=tuple(
            dataclasses.replace(grid, real=_real_loop(lm, exits, prompts, grid.depths, new_tokens))
            for grid in profile.grids
        ),
    )


def _real_loop(
    lm: LanguageModel, exits: TrainedExits | str, prompts: Sequence[list[int]], depths: tuple[int, ...], new_tokens: int
) -> RealLoop:
    ticks = tokens = rows = 0
    for prompt in prompts:
        out = generate(lm, [prompt], method=Dex(depths=depths, draft=False), exits=exits, max_new_tokens=new_tokens)
        assert out.stats.ticks is not None
        ticks += int(out.stats.ticks[0])
        tokens += int(out.lengths[0]) - 1
        rows = out.stats.schedule.rows
    return RealLoop(rows, ticks / max(tokens, 1), len(depths) * tokens / max(ticks, 1))


def _ead(measured: Forced) -> EAD:
    return EAD((*measured.depths, measured.layers), figures_of(measured).ead)


def _by_exit(texts: Sequence[np.ndarray], stages: int) -> tuple[float, ...]:
    """Share of tokens after the first by exit [K]."""
    found = np.bincount(np.concatenate([exits[1:] for exits in texts]) - 1, minlength=stages)
    return tuple((found / max(found.sum(), 1)).tolist())
