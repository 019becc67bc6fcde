"""results.jsonl: one line a run, the one schema of everything that the benchmark and the template study measure.

A folder of results holds study.json, the settings that all of its lines share, and results.jsonl. Everything that a
report says is computed from these two.

Three kinds of figures are never mixed: depth-side ones (`layer_steps`, `ticks`), work (`work`) and wall-clock
(`seconds`). A line of kind "depth" has counts and no seconds: it may come from a batch, from teacher forcing or from a
busy machine. A line of kind "wall" was run alone, one sequence at a time; its counts are there to explain its seconds.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dex_jax.decoding.output import Output
from dex_jax.errors import DexError
from dex_jax.evaluation.check import Check
from dex_jax.selfcheck import CLOSE
from dex_jax.training.journal import plain

FILE_NAME = "results.jsonl"
STUDY_NAME = "study.json"
KINDS = ("depth", "wall")
SPLITS = ("report", "tune")
COUNTED = ("loop", "forced")

COSTS = {"depth": "layer_steps", "work": "work", "wall": "seconds"}
"""Kind of figure -> the field that holds it."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of one method on one prompt.

    Attributes:
      kind: "depth" or "wall".
      method: as on the command line: "ar", "dex", "dex_serial", "layerskip", "adadecode", "del", "oracle", ...
      task: name of the task.
      prompt_id: of the item within the task, the same in every template.
      model: as `dex_jax.load` was given it.
      tokens: ids of the new tokens, an ending EOS included. The only thing that tokens are ever counted from.
      prompt_tokens: length of the prompt.
      setting: fields of the method that are not its defaults, {"exit": 12, "draft_length": 4}.
      exits: as of Stats.exits, -1 for token 0; None where the method has none (AR).
      exits_source: "shared", "default", a path; None where nothing drafts.
      depths: exit depths x_1 .. x_K = L.
      rows: rows a stage, or of a chain.
      template: name of the prompt template; "default" where there is only one.
      split: "report", or "tune" for prompts on which settings are chosen and nothing is reported.
      counted: "loop", or "forced" where exits and ticks were teacher-forced instead of run.
      round: number of the repetition, from 0; even rounds run the methods in their order, odd ones backwards.
      batch: how many sequences ran together.
      layer_steps: layers run one after the other since the prefill, as of Stats; of "oracle", a bound.
      ticks: loop steps of stages side by side; None for other methods.
      rounds: verifications in serial rounds and on chains; None for other methods.
      drafted, accepted: tokens that exits drafted on chains, and those that were kept; None otherwise.
      work: layer x row evaluations since the prefill, see `work_of`; None where they are not counted.
      seconds: wall-clock of decoding, prefill and compilation apart; None in kind "depth".
      prefill_seconds, compile_seconds: apart from it and from one another; None in kind "depth".
      match: whether the tokens are AR's on the same prompt; None before anything was compared.
      first_divergence: index of the first new token that is not AR's; None for none.
      margin: AR's top-2 margin there over max |logit|, after noise; None for none.
      tie: whether rounding alone may decide there, by `selfcheck.CLOSE` of the dtype; None for none.
      repeated: share of the answer's 4-grams of tokens that occurred before in it; None below 4 tokens.
      parsed, correct: whether an answer could be read from the text, and was right; None where nothing is graded.
      chance: how often guessing is right; None where nothing is graded.
      temperature, seed: of sampling; 0.0 and None for greedy.
      max_new_tokens: the limit.
      device, dtype: where and in what it ran.
      versions: of dex_jax, jax and python.
    """

    kind: str
    method: str
    task: str
    prompt_id: str
    model: str
    tokens: list[int]
    prompt_tokens: int
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    exits: list[int] | None = None
    exits_source: str | None = None
    depths: list[int] | None = None
    rows: int | None = None
    template: str = "default"
    split: str = "report"
    counted: str = "loop"
    round: int = 0
    batch: int = 1
    layer_steps: int | None = None
    ticks: int | None = None
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    work: int | None = None
    seconds: float | None = None
    prefill_seconds: float | None = None
    compile_seconds: float | None = None
    match: bool | None = None
    first_divergence: int | None = None
    margin: float | None = None
    tie: bool | None = None
    repeated: float | None = None
    parsed: bool | None = None
    correct: bool | None = None
    chance: float | None = None
    temperature: float = 0.0
    seed: int | None = None
    max_new_tokens: int = 0
    device: str = ""
    dtype: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        """n."""
        return len(self.tokens)

    @property
    def name(self) -> str:
        """Method and setting in words: "layerskip exit=12 draft_length=4"."""
        return " ".join([self.method, *(f"{name}={value}" for name, value in sorted(self.setting.items()))])

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells a run from all others of its study; a run whose key is there needs not be made again."""
        return run_key(**{name: getattr(self, name) for name in KEY})

    def cost(self, kind: str) -> float | None:
        """The figure of a kind: "depth", "work" or "wall"; None where the run has none of that kind."""
        if kind == "wall" and self.kind != "wall":
            return None
        value = getattr(self, COSTS[kind])
        return None if value is None else float(value)


KEY = ("kind", "split", "task", "template", "prompt_id", "method", "setting", "counted", "round", "dtype", "seed")
FIELDS = {field.name: field for field in dataclasses.fields(Run)}
TYPES = typing.get_type_hints(Run)


def run_key(
    kind: str,
    method: str,
    task: str,
    prompt_id: str,
    setting: dict[str, Any],
    template: str = "default",
    split: str = "report",
    counted: str = "loop",
    round: int = 0,
    dtype: str = "",
    seed: int | None = None,
) -> tuple[Any, ...]:
    """The key of a run that is still to be made; see `Run.key`."""
    flat = json.dumps(plain(setting), sort_keys=True)
    return kind, split, task, template, prompt_id, method, flat, counted, round, dtype, seed


def versions() -> dict[str, str]:
    """Of what a figure depends on."""
    found = {name: importlib.metadata.version(name) for name in ("dex-jax", "jax", "flax")}
    return found | {"python": platform.python_version()}


def run_of(output: Output, row: int, *, kind: str, seconds_of_batch: bool = False, **given: Any) -> Run:
    """The line of one sequence of an Output.

    Args:
      output: from `generate`.
      row: of the sequence.
      kind: "depth", which keeps counts alone, or "wall".
      seconds_of_batch: allows kind "wall" for more than one sequence at a time: seconds are then of all of them.
      **given: the other fields of Run that an Output does not know: method, task, prompt_id, model, setting, ..

    Raises:
      DexError: kind "wall" of a batch.
    """
    stats, length, batch = output.stats, int(output.lengths[row]), len(output.lengths)
    if kind == "wall" and batch > 1 and not seconds_of_batch:
        raise DexError(f"seconds of {batch} sequences at once are nobody's: time them one at a time")

    def at(name: str) -> int | None:
        figures = getattr(stats, name)
        return None if figures is None else int(figures[row])

    tokens = output.tokens[row, :length].tolist()
    times = {}
    if kind == "wall":
        times = {
            "seconds": stats.decode_seconds,
            "prefill_seconds": stats.prefill_seconds,
            "compile_seconds": stats.compile_seconds,
        }
    counts = {name: at(name) for name in ("layer_steps", "ticks", "rounds", "drafted", "accepted")}
    schedule = stats.schedule
    fields: dict[str, Any] = {
        "tokens": tokens,
        "prompt_tokens": len(output.prompt_tokens[row]),
        "exits": None if schedule.method == "ar" else stats.exits[row, :length].tolist(),
        "exits_source": stats.exits_source,
        "depths": list(schedule.depths),
        "rows": schedule.rows,
        "batch": batch,
        **counts,
        "work": work_of(schedule, length, counts),
        **times,
        "repeated": repeated(tokens),
        "seed": None if output.seeds is None else output.seeds[row],
        "device": stats.device,
        "dtype": stats.dtype,
        "versions": versions(),
    }
    return Run(kind=kind, **(fields | given))


def compared(run: Run, check: Check) -> Run:
    """A run with what the comparison of its tokens with AR's has shown."""
    margin = check.top2_margin
    # A margin between two -inf is none.
    margin = float(margin) if margin is not None and math.isfinite(margin) else None
    tie = None if check.identical else margin is not None and margin < CLOSE[run.dtype]
    return dataclasses.replace(
        run, match=check.identical, first_divergence=check.first_divergence, margin=margin, tie=tie
    )


def work_of(schedule: Any, length: int, counts: dict[str, int | None]) -> int | None:
    """Layer x row evaluations of a sequence since its prefill, rows that only fill up a shape apart.

    AR runs L layers for each of n - 1 tokens. On a chain every row of a round runs every layer once: L (drafted +
    rounds). In serial rounds a round runs at most all rows of its tree: an upper end where rounds choose how many. Side
    by side every stage has W rows at every tick, live or not, as explorers run whether they have something to run or
    not: W L a tick, which is again an upper end. None for the oracle, which is no decoder.
    """
    last, rounds = schedule.depths[-1], counts.get("rounds")
    if schedule.method == "oracle":
        return None
    if schedule.method == "ar":
        return last * (length - 1)
    if schedule.policy is not None:
        return last * ((counts.get("drafted") or 0) + (rounds or 0))
    if schedule.tree is not None:
        return last * schedule.tree.rows * (rounds or 0)
    return last * schedule.rows * (counts.get("ticks") or 0)


def repeated(tokens: list[int], length: int = 4) -> float | None:
    """Share of `length`-grams that occurred earlier in the same list; None if it has no such gram.

    Example:
      >>> repeated([1, 2, 3, 4, 1, 2, 3, 4])
      0.2
    """
    grams = [tuple(tokens[at : at + length]) for at in range(len(tokens) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


class Results:
    """Appends runs to a folder's results.jsonl, each one safe on disk before the next begins.

    Args:
      folder: is made if it is not there.
      study: settings that all lines share; a folder of another study is refused.

    Attributes:
      runs: all that are there, in the order of the file.

    Raises:
      DexError: a damaged line that is not the last one, another study, or a folder that cannot be written.
    """

    def __init__(self, folder: str | Path, study: dict[str, Any]):
        self.folder = Path(folder)
        self.path = self.folder / FILE_NAME
        try:
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
        self._file.close()


def to_line(run: Run) -> str:
    """A run as one line of JSON: every field, null where it has none."""
    return json.dumps(plain(dataclasses.asdict(run)), allow_nan=False)


def read_results(folder: str | Path) -> list[Run]:
    """All runs of a folder (or of a results.jsonl file), in order; a line cut off by a kill at the end is left out.

    Raises:
      DexError: no such file, nothing in it, or a damaged line, by its number.
    """
    path = Path(folder)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise DexError(f"there is no {path}: give a folder that a benchmark has written")
    runs, _ = _read(path)
    if not runs:
        raise DexError(f"{path} is empty: no run has ended yet")
    return runs


def read_study(folder: str | Path) -> dict[str, Any]:
    """The settings of a folder of results.

    Raises:
      DexError: no such file, or a damaged one.
    """
    path = Path(folder) / STUDY_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DexError(f"there is no {path}: give a folder that a benchmark has written") from error
    except ValueError as error:
        raise DexError(f"{path} is no JSON ({error}): remove the folder and run the benchmark again") from error


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


def _read(path: Path) -> tuple[list[Run], int]:
    """(runs, bytes of whole lines)."""
    data = path.read_bytes()
    lines, end, runs = data.split(b"\n"), 0, []
    for number, line in enumerate(lines[:-1], 1):
        runs.append(from_line(line.decode("utf-8", "replace"), f"line {number} of {path}"))
        end += len(line) + 1
    return runs, end


def from_line(line: str, where: str) -> Run:
    """The run of one line.

    Args:
      line: JSON.
      where: of it, for the error.

    Raises:
      DexError: no JSON, a field that is missing, unknown or of another type.
    """
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise DexError(f"{where} is no JSON ({error}): remove the line and run the benchmark again") from error
    if not isinstance(fields, dict):
        raise DexError(f"{where} is no JSON object: remove the line and run the benchmark again")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise DexError(f'{where} has a field "{unknown[0]}" that the schema does not know: was it written by hand?')
    for name, field in FIELDS.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if name not in fields and no_default:
            raise DexError(f'{where} has no "{name}": remove the line and run the benchmark again')
        if name in fields and not _fits(fields[name], TYPES[name]):
            raise DexError(f'{where}: "{name}" is {fields[name]!r}, and not {FIELDS[name].type}')
    for name, known in (("kind", KINDS), ("split", SPLITS), ("counted", COUNTED)):
        if fields.get(name, known[0]) not in known:
            raise DexError(f'{where}: "{name}" is {fields[name]!r}, and not one of {", ".join(known)}')
    if fields["kind"] == "depth" and fields.get("seconds") is not None:
        raise DexError(f'{where} is of kind "depth" and has seconds: they belong to kind "wall"')
    return Run(**fields)


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if origin is list:
        (part,) = typing.get_args(kind)
        return isinstance(value, list) and all(_fits(item, part) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def reported(runs: Iterable[Run], kind: str) -> list[Run]:
    """Runs that figures of a kind ("depth", "work" or "wall") are made of: split "report", with such a cost."""
    wanted = "wall" if kind == "wall" else "depth"
    return [run for run in runs if run.split == "report" and run.kind == wanted and run.cost(kind) is not None]
