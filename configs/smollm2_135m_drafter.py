"""A drafter for SmolLM2-135M: an exit at depth 0, trained on steps of its own outputs.

The data and their shares are those of configs/smollm2_135m.py. The drafter that ships learnt from the same sources, in
three trainings with 1200, 400 and 700 steps, the last of them with five draft steps.
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.distillation import DistillationOptions

smollm2 = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["config"]

config = dataclasses.replace(
    smollm2,
    exits=ExitsConfig(kind="mlp", fused=True, depths=(0,), width=576, hidden=1536, draft_size=8192),
    options=DistillationOptions(draft_steps=4),
    train=dataclasses.replace(smollm2.train, steps=2300),
)
