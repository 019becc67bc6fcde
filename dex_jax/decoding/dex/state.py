"""What one decoding by the lattice carries from tick to tick.

Letters: B sequences, W rows a cohort, N rows of one while it grows, K stages, H heads, E numbers that a drafter reads
of the position before, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from dex_jax.decoding.dex.drafts import Drafting
from dex_jax.decoding.noise import Noise
from dex_jax.decoding.record import Record
from dex_jax.lattice import Cohort, Lattice


class Waiting(NamedTuple):
    """A cohort that is not in the lattice yet."""

    cohort: Cohort  # [B, N], its heads alone
    fresh: jax.Array  # [B] bool, whether its head is a fresh root
    before: jax.Array | None  # [B, H, E], what the drafter reads of the position before each head; None without one


class DexState(NamedTuple):
    """All that one decoding carries from tick to tick.

    Attributes:
      tick: int32, ticks since the start, the same for all sequences.
      lattice: every field with a leading axis B.
      hidden: [K, B, W, D], states of the cohorts by the stage they have just run.
      prefix: [B] int32, committed positions.
      memory: the network's own.
      noise: None when greedy.
      record: what has been emitted.
      drafting: what exit 0 goes by, None when it is silent.
      waiting: what `enter` puts into the lattice; None in what `init` and `step` give, where it has.
    """

    tick: jax.Array
    lattice: Lattice
    hidden: jax.Array
    prefix: jax.Array
    memory: Any
    noise: Noise | None
    record: Record
    drafting: Drafting | None = None
    waiting: Waiting | None = None

    @property
    def stages(self) -> int:
        """K."""
        return self.lattice.token.shape[1]

    @property
    def rows(self) -> int:
        """W."""
        return self.lattice.token.shape[2]
