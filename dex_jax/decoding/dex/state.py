"""What one decoding by the lattice carries from tick to tick.

Letters: B sequences, W rows a cohort, K stages, S text length, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from dex_jax.decoding.dex.shape import RowCosts
from dex_jax.decoding.noise import Noise
from dex_jax.decoding.record import Record
from dex_jax.lattice import Lattice


class Drafting(NamedTuple):
    """What exit 0 goes by; counts are float32."""

    text: jax.Array  # [B, S] int32, all tokens at their positions
    costs: RowCosts | None  # None where every cohort keeps all of its rows
    rung: jax.Array  # [K] int32, which of the shape's row counts the cohort in each ring row has kept
    chosen: jax.Array  # how many stages have run each of the row counts, and how many levels were drafted in all
    spent: jax.Array  # AR steps that the ticks took by the costs, times the sequences in them
    promised: jax.Array  # tokens that all drafts should have brought by their probabilities
    kept: jax.Array  # how many they brought


class DexState(NamedTuple):
    """All that one decoding carries from tick to tick.

    Attributes:
      tick: int32, the last one, the same for all sequences: -1 before tick 0, which runs nothing.
      lattice: every field with a leading axis B.
      hidden: [K, B, W, D], states of the cohorts by the stage they have just run.
      prefix: [B] int32, committed positions.
      memory: the network's own.
      noise: None when greedy.
      record: what has been emitted.
      drafting: what exit 0 goes by, None when it is silent.
    """

    tick: jax.Array
    lattice: Lattice
    hidden: jax.Array
    prefix: jax.Array
    memory: Any
    noise: Noise | None
    record: Record
    drafting: Drafting | None = None

    @property
    def stages(self) -> int:
        """K."""
        return self.lattice.token.shape[1]

    @property
    def rows(self) -> int:
        """W."""
        return self.lattice.token.shape[2]

    @property
    def heads(self) -> int:
        """How many of a cohort's first rows may be heads."""
        return 1 if self.stages == 1 else self.rows
