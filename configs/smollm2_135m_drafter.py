"""A drafter for SmolLM2-135M: an exit at depth 0, trained on four steps of its own outputs, for --schedule serial.

Data and their shares are those of configs/smollm2_135m.py. The second run goes on from the first with fresh texts and
a learning rate that rises and falls once more.
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.distillation import DistillationOptions

exits = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["first"]

first = dataclasses.replace(
    exits,
    exits=ExitsConfig(
        kind="attn", depths=(0,), width=576, hidden=1536, heads=9, head_dim=64, window=64, draft_size=8192
    ),
    draft_tokens=60_000,
    options=DistillationOptions(draft_steps=4),
    train=dataclasses.replace(exits.train, steps=600),
)

config = dataclasses.replace(
    first,
    first=first,
    sources=dataclasses.replace(first.sources, seed=1),
    train=dataclasses.replace(first.train, steps=1000, learning_rate=1e-3, warmup_steps=30, seed=1),
)
