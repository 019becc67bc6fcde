"""Checkpoints of a training run: what orbax keeps, and what a kill, a bad disk or a full one cannot take away.

A checkpoint is a folder step_00000500 that orbax first writes under another name and then renames, so it is there whole
or not at all. Orbax does not notice bytes that changed since; the checksum kept here does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from dex_jax.errors import DexError
from dex_jax.foreign import reading, reason
from dex_jax.io.whole_files import lock
from dex_jax.training.stream import Cursor

_NAMES: dict[str, Any] = {"step_prefix": "step", "step_format_fixed_length": 8}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint says beside its arrays."""

    step: int  # steps done
    tokens: int  # learnt from so far
    cursor: Cursor  # the place in the data
    config: dict[str, Any]  # of the run, as JSON
    task: str  # name of the task
    settings: dict[str, Any]  # of the task, as JSON
    fingerprint: str  # of the backbone


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and found whole."""

    path: Path  # its folder
    record: Record
    arrays: dict[str, np.ndarray]  # path in the training state, such as "opt_state.1.mu.map" -> on the host


class Checkpoints:
    """The checkpoints of one run's folder, which one process writes at a time, of which the newest `keep` are kept.

    A context: entering it takes the folder, leaving it waits for the last save. `notify` is told what a person should
    know.

    Raises:
      DexError: the folder cannot be written, or another process trains in it (on entering).
    """

    def __init__(self, folder: str | Path, keep: int, notify: Callable[[str], None]):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.notify = notify
        self.saved_step: int | None = None
        self._pending: int | None = None

    def __enter__(self) -> Checkpoints:
        # Directories made in the background would turn a full disk into a wait of many minutes.
        at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.keep, cleanup_tmp_directories=True, async_options=at_once, **_NAMES
        )
        with contextlib.ExitStack() as opened:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock(opened.enter_context((self.folder / "lock").open("w")))
            except BlockingIOError:
                why = f"another process trains in {self.folder}: let it end, or train in another folder"
                raise DexError(why) from None
            except OSError as error:
                raise DexError(f"{self.folder} cannot be written: {error.strerror or error}") from error
            opened.enter_context(_muted())
            self._manager = ocp.CheckpointManager(self.folder, options=options)
            opened.callback(self._close)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._opened:
            try:
                self.wait()
            except DexError:
                # What already went wrong is what a person needs to hear.
                if kind is None:
                    raise

    def save(self, state: Any, record: Record) -> Record:
        """Starts a save and returns as soon as the state has been copied; the one before is waited for.

        The state, a pytree of arrays on this process's devices, may be donated right after.

        Returns:
          The record as it will be read back: a run that goes on with its cursor is in the state of one that resumes.

        Raises:
          DexError: the disk is full, or cannot be written to for another reason.
        """
        self.wait()
        # Orbax takes no arrays without elements, and there is nothing to keep of them.
        leaves = jax.tree_util.tree_leaves_with_path(state)
        arrays = {_name(path): np.array(value) for path, value in leaves if value.size}
        text = json.dumps(dataclasses.asdict(record))
        about = {"record": text, "checksum": checksum(text, arrays)}
        try:
            kept = ocp.args.Composite(state=ocp.args.StandardSave(arrays))
            self._manager.save(record.step, args=kept, custom_metadata=about, force=True)
        except Exception as error:
            raise self._failure(record.step, error) from error
        self._pending = record.step
        return Record(**json.loads(text))

    def wait(self) -> None:
        """Waits until what `save` started is on disk and orbax has deleted old checkpoints. DexError: as `save`."""
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(step, error) from error
        self.saved_step = step

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole, or None; damaged ones on the way are renamed and told of."""
        found, damaged = _newest(self.folder, self.notify)
        for path in damaged:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        self._manager.reload()
        self.saved_step = None if found is None else found.record.step
        return found

    def _close(self) -> None:
        with contextlib.suppress(Exception):  # `wait` has told of it
            self._manager.close()

    def _failure(self, step: int, error: Exception) -> DexError:
        for path in self.folder.glob("step_*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)
        full = getattr(error, "errno", None) in _FULL or re.search(
            "No space left|quota exceeded|File too large", str(error), re.IGNORECASE
        )
        whole = list_checkpoints(self.folder)
        kept = f"step {whole[0][0]} is still there" if whole else "there is none before it"
        what = "make room and run the same command again" if full else "run the same command again once that is mended"
        why = "the disk is full" if full else reason(error)
        return DexError(f"the checkpoint of step {step} could not be written to {self.folder} ({why}); {kept}: {what}")


def read_newest(folder: str | Path, notify: Callable[[str], None] = lambda line: None) -> Saved:
    """The newest whole checkpoint of a run, which may be going on: nothing is touched. DexError: there is none."""
    found, _ = _newest(Path(folder).absolute(), notify)
    if found is None:
        raise DexError(f"{folder} holds no whole checkpoint: train there first, or name another folder")
    return found


def read_step(folder: str | Path, step: int) -> Saved:
    """A run's checkpoint after `step` updates, read as by `read_newest`. DexError: there is none, or it is damaged."""
    kept = dict(list_checkpoints(Path(folder).absolute()))
    if step not in kept:
        which = ", ".join(map(str, sorted(kept))) or "none"
        raise DexError(f"{folder} holds no checkpoint of step {step}; those that are kept: {which}")
    with reading(kept[step], "choose another step"):
        return _read(kept[step])


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints of a folder, newest first, whole or damaged."""
    found = ocp.path.step.standard_name_format(**_NAMES).find_all(folder) if folder.is_dir() else ()
    return sorted(((each.step, Path(each.path)) for each in found), reverse=True)


def restore(saved: Saved, state: Any) -> Any:
    """The saved training state, placed as `state` is, none of whose values is used; DexError as `saved_arrays`."""
    # Copies: the update donates what it is given.
    arrays = saved_arrays(saved, state)
    return jax.tree.map(lambda array, leaf: jax.device_put(jnp.array(array), leaf.sharding), arrays, state)


def saved_arrays(saved: Saved, like: Any, prefix: str = "") -> Any:
    """What is saved under names that begin with `prefix` ("params."), as host arrays in the tree of `like`.

    Raises:
      DexError: names, shapes or dtypes are not those of `like`, a pytree of arrays or shapes.
    """

    def pick(path: Any, leaf: Any) -> np.ndarray:
        name = prefix + _name(path)
        found = saved.arrays.get(name) if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise DexError(
                f"{saved.path} holds {name} as {_shape(found)}, but this run means {_shape(leaf)}: it was trained with "
                "other settings, so name another folder"
            )
        return found

    return jax.tree_util.tree_map_with_path(pick, like)


def checksum(text: str, arrays: dict[str, np.ndarray]) -> int:
    """CRC-32 of a text and of all bytes of arrays in row-major order, by name."""
    found = zlib.crc32(text.encode())
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data, found)
    return found


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _shape(array: Any) -> str:
    return "nothing" if array is None else f"{array.dtype}{[*array.shape]}"


def _newest(folder: Path, notify: Callable[[str], None]) -> tuple[Saved | None, list[Path]]:
    damaged: list[Path] = []
    for _, path in list_checkpoints(folder):
        try:
            return _read(path), damaged
        except MemoryError:
            raise
        except Exception as error:
            notify(f"warning: {path} is damaged and is passed over ({reason(error)})")
            damaged.append(path)
    return None, damaged


def _read(path: Path) -> Saved:
    step = int(path.name.removeprefix("step_"))
    with _muted():
        manager = ocp.CheckpointManager(path.parent, options=ocp.CheckpointManagerOptions(read_only=True, **_NAMES))
        about = manager.metadata(step).custom_metadata
        arrays = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    if about["checksum"] != checksum(about["record"], arrays):
        raise ValueError("its bytes have changed since it was written")
    return Saved(path, Record(**json.loads(about["record"])), arrays)


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Orbax logs tracebacks of what becomes one sentence here, and that what is read cannot be written."""
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.getLogger("absl").setLevel(level)
