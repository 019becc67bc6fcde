"""Depth Exploration Decoding once more, slowly: nodes are objects, a cohort is a list, nothing is an array of slots.

Written from the description of the algorithm (arXiv 2606.29223), not from the library's loop, to be compared with it
tick by tick. One sequence at a time; a batch is several runs. The model is any object with

    logits(tokens, stage) -> float32 [columns], what exit `stage` (1..K, K the final layer) says after `tokens`;
    vocabulary(stage) -> the token id of each column, ascending or not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from reference.filters import filter_logits

SCORE_STEP = 2.0**-10
LOWEST_LOG_PROBABILITY = -64.0


@dataclasses.dataclass(frozen=True)
class Draws:
    """How to sample: noise(position) is a float32 row over the full vocabulary."""

    noise: Callable[[int], np.ndarray]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclasses.dataclass(eq=False)
class Node:
    """A candidate token."""

    token: int
    parent: Node | None
    tokens: tuple[int, ...]  # the prompt, what has been emitted, and the path down to this node
    born_at: int
    score: float = 0.0
    progress: int = 0
    children: list[Node] = dataclasses.field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.tokens) - 1

    def subtree(self) -> Iterable[Node]:
        yield self
        for child in self.children:
            yield from child.subtree()


@dataclasses.dataclass(frozen=True)
class Seen:
    """A live node as the comparison sees it after a tick; `path` is the tokens from the root down to it."""

    path: tuple[int, ...]
    progress: int
    born_at: int
    position: int
    score: float


@dataclasses.dataclass
class Run:
    """What one run did: exits as the library reports them, and the live nodes after each tick."""

    tokens: list[int]
    exits: list[int]
    ticks: int
    lattices: list[set[Seen]]
    largest_cohort: int
    pruned: int


def decode(
    model,
    prompt: Sequence[int],
    *,
    stages: int,
    rows: int | None,
    max_new_tokens: int,
    decs: bool = True,
    asked: Sequence[int] | None = None,
    eos_ids: Sequence[int] = (),
    draws: Draws | None = None,
) -> Run:
    """The whole loop; rows=None never prunes, asked=None asks every exit."""
    committed = tuple(prompt)
    first = final_token(model, committed, stages, draws)
    run = Run([first], [-1], 0, [], 0, 0)
    committed = (*committed, first)
    root = Node(first, None, committed, born_at=stages)
    cohorts = [[root]]  # youngest last; dead nodes are taken out

    def ended() -> bool:
        return run.tokens[-1] in eos_ids or len(run.tokens) >= max_new_tokens

    while not ended():
        run.ticks += 1

        # Advance: every live node runs its next stage.
        for cohort in cohorts:
            for node in cohort:
                node.progress += 1

        # Commit and collapse: the final layer decides; one child, or nobody, had that token.
        proposing = cohorts
        if root.progress == stages:
            token = final_token(model, committed, stages, draws)
            heir = next((child for child in root.children if child.token == token), None)
            committed = (*committed, token)
            run.tokens.append(token)
            run.exits.append(stages if heir is None else heir.born_at)
            if ended():
                run.lattices.append(set())
                break
            if heir is None:
                root = Node(token, None, committed, born_at=stages)
                proposing = []
                cohorts = [[root]]
            else:
                offset = heir.score
                root = heir
                root.parent = None
                survivors = set(root.subtree())
                for node in survivors:
                    node.score -= offset
                cohorts = proposing = [[node for node in cohort if node in survivors] for cohort in cohorts]

        # Propose: exit by exit, and within an exit in the order in which its cohort was spawned.
        candidates = []
        for node in sorted((n for cohort in proposing for n in cohort), key=lambda n: n.progress):
            if asked is not None and node.progress not in asked:
                continue
            child = proposal(model, node, decs, draws)
            if child is not None:
                candidates.append(child)
        candidates.sort(key=lambda child: -child.score)  # stable: equal scores keep that order
        spawned = candidates if rows is None else candidates[:rows]
        run.pruned += len(candidates) - len(spawned)
        for child in spawned:
            child.parent.children.append(child)
        if spawned:
            cohorts = [*cohorts, spawned]
        cohorts = [cohort for cohort in cohorts if cohort]
        run.largest_cohort = max(run.largest_cohort, len(spawned))
        run.lattices.append({_seen(node, len(committed)) for node in root.subtree()})
    return run


def proposal(model, node: Node, decs: bool, draws: Draws | None) -> Node | None:
    """The child that `node` gets from the exit that it has just reached, not yet hung under it."""
    stage = node.progress
    held = [child.token for child in node.children]
    best = best_token(model, node.tokens, stage, held if decs else [], draws)
    if best is None or best in held:
        return None
    scaled = model.logits(node.tokens, stage).astype(np.float64) / (1.0 if draws is None else draws.temperature)
    column = list(model.vocabulary(stage)).index(best)
    log_probability = scaled[column] - math.log(np.exp(scaled - scaled.max()).sum()) - scaled.max()
    return Node(best, node, (*node.tokens, best), born_at=stage, score=node.score + quantized(log_probability))


def final_token(model, tokens: Sequence[int], stages: int, draws: Draws | None) -> int:
    """What the last layer says after `tokens`."""
    token = best_token(model, tuple(tokens), stages, [], draws)
    assert token is not None
    return token


def best_token(model, tokens: tuple[int, ...], stage: int, banned: Sequence[int], draws: Draws | None) -> int | None:
    """The best token of one exit that is not banned; None if nothing is left. Ties go to the first column."""
    ids = list(model.vocabulary(stage))
    logits = model.logits(tokens, stage).astype(np.float32)
    logits = np.where([i in banned for i in ids], np.float32(-np.inf), logits)
    if draws is not None:
        logits = filter_logits(logits / np.float32(draws.temperature), draws.top_k, draws.top_p)
        logits = logits + draws.noise(len(tokens))[ids]
    column = int(np.argmax(logits))
    return None if logits[column] == -np.inf else ids[column]


def quantized(log_probability: float) -> float:
    """Rounded as the library documents it, so that sums do not depend on their order."""
    return round(min(max(log_probability, LOWEST_LOG_PROBABILITY), 0.0) / SCORE_STEP) * SCORE_STEP


def teacher_forced_exits(
    model, prompt: Sequence[int], tokens: Sequence[int], *, stages: int, decs: bool = True, draws: Draws | None = None
) -> list[int]:
    """For each token after the first, the first exit that gives it after its true prefix, K if none does.

    No lattice: the emitted text is put through the model once.
    """
    found = []
    for i in range(1, len(tokens)):
        before = (*prompt, *tokens[:i])
        offered: list[int] = []
        first = stages
        for stage in range(1, stages):
            best = best_token(model, before, stage, offered if decs else [], draws)
            if best == tokens[i]:
                first = stage
                break
            if best is not None:
                offered.append(best)
        found.append(first)
    return found


def autoregressive(
    model,
    prompt: Sequence[int],
    *,
    stages: int,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    draws: Draws | None = None,
) -> list[int]:
    """Plain decoding: the final layer after every prefix."""
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_ids):
        tokens.append(final_token(model, (*prompt, *tokens), stages, draws))
    return tokens


def _seen(node: Node, committed: int) -> Seen:
    return Seen(node.tokens[committed - 1 :], node.progress, node.born_at, node.position, node.score)
