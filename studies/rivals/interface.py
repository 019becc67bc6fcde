"""The callables that the loop of chains needs of a network and of a policy, and the arrays that it gives them.

Letters: B sequences, R rows of a chain, n of them at a time, K stages, D model width, V vocabulary. Stages and exits
are counted from 0 in code, as array indices, and from 1 in what is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax

from dex_jax.decoding.dex.interface import Chunk


class ChainRows(NamedTuple):
    """The rows of a round."""

    token: jax.Array  # [B, R] int32, row 0 the root: the last token emitted
    position: jax.Array  # [B, R] int32
    progress: jax.Array  # [B, R] int32, stages done; 0 for rows that are not there yet
    states: jax.Array  # [K, B, R, D], hidden states after each stage; anything above a row's progress


class ChainExits(NamedTuple):
    """The heads of exits 1..K-1."""

    # (memory, ChainRows, row [B], exit [B]) -> features [B, D'] of one row a sequence at one exit each
    newest: Callable[..., jax.Array]
    # (memory, ChainRows) -> [K - 1, B R, D'], every row at every exit, as if the rows had been drafted there
    shadows: Callable[..., jax.Array]
    # for logits, vocabulary and rest see dex.interface.Exits
    logits: Callable[[jax.Array], jax.Array]
    vocabulary: jax.Array | None = None
    rest: Callable[[jax.Array], jax.Array] | None = None


class ChainNetwork(NamedTuple):
    """A decoder with stages that run one by one."""

    vocab_size: int  # V
    depths: tuple[int, ...]  # x_1 < ... < x_K = L.
    embed: Callable[[jax.Array, jax.Array], jax.Array]  # (token [B], position [B]) -> hidden [B, D]
    # (memory, stage, hidden [B, n, D], start [B]) -> (hidden, fresh): n rows at consecutive positions through one
    # stage; each attends to the positions before `start` and the rows up to itself. Leaves of `fresh` have the rows on
    # the last axis but one.
    run: Callable[..., tuple[jax.Array, Any]]
    # (memory, stage, fresh, start [B], where [B] bool) -> memory: the sequences of `where` write n rows from `start`
    # on; rows that are not there yet may be anything, as they are written again before they are read
    write: Callable[..., Any]
    # (memory, Chunk) -> memory, for what exits keep of the committed prefix. The chunk is the rows that a round
    # commits, with their keys and values in place already; it ends where it starts for sequences that commit nothing
    # in this step.
    commit: Callable[[Any, Chunk], Any]
    final: Callable[[jax.Array], jax.Array]  # hidden [M, D] -> logits [M, V] float32
    exits: ChainExits | None  # None for K = 1


class Verified(NamedTuple):
    """The outcome of a round, in which rows 0 .. length - 1 hold right tokens."""

    where: jax.Array  # [B] bool, the sequences that end a round in this step
    length: jax.Array  # [B] int32
    final: jax.Array  # [B, R] int32, the final layer's token after each row
    shadow: jax.Array  # [K - 1, B, R] int32, each exit's token; zeros unless the policy has `shadows`
    confidence: jax.Array  # [K - 1, B, R] float32, the probability that the exit gave it


@dataclasses.dataclass(frozen=True)
class Policy:
    """The rule that says when to draft; this one drafts at the first exit until `draft_length` tokens wait.

    A confidence is the probability of the token that an exit gives: of its softmax over logits, divided by the
    temperature and with the position's noise added where tokens are sampled, as the choice itself is made.

    Attributes:
      draft_length: the most tokens that a round drafts, R - 1.
    """

    draft_length: int
    shadows: ClassVar[bool] = False

    @property
    def rows(self) -> int:
        """The number of rows of a chain, R."""
        return self.draft_length + 1

    def initial(self, batch: int) -> Any:
        """Return what is known before the first round: a pytree of arrays with a leading axis B."""
        return ()

    def asks(self, known: Any, exit_index: jax.Array, drafted: jax.Array) -> jax.Array:
        """Return [B] bool, whether to ask the exit [B] where the newest row is, with `drafted` [B] tokens waiting."""
        return drafted >= 0

    def drafts(self, known: Any, exit_index: jax.Array, drafted: jax.Array, confidence: jax.Array) -> jax.Array:
        """Return [B] bool, whether to draft the token that the exit gives with this confidence [B]; see `asks`."""
        return confidence >= 0

    def learn(self, known: Any, verified: Verified) -> Any:
        """Return what is known after a round, unchanged for sequences outside `verified.where`."""
        return known
