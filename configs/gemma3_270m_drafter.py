"""A drafter for Gemma 3 270M (docs/howto_own_model.md says where to get it): an exit at depth 0.

The data and their shares are those of configs/smollm2_135m.py. 168 of Gemma's 270 million weights are its vocabulary,
which a step of training reads twice.
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.distillation import DistillationOptions

smollm2 = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["config"]

config = dataclasses.replace(
    smollm2,
    model="gemma-3-270m.gguf",
    exits=ExitsConfig(kind="mlp", fused=True, depths=(0,), width=640, hidden=1280, draft_size=8192),
    options=DistillationOptions(draft_steps=3),
    train=dataclasses.replace(smollm2.train, steps=480, warmup_steps=40, checkpoint_every=60, eval_every=240),
)
