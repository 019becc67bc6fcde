"""The few sizes of prompts, caches and batches that programs are compiled for."""

from __future__ import annotations

CHUNK_SIZES = (512, 192, 48)
CACHE_STEP = SMALL_CACHE = 1024
SMALLEST_CACHE = {1: SMALL_CACHE, 2: 512, 4: 512}
"""The smallest cache length S by the number of sequences, 256 for others: caches of few are small beside the
weights, and all lengths up to it share their programs."""

BATCH_STEP = 4


def chunk_sizes(length: int) -> tuple[int, ...]:
    """Return the sizes of the chunks in which a prompt of `length` tokens is prefilled; only the last is padded.

    Prompts of all lengths share the programs of a few sizes. Chunks are as few as possible, as each reads
    all weights, and padding costs next to nothing.
    """
    whole, rest = divmod(length, CHUNK_SIZES[0])
    return (CHUNK_SIZES[0],) * whole + ((min(size for size in CHUNK_SIZES if size >= rest),) if rest else ())


def prompt_bucket(length: int) -> int:
    """Return the padded length of a prompt."""
    return sum(chunk_sizes(length))


def cache_length_for(prompt_length: int, max_new_tokens: int, ahead: int, batch: int) -> int:
    """Return S, the cache positions of each of `batch` sequences: prompt, new tokens and `ahead` more, rounded up.

    S is a power of two up to CACHE_STEP, then a multiple of it: programs that decode are compiled for S, not for every
    length of prompts and answers.
    """
    needed = max(prompt_bucket(prompt_length), prompt_length + max_new_tokens + ahead)
    if needed > CACHE_STEP:
        return -(-needed // CACHE_STEP) * CACHE_STEP
    return max(SMALLEST_CACHE.get(batch, 256), 1 << (needed - 1).bit_length())


def batch_bucket(sequences: int) -> int:
    """Return B, the number of sequences to compile for: 1, 2 or a multiple of 4; added ones are done from the start."""
    return sequences if sequences <= 2 else -(-sequences // BATCH_STEP) * BATCH_STEP
