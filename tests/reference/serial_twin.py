"""Serial rounds once more, slowly: a tree of objects, one sequence at a time.

Written from the description of the method, to be compared with the library's rounds. The model is any object with

    final(tokens) -> float32 [V], the last layer's logits after `tokens`;
    draft(tokens, committed) -> float32 [V'], the drafter's logits after `tokens`, of which `committed` have been
        through all layers, and columns -> the token id of each of its columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

SCORE_STEP = 2.0**-10
LONGEST = 8
HOPE = 0.25
PRIOR = 16


@dataclasses.dataclass(frozen=True)
class Draws:
    """Sampling at a temperature: noise(position) is a float32 row over the full vocabulary."""

    noise: Callable[[int], np.ndarray]
    temperature: float


@dataclasses.dataclass(eq=False)
class Node:
    """A row of the tree: the whole text down to it, and the score of its path."""

    tokens: list[int]
    score: float
    children: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class SerialRun:
    """What a run emits: tokens, and for each whether the tree held it (0) or the last layer alone gave it (1).

    `rows` and `levels` are those that each round ran and drafted, where a round may choose, `spent` what all of it took
    and `promised` how many drafted tokens should have been right.
    """

    tokens: list[int]
    exits: list[int]
    rounds: int = 0
    rows: list[int] = dataclasses.field(default_factory=list)
    levels: list[int] = dataclasses.field(default_factory=list)
    spent: float = 0.0
    promised: float = 0.0

    def price(self) -> float:
        """Promised tokens that an AR step's time is worth, before another round begins."""
        pace = (PRIOR + len(self.tokens) - 1) / (PRIOR + self.spent)
        kept = (PRIOR + len(self.tokens) - 1 - self.rounds) / (PRIOR + self.promised)
        return max(1.0, pace) / min(1.0, kept)


def perturbed(logits: np.ndarray, columns: np.ndarray, position: int, draws: Draws | None) -> np.ndarray:
    if draws is None:
        return logits.astype(np.float32)
    return (logits / np.float32(draws.temperature) + draws.noise(position)[columns]).astype(np.float32)


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    wide = scores.astype(np.float64)
    top = wide.max()
    log = wide - top - math.log(np.exp(wide - top).sum())
    return np.maximum(np.round(log / SCORE_STEP) * SCORE_STEP, -64.0)


def continuation(text: Sequence[int], count: int) -> tuple[list[int], int]:
    """(what followed the latest of the longest earlier occurrences of the text's suffix, length of the match)."""
    best, end = 0, None
    for at in range(len(text) - 1):
        length = 0
        while length < LONGEST and at - length >= 0 and text[at - length] == text[len(text) - 1 - length]:
            length += 1
        if length > 0 and length >= best:
            best, end = length, at
    if end is None:
        return [], 0
    grown = list(text)
    for i in range(count):
        grown.append(grown[end + 1 + i])
    return grown[len(text) :], best


def prune(
    root: Node, made: Sequence[Node], rungs: Sequence[tuple[int, float]], price: float
) -> tuple[int, float, float]:
    """Leaves as many of the most probable nodes as are worth the time: how many, what they take, what they promise."""
    order = sorted([root, *made], key=lambda node: -node.score)
    worth = [sum(math.exp(node.score) for node in order[:rows]) - price * cost for rows, cost in rungs]
    rows, cost = rungs[worth.index(max(worth))]
    kept = order[:rows]
    for node in order:
        node.children = [child for child in node.children if any(child is other for other in kept)]
    return rows, cost, sum(math.exp(node.score) for node in kept) - 1


def serial_run(
    model, prompt, first, *, widths, drafted, lookup, limit, rungs=(), drafting=0.0, eos=(), draws=None
) -> SerialRun:
    """Decodes one sequence; `lookup` is trust by length of the match, from 1 on."""
    run = SerialRun([first], [-1])
    while len(run.tokens) < limit and run.tokens[-1] not in eos:
        price = run.price()
        run.rounds += 1
        text = [*prompt, *run.tokens]
        root = Node(text, 0.0)
        said, matched = continuation(text, len(widths))
        trust = lookup[matched - 1] if matched else 0.0
        follows: Node | None = root if trust > 0 else None
        above, everything, levels = [root], [], 0
        for level, width in enumerate(widths, 1):
            found: list[tuple[Node, int, float]] = []
            if follows is not None:
                log = round(math.log(trust) / SCORE_STEP) * SCORE_STEP
                found.append((follows, said[level - 1], follows.score + log))
            claimed = sum(math.exp(score) for _, _, score in found)  # by the lookup
            hope = HOPE * (sum(math.exp(node.score) for node in above) - claimed)
            if model.columns is not None and level <= drafted and (not rungs or hope > price * drafting):
                levels += 1
                for node in above:
                    scores = perturbed(model.draft(node.tokens, len(text) - 1), model.columns, len(node.tokens), draws)
                    log = log_probabilities(scores)
                    for column in np.argsort(-scores, kind="stable")[:width]:
                        found.append((node, int(model.columns[column]), node.score + float(log[column])))
            merged: list[tuple[Node, int, float]] = []
            for node, token, score in found:
                twin = next((i for i, (n, t, _) in enumerate(merged) if n is node and t == token), None)
                if twin is None:
                    merged.append((node, token, score))
                elif score > merged[twin][2]:
                    merged[twin] = (node, token, score)
            merged.sort(key=lambda each: -each[2])
            made = []
            for node, token, score in merged[:width]:
                node.children.append(Node([*node.tokens, token], score))
                made.append(node.children[-1])
            everything += made
            if follows is not None:
                follows = next((n for n in follows.children if n.tokens[-1] == said[level - 1]), None)
            above = made
        if rungs:
            rows, cost, promised = prune(root, everything, rungs, price)
            run.promised += promised
            run.rows.append(rows)
            run.levels.append(levels)
            run.spent += cost + levels * drafting
        node: Node | None = root
        while node is not None and len(run.tokens) < limit and run.tokens[-1] not in eos:
            scores = perturbed(model.final(node.tokens), np.arange(model.vocab_size), len(node.tokens), draws)
            token = int(np.argmax(scores))
            node = next((child for child in node.children if child.tokens[-1] == token), None)
            run.tokens.append(token)
            run.exits.append(0 if node is not None else 1)
    return run
