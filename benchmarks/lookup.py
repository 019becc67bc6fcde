"""What the text itself is worth as a drafter: how often its continuations are right, and tokens a round with them.

    python benchmarks/lookup.py --data HumanEval.jsonl.gz --data question_240.jsonl --prompts 20

Over the model's greedy answers to some prompts of each file, the first token of each apart. The first table is what
`decoding.known_trees.LOOKUP_TRUST` was smoothed from, the second what `LOOKUP_TREES` says.
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

import dex_jax
from dex_jax.cli.train_results import spread
from dex_jax.decoding.known_trees import LOOKUP_TRUST
from dex_jax.decoding.suffix import LONGEST, continuation
from dex_jax.training.prompt_files import read_prompts

CHAINS = range(1, 13)


def rounds(text: np.ndarray, begin: int, said: np.ndarray, matched: np.ndarray, chain: int) -> int:
    """Rounds that the tokens after `begin` take with chains of `chain` tokens; a round emits what was right and one."""
    at, count = begin, 0
    while at < len(text):
        right = 0
        if matched[at] and LOOKUP_TRUST[matched[at] - 1] > 0:
            while right < chain and at + right < len(text) and said[at, right] == text[at + right]:
                right += 1
        at, count = at + right + 1, count + 1
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", action="append", required=True, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=20, help="evenly spread over each file (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    lm = dex_jax.load(args.model)
    look = jax.jit(jax.vmap(lambda text, length: continuation(text, length, CHAINS[-1]), (None, 0)))
    right, met = np.zeros(LONGEST + 1, int), np.zeros(LONGEST + 1, int)
    took: dict[int, list[tuple[int, int]]] = {chain: [] for chain in CHAINS}
    for path in args.data:
        ids = [lm.encode(prompt) for prompt in spread(read_prompts(path), args.prompts)]
        size = max(map(len, ids)) + args.max_new_tokens
        for prompt in ids:
            out = dex_jax.generate(lm, [prompt], method=dex_jax.AR(), max_new_tokens=args.max_new_tokens)
            text = np.asarray([*prompt, *out.tokens[0, : out.lengths[0]]], np.int32)
            padded = np.pad(text, (0, size - len(text)))
            said, matched = (np.asarray(x) for x in look(jnp.asarray(padded), jnp.arange(size)))
            begin = len(prompt) + 1
            for length in range(begin, len(text)):
                met[matched[length]] += 1
                right[matched[length]] += matched[length] > 0 and said[length, 0] == text[length]
            for chain in CHAINS if begin < len(text) else ():
                took[chain].append((len(text) - begin, rounds(text, begin, said, matched, chain)))
    print("| length of the match | positions | right |\n|---|---|---|")
    for length in range(LONGEST + 1):
        share = f"{right[length] / met[length]:.3f}" if length and met[length] else "-"
        print(f"| {length}{' or more' if length == LONGEST else ''} | {met[length]} | {share} |")
    print("\n| tokens ahead | tokens a round, all texts together | median of texts |\n|---|---|---|")
    for chain, found in took.items():
        tokens, rounds_taken = np.array(found).T
        print(f"| {chain} | {tokens.sum() / rounds_taken.sum():.2f} | {np.median(tokens / rounds_taken):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
