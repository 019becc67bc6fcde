"""The lattice replayed from teacher-forced figures: ticks and rows in use for any cap, without running the model.

How many nodes a cohort holds follows from which exit first gives each token, and from scores once rows are capped. On
the emitted text both are known. Of a wrong branch the model has said nothing: its nodes are given what exits said at
positions drawn at random, a little less sure (UNSURE). With rows that never prune neither
ticks nor the number of live nodes depends on that, and both are exact; with a cap they are estimates, and so is always
in which rows of a cohort its survivors stand.

Letters: N answer positions of all texts, K stages, W rows a stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from dex_jax.decoding.heads import HEAD_BLOCK
from dex_jax.evaluation.exit_forcing import Measurement
from dex_jax.evaluation.exit_metrics import proposals
from dex_jax.lattice import MIN_LOG_PROBABILITY, SCORE_STEP

UNSURE = 1.5
"""Assumption: on a wrong branch exits' log-probabilities are so many times as large. With the exits that ship for
SmolLM2-135M and K = 10 this brings the replay closest to the loop (`profile --real-loop` shows both); with 1, where a
wrong branch is as sure of itself as a right one, a cap of 4 or 8 rows seems to cost half as many ticks again."""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What the exits of one grid would propose at every answer position.

    Attributes:
      stages: K.
      right: [K, N, K - 1] bool, whether the proposal is the text's token; the first axis is the exit 1..K at which the
        proposing node was born.
      score: [K, N, K - 1] float64, log-probabilities as the lattice rounds them, -inf for no proposal.
      lengths: tokens of each text.
    """

    stages: int
    right: np.ndarray
    score: np.ndarray
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Replay:
    """What one replay counted.

    Attributes:
      ticks, tokens: of all texts; tokens after the first of each text.
      exits: [K] float64, share of these tokens by the exit that first gave them.
      live: [K] float64, live nodes of each stage, mean over ticks.
      used: [K, W + 1] float64, share of ticks in which the last live row of stage k is row w (0: the stage is empty).
      widest: [W + 1] float64, share of ticks in which row w is the last live one of any stage.
      asked: [HEAD_BLOCK + 1] float64, calls of the heads a tick that ask n nodes, by n.
    """

    ticks: int
    tokens: int
    exits: np.ndarray
    live: np.ndarray
    used: np.ndarray
    widest: np.ndarray
    asked: np.ndarray

    @property
    def ticks_per_token(self) -> float:
        """Ticks over tokens."""
        return self.ticks / self.tokens


def table_of(measured: Measurement, grid: tuple[int, ...]) -> Table:
    """The table of one grid, x_1 < ... < x_K = L."""
    right, score = [], []
    for born_at in range(1, len(grid) + 1):
        tokens, log_probability = proposals(measured, grid, born_at)
        right.append(tokens == measured.target[:, None])
        clipped = np.clip(log_probability.astype(np.float64), MIN_LOG_PROBABILITY, 0.0)
        rounded = np.round(clipped / SCORE_STEP) * SCORE_STEP
        score.append(np.where(np.isneginf(log_probability), -np.inf, rounded))
    return Table(len(grid), np.stack(right), np.stack(score), measured.lengths)


@dataclasses.dataclass(eq=False)
class _Node:
    """A candidate token: the row of the table that its proposals come from, and whether it belongs to the text."""

    at: int
    right: bool
    born_at: int
    score: float
    row: int
    children: list[_Node] = dataclasses.field(default_factory=list)

    def subtree(self) -> Iterable[_Node]:
        yield self
        for child in self.children:
            yield from child.subtree()


def replay(table: Table, rows: int, seed: int = 0, unsure: float = UNSURE) -> Replay:
    """Runs the loop over every text with at most `rows` nodes a cohort.

    Args:
      table: of one grid.
      rows: W.
      seed: of the positions that stand in for what exits would say on wrong branches.
      unsure: log-probabilities on wrong branches are so many times as large.
    """
    stages, random = table.stages, np.random.default_rng(seed)
    exits, live = np.zeros(stages), np.zeros(stages)
    used = np.zeros((stages, rows + 1))
    widest = np.zeros(rows + 1)
    asked = np.zeros(HEAD_BLOCK + 1)
    ticks = start = 0
    # Plain lists: single items of NumPy arrays are slow to read.
    right, score = table.right.tolist(), table.score.tolist()
    drawn: list[int] = []

    def anywhere() -> int:
        if not drawn:
            drawn.extend(random.integers(0, table.right.shape[1], 4096).tolist())
        return drawn.pop()

    for length in table.lengths:
        emitted = 1
        root = _Node(start + 1, True, stages, 0.0, 0)
        cohorts: list[list[_Node]] = [[root]]  # by age: cohorts[0] is the youngest, about to run stage 1
        while emitted < length:
            ticks += 1
            last = [1 + max((node.row for node in cohort), default=-1) for cohort in cohorts]
            for k in range(stages):
                used[k, last[k] if k < len(last) else 0] += 1
                live[k] += len(cohorts[k]) if k < len(cohorts) else 0
            widest[max(last)] += 1
            proposing = cohorts
            if len(cohorts) >= stages and root in cohorts[stages - 1]:
                emitted += 1
                heir = next((child for child in root.children if child.right), None)
                exits[(stages if heir is None else heir.born_at) - 1] += 1
                if emitted == length:
                    break
                if heir is None:
                    root = _Node(start + emitted, True, stages, 0.0, 0)
                    cohorts = [[root]]
                    continue
                survivors = set(heir.subtree())
                for node in survivors:
                    node.score -= heir.score if node is not heir else 0.0
                heir.score = 0.0
                root = heir
                cohorts = proposing = [[node for node in cohort if node in survivors] for cohort in cohorts]
            spawned = _propose(proposing[: stages - 1], right, score, rows, start + length, anywhere, unsure, asked)
            cohorts = [spawned, *cohorts[: stages - 1]]
        start += length
    tokens = sum(length - 1 for length in table.lengths)
    return Replay(
        ticks,
        tokens,
        exits / max(tokens, 1),
        live / max(ticks, 1),
        used / max(ticks, 1),
        widest / max(ticks, 1),
        asked / max(ticks, 1),
    )


def _propose(
    cohorts: list[list[_Node]],
    right: list,
    score: list,
    rows: int,
    end: int,
    anywhere: Callable[[], int],
    unsure: float,
    asked: np.ndarray,
) -> list[_Node]:
    """The cohort that is spawned: best scores first, equal ones by exit and then by row; `end` is the text's."""
    candidates, standing = [], []
    for k, cohort in enumerate(cohorts):
        for node in sorted(cohort, key=lambda node: node.row):
            step = score[node.born_at - 1][node.at][k] * (1.0 if node.right else unsure)
            standing.append((node.score, node.score + step))
            if step > -np.inf:
                candidates.append((node.score + step, k, node))
    _count_asked(standing, rows, asked)
    candidates.sort(key=lambda candidate: -candidate[0])
    spawned = []
    for row, (total, k, node) in enumerate(candidates[:rows]):
        on_text = node.right and right[node.born_at - 1][node.at][k]
        known = on_text and node.at + 1 < end
        child = _Node(node.at + 1 if known else anywhere(), on_text, k + 1, total, row)
        node.children.append(child)
        spawned.append(child)
    return spawned


def _count_asked(standing: list[tuple[float, float]], rows: int, asked: np.ndarray) -> None:
    """Counts the blocks of nodes that `decoding.heads.propose` asks: until no other node could win a row."""
    block = min(rows, HEAD_BLOCK)
    order = sorted(standing, key=lambda pair: -pair[0])
    totals: list[float] = []
    for first in range(0, len(order), block):
        least = sorted(totals, reverse=True)[rows - 1] if len(totals) >= rows else -np.inf
        worth = [pair for pair in order[first : first + block] if pair[0] >= least]
        if not worth:
            break
        asked[len(worth)] += 1
        totals += [total for _, total in worth]
