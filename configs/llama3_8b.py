"""Exits for Llama 3.1 8B, on a grid that serves K = 2, 4 and 8.

Never run: results/training_cost.md estimates what it takes. The model must be in the hub's cache or in a directory
(`--model`), as its licence has to be agreed to first.
"""

from dex_jax.config import ExitsConfig
from dex_jax.training.config import TrainConfig
from dex_jax.training.exit_training import ExitTraining
from dex_jax.training.sources import SourceOptions

BATCH, CHUNK = 128, 8

config = ExitTraining(
    model="meta-llama/Llama-3.1-8B-Instruct",
    exits=ExitsConfig(kind="linear", depths=(4, 8, 12, 16, 20, 24, 28), width=4096, fused=True, draft_size=16_384),
    data=("self=0.7", "python-stdlib=0.3"),
    sources=SourceOptions(length=256, prompt_weight=0.3),
    chunk=CHUNK,
    train=TrainConfig(
        # One million tokens.
        steps=-(-1_000_000 // (BATCH * CHUNK)),
        batch=BATCH,
        learning_rate=1e-3,
        warmup_steps=60,
        final_rate=0.02,
        checkpoint_every=100,
        eval_every=500,
        dtype="bfloat16",
    ),
)
