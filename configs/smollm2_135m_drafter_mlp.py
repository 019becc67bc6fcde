"""A drafter for SmolLM2-135M without an attention layer, trained on three steps of its own outputs; it does not ship.

Data and their shares are those of configs/smollm2_135m.py, and as many row-steps in all as the drafter that ships has
seen (docs/serial.md compares them).
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.distillation import DistillationOptions

exits = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["first"]

first = dataclasses.replace(
    exits,
    exits=ExitsConfig(kind="mlp", depths=(0,), width=576, fused=True, hidden=1536, draft_size=8192),
    draft_tokens=60_000,
    options=DistillationOptions(draft_steps=3),
    train=dataclasses.replace(exits.train, steps=1200),
)

config = dataclasses.replace(
    first,
    first=first,
    sources=dataclasses.replace(first.sources, seed=1),
    train=dataclasses.replace(first.train, steps=400, learning_rate=1e-3, warmup_steps=30, seed=1),
)
