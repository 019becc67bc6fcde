"""results.jsonl: one line a run, the one schema of everything that the benchmark and the template study measure.

A folder of results holds study.json, the settings that all of its lines share, and results.jsonl. Everything that a
report says is computed from these two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading, typed
from dex_jax.io.exits_file import TrainedExits
from dex_jax.io.whole_files import plain
from dex_jax.language_model import LanguageModel
from dex_jax.progress import Display
from studies.bench.runs import Run

FILE_NAME = "results.jsonl"
STUDY_NAME = "study.json"
FIELDS = {field.name for field in dataclasses.fields(Run)}


class Results:
    """Appends runs to a folder's results.jsonl, each one safe on disk before the next begins.

    Args:
      folder: is made if it is not there.
      study: settings that all lines share; a folder of another study is refused.

    Attributes:
      runs: all that are there, in the order of the file.

    Raises:
      DexError: a damaged line that is not the last one, another study, runs that are packed, or a folder that cannot be
        written.
    """

    def __init__(self, folder: str | Path, study: dict[str, Any]):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        try:
            packed = _packed(self.path)
            if packed.exists() and not self.path.exists():
                raise DexError(f"{packed} holds the runs there are: unpack it (gunzip) to add to them")
            self.folder.mkdir(parents=True, exist_ok=True)
            _begin_study(self.folder / STUDY_NAME, plain(study))
            self.runs, end = _read(self.path) if self.path.exists() else ([], 0)
            self._file = self.path.open("a+b")
            self._file.truncate(end)
        except OSError as error:
            raise DexError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        self.done = {run.key for run in self.runs}

    def add(self, run: Run) -> None:
        """Appends a run and waits until it is on disk; one whose key is there already is left out.

        Raises:
          DexError: writing fails.
        """
        if run.key in self.done:
            return
        try:
            self._file.write((to_line(run) + "\n").encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DexError(
                f"{self.path} cannot be written: {error.strerror or error}; make room and run the same command again"
            ) from error
        self.runs.append(run)
        self.done.add(run.key)

    def close(self) -> None:
        """Ends writing."""
        with contextlib.suppress(OSError):  # what could not be written is in the file's buffer, and `add` has said so
            self._file.close()


@contextlib.contextmanager
def writing(folder: str | Path, study: dict[str, Any]) -> Iterator[tuple[Results, Display]]:
    """The results of a study while it runs, and what shows how far it has come."""
    results, display = Results(folder, study), Display()
    try:
        yield results, display
    finally:
        display.close()
        results.close()


def about_model(lm: LanguageModel, prompts: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """What a study says of its model, and a digest of its prompts."""
    return {
        "fingerprint": lm.fingerprint,
        "layers": lm.config.num_layers,
        "dtype": str(lm.dtype),
        "prompt_digest": hashlib.sha256(repr(prompts).encode()).hexdigest()[:16],
    }


def about_exits(exits: TrainedExits | None) -> dict[str, Any]:
    """What a study says of the exits in use: a digest, and the sources of their training data as folder/file."""
    if exits is None:
        return {"digest": None, "trained_on": []}
    data = [str(source).rpartition("=")[0] or str(source) for source in exits.metadata.get("data", [])]
    return {"digest": exits.digest, "trained_on": ["/".join(source.split("/")[-2:]) for source in data]}


def seen_in_training(study: dict[str, Any]) -> str:
    """A sentence on the tasks of a study whose data its exits were trained on, empty for none."""
    sources = [
        source for used in ("exits_used", "drafter_used") for source in study.get(used, {}).get("trained_on", ())
    ]
    folders = {source.split("/")[0] for source in sources if "/" in source}
    seen = [task for task in study.get("tasks", []) if task in folders]
    if not seen:
        return ""
    return (
        f"Exits or drafter were trained on answers to {', '.join(dict.fromkeys(sources))}: on {' and '.join(seen)} "
        "they may know the very prompts, which flatters every method that uses them over AR."
    )


def to_line(run: Run) -> str:
    """A run as one line of JSON: every field, null where it has none."""
    return json.dumps(plain(dataclasses.asdict(run)), allow_nan=False)


def read_results(folder: str | Path) -> list[Run]:
    """All runs of a folder (or of a results.jsonl file), in order; a line cut off by a kill at the end is left out.

    A results.jsonl.gz, as a finished study may be kept, is read as well.

    Raises:
      DexError: no such file, nothing in it, or a damaged line, by its number.
    """
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    packed = _packed(path)
    path = packed if packed.exists() and not path.exists() else path
    if not path.exists():
        raise DexError(f"there is no {path}: give a folder that a benchmark has written")
    runs, _ = _read(path)
    if not runs:
        raise DexError(f"{path} is empty: no run has ended yet")
    return runs


def read_study(folder: str | Path) -> dict[str, Any]:
    """The settings of a folder of results. DexError: no such file, or a damaged one."""
    path = Path(folder) / STUDY_NAME
    if not path.is_file():
        raise DexError(f"there is no {path}: give a folder that a benchmark has written")
    with reading(path, "remove the folder and run the benchmark again"):
        return parsed(path.read_bytes(), dict[str, Any], path, "remove the folder and run the benchmark again")


def _begin_study(path: Path, study: dict[str, Any]) -> None:
    if not path.exists():
        path.write_text(json.dumps(study, indent=1) + "\n", encoding="utf-8")
        return
    old = read_study(path.parent)
    changed = sorted(name for name in {*old, *study} if old.get(name) != study.get(name))
    if changed:
        name = changed[0]
        raise DexError(
            f"{path.parent} holds results of another study ({name} was {old.get(name)!r}, now {study.get(name)!r}): "
            "give another --output, or remove the folder"
        )


def _packed(path: Path) -> Path:
    return path.with_name(path.name + ".gz")


def _read(path: Path) -> tuple[list[Run], int]:
    """(runs, bytes of whole lines)."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DexError(f"{path} is no whole gzip file ({error}): pack results.jsonl again") from error
    lines, end, runs = data.split(b"\n"), 0, []
    for number, line in enumerate(lines[:-1], 1):
        runs.append(from_line(line.decode("utf-8", "replace"), f"line {number} of {path}"))
        end += len(line) + 1
    return runs, end


def from_line(line: str, where: str) -> Run:
    """The run of one line of JSON; `where` it stands is for the error.

    Raises:
      DexError: no JSON, a field that is missing, unknown or of another type.
    """
    advice = "remove the line and run the benchmark again"
    fields = parsed(line, dict[str, Any], where, advice)
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise DexError(f'{where} has a field "{unknown[0]}" that the schema does not know: was it written by hand?')
    return typed(fields, Run, where, advice)
