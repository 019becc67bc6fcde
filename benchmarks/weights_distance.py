"""The distance of other forms of weights from dense ones: KL, best tokens along AR's answers, perplexity.

    python benchmarks/weights_distance.py --data HumanEval.jsonl.gz question_240.jsonl --text input.txt \\
        --output results/weights_distance

Answers are AR's on dense weights, and every form of weights runs over prompt and answer once. As long as its best
token is the answer's, AR on it writes the same text. "stored" weights must be at distance 0 where products are in C++.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from measuring import Figures, arguments, machine, main, read_ids

import dex_jax
from dex_jax.nn import few_rows
from dex_jax.prompt_files import read_texts
from dex_jax.tables import markdown

DENSE, KINDS = "dense", ("stored", "int8")
SHORTEST = 256
"""The shortest length that texts are padded to; powers of two follow, so that few lengths are compiled."""


def log_probabilities(lm: Any, ids: Sequence[int], start: int) -> np.ndarray:
    """Return log probabilities from `start` on, each given the tokens before: ids [N] -> [N - start, V] float64."""
    padded = np.zeros((1, max(SHORTEST, 1 << (len(ids) - 2).bit_length())), np.int32)  # zeros reach nothing before them
    padded[0, : len(ids) - 1] = ids[:-1]
    rows = np.asarray(lm.logits(padded))[0, start - 1 : len(ids) - 1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


def distance(dense: np.ndarray, other: np.ndarray, answer: Sequence[int]) -> list[float]:
    """Return tokens, nats (KL), best tokens that are the answer's, and whether all are, of log probabilities [N, V]."""
    agree = int((other.argmax(axis=1) == answer).sum())
    return [len(answer), float((np.exp(dense) * (dense - other)).sum()), agree, float(agree == len(answer))]


def run(args: argparse.Namespace) -> int:
    """Measure what is missing and write the page; return 1 where stored weights differ from dense ones."""
    model = functools.cache(lambda kind: dex_jax.load(args.model, dtype="float32", weights=kind))
    figures, text = Figures(args.output, machine(args)), model(DENSE).encode(read_texts(args.text)[0], chat=False)
    options = {"method": dex_jax.AR(), "max_new_tokens": args.max_new_tokens, "exits": "shared"}

    def distances(ids: list[int]) -> dict[str, list[float]]:
        out = dex_jax.generate(model(DENSE), [ids], **options)
        answer = out.tokens[0, : out.lengths[0]].tolist()
        dense, *others = (log_probabilities(model(kind), [*ids, *answer], len(ids)) for kind in (DENSE, *KINDS))
        return {kind: distance(dense, other, answer) for kind, other in zip(KINDS, others, strict=True)}

    def nats(window: np.ndarray) -> list[float]:
        found = (log_probabilities(model(kind), window, 1) for kind in (DENSE, *KINDS))
        return [-float(np.take_along_axis(each, window[1:, None], axis=1).mean()) for each in found]

    asked = read_ids(model(DENSE), args.data, args.prompts)
    runs = [*figures.each(asked, distances).values()]
    cells = []
    for kind in KINDS:
        tokens, kl, agree, whole = np.sum([each[kind] for each in runs], axis=0)
        shares = f"{kl / tokens:.2g}", f"{agree / tokens:.2%}", f"{whole:.0f} of {len(runs)}"
        cells.append([kind, f"{tokens:.0f}", *shares])
    windows = np.array(text[: len(text) // args.window * args.window]).reshape(-1, args.window)[: args.windows]
    read = np.mean(
        [*figures.each({f"window {at + 1}": each for at, each in enumerate(windows)}, nats).values()], axis=0
    )
    found = zip((DENSE, *KINDS), read, strict=True)
    perplexities = [[kind, f"{math.exp(x):.3f}", f"{math.expm1(x - read[0]):+.2%}"] for kind, x in found]
    figures.publish(
        "# How far weights are from dense ones",
        markdown(["weights", "tokens", "mean KL, nats", "best token agrees", "whole answers"], cells),
        f"The text's first {windows.size} tokens in windows that know nothing of each other:",
        markdown(["weights", "perplexity", "over dense"], perplexities),
    )
    # XLA adds up products with packed weights in another order.
    return int(few_rows.language() != "XLA" and any(each["stored"][1] for each in runs))


if __name__ == "__main__":
    flags = arguments(__doc__, data=[], prompts=10, max_new_tokens=64)
    flags.add_argument("--text", required=True, metavar="FILE", help="text whose perplexity is measured")
    flags.add_argument("--window", type=int, default=512, metavar="N", help="tokens read at a time (%(default)s)")
    flags.add_argument("--windows", type=int, default=8, metavar="N", help="of the text's beginning (%(default)s)")
    main(run, flags)
