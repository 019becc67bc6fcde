"""A drafter for SmolLM2-135M with an attention layer, trained on four steps of its own outputs; it does not ship.

It has as many row-steps as the first two runs of configs/smollm2_135m_drafter.py (docs/serial.md compares them).
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.distillation import DistillationOptions

without = runpy.run_path(str(Path(__file__).with_name("smollm2_135m_drafter.py")))


def with_attention(training, steps: int):
    """The training of the same heads with attention instead of a fused input."""
    return dataclasses.replace(
        training,
        exits=ExitsConfig(
            kind="attn", depths=(0,), width=576, hidden=1536, heads=9, head_dim=64, window=64, draft_size=8192
        ),
        options=DistillationOptions(draft_steps=4),
        train=dataclasses.replace(training.train, steps=steps),
        first=None,
    )


first = with_attention(without["first"], steps=600)
config = dataclasses.replace(with_attention(without["second"], steps=1000), first=first)
