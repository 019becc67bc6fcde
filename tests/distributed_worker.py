"""One of two processes that decode together, each with one CPU device, for tests/test_distributed.py.

python distributed_worker.py CHECKPOINT [NUMBER loading|decoding]    (the process of that NUMBER dies then)
"""

from __future__ import annotations

import json
import os
import signal
import sys

import jax

import dex_jax
from dex_jax.distributed import is_first, join, name

PROMPTS = [[5, 9, 30], [7, 40, 41, 3, 8]]
OPTIONS = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 20, "seed": 3}


def main() -> None:
    join()
    assert jax.process_count() == 2
    read: list[tuple[int, int]] = []
    end = sys.argv[3] if sys.argv[2:3] == [str(jax.process_index())] else None

    def on_tensor(*done: int) -> None:
        read.append(done)
        if end == "loading":
            os.kill(os.getpid(), signal.SIGKILL)

    lm = dex_jax.load(sys.argv[1], "float32", mesh="stage=2", on_tensor=on_tensor)
    # The prompts of process 0 count, whatever the other process has.
    method, prompts = dex_jax.Dex(explorers=2, draft=False), PROMPTS if is_first() else [[1], [2]]
    updates = dex_jax.stream(lm, prompts, method=method, ticks_per_update=4, **OPTIONS)
    if end == "decoding":
        next(updates)
        os.kill(os.getpid(), signal.SIGKILL)
    *_, output = updates
    layers = jax.tree.leaves(lm.weights["layers"])
    print(
        json.dumps(
            {
                "name": name(),
                "tokens": output.tokens.tolist(),
                "exits": output.stats.exits.tolist(),
                "ticks": output.stats.ticks.tolist(),
                "read": read[-1],
                "stages": sorted({shard.index[0].start for leaf in layers for shard in leaf.addressable_shards}),
            }
        )
    )


if __name__ == "__main__":
    main()
