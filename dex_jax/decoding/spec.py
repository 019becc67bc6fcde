"""What a compiled decoding program depends on beside shapes."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.methods import Schedule
from dex_jax.nn.transformer import Layout


@dataclasses.dataclass(frozen=True)
class Spec:
    """Statics of the programs.

    Attributes:
      config, layout: of the model.
      schedule: the method.
      exits: None for the model's own, "shared", and for serial rounds without a drafter.
      mesh: None for one device; otherwise the layout is Staged.
    """

    config: ModelConfig
    layout: Layout
    schedule: Schedule
    exits: ExitsConfig | None = None
    mesh: Mesh | None = None
