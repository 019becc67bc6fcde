"""The history of one sequence's lattice, tick by tick: recorded on the host, for pictures and for teaching.

The jitted loop knows nothing of this. A trace steps it one tick at a time and copies the lattice in between, so it is
recorded only on request, and takes longer than decoding does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from dex_jax.decoding.dex.interface import DexState
from dex_jax.decoding.generate import prepare
from dex_jax.decoding.output import text_pieces
from dex_jax.decoding.plan import Method
from dex_jax.decoding.request import Dex, Request
from dex_jax.errors import DexError
from dex_jax.io.prompts import Prompt
from dex_jax.lattice import NO_NODE, Lattice

if TYPE_CHECKING:
    from dex_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class TracedNode:
    """One node from its birth to its end: after tick t, for born <= t < ended, it had done t - born stages.

    Attributes:
      token: id.
      position: absolute position in the sequence.
      parent: index of its parent in `Trace.nodes`, None for a root that no exit had proposed.
      born_at: the exit 1..K-1 that proposed it, 0 for a draft, K for such a root.
      born: the tick that spawned it, 0 for the prefill's token.
      ended: the tick in which it was committed to the prefix or died.
      rooted: the tick in which it became the root, None if it never did.
      probability: that of its token by the exit that proposed it; 1 for a root that no exit had proposed.
    """

    token: int
    position: int
    parent: int | None
    born_at: int
    born: int
    ended: int
    rooted: int | None
    probability: float = 1.0


@dataclasses.dataclass(frozen=True)
class Trace:
    """The decoding of one sequence, with the history of its lattice.

    Attributes:
      depths: exit depths x_1 < ... < x_K = L.
      tokens: the n tokens emitted, token 0 of the prefill among them.
      exits: the exit that first gave each token, -1 for token 0.
      ticks: loop steps taken.
      nodes: every node that was spawned, in the order of birth.
      labels: text of every token in `nodes` and `tokens`, by id.
      pieces: the text that each of `tokens` added, "" where a later one completes it.
    """

    depths: tuple[int, ...]
    tokens: tuple[int, ...]
    exits: tuple[int, ...]
    ticks: int
    nodes: tuple[TracedNode, ...]
    labels: dict[int, str]
    pieces: tuple[str, ...]

    @property
    def stages(self) -> int:
        """Number of stages K."""
        return len(self.depths)

    @property
    def roots(self) -> tuple[TracedNode, ...]:
        """The nodes that were the root, one after the other; the n-th held token n."""
        return tuple(sorted((node for node in self.nodes if node.rooted is not None), key=lambda node: node.position))

    def alive(self, tick: int) -> tuple[int, ...]:
        """Return the indices of the nodes that lived after `tick`."""
        return tuple(i for i, node in enumerate(self.nodes) if node.born <= tick < node.ended)


def trace(lm: LanguageModel, prompt: Prompt, method: Method | None = None, **options) -> Trace:
    """Decode one prompt and record its lattice.

    Args:
      lm: from `dex_jax.load`.
      prompt: a string, a list of messages or a list of token ids.
      method: DEX; None is five explorers without drafts, which give a readable picture.
      **options: the other options of `dex_jax.stream`, except ticks_per_update, num_samples and stop.

    Raises:
      DexError: bad options, a model on a mesh, or a method without a lattice.

    Examples:
      >>> figure = dex_jax.plot.lattice(dex_jax.trace(lm, "Why is the sky blue?"))   # doctest: +SKIP
    """
    if lm.mesh is not None:
        raise DexError("a lattice is traced on one device: load the model without a mesh")
    method = Dex(draft=False) if method is None else method
    session = prepare(lm, [prompt], Request.of({"method": method, **options}))
    if not session.plan.has_lattice:
        raise DexError("only DEX has a lattice to trace: give method=Dex(explorers=5), say")
    session.plan.say(lm.fingerprint)
    session.prefill()
    session.tick = -1  # so that the first step is tick 0, which gives the first root

    def tick(_: DexState) -> DexState:
        session.advance(1)
        return session.state

    tokenizer = lm.tokenizer
    text = str if tokenizer is None else lambda token: tokenizer.decode([token], skip_special=False)
    found = watch(tick, session.state, depths=session.plan.depths, text=text)
    return found if tokenizer is None else dataclasses.replace(found, pieces=text_pieces(tokenizer, found.tokens))


def watch(
    step: Callable[[DexState], DexState],
    state: DexState,
    *,
    depths: Sequence[int] | None = None,
    text: Callable[[int], str] = str,
    sequence: int = 0,
) -> Trace:
    """Record the lattice of one sequence of a loop of your own.

    Args:
      step: one tick, such as a jitted `lambda state: dex_jax.step(network, state, limits)`; it may donate its argument.
      state: as `dex_jax.init` returns it.
      depths: exit depths x_1 .. x_K; None is 1 .. K.
      text: token id -> its text in a picture.
      sequence: its index in the batch.
    """
    stages = state.stages
    seen = []
    while not bool(state.record.done[sequence]):
        state = step(state)
        seen.append(_look(state, sequence))
    length = int(state.record.lengths[sequence])
    tokens = tuple(np.asarray(state.record.tokens[sequence, :length]).tolist())
    nodes = _nodes(seen, tokens) if seen else ()
    labels = {token: text(token) for token in sorted({*tokens, *(node.token for node in nodes)})}
    return Trace(
        depths=tuple(range(1, stages + 1)) if depths is None else tuple(depths),
        tokens=tokens,
        exits=tuple(np.asarray(state.record.exits[sequence, :length]).tolist()),
        ticks=int(state.record.ticks[sequence]),
        nodes=nodes,
        labels=labels,
        pieces=tuple(f"{token} " if text is str else labels[token] for token in tokens),  # ids are told apart by spaces
    )


def _look(state: DexState, sequence: int) -> tuple[Lattice, int]:
    # A copy, not a view: the next tick may reuse the memory.
    return jax.tree.map(lambda field: np.array(field[sequence]), state.lattice), int(state.record.lengths[sequence])


def _nodes(seen: Sequence[tuple[Lattice, int]], tokens: Sequence[int]) -> tuple[TracedNode, ...]:
    """Return the nodes, given (lattice, number of emitted tokens) after ticks 0, 1, ... and all tokens."""
    stages, rows = seen[0][0].token.shape
    nodes: list[TracedNode] = []
    at: dict[int, int] = {}  # slot -> index of the node that lives there
    top, told = -1, 1  # the root so far, and how many tokens had been emitted
    for tick, (lattice, length) in enumerate(seen):
        # Where one tick commits a path, all its nodes but the last are the root within that tick only.
        for said in tokens[told : length - 1]:
            top = next(i for i in at.values() if nodes[i].parent == top and nodes[i].token == said)
            nodes[top] = dataclasses.replace(nodes[top], rooted=tick)
        told = length
        live = np.flatnonzero(np.asarray(lattice.live).reshape(-1)).tolist()
        born = {slot: tick - (tick - slot // rows) % stages for slot in live}
        for slot, index in at.items():
            if born.get(slot) != nodes[index].born:
                nodes[index] = dataclasses.replace(nodes[index], ended=tick)
        token, position, parent, born_at, score = (
            np.asarray(field).reshape(-1)
            for field in (lattice.token, lattice.position, lattice.parent, lattice.born_at, lattice.score)
        )
        before, at = at, {}
        # Parents first: they are older, or stand in an earlier row.
        for slot in sorted(live, key=born.__getitem__):
            if born[slot] < tick:
                at[slot] = before[slot]
                continue
            at[slot] = len(nodes)
            above, chance = None, 1.0
            if parent[slot] != NO_NODE:
                above, chance = at[int(parent[slot])], math.exp(min(0.0, score[slot] - score[parent[slot]]))
            about = (int(token[slot]), int(position[slot]), above, int(born_at[slot]))
            nodes.append(TracedNode(*about, born=tick, ended=tick, rooted=None, probability=chance))
        top = at.get(int(lattice.root), -1)
        if top >= 0 and nodes[top].rooted is None:
            nodes[top] = dataclasses.replace(nodes[top], rooted=tick)
    return tuple(nodes)
