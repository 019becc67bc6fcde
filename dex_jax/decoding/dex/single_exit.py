"""DEX with only the first and the last exit of a grid: the ablation of exploring several depths."""

from __future__ import annotations

import dataclasses

from dex_jax.decoding.methods import Dex, Schedule


@dataclasses.dataclass(frozen=True)
class DexSingleExit:
    """DEX whose stages are those of a grid of K, but of whose exits only the first proposes; ticks mean the same.

    A token costs one tick if the first exit gave it and K if not. A node has one child at most, so a stage never runs
    more than one row.

    Attributes:
      explorers: K, an even grid of exit depths; 5 when neither this nor `depths` is given.
      depths: exit depths themselves, ascending and ending at L.
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers; errors as of Dex."""
        schedule = Dex(self.explorers, self.depths, rows=1, draft=False).schedule_for(num_layers)
        return dataclasses.replace(schedule, method="dex-single-exit", proposing=(1,))
