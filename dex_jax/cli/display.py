"""The text that streams to a terminal, coloured by depth if requested, and the summary after it."""

from __future__ import annotations

import math
import sys

import numpy as np
from rich.console import Console
from rich.text import Text

from dex_jax.decoding.check import Check
from dex_jax.decoding.output import Output, title, where_of
from dex_jax.io.tokenizer import TextStream, Tokenizer
from dex_jax.plot.colors import depth_style
from dex_jax.plot.text import exit_names

BAR_WIDTH = 30


class TextPrinter:
    """The printer that streams the sequences of a batch to stdout, one after the other.

    Args:
      tokenizer: of the model; None prints token ids.
      prompts: a heading for each sequence; headings are printed only when there are several.
      color_depth: colour each token by its exit, where stdout is a terminal.
      told: number of sequences of earlier batches.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompts: list[str], color_depth: bool, told: int = 0):
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.told = told
        console = Console(highlight=False, soft_wrap=True)
        self.console = console if color_depth and console.is_terminal else None
        self.row = 0
        self.printed = 0
        self.stream = self._begin()

    def update(self, output: Output, stops: bool) -> None:
        """Print what is new; with stop strings (`stops`) text is final only when its sequence has ended."""
        while self.row < len(self.prompts):
            length = int(output.lengths[self.row])
            finished = bool(output.finished[self.row])
            if stops and not finished:
                return
            if stops:
                self._write(output.texts[self.row])
            else:
                for at in range(self.printed, length):
                    token = int(output.tokens[self.row, at])
                    text = f"{token} " if self.stream is None else self.stream.push([token])
                    self._write(text, depth_style(int(output.stats.exits[self.row, at]), output.stats.plan.stages))
                self.printed = length
            if not finished:
                return
            self.close()
            self.row, self.printed = self.row + 1, 0
            if self.row < len(self.prompts):
                self.stream = self._begin()

    def close(self) -> None:
        """End the current sequence's text with a newline."""
        self._write((self.stream.flush() if self.stream else "") + "\n")

    def _begin(self) -> TextStream | None:
        number = self.told + self.row + 1
        if len(self.prompts) > 1 or self.told:
            self._write(f"{'' if number == 1 else chr(10)}[{number}] {self.prompts[self.row]}\n")
        return None if self.tokenizer is None else TextStream(self.tokenizer)

    def _write(self, text: str, style: str = "default") -> None:
        if not text:
            return
        if self.console is None:
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            self.console.print(Text(text, style=style), end="")


def show(output: Output, checks: list[Check] | None, colors: bool) -> None:
    """Print on stderr what follows the text: the meaning of its colours, counts, times, and a bar for each exit."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print()
    if colors:
        plan = output.stats.plan
        console.print(
            Text.assemble(
                *(
                    (f"{name}  ", depth_style(number, plan.stages))
                    for name, number in exit_names(plan.depths, plan.drafts is not None)
                ),
                "" if sys.stdout.isatty() else "(--color-depth colours text on terminals only)",
            )
        )
    console.print(summary(output, checks), markup=False)


def summary(output: Output, checks: list[Check] | None) -> str:
    """Return the lines after the text: counts, times, and a bar for each exit."""
    stats, plan = output.stats, output.stats.plan
    after_first = int((output.lengths - 1).sum())
    rate = f"{after_first / stats.decode_seconds:.1f} tok/s" if stats.decode_seconds > 0 and after_first else "n/a"
    lines = [f"{title(plan)} on {where_of(stats)}: {int(output.lengths.sum())} tokens"]
    if stats.plan.choice is not None:
        lines.append(f"chosen: {stats.plan.choice}")
    where = f"depths {', '.join(map(str, plan.depths))}; {plan.rows} rows"
    where += "" if stats.plan.exits_source is None else f"; exits: {stats.plan.exits_source}"
    if plan.drafts is not None:
        drafter = f" and the drafter ({stats.plan.drafter_source})" if stats.plan.drafter_source else ""
        where += f"; drafts from the text{drafter}"
    if plan.has_lattice and stats.ticks is not None:
        ticks = int(stats.ticks.sum())
        speedup = plan.stages * after_first / ticks if ticks else math.nan
        lines[0] += f", {ticks} ticks, depth-side speedup {speedup:.2f}"
        lines.append(where)
    lines.append(
        f"wall-clock: {rate} in {stats.decode_seconds:.2f} s of decoding, prefill {stats.prefill_seconds:.2f} s, "
        f"compilation {stats.compile_seconds:.1f} s"
    )
    if plan.stages > 1 or plan.drafts is not None:
        lines += _bars(output)
    lines += _measured(output)
    lines += _check_lines(checks, stats.dtype)
    return "\n".join(lines)


def _measured(output: Output) -> list[str]:
    """Return a line on the rows that ticks ran, and an estimate of AR's time from the ticks of one row."""
    stats = output.stats
    ran = {rows: ticks for rows, ticks in stats.rows_run.items() if ticks}
    if not ran:
        return []
    line = f"ticks of {', '.join(map(str, ran))} rows: {', '.join(map(str, ran.values()))}"
    if stats.row_seconds is not None and stats.ticks is not None and stats.decode_seconds > 0:
        # No tick is faster than a plain one, so no more than the tokens of a tick can be gained.
        steps, ticks = int(output.lengths.max()) - 1, int(stats.ticks.max())
        gain = min(stats.row_seconds * steps / stats.decode_seconds, steps / max(ticks, 1))
        line += f"; one of 1 row without drafts takes {1000 * stats.row_seconds:.1f} ms here, so AR would have taken "
        line += f"about {gain:.2f} times as long"
    return [line]


def _bars(output: Output) -> list[str]:
    plan, stages = output.stats.plan, output.stats.plan.stages
    first = 0 if plan.drafts is not None else 1
    given = output.stats.exits[output.stats.exits >= first]
    counts = np.bincount(given, minlength=stages + 1)
    lines = ["tokens by the exit that first gave them:"]
    for number, depth in list(enumerate((0, *plan.depths)))[first:]:
        count, share = counts[number], counts[number] / max(counts.sum(), 1)
        what = "final layer" if number == stages else f"exit {number}" if number else "drafted"
        lines.append(
            f"  {what:>11} (depth {depth:>3}) {'█' * round(share * BAR_WIDTH):<{BAR_WIDTH}} {count:>5} {share:4.0%}"
        )
    return lines


def _check_lines(checks: list[Check] | None, dtype: str) -> list[str]:
    if checks is None:
        return []
    lines = []
    for number, check in enumerate(checks, 1):
        which = f"sequence {number}: " if len(checks) > 1 else ""
        if check.identical:
            lines.append(f"check: {which}identical to plain AR decoding")
        else:
            kind = "a tie in floating point" if check.is_tie(dtype) else "NOT a tie: please report this"
            lines.append(
                f"check: {which}differs from plain AR decoding at token {check.first_divergence}, "
                f"top-2 margin {check.top2_margin:.2e} ({kind})"
            )
    return lines
