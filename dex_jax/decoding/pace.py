"""What steps and ticks really take: seen chunk by chunk, and held against what was measured or guessed before."""

from __future__ import annotations

import numpy as np

TRUST = 0.05
"""How far costs are off is believed to be about 0.5, what a chunk says of it about 0.1: the ratio of their squares."""

MEMORY = 0.95
"""Each chunk weighs so many times what the next one does: other load on the machine comes and goes."""

FAR_OFF = 2.0
"""Steps that are so many times as fast as they were measured were measured beside other load. Without any, costs, which
are measured on one layer, have been seen to be half as large again as steps."""


class Pace:
    """Costs of the kinds of work that chunks consist of, corrected by the seconds that chunks take.

    They are [n], in AR steps, above 0, of one piece of each kind. That of the first kind stays as it is: seconds say
    how the others compare with it.
    """

    def __init__(self, costs: np.ndarray):
        self.given = self.costs = np.asarray(costs, np.float64)  # `costs` as corrected so far
        self.fastest = np.inf  # seconds of an AR step in the fastest chunk
        self._seen: list[tuple[np.ndarray, float]] = []

    def saw(self, pieces: np.ndarray, seconds: float) -> None:
        """Takes in a chunk of so many `pieces` [n] of each kind; one without any says nothing."""
        work = np.asarray(pieces, np.float64) * self.given
        if work.sum() <= 0:
            return
        self.fastest = min(self.fastest, seconds / float(np.sum(pieces * self.costs)))
        self._seen.append((work, seconds))
        weights = MEMORY ** np.arange(len(self._seen))[::-1]
        works, times = np.stack([work for work, _ in self._seen]), np.array([time for _, time in self._seen])
        # Seconds of an AR step if costs are right, then by how much each kind is off: least squares that begin at 1.
        step = np.sum(weights * times) / np.sum(weights * works.sum(axis=1))
        shares = works / works.sum(axis=1, keepdims=True)
        off = times / (step * works.sum(axis=1)) - 1
        matrix = (shares * weights[:, None]).T @ shares + TRUST * np.eye(len(self.given))
        ratios = np.clip(1 + np.linalg.solve(matrix, (shares * weights[:, None]).T @ off), 0.25, 4)
        self.costs = self.given * ratios / ratios[0]

    def far_off(self, measured: float) -> bool:
        """Whether an AR step was faster here than `measured` seconds by so much that measuring again is worth it."""
        return FAR_OFF * self.fastest < measured
