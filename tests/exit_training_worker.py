"""A training of exits of a few seconds; as a program it runs on four devices and writes into the given folder."""

from __future__ import annotations

import dataclasses
import sys

import jax
from jax.sharding import AxisType
from reference.small_models import LLAMA, small_model

from dex_jax.config import ExitsConfig
from dex_jax.language_model import LanguageModel
from dex_jax.training.config import TrainConfig
from dex_jax.training.exit_training import ExitTraining, train_exits
from dex_jax.training.sources import SourceOptions

EXITS = ExitsConfig("attn", (1, 2), LLAMA.width, hidden=12, heads=2, head_dim=8, window=5, draft_size=24)
EVERY = {"checkpoint_every": 2, "eval_every": None, "log_every": 1}
CONFIG = ExitTraining(
    exits=EXITS,
    sources=SourceOptions(length=20, held_out_least=3),
    tokens=100,
    evaluation_texts=3,
    evaluation_tokens=8,
    # Epsilon is large, as Adam would otherwise take a full step along a gradient of rounding errors alone.
    train=TrainConfig(**EVERY, epsilon=1e-3, steps=6, batch=4, learning_rate=0.01, warmup_steps=1),
)


def base_model() -> LanguageModel:
    """Return a model without a chat template; its texts begin with token 1 and end with token 0."""
    return small_model(dataclasses.replace(LLAMA, num_layers=3, bos_id=1, eos_ids=(0,)))


if __name__ == "__main__":
    config = dataclasses.replace(CONFIG, evaluation_texts=0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    train_exits(config, base_model(), sys.argv[1], mesh=mesh)
