"""Exits for Gemma 3 270M (docs/howto_own_model.md says where to get it) at depths that serve two to five explorers.

The data and their shares are those of configs/smollm2_135m.py.
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig

smollm2 = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["config"]

config = dataclasses.replace(
    smollm2,
    model="gemma-3-270m.gguf",
    exits=ExitsConfig(
        kind="attn", depths=(4, 8, 12, 15), width=640, hidden=384, heads=4, head_dim=64, window=32, draft_size=8192
    ),
    train=dataclasses.replace(smollm2.train, steps=160, warmup_steps=20, checkpoint_every=40, eval_every=160),
)
