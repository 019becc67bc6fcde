"""Exits for SmolLM2-135M from about ten thousand tokens: a training from its beginning to its end in a few minutes.

They show how a training goes, and are better than the model's own head at most depths. The exits that ship with the
package (configs/smollm2_135m.py) have learned from sixty times as many tokens.
"""

from dex_jax.config import ExitsConfig
from dex_jax.training.config import TrainConfig
from dex_jax.training.exit_training import ExitTraining
from dex_jax.training.sources import SourceOptions

config = ExitTraining(
    model="smollm2-135m",
    exits=ExitsConfig(kind="linear", depths=(6, 12, 18, 24), width=576, draft_size=2048),
    data=("self",),
    sources=SourceOptions(length=96),
    evaluation_texts=4,
    evaluation_tokens=32,
    train=TrainConfig(
        steps=60, batch=3, learning_rate=2e-3, warmup_steps=5, checkpoint_every=20, eval_every=20, log_every=20
    ),
)
