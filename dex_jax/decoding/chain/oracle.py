"""The oracle of the earliest available depth: NOT a decoder, a bound on what early exits can save."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dex_jax.decoding.chain.interface import Policy, Verified
from dex_jax.decoding.loops import ORACLE_LOOP
from dex_jax.decoding.methods import Dex, Schedule
from dex_jax.errors import DexError


@dataclasses.dataclass(frozen=True)
class Hindsight(Policy):
    """Drafts nothing, and says afterwards which exit had the token first."""

    draft_length: int = 0
    shadows = True

    def born_at(self, born_at: jax.Array, verified: Verified) -> jax.Array:
        """The first exit that gives what the last layer gives, K if none does."""
        right = verified.shadow == verified.final[None]
        return jnp.where(jnp.any(right, axis=0), jnp.argmax(right, axis=0).astype(jnp.int32) + 1, born_at)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A bound and no decoder: every layer of every token is run, and what is counted is what need not have been.

    `exits` are the earliest of the exits that give each token after its true prefix, and `layer_steps` is what would be
    left if every token exited there and no draft were ever wrong: L + sum(depths of exits[1 : n - 1]). No method that
    takes one token from an exit can do with less; DEX can, as DECS also takes an exit's second choice. Exits that read
    the position before see its true features.

    Attributes:
      explorers: K, an even grid of exits as in Dex.
      depths: exit depths themselves, ascending and ending at L. When neither is given, wherever exits stand: at every
        depth for "shared" ones, at all trained depths otherwise.
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None

    @property
    def everywhere(self) -> bool:
        """Whether the depths are those of the exits."""
        return self.explorers is None and self.depths is None

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers; errors as of Dex, and no exit at all."""
        explorers = num_layers if self.everywhere else self.explorers
        depths = Dex(explorers, self.depths, rows=1, draft=False).schedule_for(num_layers).depths
        if len(depths) == 1:
            raise DexError("the oracle needs exits: give explorers of 2 or more, or depths below the last layer")
        return Schedule("oracle", depths, 1, decs=False, policy=Hindsight(), loop=ORACLE_LOOP)
