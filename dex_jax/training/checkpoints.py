"""The checkpoints of a training run, by orbax: each is a folder, whole or not there at all, whatever kills the run.

One holds the "params" of the task, the "rest" that an update changes, and a "record" in plain JSON: "step", "tokens"
and "seconds" so far, the "config" of the run, the "task" with its "settings", the backbone's "fingerprint".
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dex_jax.errors import DexError
from dex_jax.foreign import reading, reason
from dex_jax.io.whole_files import lock

Record = dict[str, Any]


class Checkpoints:
    """The newest `keep` checkpoints of a run, a context that one process enters at a time and that ends when saved."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self._keep = Path(folder).absolute(), keep

    def __enter__(self) -> Checkpoints:
        logger = logging.getLogger("absl")
        # Directories made in the background would turn a full disk into a wait of many minutes.
        at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = {"max_to_keep": self._keep, "cleanup_tmp_directories": True, "async_options": at_once}
        with contextlib.ExitStack() as opened, self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock(opened.enter_context((self.folder / "lock").open("w")))
            opened.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)  # orbax logs tracebacks of what becomes one sentence here
            self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(**options))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An earlier error is the one that a person needs to see.
        with self._opened, self._writing() if kind is None else contextlib.suppress(Exception):
            self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, None without any."""
        return self._manager.latest_step()

    def save(self, params: Any, rest: Any, record: Record) -> None:
        """Start a save, once the one before is done, and return when all arrays are copied, as they may be donated.

        Raise DexError where this save or the one before cannot be written, as on a full disk.
        """
        # Copies, as orbax reads arrays of a CPU in place.
        arrays = (ocp.args.StandardSave(jax.tree.map(np.array, tree)) for tree in (params, rest))
        items = zip(("params", "rest", "record"), (*arrays, ocp.args.JsonSave(record)), strict=True)
        with self._writing():
            self._manager.save(record["step"], args=ocp.args.Composite(**dict(items)), force=True)

    def record(self) -> Record | None:
        """Return the record of the newest checkpoint, or None without any."""
        return None if self.newest is None else _read(self._manager, self.newest, "record", ocp.args.JsonRestore())

    def restore(self, **trees: Any) -> list[Any]:
        """Return the newest arrays of these names, with the shapes and the placement of the given trees."""
        return [_read(self._manager, self.newest, name, ocp.args.StandardRestore(trees[name])) for name in trees]

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise DexError(f"another process trains in {self.folder}: name another folder, or let it end") from None
        except Exception as error:
            why = f"checkpoints cannot be written to {self.folder} ({reason(error)})"
            raise DexError(f"{why}: what was written is kept, so mend that and run the same command again") from error


def _read(manager: ocp.CheckpointManager, step: int | None, item: str, how: Any) -> Any:
    with reading(Path(manager.directory) / str(step), "remove it, and training goes on from the one before"):
        return manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
