"""One exit for SmolLM2-135M at depth 20, for two explorers on two devices; it does not ship.

It goes on from the exit that ships, with no other depth beside it and half the draft vocabulary: in a tick of two
stages the other one waits for the exit's product with the draft unembedding.

    python train_exits.py --config configs/smollm2_135m_k2.py --init-from default
    python benchmarks/two_processes.py --exits runs/smollm2_135m_k2 --depths 20,30 --data ... --output ...
"""

import dataclasses
import runpy
from pathlib import Path

first = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["first"]

config = dataclasses.replace(
    first,
    exits=dataclasses.replace(first.exits, depths=(20,)),
    sources=dataclasses.replace(first.sources, seed=2),
    train=dataclasses.replace(first.train, steps=400, learning_rate=1e-3, warmup_steps=30, seed=2),
)
