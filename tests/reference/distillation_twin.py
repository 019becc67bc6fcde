"""Slow twins of exit distillation: the loss in float64, and what each exit reads at one step of one item."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from reference.exit_metrics_twin import TRUE, TextTwin


class LossTwin(NamedTuple):
    """As `exit_losses` returns them, and the gradient [X, N, D + 1] of the sum over exits of scale times loss."""

    loss: np.ndarray
    agreement: np.ndarray
    coverage: float
    gradient: np.ndarray


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def losses(features, final, weight, unembed, draft, hard, scale) -> LossTwin:
    """One token and one exit at a time; `draft` is a list of token ids, or None for the full vocabulary."""
    features, final, weight, unembed = (np.asarray(x, np.float64) for x in (features, final, weight, unembed))
    exits, tokens, _ = features.shape
    kept = list(range(len(unembed))) if draft is None else list(draft)
    total = weight.sum()
    loss, agreement, coverage, gradient = np.zeros(exits), np.zeros(exits), 0.0, np.zeros_like(features)
    for n in range(tokens):
        best = int(np.argmax(unembed @ final[n]))
        wanted = (1 - hard) * np.exp(log_softmax(unembed @ final[n]))
        wanted[best] += hard
        others = sum(wanted[token] for token in range(len(unembed)) if token not in kept)
        target = np.array([*(wanted[token] for token in kept), others])
        coverage += weight[n] / total * (best in kept)
        for x in range(exits):
            own, rest = features[x, n, :-1], features[x, n, -1]
            logits = unembed[kept] @ own
            said = log_softmax(np.array([*logits, -np.inf if draft is None else rest]))
            some = target > 0
            loss[x] += weight[n] / total * np.sum(target[some] * (np.log(target[some]) - said[some]))
            agreement[x] += weight[n] / total * (kept[int(np.argmax(logits))] == best)
            slope = scale[x] * weight[n] / total * (np.exp(said) - target)
            gradient[x, n, :-1] = slope[:-1] @ unembed[kept]
            gradient[x, n, -1] = slope[-1]
    return LossTwin(loss, agreement, coverage, gradient)


@dataclasses.dataclass
class ItemTwin(TextTwin):
    """One item of the stream; its tokens are `prompt`, and `answer` is empty.

    `features(depth, at, source)` is the twin's. Where `source` is a depth, the context layer does not see the last
    `hidden` positions before `at`.
    """

    hidden: int = 1

    def with_rest(self, depth: int, at: int, source: int | None, hidden: int) -> np.ndarray:
        """[D + 1]: features and the logit of all tokens outside the draft vocabulary."""
        self.hidden = hidden
        out, e = self.features(depth, at, source), self.exits.depths.index(depth)
        rest = -np.inf
        if "rest" in self.parameters:
            rest = self.parameters["rest"][e] @ out + self.parameters["rest_bias"][e]
        return np.append(out, rest)

    def context(self, at: int, source: int | None) -> np.ndarray:
        here = self.context_row(at, source)
        newest = at - 1 if source is TRUE else at - 1 - self.hidden
        seen = [self.context_row(j, TRUE) for j in range(max(0, at - self.exits.window), newest + 1)]
        query, *_ = self.projected(here, at)
        pairs = [self.projected(row, j)[1:] for j, row in zip(range(max(0, at - self.exits.window), at), seen)]  # noqa: B905
        pairs.append(self.projected(here, at)[1:])
        mixed = []
        for h in range(self.exits.heads):
            scores = log_softmax(np.array([key[h] @ query[h] for key, _ in pairs]) / np.sqrt(self.exits.head_dim))
            mixed.append(sum(np.exp(score) * value[h] for score, (_, value) in zip(scores, pairs, strict=True)))
        layer = self.layer
        x = here + layer["out"] @ np.concatenate(mixed)
        gate, up = np.split(layer["gate_up"] @ (self.normed(x) * layer["mlp_norm"]), 2)
        x = x + layer["down"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.normed(x) * self.parameters["context.leave"]

    @property
    def layer(self) -> dict[str, np.ndarray]:
        start = "context.layer."
        return {name.removeprefix(start): p for name, p in self.parameters.items() if name.startswith(start)}

    def context_row(self, at: int, source: int | None) -> np.ndarray:
        both = [self.normed(self.embed[self.inputs[at]]), self.normed(self.previous(at, source))]
        return self.parameters["context.enter"] @ np.concatenate(both)

    def projected(self, row: np.ndarray, at: int) -> tuple[list, list, list]:
        """Query, key and value of each head; queries and keys are turned, pair by pair, by the position."""
        heads, width = self.exits.heads, self.exits.head_dim
        flat = self.layer["qkv"] @ (self.normed(row) * self.layer["attention_norm"])
        query, key, value = flat.reshape(3, heads, width)
        turn = np.exp(1j * at / 10000.0 ** (np.arange(0, width, 2) / width))

        def turned(head: np.ndarray) -> np.ndarray:
            pairs = (head[: width // 2] + 1j * head[width // 2 :]) * turn
            return np.concatenate([pairs.real, pairs.imag])

        return [turned(h) for h in query], [turned(h) for h in key], list(value)
