"""A slow twin of the exits' metrics: one position, one exit, one token at a time, in float64.

It takes hidden states as given; the exits' heads, DECS, the chain of exits and every figure are written out anew.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dex_jax.config import ExitsConfig

TRUE = None
"""The `source` that stands for the final features of the position before, in place of a depth."""


@dataclasses.dataclass
class TextTwin:
    """One text: token ids, states[depth] [T, D] of its T inputs, and all parameters by name."""

    prompt: list[int]
    answer: list[int]
    states: dict[int, np.ndarray]
    final: np.ndarray
    exits: ExitsConfig
    parameters: dict[str, np.ndarray]
    embed: np.ndarray
    unembed: np.ndarray
    vocabulary: list[int]
    hidden: int = 1  # positions before a node that its context does not see if its parent has not finished

    def __post_init__(self) -> None:
        self.inputs = [*self.prompt, *self.answer[:-1]]
        self._known: dict = {}

    def normed(self, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + self.exits.norm_eps)

    def base(self, depth: int, at: int) -> np.ndarray:
        e, p = self.exits.depths.index(depth), self.parameters
        normed = self.normed(self.states[depth][at])
        out = normed * p["norm"][e]
        if "map" in p:
            out = out + p["map"][e] @ normed
        return out

    def previous(self, at: int, source: int | None) -> np.ndarray:
        if at == 0:
            return np.zeros(self.exits.width)
        return self.final[at - 1] if source is TRUE else self.base(source, at - 1)

    def features(self, depth: int, at: int, source: int | None) -> np.ndarray:
        e, p = self.exits.depths.index(depth), self.parameters
        normed = self.normed(self.states[depth][at])
        out, inputs = self.base(depth, at), normed
        if "previous_norm" in p:
            before = self.normed(self.previous(at, source)) * p["previous_norm"][e]
            inputs = np.concatenate([normed, before])
            out = out + p["previous_map"][e] @ before
        if "gate_up" in p:
            gate, up = np.split(p["gate_up"][e] @ inputs, 2)
            out = out + p["down"][e] @ (gate / (1 + np.exp(-gate)) * up)
        if "context_map" in p:
            out = out + p["context_map"][e] @ self.context(at, source)
        return out

    def context(self, at: int, source: int | None) -> np.ndarray:
        c, p = self.exits, {k[14:]: v for k, v in self.parameters.items() if k.startswith("context.layer.")}
        heads, width = c.heads, c.head_dim

        def entered(j: int, source: int | None) -> np.ndarray:
            both = [self.normed(self.embed[self.inputs[j]]), self.normed(self.previous(j, source))]
            return self.parameters["context.enter"] @ np.concatenate(both)

        def projected(x: np.ndarray, j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            q, k, v = (p["qkv"] @ (self.normed(x) * p["attention_norm"])).reshape(3, heads, width)
            angle = j / 10000.0 ** (np.arange(0, width, 2) / width)

            def rotated(rows: np.ndarray) -> np.ndarray:
                left, right = rows[:, : width // 2], rows[:, width // 2 :]
                cos, sin = np.cos(angle), np.sin(angle)
                return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=1)

            return rotated(q), rotated(k), v

        x = entered(at, source)
        query, key, value = projected(x, at)
        newest = at - 1 if source is TRUE else at - 1 - self.hidden
        seen = [projected(entered(j, TRUE), j) for j in range(max(0, at - c.window), newest + 1)]
        keys, values = np.stack([*(k for _, k, _ in seen), key]), np.stack([*(v for *_, v in seen), value])
        mixed = []
        for h in range(heads):
            scores = keys[:, h] @ query[h] / np.sqrt(width)
            weight = np.exp(scores - scores.max())
            mixed.append(weight / weight.sum() @ values[:, h])
        x = x + p["out"] @ np.concatenate(mixed)
        gate, up = np.split(p["gate_up"] @ (self.normed(x) * p["mlp_norm"]), 2)
        x = x + p["down"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.normed(x) * self.parameters["context.leave"]

    def logits(self, depth: int, i: int, source: int | None) -> tuple[dict[int, float], float]:
        """Return the logit of each token of the vocabulary for answer token i, and the one of all others together."""
        key = (depth, i, source)
        if key not in self._known:
            out = self.features(depth, len(self.prompt) - 1 + i, source)
            rest = -np.inf
            if "rest" in self.parameters:
                e = self.exits.depths.index(depth)
                rest = float(self.parameters["rest"][e] @ out + self.parameters["rest_bias"][e])
            self._known[key] = {t: float(self.unembed[t] @ out) for t in self.vocabulary}, rest
        return self._known[key]

    def probabilities(self, depth: int, i: int, source: int | None = TRUE) -> tuple[dict[int, float], float]:
        inside, rest = self.logits(depth, i, source)
        top = max(inside.values())
        total = sum(np.exp(x - top) for x in inside.values()) + np.exp(rest - top)
        return {t: np.exp(x - top) / total for t, x in inside.items()}, np.exp(rest - top) / total

    def final_probabilities(self, i: int) -> np.ndarray:
        logits = self.unembed @ self.final[len(self.prompt) - 1 + i]
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    def divergence(self, depth: int, i: int) -> float:
        p, (q, q_rest) = self.final_probabilities(i), self.probabilities(depth, i)
        total = sum(p[t] * np.log(p[t] / q[t]) for t in self.vocabulary)
        outside = sum(p[t] for t in range(len(p)) if t not in self.vocabulary)
        return total + (outside * np.log(outside / q_rest) if outside > 0 else 0.0)

    def best(self, depth: int, i: int, source: int | None = TRUE, masked: tuple[int, ...] = ()) -> int:
        logits, _ = self.logits(depth, i, source)
        return max((t for t in self.vocabulary if t not in masked), key=lambda t: logits[t])

    def first_exit(self, grid: tuple[int, ...], i: int, born_at: int) -> int:
        """Return the first exit that gives answer token i below a node that exit `born_at` proposed."""
        children: list[int] = []
        for k in range(1, len(grid)):
            parent = k + born_at  # stages that the parent has done when its child has done k
            source = grid[parent - 1] if parent < len(grid) else TRUE
            token = self.best(grid[k - 1], i, source if self.exits.needs_previous else TRUE, tuple(children))
            if token == self.answer[i]:
                return k
            children.append(token)
        return len(grid)

    def predicted_exits(self, grid: tuple[int, ...]) -> list[int]:
        exits = [-1]
        for i in range(1, len(self.answer)):
            exits.append(self.first_exit(grid, i, len(grid) if i == 1 else exits[i - 1]))
        return exits

    def earliest_depth(self, i: int) -> int | None:
        """Return the first trained depth at which the exit gives answer token i, or None."""
        return next((d for d in self.exits.depths if self.best(d, i) == self.answer[i]), None)
