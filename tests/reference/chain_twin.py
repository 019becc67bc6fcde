"""A slow twin of methods that draft on a chain: a list of drafted tokens, one sequence at a time.

It is written from the descriptions of the methods, to be compared with the loop in studies/rivals. The model is that of
the twin of DEX (reference.twin): it has logits(tokens, stage) and vocabulary(stage), and no cache that could be stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from reference.filters import filter_logits
from reference.twin import Draws, final_token

ONE, ALMOST_ZERO = np.float32(1), np.float32(1e-6)
Shadow = tuple[list[int], list[float], int]
"""The tokens that the exits give after one verified row, their confidences, and the token of the final layer."""


@dataclasses.dataclass
class ChainRun:
    """The outcome of a run; its costs are those of all rounds up to the one that gave the last token."""

    tokens: list[int]
    exits: list[int]
    rounds: int = 0
    layer_steps: int = 0
    drafted: int = 0


class Fixed:
    """A policy that drafts at every exit it comes to."""

    shadows = False

    def asks(self, exit_number: int, drafted: int) -> bool:
        return True

    def drafts(self, exit_number: int, drafted: int, confidence: float) -> bool:
        return True

    def learn(self, round_: list[Shadow]) -> None:
        pass


class Sure(Fixed):
    """A policy that drafts where the exit is confident enough."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def drafts(self, exit_number: int, drafted: int, confidence: float) -> bool:
        return confidence >= self.threshold


class Dynamic(Fixed):
    """A policy of the exit and draft length that promise the most tokens a layer; in float32, as the loop counts."""

    shadows = True

    def __init__(self, depths: Sequence[int], draft_length: int, decay: float):
        self.depths, self.draft_length, self.decay = depths, draft_length, np.float32(decay)
        self.rows, self.rate = ONE, ONE / np.float32(depths[-1])
        self.given, self.right = np.zeros((2, len(depths) - 1, 4), np.float32)
        self.open, self.kept = np.zeros((2, len(depths) - 1), np.float32)
        self.exit, self.length = 1, 0

    def asks(self, exit_number: int, drafted: int) -> bool:
        return exit_number == self.exit and drafted < self.length

    def drafts(self, exit_number: int, drafted: int, confidence: float) -> bool:
        precision = self.kept[exit_number - 1] / max(self.open[exit_number - 1], ALMOST_ZERO)
        return self.pays(exit_number - 1, confidence, precision ** np.float32(drafted))

    def pays(self, k: int, confidence: float, precision: np.float32 = ONE) -> bool:
        quarter = min(int(confidence * 4), 3)
        chance = (self.right[k, quarter] + 3 * np.float32((quarter + 0.5) / 4)) / (self.given[k, quarter] + 3)
        return bool(chance * precision >= np.float32(self.depths[k]) * self.rate)

    def learn(self, round_: list[Shadow]) -> None:
        self.rows = self.decay * self.rows + np.float32(len(round_))
        for k in range(len(self.depths) - 1):
            paid = [tokens[k] == final for tokens, sure, final in round_ if self.pays(k, sure[k])]
            self.open[k] = self.decay * self.open[k] + np.float32(len(paid))
            self.kept[k] = self.decay * self.kept[k] + np.float32(sum(paid))
            for quarter in range(4):
                some = [tokens[k] == final for tokens, sure, final in round_ if min(int(sure[k] * 4), 3) == quarter]
                self.given[k, quarter] = self.decay * self.given[k, quarter] + np.float32(len(some))
                self.right[k, quarter] = self.decay * self.right[k, quarter] + np.float32(sum(some))
        promises = []
        for g in range(self.draft_length + 1):
            for k, depth in enumerate(self.depths[:-1]):
                kept, opened = self.kept[k] / self.rows, self.open[k] / self.rows
                tokens, layers, kept_all, opened_all = ONE, np.float32(self.depths[-1]), kept, opened
                for _ in range(g):
                    tokens, layers = tokens + kept_all, layers + np.float32(depth) * opened_all
                    kept_all, opened_all = kept_all * kept, opened_all * opened
                promises.append((tokens / layers, -g, -k))
        self.rate, g, k = max(promises)
        self.exit, self.length = 1 - k, -g


def given(model, tokens: Sequence[int], exit_number: int, draws: Draws | None) -> tuple[int, float]:
    """Return the token of an exit after `tokens`, and its confidence."""
    ids = list(model.vocabulary(exit_number))
    scores = model.logits(tuple(tokens), exit_number).astype(np.float32)
    if draws is not None:
        scores = filter_logits(scores / np.float32(draws.temperature), draws.top_k, draws.top_p)
        scores = scores + draws.noise(len(tokens))[ids]
    column = int(np.argmax(scores))
    wide = scores.astype(np.float64)
    return ids[column], float(1 / np.exp(wide - wide[column]).sum())


def chain_run(
    model,
    prompt: Sequence[int],
    first: int,
    *,
    depths: Sequence[int],
    policy: Fixed,
    draft_length: int,
    limit: int,
    eos: Sequence[int] = (),
    draws: Draws | None = None,
) -> ChainRun:
    """Decode one sequence."""
    stages, layers, run = len(depths), np.diff([0, *depths]).tolist(), ChainRun([first], [-1])

    def ended() -> bool:
        return run.tokens[-1] in eos or len(run.tokens) >= limit

    while not ended():
        run.rounds += 1
        text = [*prompt, *run.tokens]
        drafts: list[tuple[int, int]] = []  # token, exit
        stage = 0
        while stage < stages:
            stage += 1
            run.layer_steps += layers[stage - 1]
            room = len(drafts) < draft_length and len(drafts) + 2 <= limit - len(run.tokens)
            if stage == stages or not room or not policy.asks(stage, len(drafts)):
                continue
            token, confidence = given(model, [*text, *(t for t, _ in drafts)], stage, draws)
            if token not in eos and policy.drafts(stage, len(drafts), confidence):
                drafts.append((token, stage))
                stage = 0
        run.drafted += len(drafts)
        shadows: list[Shadow] = []
        for row in range(len(drafts) + 1):
            before = [*text, *(t for t, _ in drafts[:row])]
            final = final_token(model, before, stages, draws)
            if policy.shadows:
                pairs = [given(model, before, k, draws) for k in range(1, stages)]
                shadows.append(([t for t, _ in pairs], [c for _, c in pairs], final))
            kept = row < len(drafts) and drafts[row][0] == final
            if not ended():
                run.tokens.append(final)
                run.exits.append(drafts[row][1] if kept else stages)
            if not kept:
                break
        policy.learn(shadows)
    return run
