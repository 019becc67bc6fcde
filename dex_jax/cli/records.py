"""The JSON object that decode.py --json prints for each sequence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dex_jax.decoding.check import Check
from dex_jax.decoding.output import Output


def json_record(row: int, output: Output, prompt: Any, seed: int | None, check: Check | None) -> dict[str, Any]:
    """Return one sequence as a JSON-ready dict.

    Keys: prompt (as given), text, tokens (ids, an ending EOS included), prompt_tokens and new_tokens (counts), finished
    (False only when interrupted), method ("dex", or "ar" also where that was chosen), draft (whether exit 0 drafts),
    choice (why the method was chosen, null where it was given), depths, rows, exits_source (null for K = 1),
    drafter_source (null without a drafter), ticks, exits (born_at of each token), depth_side_speedup (null for one
    token), rows_run (how many ticks of the batch ran so many rows, by rows; {} where all run the same), row_seconds (of
    a tick of one row without drafts, null where none was timed), compile_seconds, prefill_seconds and decode_seconds
    (of the whole batch), tokens_per_second ((n - 1) / decode_seconds of this sequence, null for one token), device,
    dtype, weights (the dtype, or the formats of packed ones), seed (null when greedy), and check when requested
    (identical, first_divergence, top2_margin; see dex_jax.decoding.check).
    """
    stats, length = output.stats, int(output.lengths[row])
    of_plan, of_all = ("choice", "exits_source", "drafter_source"), ("device", "dtype", "weights")
    measured = ("compile_seconds", "prefill_seconds", "decode_seconds", "rows_run", "row_seconds")
    of_each = ("ticks", "depth_side_speedup")
    record = {
        "prompt": prompt,
        "text": output.texts[row],
        "tokens": output.tokens[row, :length].tolist(),
        "prompt_tokens": len(output.prompt_tokens[row]),
        "new_tokens": length,
        "finished": bool(output.finished[row]),
        "method": stats.plan.method,
        "draft": stats.plan.drafts is not None,
        "depths": list(stats.plan.depths),
        "rows": stats.plan.rows,
        "exits": stats.exits[row, :length].tolist(),
        "tokens_per_second": (length - 1) / stats.decode_seconds if length > 1 and stats.decode_seconds > 0 else None,
        "seed": seed,
    }
    record |= {name: getattr(stats.plan, name) for name in of_plan}
    record |= {name: getattr(stats, name) for name in (*of_all, *measured)}
    record |= {name: _at(getattr(stats, name), row) for name in of_each}
    if check is not None:
        record["check"] = dataclasses.asdict(check)
    return record


def _at(figures: np.ndarray | None, row: int) -> int | float | None:
    """Return one sequence's figure, None where it is undefined."""
    if figures is None:
        return None
    figure = figures[row].item()
    return None if math.isnan(figure) else figure
