"""Slow twins of exit distillation: the loss in float64, and the features of each exit at one step of one item."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from reference.exit_metrics_twin import TextTwin


class LossTwin(NamedTuple):
    """The results of `exit_losses`, and the gradient [X, N, D + 1] of the sum over exits of scale times loss."""

    loss: np.ndarray
    agreement: np.ndarray
    coverage: float
    gradient: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def losses(features, final, weight, unembed, draft, scale, cap=None) -> LossTwin:
    """Compute the losses one token and exit at a time; `draft` lists token ids, or is None for the full vocabulary."""

    def capped(logits: np.ndarray) -> np.ndarray:
        return logits if cap is None else cap * np.tanh(logits / cap)

    features, final, weight, unembed = (np.asarray(x, np.float64) for x in (features, final, weight, unembed))
    exits, tokens, _ = features.shape
    kept = list(range(len(unembed))) if draft is None else list(draft)
    total = weight.sum()
    loss, agreement, coverage, gradient = np.zeros(exits), np.zeros(exits), 0.0, np.zeros_like(features)
    for n in range(tokens):
        best = int(np.argmax(unembed @ final[n]))
        wanted = np.exp(log_softmax(capped(unembed @ final[n])))
        others = sum(wanted[token] for token in range(len(unembed)) if token not in kept)
        target = np.array([*(wanted[token] for token in kept), others])
        coverage += weight[n] / total * (best in kept)
        for x in range(exits):
            own, rest = features[x, n, :-1], features[x, n, -1]
            logits = capped(unembed[kept] @ own)
            said = log_softmax(np.array([*logits, -np.inf if draft is None else rest]))
            some = target > 0
            loss[x] += weight[n] / total * np.sum(target[some] * (np.log(target[some]) - said[some]))
            agreement[x] += weight[n] / total * (kept[int(np.argmax(logits))] == best)
            slope = scale[x] * weight[n] / total * (np.exp(said) - target)
            steep = 1 if cap is None else np.cosh(unembed[kept] @ own / cap) ** -2.0
            gradient[x, n, :-1] = (slope[:-1] * steep) @ unembed[kept]
            gradient[x, n, -1] = slope[-1]
    return LossTwin(loss, agreement, coverage, gradient)


class ItemTwin(TextTwin):
    """One item of the training data; its tokens are `prompt`, and `answer` is empty."""

    def with_rest(self, depth: int, at: int, source: int | None, hidden: int) -> np.ndarray:
        """Return [D + 1]: the features, and the logit of all tokens outside the draft vocabulary together.

        If `source` is a depth, the context layer does not see the last `hidden` positions before `at`.
        """
        self.hidden = hidden
        out, e = self.features(depth, at, source), self.exits.depths.index(depth)
        rest = -np.inf
        if "rest" in self.parameters:
            rest = self.parameters["rest"][e] @ out + self.parameters["rest_bias"][e]
        return np.append(out, rest)
