"""The methods LayerSkip and AdaDecode, and the loop that they and DEL (dynamic.py) name in their plans.

Letters: B sequences, T capacity for new tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding.dex.trained_exits import Heads
from dex_jax.decoding.loops import Loop, Prefilled, Tick
from dex_jax.decoding.output import Stats
from dex_jax.decoding.plan import SPARE, Plan, plan_for
from dex_jax.decoding.record import Limits
from dex_jax.decoding.request import Dex
from dex_jax.errors import DexError, whole_number
from dex_jax.nn.transformer import Transformer
from dex_jax.sampling import Sampling
from studies.rivals import loop
from studies.rivals.interface import ChainNetwork, Policy
from studies.rivals.loop import ChainState
from studies.rivals.network import chain_network


@dataclasses.dataclass(frozen=True)
class ChainLoop(Loop):
    """The loop that runs rounds on a chain, under a policy."""

    policy: Policy

    def init(self, model: Transformer, heads: Heads, plan: Plan, prefilled: Prefilled, capacity: int) -> ChainState:
        """Return the state before the first step; see Loop."""
        options: dict[str, Any] = {"limits": prefilled.limits, "sampling": prefilled.sampling, "capacity": capacity}
        network = _network(model, heads, plan)
        return loop.init(network, prefilled.memory, prefilled.token, prefilled.lengths, policy=self.policy, **options)

    def tick(self, model: Transformer, heads: Heads, plan: Plan, limits: Limits, sampling: Sampling | None) -> Tick:
        """Return the function that runs one step; see Loop."""
        network = _network(model, heads, plan)
        return lambda state: loop.step(network, state, limits, sampling, policy=self.policy)

    def ticks(self, exits: np.ndarray, length: int, stages: int) -> int:
        """Return the number of rounds, which all end with a token of exit K, but for a last one that is cut."""
        if length < 2:
            return 0
        return int(np.sum(exits[1:length] == stages)) + int(exits[length - 1] != stages)

    def counts(self, plan: Plan, record: Any) -> dict[str, Any]:
        """Return rounds, layers run one after the other, tokens drafted, and tokens accepted: [B] int32 each."""
        at = np.arange(record.exits.shape[1])[None]
        drafted_here = (at > 0) & (at < record.lengths[:, None]) & (record.exits < plan.stages)
        spent = np.take_along_axis(record.counts, (record.lengths - 1)[:, None, None], axis=1)[:, 0]
        accepted = np.sum(drafted_here, axis=1, dtype=np.int32)
        return {"rounds": record.ticks, "layer_steps": spent[:, 0], "drafted": spent[:, 1], "accepted": accepted}


def _network(model: Transformer, heads: Heads, plan: Plan) -> ChainNetwork:
    return chain_network(model, plan.depths, plan.exits, heads.exits)


def chain_plan(method: str, depths: tuple[int, ...], policy: Policy) -> Plan:
    """Return the plan of a method that drafts on a chain; raise DexError if the cache has no room for the drafts."""
    whole_number(draft_length=policy.draft_length)
    if 2 * policy.rows > SPARE:
        raise DexError(f"draft_length may be {SPARE // 2 - 1} at most, not {policy.draft_length}")
    return Plan(method, depths, policy.rows, decs=False, loop=ChainLoop(policy))


def layer_steps(stats: Stats) -> np.ndarray:
    """Return the number of layers run one after the other since the prefill, however many rows ran in each: [B].

    All methods have this figure of depth: AR L (n - 1); DEX ticks times the longest stage, on as many devices as there
    are stages; LayerSkip g d + L a round, and so on. It is a count and no time.
    """
    if stats.ticks is None:
        return stats.counts["layer_steps"]
    return stats.ticks * max(np.diff((0, *stats.plan.depths)))


@dataclasses.dataclass(frozen=True)
class LayerSkip:
    """LayerSkip's self-speculative decoding (Elhoushi et al., arXiv 2404.16710): one exit, one draft length.

    It drafts `draft_length` tokens at one exit, then runs the other layers for all of them at once. The drafts' states
    at the exit are kept, so a round runs g d + L layers one after the other and emits up to g + 1 tokens. At the end of
    a sequence rounds draft no more than can still be emitted.

    Attributes:
      exit: d, from 1 to L - 1.
      draft_length: g.

    Examples:
      >>> plan_for(LayerSkip(exit=12, draft_length=4), 30).depths
      (12, 30)
    """

    exit: int = 12
    draft_length: int = 4

    @property
    def depths(self) -> tuple[int, ...]:
        """The given depths, so that they are not moved to where exits are trained."""
        return (self.exit,)

    def plan_for(self, num_layers: int) -> Plan:
        """Return the plan for a model of L = num_layers.

        Raises:
          DexError: the exit is not below the final layer, or there is no token to draft.
        """
        whole_number(exit=self.exit)
        if self.exit >= num_layers:
            raise DexError(
                f"LayerSkip's exit must lie below the model's final layer, {num_layers}, and not at {self.exit}"
            )
        return chain_plan("layerskip", (self.exit, num_layers), Policy(self.draft_length))


@dataclasses.dataclass(frozen=True)
class Sure(Policy):
    """The policy that drafts at every exit with a confidence of at least `threshold`."""

    threshold: float

    def initial(self, batch: int) -> jax.Array:
        """Return the threshold of every sequence, [B] float32, as an array, so that one compiled loop serves all."""
        return jnp.full(batch, self.threshold, jnp.float32)

    def drafts(self, known: Any, exit_index: jax.Array, drafted: jax.Array, confidence: jax.Array) -> jax.Array:
        """Return whether the confidence reaches the threshold; see Policy."""
        return confidence >= known


@dataclasses.dataclass(frozen=True)
class AdaDecode:
    """AdaDecode (Wei et al., ICML 2025, arXiv 2506.03700): a token exits at the first exit that is sure of the next.

    That is the first with a probability of at least `threshold`; the token's other layers wait. They run together with
    those of later tokens that pass the same depth, and at the final layer all that wait are verified: the first wrong
    draft discards those after it. A round with drafts at depths e_1 .. e_g runs e_1 + .. + e_g + L layers one after the
    other. The paper trains heads of its own; here the exits are those of DEX.

    Attributes:
      explorers: K, an even grid of exits as in Dex; 5 when neither this nor `depths` is given.
      depths: the exit depths, ascending and ending at L.
      threshold: from 0 to 1, of an exit's top probability.
      draft_length: the most tokens that may wait.

    Examples:
      >>> plan_for(AdaDecode(depths=(6, 12, 30)), 30).rows
      9
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    threshold: float = 0.75
    draft_length: int = 8

    def plan_for(self, num_layers: int) -> Plan:
        """Return the plan for a model of L = num_layers.

        Raises:
          DexError: the threshold is no probability, there is no token to draft, or Dex refuses the depths.
        """
        if not 0 <= self.threshold <= 1:
            raise DexError(f"AdaDecode's threshold is a probability, from 0 to 1, and not {self.threshold}")
        depths = plan_for(Dex(self.explorers, self.depths, draft=False), num_layers).depths
        return chain_plan("adadecode", depths, Sure(self.draft_length, float(self.threshold)))
