"""What generate() returns."""

from __future__ import annotations

import dataclasses

import numpy as np

from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.decoding.serial import DRAFTED, FINAL
from dex_jax.io import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and times. Ticks, rounds, depth-side speedup and wall-clock seconds are different things.

    Attributes:
      schedule: method, depths, rows and DECS as they ran.
      choice: one line that says why it was chosen, where schedule="auto" was to choose; None otherwise.
      exits_source: which exit heads proposed: "shared", "default", a path, or None when K = 1 or nothing drafts.
      ticks: [B] int32, loop steps that each sequence took; None for serial rounds.
      exits: [B, T] int32, the exit that first gave each token; -1 for token 0 and beyond the length. In serial rounds 0
        for a token that was drafted, 1 for one that only the final layer gave.
      depth_side_speedup: [B] float64, K (n - 1) / ticks, NaN for n = 1: the speedup over AR if K explorers ran truly
        side by side and heads and communication were free; None for serial rounds.
      rounds: [B] int32, serial rounds that each sequence took; None otherwise.
      stage_steps: [B] int32, stages run in them, one after the other; None otherwise.
      tokens_per_round: [B] float64, (n - 1) / rounds, NaN for n = 1; None otherwise.
      compile_seconds, prefill_seconds, decode_seconds: wall-clock of the whole batch, apart from one another.
      device, dtype: where and in what it ran.
    """

    schedule: Schedule
    choice: str | None
    exits_source: str | None
    ticks: np.ndarray | None
    exits: np.ndarray
    depth_side_speedup: np.ndarray | None
    rounds: np.ndarray | None
    stage_steps: np.ndarray | None
    tokens_per_round: np.ndarray | None
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    device: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Output:
    """Generated tokens of B sequences.

    Attributes:
      texts: B strings, without special tokens and without what a `stop` string cut; "" without a tokenizer.
      tokens: [B, T] int32, the EOS that ended a sequence included, -1 beyond each length.
      lengths: [B] int32.
      prompt_tokens: B lists of token ids.
      finished: [B] bool, whether the sequence has ended (all True unless a stream was cut short).
      seeds: B seeds, None when greedy.
      stats: counts and times.
      tokenizer: of the model, None when it has none.
    """

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    prompt_tokens: list[list[int]]
    finished: np.ndarray
    seeds: list[int] | None
    stats: Stats
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False)

    def pieces(self, row: int) -> list[str]:
        """The text that each token of a sequence added, "" where a later one completes it; ids without a tokenizer.

        Together they are texts[row], with what a `stop` string cut off its last token.
        """
        ids = self.tokens[row, : self.lengths[row]].tolist()
        if self.tokenizer is None:
            return [f"{token} " for token in ids]
        stream = TextStream(self.tokenizer)
        pieces = [stream.push([token]) for token in ids]
        pieces[-1] += stream.flush()
        return pieces


def ticks_of(exits: np.ndarray, length: int, stages: int) -> int:
    """Ticks that a sequence of `length` tokens took: K + sum(exits[1 : n - 1]), 0 for one token.

    Example:
      >>> ticks_of(np.array([-1, 2, 5, 1]), 4, stages=5)
      12
    """
    return 0 if length < 2 else stages + int(exits[1 : length - 1].sum())


def rounds_of(exits: np.ndarray, length: int) -> int:
    """Serial rounds that a sequence of `length` tokens took: each ends with a token that only the final layer gave."""
    if length < 2:
        return 0
    return int(np.sum(exits[1:length] == FINAL)) + int(exits[length - 1] == DRAFTED)


def depth_side_speedup(ticks: np.ndarray, lengths: np.ndarray, stages: int) -> np.ndarray:
    """K (n - 1) / ticks for each sequence, NaN where n = 1."""
    ticks = np.asarray(ticks, np.float64)
    return np.where(lengths > 1, stages * (lengths - 1) / np.where(ticks > 0, ticks, 1), np.nan)


def cut(tokens: np.ndarray, exits: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` tokens of a row, the rest blank."""
    beyond = np.arange(tokens.shape[0]) >= length
    return np.where(beyond, -1, tokens), np.where(beyond, PREFILL_EXIT, exits)
