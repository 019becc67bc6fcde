"""EAD profiles: how early tokens become available, and the ticks that follow, as a file between measuring and planning.

A profile is measured (planner/profile.py) or assumed: a small JSON file with "assumption" (a sentence), "layers" and
"ead" alone, of which the planner makes ticks for every even grid.

Letters: L layers, K stages, W rows a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dex_jax.errors import DexError
from dex_jax.foreign import reading
from dex_jax.lattice import full_rows

FORMAT = "dex_jax EAD profile 1"

CAP_LOSS = {8: 0.087, 16: 0.036, 32: 0.016}
"""W -> share of ticks that a cap of W rows adds, measured with SmolLM2-135M and K = 10; smaller K lose less."""


@dataclasses.dataclass(frozen=True)
class Ticks:
    """What the ticks of one grid come to, of one sequence.

    Attributes:
      depths: x_1 < ... < x_K = L; (L,) for one explorer.
      rows: W; where ticks choose theirs, those of the stage that runs most, on average.
      tokens: emitted in a tick.
      commits: share of ticks whose root has finished; with drafts a commit emits a path of several tokens.
      levels: that the drafter drafts in a tick; None without drafts.
    """

    depths: tuple[int, ...]
    rows: float
    tokens: float
    commits: float
    levels: float | None = None

    @property
    def depth_side_speedup(self) -> float:
        """K times the tokens a tick; of one explorer's trees it is what their pipeline over any K devices has."""
        return len(self.depths) * self.tokens


@dataclasses.dataclass(frozen=True)
class GridProfile:
    """One grid, with DECS, teacher-forced and uncapped."""

    depths: tuple[int, ...]  # x_1 < ... < x_K = L
    exits: tuple[float, ...]  # [K], share of tokens by the exit that first gives them
    ticks_per_token: float
    depth_side_speedup: float  # K (n - 1) / ticks
    resolution_bound: float  # of `EAD.resolution_bound`

    @property
    def stages(self) -> int:
        """K."""
        return len(self.depths)


@dataclasses.dataclass(frozen=True)
class EAD:
    """When tokens become available, without DECS."""

    depths: tuple[int, ...]  # ascending, ending at L
    share: tuple[float, ...]  # of tokens whose EAD is each depth; adds up to 1

    @property
    def mean(self) -> float:
        """Mean EAD in layers."""
        return float(np.dot(self.depths, self.share))

    @property
    def oracle_speedup(self) -> float:
        """L over the mean EAD: a token would cost just as many layers as it needs."""
        return self.depths[-1] / self.mean

    def by(self, depth: int) -> float:
        """Share of tokens available by a depth, linear between the depths of the profile."""
        return float(np.interp(depth, (0, *self.depths), (0.0, *np.cumsum(self.share))))

    def steps(self, grid: Sequence[int]) -> tuple[float, ...]:
        """Share of tokens by the first grid depth at or above their EAD: [K]."""
        return tuple(float(x) for x in np.diff([0.0, *(self.by(depth) for depth in grid)]))

    def resolution_bound(self, grid: Sequence[int]) -> float:
        """K over the mean step of the grid: what it would come to if each token cost its EAD rounded up to the grid.

        DECS can do better than this.
        """
        steps = self.steps(grid)
        return len(steps) / float(np.dot(range(1, len(steps) + 1), steps))


@dataclasses.dataclass(frozen=True)
class Profile:
    """An EAD profile.

    Attributes:
      layers: L.
      ead: over all texts.
      agreement: depth -> share of tokens that are the exit's best token there.
      grids: measured ones; none in an assumed profile.
      assumption: the sentence of an assumed profile, None for a measured one.
      cap_loss: W -> share of ticks that a cap of W rows adds; what is left out adds none.
      about: what was measured: model, exits, texts, tokens.
      groups: EAD of each group of prompts.
      drafts: of one explorer and of grids, each tree that was counted; none where nobody counted.
    """

    layers: int
    ead: EAD
    agreement: dict[int, float] = dataclasses.field(default_factory=dict)
    grids: tuple[GridProfile, ...] = ()
    assumption: str | None = None
    cap_loss: dict[int, float] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    groups: dict[str, EAD] = dataclasses.field(default_factory=dict)
    drafts: tuple[Ticks, ...] = ()

    def agreement_at(self, depth: int) -> float:
        """Share of tokens that an exit at this depth gives; if it is not known, the share available by then."""
        return self.agreement.get(depth, self.ead.by(depth))

    def ticks(self, depths: Sequence[int], rows: int) -> float | None:
        """Ticks a token without drafts for a grid and a cap; None for a grid that a measured profile does not hold."""
        if len(depths) == 1:
            return 1.0
        steps = self.ead.steps(depths)
        mean = float(np.dot(range(1, len(steps) + 1), steps))
        if self.assumption is None:
            grid = next((grid for grid in self.grids if grid.depths == tuple(depths)), None)
            if grid is None:
                return None
            if rows >= full_rows(len(depths)):
                return grid.ticks_per_token
            mean = grid.ticks_per_token
        return mean * (1 + self.cap_loss.get(rows, 0.0))

    def to_json(self) -> dict[str, Any]:
        """What `read_profile` reads."""
        speedups = {"mean_ead": self.ead.mean, "oracle_speedup": self.ead.oracle_speedup}
        return {"format": FORMAT} | dataclasses.asdict(self) | {"speedups": speedups}


def read_profile(path: str | Path) -> Profile:
    """Reads a profile that was measured or assumed. DexError: no such file, or what it says cannot be."""
    with reading(path, "let python -m dex_jax.cli.profile write one"):
        content = Path(path).read_bytes()
        found = msgspec.json.decode(content, type=dict[str, Any]).get("format")
        if found != FORMAT:
            raise DexError(f"{path} is of format {found!r}, not {FORMAT!r}: write it anew")
        profile = msgspec.json.decode(content, type=Profile)
    ascending = all(a < b for a, b in zip((0, *profile.ead.depths), profile.ead.depths, strict=False))
    fits = len(profile.ead.depths) == len(profile.ead.share) and profile.ead.depths[-1:] == (profile.layers,)
    if not ascending or not fits or abs(sum(profile.ead.share) - 1) > 1e-3 or min(profile.ead.share) < 0:
        raise DexError(
            f"{path}: the depths of its EAD must ascend to the last layer, {profile.layers}, and their shares be "
            "non-negative and add up to 1"
        )
    if any(t.depths[-1:] != (profile.layers,) or min(t.rows, t.tokens, t.commits) <= 0 for t in profile.drafts):
        raise DexError(f"{path}: ticks with drafts must end at layer {profile.layers} and emit tokens from rows")
    if profile.assumption is None and not profile.grids:
        raise DexError(f"{path} has neither grids nor an assumption: measure it, or say in a sentence what it assumes")
    return profile
