"""A drafter for SmolLM2-135M without an attention layer, trained on three steps of its own outputs; it does not ship.

All else is as in configs/smollm2_135m_drafter.py, and so is the number of row-steps (docs/serial.md compares the two).
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.training.distillation import DistillationOptions

attn = runpy.run_path(str(Path(__file__).with_name("smollm2_135m_drafter.py")))["config"]


def without_attention(training, steps: int):
    """The training of the same heads but for attention."""
    return dataclasses.replace(
        training,
        exits=dataclasses.replace(training.exits, kind="mlp", fused=True),
        options=DistillationOptions(draft_steps=3),
        train=dataclasses.replace(training.train, steps=steps),
    )


first = without_attention(attn.first, steps=1200)
config = dataclasses.replace(without_attention(dataclasses.replace(attn, first=None), steps=400), first=first)
