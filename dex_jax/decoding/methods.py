"""Decoding methods as users name them, and what they come to for a model of L layers."""

from __future__ import annotations

import dataclasses
import itertools

from dex_jax.decoding.serial import TreeShape
from dex_jax.errors import DexError
from dex_jax.lattice import default_rows, full_rows

DEFAULT_EXPLORERS = 5
FULL_ROWS_LIMIT = 8
SCHEDULES = ("parallel", "serial")

LOOKUP_TRUST = (0.25, 0.6, 0.65, 0.73, 0.79, 0.79, 0.82, 0.9)
"""How often what followed a suffix before follows it again, by the length of the match; 8 means 8 or more: counts on
SmolLM2-135M's greedy answers to held-out prompts (benchmarks/lookup_trust.py), smoothed so that they do not fall."""

LOOKUP_TREE = TreeShape((1,) * 7, drafted=0, lookup=LOOKUP_TRUST)
"""Without a drafter: 8 rows, which many devices run about as fast as one."""

DRAFTED_TREE = TreeShape((2, 2, 1, 1, 1), drafted=3, lookup=LOOKUP_TRUST)
"""With a drafter that brings no tree of its own."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A method made concrete.

    Attributes:
      method: "ar" or "dex".
      depths: exit depths x_1 < ... < x_K = L.
      rows: W, rows a stage.
      decs: whether depth-coupled sampling is on.
      tree: of serial rounds; None for AR and for stages side by side.
    """

    method: str
    depths: tuple[int, ...]
    rows: int
    decs: bool
    tree: TreeShape | None = None

    @property
    def kind(self) -> str | None:
        """One of SCHEDULES; None for AR."""
        if self.method == "ar":
            return None
        return "parallel" if self.tree is None else "serial"

    @property
    def ahead(self) -> int:
        """How many positions past the last token the committed cache may be written at."""
        return 0 if self.tree is None else self.tree.levels

    @property
    def stages(self) -> int:
        """K."""
        return len(self.depths)


@dataclasses.dataclass(frozen=True)
class AR:
    """Plain autoregressive decoding: every token through all layers, one after the other. Reports K = 1."""

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers."""
        return Schedule("ar", (num_layers,), 1, decs=False)


@dataclasses.dataclass(frozen=True)
class Dex:
    """Depth Exploration Decoding (arXiv 2606.29223): K explorers side by side, the final layer's token always kept.

    Attributes:
      explorers: K, with an even grid of exit depths ceil(k L / K); 5 when neither this nor `depths` is given.
      depths: exit depths themselves, ascending and ending at L.
      rows: W, how many nodes a stage runs at most; None is min(max(1, 2^(K-2)), 8), "full" never prunes.
      decs: whether an exit may not repeat a token that its node's children hold.
      schedule: "parallel", all stages side by side in every tick, which K devices are for; "serial", rounds that draft
        a few tokens ahead and run them through all layers at once, for one device. The fields above are of "parallel".
      tree: of "serial": how large a round's tree may get; None takes what was found for the drafter.

    Example:
      >>> Dex(explorers=3).schedule_for(30).depths
      (10, 20, 30)
      >>> Dex(depths=(6, 12, 30)).schedule_for(30).rows
      2
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    rows: int | str | None = None
    decs: bool = True
    schedule: str = "parallel"
    tree: TreeShape | None = None

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers.

        Raises:
          DexError: both explorers and depths, K or depths out of range, depths not ascending or not ending at L,
            rows below 1, rows="full" above K = 8, an unknown schedule, or fields of "parallel" with "serial".
        """
        if self.schedule not in SCHEDULES:
            raise DexError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.schedule == "serial":
            given = [name for name in ("explorers", "depths", "rows") if getattr(self, name) is not None]
            if given:
                raise DexError(
                    f'{given[0]} belongs to schedule="parallel" and means nothing with "serial": leave it out'
                )
            tree = LOOKUP_TREE if self.tree is None else self.tree
            return Schedule("dex", (num_layers,), tree.rows, decs=False, tree=tree)
        if self.tree is not None:
            raise DexError('tree belongs to schedule="serial": leave it out for "parallel"')
        depths = self._depths(num_layers)
        return Schedule("dex", depths, self._rows(len(depths)), self.decs)

    def _depths(self, num_layers: int) -> tuple[int, ...]:
        if self.explorers is not None and self.depths is not None:
            raise DexError("give explorers or depths, not both: depths already say how many explorers there are")
        if self.depths is None:
            stages = DEFAULT_EXPLORERS if self.explorers is None else self.explorers
            if self.explorers is None:
                stages = min(stages, num_layers)
            if isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= num_layers:
                raise DexError(f"explorers must be from 1 to the model's {num_layers} layers, not {stages}")
            return even_depths(stages, num_layers)
        depths = tuple(int(x) for x in self.depths)
        text = ",".join(map(str, depths))
        if not depths or depths[0] < 1 or depths[-1] > num_layers:
            raise DexError(f"depths must lie between 1 and the model's {num_layers} layers, not {text or 'nothing'}")
        if any(a >= b for a, b in itertools.pairwise(depths)):
            raise DexError(f"depths must ascend without repeats, not {text}")
        if depths[-1] != num_layers:
            raise DexError(f"depths must end at the model's last layer, {num_layers}, not at {depths[-1]}")
        return depths

    def _rows(self, stages: int) -> int:
        if self.rows is None:
            return default_rows(stages)
        if self.rows == "full":
            if stages > FULL_ROWS_LIMIT:
                raise DexError(
                    f'rows="full" needs 2^(K-2) rows a stage, {full_rows(stages)} for K = {stages}: it is offered up '
                    f"to K = {FULL_ROWS_LIMIT}, give a number of rows instead"
                )
            return full_rows(stages)
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or self.rows < 1:
            raise DexError(f'rows must be a whole number of at least 1, or "full", not {self.rows}')
        return int(self.rows)


def even_depths(stages: int, num_layers: int) -> tuple[int, ...]:
    """The even grid of DEX-1/K: x_k = ceil(k L / K)."""
    return tuple(-(-k * num_layers // stages) for k in range(1, stages + 1))


Method = AR | Dex
