"""The rivals of DEX whose policy is small, a bound, and an ablation of DEX itself (DEL is in chain/dynamic_exit.py)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dex_jax.decoding.chain.interface import Policy, Verified
from dex_jax.decoding.loops import CHAIN_LOOP, ORACLE_LOOP
from dex_jax.decoding.methods import Dex, Schedule
from dex_jax.errors import DexError, whole_number


@dataclasses.dataclass(frozen=True)
class LayerSkip:
    """LayerSkip's self-speculative decoding (Elhoushi et al., arXiv 2404.16710): one exit, one draft length.

    It drafts `draft_length` tokens at one exit, then runs the other layers for all of them at once. What the first
    layers have made of the drafts is kept, so a round runs g d + L layers one after the other and emits up to g + 1
    tokens. At the end of a sequence rounds draft no more than can still be emitted.

    Attributes:
      exit: d, from 1 to L - 1.
      draft_length: g.

    Examples:
      >>> LayerSkip(exit=12, draft_length=4).schedule_for(30).depths
      (12, 30)
    """

    exit: int = 12
    draft_length: int = 4

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers.

        Raises:
          DexError: an exit that is not below the last layer, or no token to draft.
        """
        whole_number(exit=self.exit, draft_length=self.draft_length)
        if self.exit >= num_layers:
            raise DexError(
                f"LayerSkip's exit must lie below the model's last layer, {num_layers}, and not at {self.exit}"
            )
        policy = Policy(self.draft_length)
        return Schedule("layerskip", (self.exit, num_layers), policy.rows, decs=False, policy=policy, loop=CHAIN_LOOP)


@dataclasses.dataclass(frozen=True)
class Grid:
    """What methods have in common that take exit depths as Dex does, and may run `everywhere` when none are given."""

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    everywhere_unless_told: ClassVar[bool] = False

    @property
    def everywhere(self) -> bool:
        """Whether the depths are those of the exits."""
        return self.everywhere_unless_told and self.explorers is None and self.depths is None

    def depths_for(self, num_layers: int) -> tuple[int, ...]:
        """Exit depths for a model of L = num_layers; errors as of Dex, and no exit where it is to be everywhere."""
        explorers = num_layers if self.everywhere else self.explorers
        depths = Dex(explorers, self.depths, rows=1, draft=False).schedule_for(num_layers).depths
        if self.everywhere_unless_told and len(depths) == 1:
            raise DexError(
                f"{type(self).__name__} needs an exit: give explorers of 2 or more, or depths below the last layer"
            )
        return depths


@dataclasses.dataclass(frozen=True)
class Sure(Policy):
    """Drafts at every exit whose confidence reaches `threshold`."""

    threshold: float

    def begin(self, batch: int) -> jax.Array:
        """The threshold of every sequence, [B] float32: as an array, so that the loop is compiled alike for all."""
        return jnp.full(batch, self.threshold, jnp.float32)

    def drafts(self, known: Any, exit_index: jax.Array, drafted: jax.Array, confidence: jax.Array) -> jax.Array:
        """As of Policy."""
        return confidence >= known


@dataclasses.dataclass(frozen=True)
class AdaDecode(Grid):
    """AdaDecode (Wei et al., ICML 2025, arXiv 2506.03700): a token exits at the first exit that is sure of the next.

    That is the first that gives it with at least `threshold`; its other layers wait. They are run together with those
    of later tokens that pass the same depth, and at the last layer all that wait are verified: the first wrong draft
    throws away what depends on it. A round whose drafts exit at depths e_1 .. e_g runs e_1 + .. + e_g + L layers one
    after the other. The paper trains heads of its own; here the exits are those of DEX.

    Attributes:
      explorers: K, an even grid of exits as in Dex; 5 when neither this nor `depths` is given.
      depths: exit depths themselves, ascending and ending at L.
      threshold: from 0 to 1, of an exit's top probability.
      draft_length: how many tokens may wait at most.

    Examples:
      >>> AdaDecode(depths=(6, 12, 30)).schedule_for(30).rows
      9
    """

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
        policy, depths = Sure(self.draft_length, float(self.threshold)), self.depths_for(num_layers)
        return Schedule("adadecode", depths, policy.rows, decs=False, policy=policy, loop=CHAIN_LOOP)


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
class Oracle(Grid):
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

    everywhere_unless_told = True

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers; errors as of Dex, and no exit at all."""
        policy = Hindsight()
        return Schedule("oracle", self.depths_for(num_layers), 1, decs=False, policy=policy, loop=ORACLE_LOOP)


@dataclasses.dataclass(frozen=True)
class DexSingleExit(Grid):
    """DEX whose stages are those of a grid of K, but of whose exits only the first proposes; ticks mean the same.

    A token costs one tick if the first exit gave it and K if not. A node has one child at most, so a stage never runs
    more than one row.

    Attributes:
      explorers: K, an even grid of exit depths; 5 when neither this nor `depths` is given.
      depths: exit depths themselves, ascending and ending at L.
    """

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers; errors as of Dex."""
        return Schedule("dex-single-exit", self.depths_for(num_layers), 1, decs=True, proposing=(1,))
