"""How far weights kept in other ways are from dense ones: KL and best tokens along AR's answers, perplexity of a text.

    python benchmarks/weights_distance.py --data HumanEval.jsonl.gz question_240.jsonl --text input.txt \\
        --output results/weights_distance

Answers are AR's on dense weights, and every kind of weights reads prompt and answer in one run. As long as its best
token is the answer's, AR on it writes the same text: the first one that is not is where the texts part. A run that was
stopped goes on. "stored" weights must be at distance 0 where products are in C++.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Figures, arguments, machine, read_ids

import dex_jax
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import DexError, exit_code
from dex_jax.nn import few_rows
from dex_jax.prompt_files import read_texts
from dex_jax.tables import markdown

DENSE = "dense"
BATCH = 10
"""Answers that are written at once."""
SHORTEST = 256
"""Lengths are padded to this, or to the next power of two, so that few are compiled."""


def log_probabilities(lm: Any, ids: Sequence[int], start: int) -> np.ndarray:
    """Of the tokens at `start` and after, given what stands before each: ids [N] -> [N - start, V] float64."""
    padded = np.zeros((1, max(SHORTEST, 1 << (len(ids) - 2).bit_length())), np.int32)  # zeros reach nothing before them
    padded[0, : len(ids) - 1] = ids[:-1]
    rows = np.asarray(lm.logits(padded))[0, start - 1 : len(ids) - 1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def distance(dense: np.ndarray, other: np.ndarray, answer: Sequence[int]) -> dict[str, Any]:
    """Figures of one answer: log probabilities [N, V] of both, answer [N]."""
    parts = np.flatnonzero(other.argmax(axis=1) != answer)
    return {
        "tokens": len(answer),
        "nats": float((np.exp(dense) * (dense - other)).sum()),
        "agree": len(answer) - len(parts),
        "first": int(parts[0]) if len(parts) else None,
    }


def answers_table(runs: Mapping[str, dict[str, Any]], kinds: Sequence[str], prompts: Sequence[str]) -> str:
    """A line for each kind and file of prompts, and one for all files together."""
    rows = []
    files = list(dict.fromkeys(prompt.split(" ")[0] for prompt in prompts))
    for kind in kinds:
        for file in [*files, "all"]:
            found = [runs[f"{kind}; {prompt}"] for prompt in prompts if file in ("all", prompt.split(" ")[0])]
            tokens, nats, agree = (sum(run[name] for run in found) for name in ("tokens", "nats", "agree"))
            firsts = [run["first"] for run in found if run["first"] is not None]
            whole = f"{len(found) - len(firsts)} of {len(found)}"
            first = f"{np.median(firsts):.0f}" if firsts else ""
            rows.append([kind, file, str(tokens), f"{nats / tokens:.2g}", f"{agree / tokens:.2%}", whole, first])
    header = [
        "weights",
        "prompts",
        "tokens",
        "mean KL, nats",
        "best token agrees",
        "whole answers",
        "others part after",
    ]
    return markdown(header, rows)


def text_table(runs: Mapping[str, dict[str, Any]], kinds: Sequence[str], windows: int) -> str:
    """A line for each kind: perplexity, and how much larger it is than that of dense weights."""
    means = {}
    for kind in (DENSE, *kinds):
        found = [runs[f"{kind}; window {at + 1}"] for at in range(windows)]
        tokens = sum(run["tokens"] for run in found)
        means[kind] = sum(run["nats"] for run in found) / tokens
    rows = [
        [kind, str(tokens), f"{math.exp(mean):.3f}", f"{math.expm1(mean - means[DENSE]):+.2%}"]
        for kind, mean in means.items()
    ]
    return markdown(["weights", "tokens", "perplexity", "over dense"], rows)


def parser() -> argparse.ArgumentParser:
    flags = arguments(__doc__, data=None, prompts=20, max_new_tokens=64)
    flags.add_argument("--text", required=True, metavar="FILE", help="text whose perplexity is measured")
    flags.add_argument("--window", type=int, default=512, metavar="N", help="tokens read at a time (%(default)s)")
    flags.add_argument("--windows", type=int, default=8, metavar="N", help="of the text's beginning (%(default)s)")
    flags.add_argument("--kinds", nargs="+", choices=["stored", "int8"], default=["stored", "int8"], help="(both)")
    return flags


def run(args: argparse.Namespace) -> int:
    """Measures what is missing and writes the page; 1 where stored weights are another model than dense ones."""
    remember_compilations()
    model = functools.cache(lambda kind: dex_jax.load(args.model, dtype="float32", weights=kind))
    kept = {name: getattr(args, name) for name in ("model", "prompts", "max_new_tokens", "window")}
    names = {"data": [Path(path).name for path in args.data], "text": Path(args.text).name}
    figures = Figures(args.output, machine(**kept, **names))
    asked = read_ids(model(DENSE), args.data, args.prompts)

    silent = [prompt for prompt in asked if f"answer; {prompt}" not in figures.runs]
    for some in (silent[at : at + BATCH] for at in range(0, len(silent), BATCH)):
        options = {"method": dex_jax.AR(), "max_new_tokens": args.max_new_tokens, "exits": "shared"}
        out = dex_jax.generate(model(DENSE), [asked[prompt] for prompt in some], **options)
        for prompt, row, length in zip(some, out.tokens, out.lengths, strict=True):
            figures.add(f"answer; {prompt}", row[:length].tolist())
    for prompt, ids in asked.items():
        answer = figures.runs[f"answer; {prompt}"]
        missing = [kind for kind in args.kinds if f"{kind}; {prompt}" not in figures.runs]
        both = [log_probabilities(model(kind), [*ids, *answer], len(ids)) for kind in (DENSE, *missing) if missing]
        for kind, other in zip(missing, both[1:], strict=True):
            figures.add(f"{kind}; {prompt}", distance(both[0], other, answer))

    text = model(DENSE).encode(read_texts(args.text)[0], chat=False)
    if len(text) < args.window * args.windows:
        raise DexError(f"{args.text} has {len(text)} tokens: lower --window or --windows")
    for at in range(args.windows):
        window = np.array(text[at * args.window : (at + 1) * args.window])
        for kind in (DENSE, *args.kinds):
            if f"{kind}; window {at + 1}" not in figures.runs:
                found = log_probabilities(model(kind), window, 1)
                nats = -float(np.take_along_axis(found, window[1:, None], axis=1).sum())
                figures.add(f"{kind}; window {at + 1}", {"tokens": len(window) - 1, "nats": nats})

    figures.publish(
        "# How far weights are from dense ones",
        f"AR's answers on dense weights, at most {args.max_new_tokens} tokens each, greedy, float32: the KL divergence "
        "from what dense weights say of a token, how often the best token is the answer's, how many answers AR on the "
        "weights repeats whole, and the median number of tokens after which it leaves the others.",
        answers_table(figures.runs, args.kinds, list(asked)),
        f"The beginning of {Path(args.text).name}, in windows of {args.window} tokens that know nothing of each other:",
        text_table(figures.runs, args.kinds, args.windows),
    )
    # XLA adds up products with packed weights in another order.
    exact = few_rows.language() != "XLA" and "stored" in args.kinds
    return 1 if exact and any(figures.runs[f"stored; {prompt}"]["nats"] for prompt in asked) else 0


if __name__ == "__main__":
    args = parser().parse_args()
    sys.exit(exit_code(lambda: run(args), "Stopped. The same command goes on from here."))
