"""The training loop: one compiled update, a journal, evaluations, and checkpoints to go on from after any kill."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dex_jax.errors import DexError
from dex_jax.interrupts import INTERRUPTED
from dex_jax.io.whole_files import plain
from dex_jax.nn.sharding import EVERYWHERE
from dex_jax.progress import Display, Standing
from dex_jax.training.checkpoints import Checkpoints, Record
from dex_jax.training.config import TrainConfig
from dex_jax.training.journal import Journal
from dex_jax.training.optimizer import learning_rate, make_optimizer

if TYPE_CHECKING:
    from dex_jax.training.distillation import Distillation

Notify = Callable[[str | Standing], None]

Params = Any
"""The pytree of float32 arrays that the optimizer updates."""

FIRST_WORD = 20
"""Number of steps after which a line tells the speed and the time left, even where no line is due."""


class TrainState(NamedTuple):
    """The state that an update changes."""

    params: Params  # of the task, float32
    opt_state: Any  # of the optimizer
    step: jax.Array  # int32 scalar, steps done
    key: jax.Array  # of the run; step i uses fold_in(key, i)


class Trained(NamedTuple):
    """The results of training."""

    params: Params  # the last ones
    step: int  # steps done
    tokens: int  # learnt from


def train(
    task: Distillation,
    config: TrainConfig,
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    notify: Notify | None = None,
    saved: Callable[[Trained], Any] = lambda trained: None,
) -> Trained:
    """Train a task to the end, and resume the training that its folder holds.

    Killed at any moment and called again, it ends with the same parameters, bit for bit, unless the clock ends it.

    Args:
      task: a Distillation, or anything with its methods.
      config: the settings.
      folder: holds checkpoints and metrics.jsonl; made if need be.
      mesh: devices of this process that the rows of a batch are spread over, with the axis "data"; None trains where
        JAX puts arrays. The figures are those of one device up to the order of sums.
      notify: called with lines of text and with a Standing after each step; None shows them on stderr.
      saved: called at every checkpoint with the results so far.

    Raises:
      DexError: the folder holds another training, the loss is no longer finite, or the disk is full.
      SystemExit: with status 130, after Ctrl-C.
    """
    with contextlib.closing(Display()) as display:
        tell = notify or display
        checkpoints, run = Checkpoints(folder, config.keep), None
        try:
            with checkpoints:
                run = _Run(task, config, checkpoints, mesh, tell, saved)
                with contextlib.closing(run.journal):
                    while not run.done:
                        run.advance()
            return run.results
        except KeyboardInterrupt:
            if run is None:
                raise
            # No checkpoint here: a resumed journal would differ from that of a run that was never stopped.
            newest = checkpoints.newest
            where = "nothing was saved yet, so it begins anew" if newest is None else f"it goes on from step {newest}"
            tell(f"Stopped at step {run.step}. To resume, run the same command again: {where} ({folder}).")
            raise SystemExit(INTERRUPTED) from None


class _Run:
    """The part of a training that one process runs, step by step."""

    def __init__(
        self,
        task: Distillation,
        config: TrainConfig,
        checkpoints: Checkpoints,
        mesh: Mesh | None,
        notify: Notify,
        saved: Callable[[Trained], Any],
    ):
        self.task, self.config, self.checkpoints, self.notify, self.saved = task, config, checkpoints, notify, saved
        self.step = self.tokens = 0
        self.seconds, self._began = 0.0, time.perf_counter()  # of the processes before this one; when this one began
        record = checkpoints.record()
        if record is not None:
            self._check(record)
        init_key, key = jax.random.split(jax.random.key(config.seed))
        # Copies: the update gives its buffers away, and these may be somebody's weights.
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), task.init(init_key))
        self.optimizer = make_optimizer(config, task.decayed(params))
        everywhere = None if mesh is None else NamedSharding(mesh, EVERYWHERE)
        self.rows = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        self.state = jax.device_put(TrainState(params, self.optimizer.init(params), jnp.int32(0), key), everywhere)
        if record is not None:
            self._restore(record)
        self.constants = jax.device_put(task.constants(), everywhere)
        places = None if mesh is None else (everywhere, None)
        self.update = jax.jit(self._update, donate_argnums=0, out_shardings=places)
        self.journal = Journal(checkpoints.folder, self.step)
        self.figures: list[dict[str, jax.Array]] = []  # of the steps since the last line
        self.learnt: list[int] = []  # tokens of each of them
        self.share = self._share()
        self.loss: float | None = None  # the mean of that line
        self._logged = (time.perf_counter(), self.tokens)
        self._begun: tuple[float, int, float] | None = None

    @property
    def results(self) -> Trained:
        """The results so far."""
        return Trained(self.state.params, self.step, self.tokens)

    @property
    def done(self) -> bool:
        """True once all steps are done or the minutes are over."""
        return self.share >= 1

    def _spent(self) -> float:
        """Return the seconds that all processes have spent so far."""
        return self.seconds + time.perf_counter() - self._began

    def _share(self) -> float:
        """Return the share of the training that is done, by steps or by the clock."""
        by_steps, minutes = self.step / self.config.steps, self.config.minutes
        return min(1.0, by_steps if minutes is None else max(by_steps, self._spent() / (60 * minutes)))

    def advance(self) -> None:
        """Run one step and all that is due after it."""
        batch, learnt = self.task.batch(self.step)
        self.rate = learning_rate(self.config, self.step, self.share)
        self.state, figures = self.update(
            self.state, self.constants, jax.device_put(batch, self.rows), np.float32(self.rate)
        )
        if self.figures:
            # Only one step runs while the next is prepared: further ahead, the clock would not show the progress.
            jax.block_until_ready(self.figures[-1])
        self.step += 1
        self.tokens += learnt
        self.figures.append(figures)
        self.learnt.append(learnt)
        self.share = self._share()
        every = self.config.eval_every
        saves = self.done or self.step % self.config.checkpoint_every == 0
        evaluates = self.done or (every is not None and self.step % every == 0)
        # A line at each checkpoint, so that a resumed journal is the one of a run that was never killed.
        logs = saves or evaluates or self.step % self.config.log_every == 0
        if logs:
            self._log()
        if evaluates:
            found = self.task.evaluate(self.state.params)
            self.journal.write("evaluation", self.step, {"tokens": self.tokens, **found})
        if saves:
            self._save()
        self.notify(self._standing(logs or self.step == FIRST_WORD))

    def _update(
        self, state: TrainState, constants: Any, batch: Any, rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Return the state after a step, and {"loss", "gradient_norm" before clipping, the figures of the task}."""
        key = jax.random.fold_in(state.key, state.step)
        batch = self.task.read(constants, batch)
        losses = jax.value_and_grad(self.task.loss, has_aux=True)
        (loss, figures), gradients = losses(state.params, constants, batch, key, state.step)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda update: rate * update, updates))
        norm = jnp.sqrt(sum(jnp.vdot(gradient, gradient) for gradient in jax.tree.leaves(gradients)))
        figures = {**figures, "loss": loss, "gradient_norm": norm}
        return TrainState(params, opt_state, state.step + 1, state.key), figures

    def _log(self) -> None:
        means, now = self._means(), time.perf_counter()
        self.loss = means["loss"]
        seconds, tokens = now - self._logged[0], self.tokens - self._logged[1]
        self._logged = (now, self.tokens)
        speed = tokens / seconds if seconds > 0 else None
        own = {"tokens": self.tokens, "learning_rate": self.rate, "tokens_per_second": speed, "seconds": seconds}
        self.journal.write("train", self.step, {**own, **means})

    def _means(self) -> dict[str, float]:
        """Return means over the tokens since the last line; raise DexError where a loss or gradient is not finite."""
        figures, self.figures = jax.device_get(self.figures), []
        learnt, self.learnt = np.maximum(self.learnt, 1e-9), []
        for step, each in enumerate(figures, self.step - len(figures) + 1):
            for name, value in (("loss", each["loss"]), ("gradient", each["gradient_norm"])):
                if not math.isfinite(value):
                    why = f"the {name} of step {step} is {value}: checkpoints from before it are kept"
                    raise DexError(f"{why}; lower the learning rate or clip_norm, and train in another folder")
        return {name: float(np.average([each[name] for each in figures], weights=learnt)) for name in figures[0]}

    def _save(self) -> None:
        record = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self._spent(),
            "config": dataclasses.asdict(self.config),
            "task": self.task.name,
            "settings": plain(self.task.settings()),
            "fingerprint": self.task.fingerprint(),
        }
        self.checkpoints.save(self.state.params, self._rest(), record)
        self.saved(self.results)

    def _restore(self, record: Record) -> None:
        params, rest = self.checkpoints.restore(params=self.state.params, rest=self._rest())
        self.state = TrainState(params, rest.opt_state, rest.step, jax.random.wrap_key_data(rest.key))
        self.step, self.tokens, self.seconds = record["step"], record["tokens"], record.get("seconds", 0.0)
        end = " That is all of it: nothing is left to do." if self._share() >= 1 else ""
        self.notify(f"Resuming from step {self._of_steps(' of ')} in {self.checkpoints.folder}.{end}")

    def _of_steps(self, of: str) -> str:
        """Return the step, and the number of all steps where that ends the training."""
        return f"{self.step}{of}{self.config.steps}" if self.config.minutes is None else str(self.step)

    def _rest(self) -> TrainState:
        return self.state._replace(params=None, key=jax.random.key_data(self.state.key))

    def _check(self, record: Record) -> None:
        there, here = (record["task"], record["fingerprint"]), (self.task.name, self.task.fingerprint())
        if there[0] != here[0]:
            raise DexError(
                f"{self.checkpoints.folder} holds a training of {there[0]}, not {here[0]}: use another folder"
            )
        before, settings = record["settings"], plain(self.task.settings())
        changed = self.config.conflicts(record["config"]) + [
            f"{name} was {before.get(name)}, is {settings.get(name)}"
            for name in sorted(settings.keys() | before.keys())
            if settings.get(name) != before.get(name)
        ]
        if changed:
            raise DexError(
                f"{self.checkpoints.folder} holds a training with other settings ({'; '.join(changed)}): go on with "
                "those, or train in another folder"
            )
        if there != here:
            self.notify(
                f"warning: {self.checkpoints.folder} was trained on the backbone {there[1]}, this one is {here[1]}; "
                "going on"
            )

    def _standing(self, logged: bool) -> Standing:
        now, share, left = time.perf_counter(), self.share, None
        what = f"step {self._of_steps('/')}, {_amount(self.tokens)} tokens"
        if self._begun is None:
            # Not before: the first step compiles.
            self._begun = (now, self.tokens, share)
        else:
            begun, tokens, done = self._begun
            what += f", {_amount((self.tokens - tokens) / (now - begun))} tokens/s"
            left = (now - begun) * (1 - share) / max(share - done, 1e-9)
        return Standing(what if self.loss is None else f"{what}, loss {self.loss:.4f}", share, left, logged)


def _amount(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"
