"""The Output that generate() returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from dex_jax.decoding.plan import Plan
from dex_jax.io.tokenizer import TextStream, Tokenizer

SHOWN, SHOWN_TEXT, SHOWN_TOKENS = 8, 60, 12
"""The most sequences, characters of each and, without a tokenizer, tokens of each that a printed Output shows."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts and times of a generation; ticks, depth-side speedup and wall-clock seconds are different things.

    Attributes:
      plan: method, depths, rows and heads as they ran, and why they were chosen where the user gave none.
      ticks: [B] int32, loop steps that each sequence took; None for loops of one's own that have none.
      exits: [B, T] int32, the exit that first gave each token, 0 for one that was drafted and K for one that only the
        final layer gave; -1 for token 0 and beyond the length.
      depth_side_speedup: [B] float64, K (n - 1) / ticks, NaN for n = 1: the speedup over AR if K explorers ran truly
        side by side and heads and communication were free, for K = 1 tokens a tick; None where there are no ticks.
      rows_run: number of ticks by the rows that they ran; empty where ticks do not choose them, or go by usual costs.
      row_seconds: measured seconds of a tick of one row without drafts, which does what a step of AR does; None where
        none was timed.
      counts: what a loop of one's own counts, [B] each, by name; empty for AR and DEX.
      compile_seconds, prefill_seconds, decode_seconds: wall-clock seconds of the whole batch, none counted twice.
      device, dtype: the device, and the dtype of the computation.
      weights: the dtype of the weights, or the formats of packed ones.
    """

    plan: Plan
    exits: np.ndarray = dataclasses.field(repr=False)
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    device: str
    dtype: str
    weights: str
    ticks: np.ndarray | None = None
    depth_side_speedup: np.ndarray | None = None
    rows_run: dict[int, int] = dataclasses.field(default_factory=dict)
    row_seconds: float | None = None
    counts: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, repr=False)
class Output:
    """Generated tokens of B sequences; printed, it shows their texts, ticks and times.

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
        lines = [f"{title(stats.plan)} on {where_of(stats)}: {new_tokens} tokens"]
        for row, text in enumerate(self.texts[:SHOWN]):
            took = [f"{self.lengths[row]} tokens"]
            took += [] if stats.ticks is None else [f"{stats.ticks[row]} ticks"]
            ratios = stats.depth_side_speedup
            took += [] if ratios is None or np.isnan(ratios[row]) else [f"depth-side speedup {ratios[row]:.2f}"]
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
        """Return the text that each token added, "" where a later one completes it; ids where there is no tokenizer.

        Joined they are texts[row], with the part of the last token that a `stop` string cut off.
        """
        ids = self.tokens[row, : self.lengths[row]].tolist()
        if self.tokenizer is None:
            return [f"{token} " for token in ids]
        return list(text_pieces(self.tokenizer, ids))


def text_pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text that each of one or more tokens adds, "" where a later one completes it."""
    stream = TextStream(tokenizer)
    *pieces, last = [stream.push([token]) for token in ids]
    return (*pieces, last + stream.flush())


def where_of(stats: Stats) -> str:
    """Return the device, the dtype and the formats of packed weights, as users read them."""
    packed = "" if stats.weights == stats.dtype else f", weights in {stats.weights}"
    return f"{stats.device}, {stats.dtype}{packed}"


def title(plan: Plan) -> str:
    """Return a method's name as users read it."""
    if plan.loop != "dex":
        return plan.method.upper()
    return f"DEX, K = {plan.stages}{'' if plan.drafts is None else ' with drafts'}"
