"""What can be trained: the interface between the trainer and the thing that it knows nothing about."""

from __future__ import annotations

from typing import Any, Protocol

import jax

Params = Any
"""A pytree of float32 arrays: what the optimizer updates."""

Cursor = dict[str, Any]
"""A place in the data: plain JSON (dicts with string keys, lists, strings, numbers, booleans, None)."""


class Task(Protocol):
    """One thing to train.

    A task may also have these methods; the trainer does well without:

      settings() -> dict: plain JSON, what decides the training beside TrainConfig. A folder is only resumed with equal
        settings.
      batch_sharding(mesh), param_sharding(mesh), constant_sharding(mesh) -> PartitionSpec, or a pytree of them that is
        a prefix of the batch, the parameters or the constants: how they lie on a mesh; without it, a copy everywhere.

    Attributes:
      name: of the kind of task, kept in every checkpoint.
    """

    name: str

    def init(self, key: jax.Array) -> Params:
        """The parameters before the first step."""

    def constants(self) -> Any:
        """A pytree of arrays that training never changes: an argument of the compiled update, so no part of it."""

    def start(self, seed: int) -> Cursor:
        """The place before the first batch."""

    def next_batch(self, cursor: Cursor) -> tuple[Any, Cursor, int]:
        """(the batch at `cursor`, arrays of the same shapes every time; the next place; tokens learnt from)."""

    def loss(
        self, params: Params, constants: Any, batch: Any, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss, and scalars to report by name, float32; traced once under jit.

        `constants` and `batch` are as from the methods of these names, `key` is this step's own, `step` an int32 scalar
        from 0.
        """

    def evaluate(self, params: Params) -> dict[str, Any]:
        """Figures on held-out data, plain JSON. `params` lie where training keeps them. It must not move any cursor."""

    def decayed(self, params: Params) -> Any:
        """Which arrays weight decay applies to: a pytree of bool like `params`."""

    def boundary(self) -> None:
        """Forget all that no checkpoint holds.

        Called right after a checkpoint has been saved and right after one has been restored, so that a run that goes on
        and a run that was killed and resumed are in the same state from here.
        """

    def fingerprint(self) -> str:
        """Names what is trained on top of (the backbone): checkpoints of another one are used with a warning."""
