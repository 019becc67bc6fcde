"""How often what followed a suffix before follows it again, by the length of the match.

    python benchmarks/lookup_trust.py runs/smollm2_135m/held_out.json

Counts over a training run's held-out prompts with the model's greedy answers, the first token of each answer apart.
`decoding.methods.LOOKUP_TRUST` is what this printed for configs/smollm2_135m.py, smoothed so that it does not fall.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.decoding.suffix import LONGEST, continuation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("held_out", type=Path, help="held_out.json of a training of exits")
    args = parser.parse_args()
    groups = json.loads(args.held_out.read_text(encoding="utf-8"))
    texts = [(prompt, answer) for group in groups.values() for prompt, answer in group]
    size = max(len(prompt) + len(answer) for prompt, answer in texts)
    look = jax.jit(jax.vmap(lambda text, length: continuation(text, length, 1), (None, 0)))
    right, met = np.zeros(LONGEST + 1, int), np.zeros(LONGEST + 1, int)
    for prompt, answer in texts:
        text = np.asarray([*prompt, *answer], np.int32)
        padded = np.pad(text, (0, size - len(text)))
        said, matched = (np.asarray(x) for x in look(jnp.asarray(padded), jnp.arange(size)))
        for length in range(len(prompt) + 1, len(text)):
            met[matched[length]] += 1
            right[matched[length]] += matched[length] > 0 and said[length, 0] == text[length]
    print("| length of the match | positions | right |\n|---|---|---|")
    for length in range(LONGEST + 1):
        share = f"{right[length] / met[length]:.3f}" if length and met[length] else "-"
        print(f"| {length}{' or more' if length == LONGEST else ''} | {met[length]} | {share} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
