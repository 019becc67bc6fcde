"""Exits for SmolLM2-135M at the depths that K = 15 needs, for benchmarks/rows.py; they do not ship.

As configs/smollm2_135m.py, in one training with a small draft vocabulary: how ticks grow as rows shrink is asked here,
not how few they can be.

    python train_exits.py --config configs/smollm2_135m_k15.py
    python benchmarks/rows.py --exits runs/smollm2_135m_k15 --explorers 15 --data ... --output results/rows
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.decoding.methods import even_depths

LAYERS = 30

first = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["first"]

config = dataclasses.replace(
    first,
    exits=dataclasses.replace(first.exits, depths=even_depths(15, LAYERS)[:-1]),
    train=dataclasses.replace(first.train, steps=400),
)
