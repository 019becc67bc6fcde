"""LayerSkip's self-speculative decoding (Elhoushi et al., arXiv 2404.16710): one exit, one draft length."""

from __future__ import annotations

import dataclasses

from dex_jax.decoding.chain.interface import Policy
from dex_jax.decoding.loops import CHAIN_LOOP
from dex_jax.decoding.methods import Schedule
from dex_jax.errors import DexError, whole_number


@dataclasses.dataclass(frozen=True)
class LayerSkip:
    """Drafts `draft_length` tokens at one exit, then runs the other layers for all of them at once.

    What the first layers have made of the drafts is kept, so a round runs g d + L layers one after the other and emits
    up to g + 1 tokens. At the end of a sequence rounds draft no more than can still be emitted.

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
