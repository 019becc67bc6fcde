"""What generate() returns."""

from __future__ import annotations

import dataclasses

import numpy as np

from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.record import PREFILL_EXIT


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and times. Ticks, depth-side speedup and wall-clock seconds are three different things.

    Attributes:
      schedule: method, depths, rows and DECS as they ran.
      exits_source: which exit heads proposed: "shared", "default", a path, or None when K = 1.
      ticks: [B] int32, loop steps that each sequence took.
      exits: [B, T] int32, the exit that first gave each token; -1 for token 0 and beyond the length.
      depth_side_speedup: [B] float64, K (n - 1) / ticks, NaN for n = 1: the speedup over AR if K explorers ran truly
        side by side and heads and communication were free.
      compile_seconds, prefill_seconds, decode_seconds: wall-clock of the whole batch, apart from one another.
      device, dtype: where and in what it ran.
    """

    schedule: Schedule
    exits_source: str | None
    ticks: np.ndarray
    exits: np.ndarray
    depth_side_speedup: np.ndarray
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
    """

    texts: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    prompt_tokens: list[list[int]]
    finished: np.ndarray
    seeds: list[int] | None
    stats: Stats


def ticks_of(exits: np.ndarray, length: int, stages: int) -> int:
    """Ticks that a sequence of `length` tokens took: K + sum(exits[1 : n - 1]), 0 for one token."""
    return 0 if length < 2 else stages + int(exits[1 : length - 1].sum())


def depth_side_speedup(ticks: np.ndarray, lengths: np.ndarray, stages: int) -> np.ndarray:
    """K (n - 1) / ticks for each sequence, NaN where n = 1."""
    ticks = np.asarray(ticks, np.float64)
    return np.where(lengths > 1, stages * (lengths - 1) / np.where(ticks > 0, ticks, 1), np.nan)


def cut(tokens: np.ndarray, exits: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` tokens of a row, the rest blank."""
    beyond = np.arange(tokens.shape[0]) >= length
    return np.where(beyond, -1, tokens), np.where(beyond, PREFILL_EXIT, exits)
