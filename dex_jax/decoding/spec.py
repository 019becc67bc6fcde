"""What a compiled decoding program depends on beside shapes."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.dex.trained_exits import ExitArrays, Heads
from dex_jax.decoding.methods import Schedule
from dex_jax.nn.transformer import Layout


@dataclasses.dataclass(frozen=True)
class Spec:
    """Statics of the programs."""

    config: ModelConfig  # of the model
    layout: Layout  # of its weights
    schedule: Schedule  # the method
    exits: ExitsConfig | None = None  # of the exits 1..K-1; None for the model's own, "shared", and for K = 1
    drafter: ExitsConfig | None = None  # exit 0; None where the text alone drafts, or nothing does
    mesh: Mesh | None = None  # None for one device; otherwise the layout is Staged

    @property
    def remembers(self) -> ExitsConfig | None:
        """Whose memory of the committed prefix is kept: the exits' if they have one, of which a drafter's is a part."""
        return self.exits if self.exits is not None and self.exits.needs_previous else self.drafter

    def remembering(self, heads: Heads) -> ExitArrays | None:
        """The arrays of what `remembers`."""
        return heads.drafter if self.remembers is self.drafter else heads.exits
