"""A training of exits of a few seconds, as a process of its own that tests may kill or run on several devices."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
from pathlib import Path

from reference.small_models import LLAMA, small_model
from training_worker import mesh_of

from dex_jax.config import ExitsConfig
from dex_jax.language_model import LanguageModel
from dex_jax.training.config import TrainConfig
from dex_jax.training.distillation import Distillation
from dex_jax.training.exit_training import ExitTraining, train_exits
from dex_jax.training.sources import SourceOptions

EXITS = ExitsConfig("attn", (1, 2), LLAMA.width, hidden=12, heads=2, head_dim=8, window=5, draft_size=24)
EVERY = {"checkpoint_every": 2, "eval_every": None, "log_every": 1}
CONFIG = ExitTraining(
    exits=EXITS,
    sources=SourceOptions(length=20, held_out_least=3),
    chunk=4,
    draft_tokens=40,
    evaluation_texts=3,
    evaluation_tokens=8,
    # A large epsilon: otherwise Adam makes of a gradient that is all rounding as large a step as of any other.
    train=TrainConfig(**EVERY, epsilon=1e-3, steps=6, batch=4, learning_rate=0.01, warmup_steps=1),
)


def base_model() -> LanguageModel:
    """A model without chat template, whose texts begin with token 1 and end with token 0."""
    return small_model(dataclasses.replace(LLAMA, num_layers=3, bos_id=1, eos_ids=(0,)))


def with_steps(steps: int) -> ExitTraining:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=steps))


def die_before(step: int) -> None:
    """SIGKILL instead of the batch of that step, when a checkpoint is certainly on disk."""
    next_batch, done = Distillation.next_batch, 0

    def killing(self, cursor):
        nonlocal done
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        done += 1
        return next_batch(self, cursor)

    Distillation.next_batch = killing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=CONFIG.train.steps)
    parser.add_argument("--die-before", type=int)
    parser.add_argument("--evaluation-texts", type=int, default=CONFIG.evaluation_texts)
    parser.add_argument("--meshes", nargs="*", default=[""], help='as 2x2 for data x tensor; "" for none')
    args = parser.parse_args()
    if args.die_before is not None:
        die_before(args.die_before)
    config = dataclasses.replace(with_steps(args.steps), evaluation_texts=args.evaluation_texts)
    for name in args.meshes:
        train_exits(config, base_model(), args.folder / (name or "one"), mesh=mesh_of(name))


if __name__ == "__main__":
    main()
