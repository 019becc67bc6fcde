"""An EAGLE-3 head for SmolLM2-135M, of about the size of the drafter that ships (configs/smollm2_135m_drafter.py).

Data and their shares are those of configs/smollm2_135m.py.
"""

import dataclasses
import runpy
from pathlib import Path

from dex_jax.training.eagle_training import EagleTraining

exits = runpy.run_path(str(Path(__file__).with_name("smollm2_135m.py")))["first"]

config = EagleTraining(
    data=exits.data,
    sources=exits.sources,
    train=dataclasses.replace(exits.train, steps=1150, batch=4, learning_rate=1e-3, warmup_steps=60),
)
