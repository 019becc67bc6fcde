"""A slow twin of Depth Exploration Decoding: nodes are objects, a cohort is a list, nothing is an array of slots.

It is written from the description of the algorithm (arXiv 2606.29223), not from the library's loop, to be compared with
it tick by tick. It decodes one sequence at a time; a batch is several runs. The model is any object with

    logits(tokens, stage) -> float32 [columns] of exit `stage` (1..K, K the final layer) after `tokens`;
    vocabulary(stage) -> the token id of each column of an exit, ascending or not;

and, where exit 0 drafts,

    state(tokens, stage) -> the state that a drafter may read of the last of `tokens` once it has done `stage` stages;
    drafted(before, token, position) -> (exit 0's logits float32 [columns of exit 0], its own state of this position).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from reference.filters import filter_logits

from dex_jax import TreeShape

SCORE_STEP = 2.0**-10
LOWEST_LOG_PROBABILITY = -64.0
COMPARED, LONGEST = 16, 64
ANCHORS = 8
FADING, PRIOR, PRIOR_USEFULNESS = 1 / 128, 4, 0.5
LEVEL = 0.1
PATIENCE, REST = 8, 8


@dataclasses.dataclass(frozen=True)
class Draws:
    """The settings of sampling: noise(position) is a float32 row over the full vocabulary."""

    noise: Callable[[int], np.ndarray]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


@dataclasses.dataclass(eq=False)
class Node:
    """A candidate token."""

    token: int
    parent: Node | None
    tokens: tuple[int, ...]  # the prompt, the emitted tokens, and the path down to this node
    born_at: int
    score: float = 0.0
    progress: int = 0
    drafter_state: object = None  # exit 0's own state of this node, once it has drafted below it
    by_drafter: bool = False  # whether exit 0's drafter alone proposed it
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
    """A live node as the comparison sees it after a tick; `path` has the tokens from the root down to it."""

    path: tuple[int, ...]
    progress: int
    born_at: int
    position: int
    score: float


@dataclasses.dataclass
class Run:
    """The outcome of one run: exits as the library reports them, and the live nodes after each tick."""

    tokens: list[int]
    exits: list[int]
    ticks: int
    lattices: list[set[Seen]]
    pruned: int = 0
    rows: list[int] = dataclasses.field(default_factory=list)  # the row count that each cohort chose, if it has rungs
    levels: list[int] = dataclasses.field(default_factory=list)  # the levels that were drafted for each cohort
    # Fading sums: the tokens that drafts and seeds promised and brought, and those that the drafter should add and did.
    expected: float = 0.0
    accepted: float = 0.0
    called: float = 0.0
    used: float = 0.0
    idle: int = 0  # the latest ticks in a row that drafted nothing
    emitted_before: int = 1  # tokens emitted up to the last tick

    @property
    def acceptance(self) -> float:
        return (max(self.accepted, 0) + PRIOR) / (max(self.expected, 0) + PRIOR)

    @property
    def usefulness(self) -> float:
        return (self.used + PRIOR * PRIOR_USEFULNESS) / (self.called + PRIOR)

    def update_sums(self, cohort: Sequence[Node], used: Sequence[Node], called: float) -> None:
        """Update the fading sums, given a tick's cohort, the drafted nodes that are as good, and what was requested."""
        root = float(bool(cohort) and cohort[0].score == 0)
        new = {
            "expected": sum(math.exp(n.score) for n in cohort) - root,
            "accepted": len(self.tokens) - self.emitted_before - root,
            "called": called,
            "used": sum(math.exp(n.score) for n in used),
        }
        for name, value in new.items():
            setattr(self, name, (1 - FADING) * getattr(self, name) + value)
        self.emitted_before = len(self.tokens)


def decode(
    model,
    prompt: Sequence[int],
    *,
    stages: int,
    rows: int | None,
    max_new_tokens: int,
    decs: bool = True,
    eos_ids: Sequence[int] = (),
    draws: Draws | None = None,
    shape: TreeShape | None = None,
) -> Run:
    """Decode one sequence; rows=None never prunes, shape=None drafts nothing."""
    committed = tuple(prompt)
    first = final_token(model, committed, stages, draws)
    run = Run([first], [-1], 0, [])
    committed = (*committed, first)
    cohorts: list[list[Node]] = []  # youngest last; dead nodes are taken out

    def ended() -> bool:
        return run.tokens[-1] in eos_ids or len(run.tokens) >= max_new_tokens

    def spawn(anchors: list[Node]) -> None:
        """Append the next cohort: the best rows of the anchors and of what exit 0 drafts below them."""
        spawned = anchors if rows is None else anchors[:rows]
        run.pruned += len(anchors) - len(spawned)
        if shape is not None:
            spawned = with_drafts(model, run, spawned, stages, rows, shape, draws)
        for node in spawned:
            if node.parent is not None:
                node.parent.children.append(node)
        cohorts.append(spawned)

    root = Node(first, None, committed, born_at=stages)
    if not ended():
        spawn([root])
    while not ended():
        run.ticks += 1

        # Advance: every live node runs its next stage.
        for cohort in cohorts:
            for node in cohort:
                node.progress += 1

        # Commit: the final layer decides after the root, and after every confirmed child that has run all stages too.
        fresh = False
        while root.progress == stages and not fresh and not ended():
            token = final_token(model, committed, stages, draws)
            heir = next((child for child in root.children if child.token == token), None)
            committed = (*committed, token)
            run.tokens.append(token)
            run.exits.append(stages if heir is None else heir.born_at)
            # Collapse: the subtree under that child stays, or nothing.
            if heir is None:
                root, fresh = Node(token, None, committed, born_at=stages), True
                cohorts = []
            else:
                offset = heir.score
                root = heir
                root.parent = None
                survivors = set(root.subtree())
                for node in survivors:
                    node.score -= offset
                cohorts = [[node for node in cohort if node in survivors] for cohort in cohorts]
        if ended():
            run.lattices.append(set())
            run.update_sums([], [], 0.0)
            break

        # Propose: exit by exit, and within an exit in the order in which its cohort was spawned.
        anchors = [root] if fresh else []
        for node in sorted((n for cohort in cohorts for n in cohort), key=lambda n: n.progress):
            child = proposal(model, node, decs, draws)
            if child is not None:
                anchors.append(child)
        anchors.sort(key=lambda child: -child.score)  # stable: equal scores keep that order
        spawn(anchors)
        cohorts = [cohort for cohort in cohorts if cohort]
        run.lattices.append({_seen(node, len(committed)) for node in root.subtree()})
    return run


def with_drafts(
    model, run: Run, anchors: list[Node], stages: int, rows: int | None, shape: TreeShape, draws: Draws | None
) -> list[Node]:
    """Return anchors and the drafts of exit 0 below them, best first, as many as are worth it; none hangs yet."""
    follows: dict[Node, tuple[Node, list[int], list[float]]] = {}
    resting = bool(shape.rungs) and run.idle >= PATIENCE and run.idle % REST != 0
    for anchor in () if resting else anchors[:ANCHORS]:
        count = sum(shape.widths)
        following, matched = continuation(anchor.tokens, count)
        logs = [match_log_probability(shape, matched + i) for i in range(len(following))]
        if following and logs[0] > -math.inf:
            follows[anchor] = (anchor, following, logs)
    everything, above, levels, called = list(anchors), anchors[:ANCHORS], 0, 0.0
    costs = [1 + (rows - 1) / 6 for rows in shape.rungs]  # the library's usual costs
    for level, width in enumerate(() if resting else shape.widths, 1):
        found: list[tuple[Node, int, float]] = []
        claimed: dict[Node, float] = {}
        for anchor, (at, following, logs) in follows.items():
            found.append((at, following[level - 1], at.score + logs[level - 1]))
            claimed[anchor] = math.exp(found[-1][2])
        below = sum(math.exp(node.score) for node in above) - sum(claimed.values())
        price = LEVEL + costs[:2][-1] - 1 if shape.rungs else 0
        if level <= shape.drafter_levels and (not shape.rungs or run.acceptance * run.usefulness * below > price):
            levels, called = levels + 1, called + below
            for node in above:
                found += drafted_below(model, node, width, stages, draws)
        merged: dict[tuple[Node, int], float] = {}
        for node, token, score in found:
            merged[node, token] = max(score, merged.get((node, token), -math.inf))
        best = sorted(merged.items(), key=lambda each: -each[1])[:width]
        above = [Node(token, node, (*node.tokens, token), born_at=0, score=score) for (node, token), score in best]
        everything += above
        for anchor in list(follows):
            at, following, logs = follows.pop(anchor)
            on = next((node for node in above if node.parent is at and node.token == following[level - 1]), None)
            if on is not None:
                follows[anchor] = (on, following, logs)
        for node in above:
            node.by_drafter = all(node is not on for on, _, _ in follows.values())
    depth = len(shape.widths)
    if follows and sum(shape.widths) > depth:
        node, following, logs = max(follows.values(), key=lambda each: each[0].score + each[2][depth])
        for token, log in list(zip(following, logs, strict=True))[depth:]:
            node = Node(token, node, (*node.tokens, token), born_at=0, score=node.score + log)
            everything.append(node)
    everything.sort(key=lambda node: -node.score)
    spawned = everything if rows is None else everything[:rows]
    if shape.rungs:
        root = float(bool(spawned) and spawned[0].score == 0)
        worth = []
        for size, cost in zip(shape.rungs, costs, strict=True):
            tokens = root + run.acceptance * (sum(math.exp(n.score) for n in spawned[:size]) - root)
            worth.append(tokens / (1 + (cost - 1) / stages + LEVEL * levels))
        size = shape.rungs[worth.index(max(worth))]
        spawned = spawned[:size]
        run.idle = run.idle + 1 if size == shape.rungs[0] and not levels else 0
        run.rows.append(size)
        run.levels.append(levels)
        least = min((node.score for node in spawned), default=0)
        run.update_sums(spawned, [node for node in everything if node.by_drafter and node.score >= least], called)
    return spawned


def drafted_below(model, node: Node, count: int, stages: int, draws: Draws | None) -> list[tuple[Node, int, float]]:
    """Return exit 0's `count` best children of a node as (node, token, score of the path)."""
    parent = node.parent
    if parent is None:
        before = model.state(node.tokens[:-1], stages)
    elif node.born_at == 0:
        before = parent.drafter_state
    else:
        before = model.state(parent.tokens, parent.progress)
    logits, node.drafter_state = model.drafted(before, node.token, node.position)
    ids, scores = list(model.vocabulary(0)), logits.astype(np.float32)
    if draws is not None:
        scores = filter_logits(scores / np.float32(draws.temperature), draws.top_k, draws.top_p)
        scores = (scores + draws.noise(len(node.tokens))[ids]).astype(np.float32)
    wide = scores.astype(np.float64)
    total = wide.max() + math.log(np.exp(wide - wide.max()).sum())
    order = [column for column in np.argsort(-scores, kind="stable")[:count] if scores[column] > -np.inf]
    return [(node, ids[column], node.score + quantized(wide[column] - total)) for column in order]


def continuation(text: Sequence[int], count: int) -> tuple[list[int], int]:
    """Return what followed the latest of the longest earlier matches of the text's suffix, and the match's length."""
    best, longest, end = 0, 0, None
    for at in range(len(text) - 1):
        length = 0
        while length < LONGEST and at - length >= 0 and text[at - length] == text[len(text) - 1 - length]:
            length += 1
        if length > 0 and min(length, COMPARED) >= best:
            best, longest, end = min(length, COMPARED), length, at
    if end is None:
        return [], 0
    grown = list(text)
    for i in range(count):
        grown.append(grown[end + 1 + i])
    return grown[len(text) :], longest


def match_log_probability(shape: TreeShape, matched: int) -> float:
    """Return the quantized log probability of a continuation's next token after `matched` tokens that were the same."""
    known = len(shape.lookup)
    wrong = 1 - shape.lookup[min(matched, known) - 1]
    if wrong == 1:
        return -math.inf
    return quantized(math.log(1 - wrong * known / max(known, min(matched, LONGEST))))


def proposal(model, node: Node, decs: bool, draws: Draws | None) -> Node | None:
    """Return the child that the exit which `node` has just reached proposes, not yet hung under it, or None."""
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
    """Return the final layer's token after `tokens`."""
    token = best_token(model, tuple(tokens), stages, [], draws)
    assert token is not None
    return token


def best_token(model, tokens: tuple[int, ...], stage: int, banned: Sequence[int], draws: Draws | None) -> int | None:
    """Return the best token of one exit that is not banned, or None if nothing is left; ties go to the first column."""
    ids = list(model.vocabulary(stage))
    logits = model.logits(tokens, stage).astype(np.float32)
    logits = np.where([i in banned for i in ids], np.float32(-np.inf), logits)
    if draws is not None:
        logits = filter_logits(logits / np.float32(draws.temperature), draws.top_k, draws.top_p)
        logits = logits + draws.noise(len(tokens))[ids]
    column = int(np.argmax(logits))
    return None if logits[column] == -np.inf else ids[column]


def quantized(log_probability: float) -> float:
    """Return a log probability rounded as in the library, so that sums do not depend on their order."""
    return round(min(max(log_probability, LOWEST_LOG_PROBABILITY), 0.0) / SCORE_STEP) * SCORE_STEP


def teacher_forced_exits(
    model, prompt: Sequence[int], tokens: Sequence[int], *, stages: int, decs: bool = True, draws: Draws | None = None
) -> list[int]:
    """Return, for each token after the first, the first exit that gives it after its true prefix, or K.

    There is no lattice: the emitted text runs through the model once.
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
    """Decode plainly: the final layer decides after every prefix."""
    tokens: list[int] = []
    while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_ids):
        tokens.append(final_token(model, (*prompt, *tokens), stages, draws))
    return tokens


def _seen(node: Node, committed: int) -> Seen:
    return Seen(node.tokens[committed - 1 :], node.progress, node.born_at, node.position, node.score)
