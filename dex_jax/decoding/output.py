"""What generate() returns."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dex_jax.decoding.methods import Schedule
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.io import TextStream, Tokenizer
from dex_jax.lattice import NO_TOKEN

NAMES = {
    "ar": "AR",
    "layerskip": "LayerSkip",
    "adadecode": "AdaDecode",
    "del": "DEL",
    "dex-single-exit": "DEX, first and last exit only",
    "oracle": "EAD oracle (a bound, not a decoder)",
}
"""Of methods other than "dex", for people."""

SHOWN, SHOWN_TEXT, SHOWN_TOKENS = 8, 60, 12
"""Sequences, characters and, without a tokenizer, tokens of each that a printed Output shows."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and times. Ticks, layer steps, depth-side speedup and wall-clock seconds are different things.

    Attributes:
      schedule: method, depths, rows and DECS as they ran.
      choice: one line that says why it was chosen, where nothing was asked for; None otherwise.
      exits_source: which exits 1..K-1 proposed: "shared", "default", a path, or None when K = 1.
      drafter_source: which drafter stood at depth 0: "default", a path, or None for none.
      layer_steps: [B] int32, how many layers were run one after the other since the prefill, however many rows ran in
        each of them and heads apart. The one figure of depth that all methods have: AR L (n - 1); DEX ticks times the
        longest stage, on as many devices as there are stages; LayerSkip g d + L a round, and so on. No time: it says
        what a device would wait for on which only layers took any. Of "oracle", a bound.
      ticks: [B] int32, loop steps that each sequence took; None for methods that draft on a chain.
      exits: [B, T] int32, the exit that first gave each token, 0 for one that was drafted and K for one that only the
        final layer gave; -1 for token 0 and beyond the length.
      depth_side_speedup: [B] float64, K (n - 1) / ticks, NaN for n = 1: the speedup over AR if K explorers ran truly
        side by side and heads and communication were free, for K = 1 tokens a tick; None where there are no ticks.
      rounds: [B] int32, how often each sequence was verified, on chains; None otherwise.
      tokens_per_round: [B] float64, (n - 1) / rounds, NaN for n = 1; None without rounds.
      drafted: [B] int32, tokens that exits drafted on chains; None otherwise.
      accepted: [B] int32, how many of them the final layer gave as well, and were emitted; None otherwise.
      compile_seconds, prefill_seconds, decode_seconds: wall-clock of the whole batch, apart from one another.
      device, dtype: where and in what it ran.
    """

    schedule: Schedule
    choice: str | None
    exits_source: str | None
    drafter_source: str | None
    layer_steps: np.ndarray
    ticks: np.ndarray | None
    exits: np.ndarray
    depth_side_speedup: np.ndarray | None
    rounds: np.ndarray | None
    tokens_per_round: np.ndarray | None
    drafted: np.ndarray | None
    accepted: np.ndarray | None
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    device: str
    dtype: str


@dataclasses.dataclass(frozen=True, repr=False)
class Output:
    """Generated tokens of B sequences; printed, it shows the texts, what they took and how long.

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
    tokenizer: Tokenizer | None = None

    def __repr__(self) -> str:
        stats, new_tokens = self.stats, int(self.lengths.sum())
        lines = [f"{title(stats.schedule)} on {stats.device}, {stats.dtype}: {new_tokens} tokens"]
        for row, text in enumerate(self.texts[:SHOWN]):
            took = [f"{self.lengths[row]} tokens"]
            for name, figures in (("ticks", stats.ticks), ("rounds", stats.rounds)):
                took += [] if figures is None else [f"{figures[row]} {name}"]
            for name, ratios in (
                ("depth-side speedup", stats.depth_side_speedup),
                ("tokens a round", stats.tokens_per_round),
            ):
                took += [] if ratios is None or np.isnan(ratios[row]) else [f"{name} {ratios[row]:.2f}"]
            shown = text if self.tokenizer is not None else " ".join(map(str, self.tokens[row, :SHOWN_TOKENS]))
            short = shown if len(shown) <= SHOWN_TEXT else shown[: SHOWN_TEXT - 1] + "…"
            lines.append(f"  [{row}] {', '.join(took)}: {short!r}")
        if len(self.texts) > SHOWN:
            lines.append(f"  ... and {len(self.texts) - SHOWN} more")
        after_first = int((self.lengths - 1).sum())
        rate = f" ({after_first / stats.decode_seconds:.1f} tokens/s)" if stats.decode_seconds > 0 else ""
        lines.append(
            f"  decoding {stats.decode_seconds:.2f} s{rate}, prefill {stats.prefill_seconds:.2f} s, "
            f"compilation {stats.compile_seconds:.1f} s"
        )
        return "\n".join(lines)

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


def title(schedule: Schedule) -> str:
    """A method's name for people."""
    if schedule.method in NAMES:
        return NAMES[schedule.method]
    return f"DEX, K = {schedule.stages}{'' if schedule.drafts is None else ' with drafts'}"


def ticks_of(exits: np.ndarray, length: int, stages: int) -> int:
    """Ticks that a sequence of `length` tokens took: K + sum(exits[1 : n - 1]), 0 for one token.

    Examples:
      >>> ticks_of(np.array([-1, 2, 5, 1]), 4, stages=5)
      12
    """
    return 0 if length < 2 else stages + int(exits[1 : length - 1].sum())


def rounds_of(exits: np.ndarray, length: int, stages: int) -> int:
    """Rounds on a chain that a sequence of `length` tokens took: each ends with a token that only exit K gave."""
    if length < 2:
        return 0
    return int(np.sum(exits[1:length] == stages)) + int(exits[length - 1] != stages)


def steps_of(schedule: Schedule, exits: np.ndarray, length: int) -> int:
    """Ticks or rounds that a sequence of `length` tokens took: exits [T] say so."""
    count = ticks_of if schedule.policy is None else rounds_of
    return count(exits, length, schedule.stages)


def counts(
    schedule: Schedule, exits: np.ndarray, steps: np.ndarray, spent: np.ndarray | None, lengths: np.ndarray
) -> dict[str, Any]:
    """The counts of a batch, by their names in Stats; None where a method has no such thing.

    Args:
      schedule: what ran.
      exits: [B, T] int32.
      steps: [B] int32, ticks or rounds.
      spent: [B, T, 2] as in Record, None without a chain.
      lengths: [B] int32.
    """
    names = ("ticks", "depth_side_speedup", "rounds", "tokens_per_round", "drafted", "accepted")
    found: dict[str, Any] = dict.fromkeys(names)
    stages, depths = schedule.stages, schedule.depths
    if schedule.method == "oracle":
        bounds = [bound_of(row, length, depths) for row, length in zip(exits, lengths, strict=True)]
        return found | {"layer_steps": np.array(bounds, np.int32)}
    if schedule.policy is None:
        longest = max(end - start for start, end in zip((0, *depths), depths, strict=False))
        found["depth_side_speedup"] = depth_side_speedup(steps, lengths, stages)
        return found | {"ticks": steps, "layer_steps": steps * longest}
    found["rounds"] = steps
    found["tokens_per_round"] = np.where(lengths > 1, (lengths - 1) / np.maximum(steps, 1), np.nan)
    assert spent is not None
    at = np.arange(exits.shape[1])[None]
    found["accepted"] = np.sum((at > 0) & (at < lengths[:, None]) & (exits < stages), axis=1, dtype=np.int32)
    layers, drafted = np.take_along_axis(spent, (lengths - 1)[:, None, None], axis=1)[:, 0].T
    return found | {"layer_steps": layers, "drafted": drafted}


def bound_of(exits: np.ndarray, length: int, depths: tuple[int, ...]) -> int:
    """Layer steps of a sequence whose every token exits at its exit and no draft is wrong: 0 for one token."""
    if length < 2:
        return 0
    return depths[-1] + int(np.take((0, *depths), exits[1 : length - 1]).sum())


def depth_side_speedup(ticks: np.ndarray, lengths: np.ndarray, stages: int) -> np.ndarray:
    """K (n - 1) / ticks for each sequence, NaN where n = 1."""
    ticks = np.asarray(ticks, np.float64)
    return np.where(lengths > 1, stages * (lengths - 1) / np.where(ticks > 0, ticks, 1), np.nan)


def cut(tokens: np.ndarray, exits: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `length` tokens of a row, the rest blank."""
    beyond = np.arange(tokens.shape[0]) >= length
    return np.where(beyond, NO_TOKEN, tokens), np.where(beyond, PREFILL_EXIT, exits)
