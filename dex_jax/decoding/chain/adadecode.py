"""AdaDecode (Wei et al., ICML 2025, arXiv 2506.03700): every token exits where an exit is sure of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dex_jax.decoding.chain.interface import Policy
from dex_jax.decoding.loops import CHAIN_LOOP
from dex_jax.decoding.methods import Dex, Schedule
from dex_jax.errors import DexError, whole_number


@dataclasses.dataclass(frozen=True)
class Sure(Policy):
    """Drafts at every exit whose confidence reaches `threshold`."""

    threshold: float

    def begin(self, batch: int) -> jax.Array:
        """The threshold of every sequence, [B] float32: as an array, so that the loop is compiled alike for all."""
        return jnp.full(batch, self.threshold, jnp.float32)

    def drafts(self, known: Any, exit_index: jax.Array, drafted: jax.Array, confidence: jax.Array) -> jax.Array:
        """As of Policy."""
        del exit_index, drafted
        return confidence >= known


@dataclasses.dataclass(frozen=True)
class AdaDecode:
    """A token exits at the first exit that gives the next one with at least `threshold`; its other layers wait.

    They are run together with those of later tokens that pass the same depth, and at the last layer all that wait are
    verified: the first wrong draft throws away what depends on it. A round whose drafts exit at depths e_1 .. e_g runs
    e_1 + .. + e_g + L layers one after the other. The paper trains heads of its own; here the exits are those of DEX.

    Attributes:
      explorers: K, an even grid of exits as in Dex; 5 when neither this nor `depths` is given.
      depths: exit depths themselves, ascending and ending at L.
      threshold: from 0 to 1, of an exit's top probability.
      draft_length: how many tokens may wait at most.

    Examples:
      >>> AdaDecode(depths=(6, 12, 30)).schedule_for(30).rows
      9
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    threshold: float = 0.75
    draft_length: int = 8

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers.

        Raises:
          DexError: a threshold that is no probability, no token to draft, or depths as Dex refuses them.
        """
        whole_number(draft_length=self.draft_length)
        if not 0 <= self.threshold <= 1:
            raise DexError(f"AdaDecode's threshold is a probability, from 0 to 1, and not {self.threshold}")
        depths = Dex(self.explorers, self.depths, rows=1, draft=False).schedule_for(num_layers).depths
        policy = Sure(self.draft_length, float(self.threshold))
        return Schedule("adadecode", depths, policy.rows, decs=False, policy=policy, loop=CHAIN_LOOP)
