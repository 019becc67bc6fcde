"""A drafter for SmolLM2-135M: an exit at depth 0, trained on steps of its own outputs.

The data and their shares are those of configs/smollm2_135m.py. Every run starts from the exits of the one before, with
fresh texts and a learning rate that rises and falls once more, the last one with five draft steps instead of three.
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.distillation import DistillationOptions

exits = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["first"]

first = dataclasses.replace(
    exits,
    exits=ExitsConfig(kind="mlp", fused=True, depths=(0,), width=576, hidden=1536, draft_size=8192),
    options=DistillationOptions(draft_steps=3),
    train=dataclasses.replace(exits.train, steps=1200),
)

second = dataclasses.replace(
    first,
    first=first,
    sources=dataclasses.replace(first.sources, seed=1),
    train=dataclasses.replace(first.train, steps=400, learning_rate=1e-3, warmup_steps=30, seed=1),
)

config = dataclasses.replace(
    second,
    first=second,
    sources=dataclasses.replace(first.sources, seed=2),
    options=DistillationOptions(draft_steps=5),
    train=dataclasses.replace(second.train, steps=700, seed=2),
)
