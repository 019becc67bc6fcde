"""The JSON object that decode.py --json prints for each sequence."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dex_jax.decoding.output import Output
from dex_jax.evaluation.check import Check


def json_record(row: int, output: Output, prompt: Any, seed: int | None, check: Check | None) -> dict[str, Any]:
    """One sequence as a JSON-ready dict.

    Keys: prompt (as given), text, tokens (ids, an ending EOS included), prompt_tokens and new_tokens (counts),
    finished (False only when interrupted), method, schedule ("parallel" for DEX, null for AR), depths, rows,
    exits_source (null for K = 1), ticks, exits (born_at of each token), depth_side_speedup (null for one token),
    compile_seconds, prefill_seconds and decode_seconds (of the whole batch), tokens_per_second ((n - 1) /
    decode_seconds of this sequence, null for one token), device, dtype, seed (null when greedy), and check when asked
    for (identical, first_divergence, top2_margin; see evaluation.check).
    """
    stats, length = output.stats, int(output.lengths[row])
    speedup = float(stats.depth_side_speedup[row])
    record = {
        "prompt": prompt,
        "text": output.texts[row],
        "tokens": output.tokens[row, :length].tolist(),
        "prompt_tokens": len(output.prompt_tokens[row]),
        "new_tokens": length,
        "finished": bool(output.finished[row]),
        "method": stats.schedule.method,
        "schedule": "parallel" if stats.schedule.method == "dex" else None,
        "depths": list(stats.schedule.depths),
        "rows": stats.schedule.rows,
        "exits_source": stats.exits_source,
        "ticks": int(stats.ticks[row]),
        "exits": stats.exits[row, :length].tolist(),
        "depth_side_speedup": None if math.isnan(speedup) else speedup,
        "compile_seconds": stats.compile_seconds,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "tokens_per_second": (length - 1) / stats.decode_seconds if length > 1 and stats.decode_seconds > 0 else None,
        "device": stats.device,
        "dtype": stats.dtype,
        "seed": seed,
    }
    if check is not None:
        record["check"] = dataclasses.asdict(check)
    return record
