"""What a compiled decoding program depends on beside shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.dex.interface import ExitZero
from dex_jax.decoding.dex.trained_exits import Heads, TrainedHeads
from dex_jax.decoding.methods import Schedule
from dex_jax.nn.transformer import Layout


@dataclasses.dataclass(frozen=True)
class Spec:
    """Statics of the programs."""

    config: ModelConfig  # of the model
    layout: Layout  # of its weights
    schedule: Schedule  # the method
    exits: ExitsConfig | None = None  # of the exits 1..K-1; None for the model's own, "shared", and for K = 1
    drafter: ExitZero | None = None  # exit 0; None where the text alone drafts, or nothing does
    mesh: Mesh | None = None  # None for one device; otherwise the layout is Staged

    @property
    def remembers(self) -> ExitZero | None:
        """Whose memory of the committed prefix is kept: the exits' if they have one, of which a drafter's is a part."""
        exits = self.exits
        return TrainedHeads(exits) if exits is not None and exits.needs_previous else self.drafter

    @property
    def reads(self) -> tuple[int, ...]:
        """Depths whose states are kept for exit 0 beside those at L."""
        return () if self.drafter is None else self.drafter.reads

    def remembering(self, heads: Heads) -> Any:
        """The arrays of what `remembers`."""
        return heads.drafter if self.remembers is self.drafter else heads.exits
