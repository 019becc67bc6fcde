"""Top-k and top-p filters that sort one row at a time, as the library does without a sort."""

from __future__ import annotations

import numpy as np


def filter_logits(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Return one row of float32 logits, removed ones at -inf; top-k comes first, ties with the last kept stay."""
    logits = np.asarray(logits, np.float32)
    if top_k is not None:
        cut = np.sort(logits)[::-1][min(top_k, len(logits)) - 1]
        logits = np.where(logits >= cut, logits, np.float32(-np.inf))
    if top_p is not None and np.isfinite(logits).any():
        wide = logits.astype(np.float64)
        probability = np.exp(wide - wide.max())
        probability /= probability.sum()
        order = np.argsort(-wide, kind="stable")
        reached = np.cumsum(probability[order]) >= np.float64(np.float32(top_p))
        # Rounding may leave the full sum a hair below p = 1: then nothing is cut.
        last = order[np.argmax(reached)] if reached.any() else order[-1]
        logits = np.where(logits >= logits[last], logits, np.float32(-np.inf))
    return logits
