"""Exits for SmolLM2-135M on a grid that serves K = 2, 3, 5, 6 and 10: every multiple of 3 and of 5 below 30 layers.

Beside what the model writes itself and Python's standard library they learn from prompts of public sets, read by path.
Sets that are not there are left out with a line on stderr. The exits that ship learnt from the same sources, in two
trainings: 700 steps with a draft vocabulary of 8,192 tokens, then 600 with this one.
"""

import sys
from pathlib import Path

from dex_jax.config import ExitsConfig
from dex_jax.training.config import TrainConfig
from dex_jax.training.distillation import DistillationOptions
from dex_jax.training.exit_training import ExitTraining
from dex_jax.training.sources import SourceOptions

DATA = Path("../shared/data")
PROMPTS = {
    "instruct_rasbt/instruction-data.json": 0.1,
    "instruct_selfinstruct/seed_tasks.jsonl": 0.05,
    "instruct_selfinstruct/user_oriented_instructions.jsonl": 0.05,
    "gsm8k/train.jsonl": 0.15,
    "mmlu/mmlu_dev.jsonl": 0.1,
}

present = {name: share for name, share in PROMPTS.items() if (DATA / name).is_file()}
if len(present) < len(PROMPTS):
    missing = ", ".join(sorted(PROMPTS.keys() - present.keys()))
    print(f"training without {missing}: not in {DATA}", file=sys.stderr)

config = ExitTraining(
    model="smollm2-135m",
    exits=ExitsConfig(
        kind="attn",
        depths=(3, 5, 6, 9, 10, 12, 15, 18, 20, 21, 24, 25, 27),
        width=576,
        hidden=768,
        heads=6,
        head_dim=64,
        window=32,
        draft_size=16384,
    ),
    data=("self=0.25", "python-stdlib=0.3", *(f"{DATA / name}={share}" for name, share in present.items())),
    sources=SourceOptions(
        length=224,
        answer_limit=128,
        prompt_limit=48,
        prompt_weight=0.3,
        held_out_least=8,
        starts=(
            "",
            "Write a Python function",
            "Complete this code:\n\ndef",
            "Explain",
            "What is",
            "How do I",
            "Solve this problem:",
            "Write a story",
        ),
    ),
    options=DistillationOptions(own_outputs=0.5),
    train=TrainConfig(
        steps=1300,
        batch=2,
        learning_rate=2e-3,
        warmup_steps=60,
        final_rate=0.02,
        checkpoint_every=100,
        keep=12,
        eval_every=500,
        log_every=20,
    ),
)
