"""DEL, dynamic exit layer (Entezari Zarch et al., COLM 2025, arXiv 2504.05598): LayerSkip that chooses (d, g) itself.

Letters: B sequences, X = K - 1 exits, g draft length.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.decoding.plan import Plan, plan_for
from dex_jax.decoding.request import Dex
from dex_jax.errors import DexError
from studies.rivals.interface import Policy, Verified
from studies.rivals.methods import chain_plan

QUARTERS = 4
"""Number of groups of shadow tokens by how sure the exit was: up to 1/4, up to 1/2, and so on."""

PRIOR = 3.0
"""Number of tokens that every exit and quarter counts in advance, right as often as the exit was sure."""


class Seen(NamedTuple):
    """The counts of shadow tokens, with less weight on older rounds, and the choice for the next round."""

    rows: jax.Array  # [B] float32, number of right rows
    given: jax.Array  # [B, X, QUARTERS] float32, number of tokens that each exit gave
    right: jax.Array  # [B, X, QUARTERS] float32, number of those that were right
    open: jax.Array  # [B, X] float32, number of rows in which it paid to draft
    kept: jax.Array  # [B, X] float32, number of those in which the token was right
    exit: jax.Array  # [B] int32, the exit that drafts next
    length: jax.Array  # [B] int32, the number of tokens that it drafts
    rate: jax.Array  # [B] float32, the tokens a layer that the choice promises


@dataclasses.dataclass(frozen=True)
class Dynamic(Policy):
    """The policy that chooses the exit and the draft length which promise most tokens a layer."""

    depths: tuple[int, ...]
    decay: float
    shadows: ClassVar[bool] = True

    def initial(self, batch: int) -> Seen:
        """Return counts of one row in which no exit was right, so that the first round drafts nothing."""
        none = jnp.zeros((batch, len(self.depths) - 1), jnp.float32)
        apart, nowhere = jnp.zeros((*none.shape, QUARTERS), jnp.float32), jnp.zeros(batch, jnp.int32)
        rate = jnp.full(batch, 1 / self.depths[-1], jnp.float32)
        return Seen(jnp.ones(batch, jnp.float32), apart, apart, none, none, nowhere, nowhere, rate)

    def asks(self, known: Seen, exit_index: jax.Array, drafted: jax.Array) -> jax.Array:
        """Return whether the exit is the chosen one and has tokens left to draft; see Policy."""
        return (exit_index == known.exit) & (drafted < known.length)

    def drafts(self, known: Seen, exit_index: jax.Array, drafted: jax.Array, confidence: jax.Array) -> jax.Array:
        """Return whether the draft's chance to be right is worth its layers; see Policy."""
        at = jnp.arange(exit_index.shape[0]), exit_index
        precision = known.kept[at] / jnp.maximum(known.open[at], 1e-6)
        chance = self._chance(known)[(*at, _quarter(confidence))] * precision ** drafted.astype(jnp.float32)
        return chance >= self._price(known)[at]

    def learn(self, known: Seen, verified: Verified) -> Seen:
        """Return the counts after a round, and the exit and draft length chosen by them; see Policy."""
        batch, rows = verified.final.shape
        true = (jnp.arange(rows)[None] < verified.length[:, None])[:, None]
        right = jnp.swapaxes(verified.shadow == verified.final[None], 0, 1) & true
        quarter = jnp.swapaxes(_quarter(verified.confidence), 0, 1)
        paying = self._chance(known) >= self._price(known)[..., None]
        pays = jnp.take_along_axis(paying, quarter, axis=2) & true
        of_quarter = quarter[..., None] == jnp.arange(QUARTERS)[None, None, None]

        def more(old: jax.Array, what: jax.Array) -> jax.Array:
            return self.decay * old + jnp.sum(what, axis=2, dtype=jnp.float32)

        seen = known._replace(
            rows=self.decay * known.rows + verified.length,
            given=more(known.given, of_quarter & true[..., None]),
            right=more(known.right, of_quarter & right[..., None]),
            open=more(known.open, pays),
            kept=more(known.kept, pays & right),
        )
        seen = self._best(seen)

        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(verified.where.reshape((batch,) + (1,) * (new.ndim - 1)), new, old)

        return jax.tree.map(chosen, seen, known)

    def _chance(self, seen: Seen) -> jax.Array:
        """Return the probability that a token of each exit and quarter is right: [B, X, QUARTERS]."""
        middle = (jnp.arange(QUARTERS, dtype=jnp.float32)[None, None] + 0.5) / QUARTERS
        return (seen.right + PRIOR * middle) / (seen.given + PRIOR)

    def _price(self, seen: Seen) -> jax.Array:
        """Return the tokens that the layers of one draft would bring otherwise: [B, X]."""
        return jnp.asarray(self.depths[:-1], jnp.float32)[None] * seen.rate[:, None]

    def _best(self, seen: Seen) -> Seen:
        """Return `seen` with the exit and the draft length that promise most tokens a layer."""
        kept, opened = seen.kept / seen.rows[:, None], seen.open / seen.rows[:, None]
        depth = jnp.asarray(self.depths[:-1], jnp.float32)[None]
        tokens, layers = jnp.ones_like(kept), jnp.full_like(kept, self.depths[-1])
        kept_all, open_all, rates = kept, opened, [tokens / layers]
        for _ in range(self.draft_length):
            tokens, layers = tokens + kept_all, layers + depth * open_all
            rates.append(tokens / layers)
            kept_all, open_all = kept_all * kept, open_all * opened
        promises = jnp.stack(rates, axis=1).reshape(kept.shape[0], -1)
        best, exits = jnp.argmax(promises, axis=1).astype(jnp.int32), kept.shape[1]
        return seen._replace(exit=best % exits, length=best // exits, rate=jnp.max(promises, axis=1))


def _quarter(confidence: jax.Array) -> jax.Array:
    return jnp.minimum((confidence * QUARTERS).astype(jnp.int32), QUARTERS - 1)


@dataclasses.dataclass(frozen=True)
class DEL:
    """LayerSkip that chooses its exit and draft length for each round by the tokens that exits would have given before.

    Every exit gives its token for each verified row ("shadow tokens"). If an exit had the share a right, a round of g
    drafts promises (1 + a + .. + a^g) / (g d + L) tokens a layer; the best (d, g) drafts next, g = 0 among them.

    The confidence rule ends a draft early: a token is drafted only if its chance of acceptance, learnt from shadow
    tokens of like confidence, is worth more than what d layers bring otherwise. The promise then counts what passes
    the rule: if o is the share of tokens that pass it and s that of those that pass and are right, it is (1 + s + ..
    + s^g) / (L + d (o + .. + o^g)), the same thing where all pass. The paper ends drafts by confidence too; this form
    of the rule is the project's own.

    Attributes:
      explorers: K, an even grid of exits to choose from as in Dex; 5 when neither this nor `depths` is given.
      depths: the exit depths, ascending and ending at L.
      draft_length: the largest g.
      decay: factor on the weight of a round with each one after it, above 0 and at most 1.
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    draft_length: int = 8
    decay: float = 0.98

    def plan_for(self, num_layers: int) -> Plan:
        """Return the plan for a model of L = num_layers.

        Raises:
          DexError: the decay is out of range, there is no token to draft, or Dex refuses the depths.
        """
        if not 0 < self.decay <= 1:
            raise DexError(f"DEL's decay lies above 0 and is at most 1, not {self.decay}")
        depths = plan_for(Dex(self.explorers, self.depths, draft=False), num_layers).depths
        return chain_plan("del", depths, Dynamic(self.draft_length, depths, float(self.decay)))
