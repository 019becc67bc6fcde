"""SmolLM2-135M's shipped drafter, trained on with the texts that decoding has kept: some minutes on two cores.

decode.py --store runs/texts --prompt-file prompts.jsonl
train_exits.py --config configs/smollm2_135m_learn.py --init-from default
decode.py --exits runs/smollm2_135m_learn --prompt-file more.jsonl
"""

import dataclasses
import runpy
from pathlib import Path

drafter = runpy.run_path(str(Path(__file__).with_name("smollm2_135m_drafter.py")))["config"]

config = dataclasses.replace(
    drafter,
    first=None,
    data=("store:runs/texts",),
    train=dataclasses.replace(
        drafter.train, steps=100, learning_rate=3e-4, warmup_steps=10, checkpoint_every=50, eval_every=50
    ),
)
