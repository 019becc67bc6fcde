"""Benchmark tasks: prompts that ask for text, from files or from the Hugging Face hub.

All are generative. A task that one letter answers has no decoding to speed up, so choices are asked for with a reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dex_jax.errors import DexError
from dex_jax.prompt_files import dataset_rows, read_prompts, read_rows
from dex_jax.prompts import Prompt

T = TypeVar("T")

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
SPLITS = ("test", "val", "dev")
"""Of several files the first whose name holds one of these, in this order, is read."""


class Asked(NamedTuple):
    """One prompt of a task."""

    task: str  # its name
    id: str  # of the item in the task
    prompt: Any  # text or messages


@dataclasses.dataclass(frozen=True)
class Task:
    """Where a task's items are and how they are asked."""

    hub: tuple[str, str | None, str] | None  # (name, config, split) for the package `datasets`; None where it has none
    id_field: str | None  # of a row; None numbers the rows
    ask: Callable[[dict[str, Any], str], Prompt]  # (row, where it stands) -> the prompt


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A text of a row. DexError: there is none."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        held = ", ".join(f'"{key}"' for key in row) or "nothing"
        raise DexError(f'{where} has no text "{name}", only {held}: is it a file of this task?')
    return value


def _field(name: str, before: str = "") -> Callable[[dict[str, Any], str], Prompt]:
    return lambda row, where: before + text_field(row, name, where)


def _first_turn(row: dict[str, Any], where: str) -> Prompt:
    # The hub calls them "prompt", the files of FastChat "turns".
    turns = row.get("turns", row.get("prompt"))
    if not isinstance(turns, list) or not turns:
        raise DexError(f'{where} has no "turns", a list of what is asked in turn: is it a file of this task?')
    return text_field({"turns": turns[0]}, "turns", where)


def _choice(question: str, options: str, asked: str) -> Callable[[dict[str, Any], str], Prompt]:
    """Options are lettered, and a reason is asked for."""

    def ask(row: dict[str, Any], where: str) -> Prompt:
        given = row.get(options)
        if not isinstance(given, list) or len(given) < 2 or not all(isinstance(each, str) for each in given):
            raise DexError(f'{where}: "{options}" is no list of at least two texts: mend or remove the item')
        lettered = "\n".join(f"{chr(ord('A') + number)}. {option}" for number, option in enumerate(given))
        text = text_field(row, question, where)
        return f"{text}\n\n{asked}\n{lettered}\n\nName the letter and explain your choice."

    return ask


TASKS: dict[str, Task] = {
    "gsm8k": Task(("openai/gsm8k", "main", "test"), None, _field("question")),
    "humaneval": Task(("openai/openai_humaneval", None, "test"), "task_id", _field("prompt")),
    "spec_bench": Task(None, "question_id", _first_turn),
    "mt_bench": Task(("HuggingFaceH4/mt_bench_prompts", None, "train"), "question_id", _first_turn),
    "xsum": Task(
        ("EdinburghNLP/xsum", None, "test"), "id", _field("document", "Summarise this article in a few sentences.\n\n")
    ),
    "hellaswag": Task(
        ("Rowan/hellaswag", None, "validation"), "ind", _choice("ctx", "endings", "How does this go on?")
    ),
    "mmlu": Task(("cais/mmlu", "all", "dev"), None, _choice("question", "choices", "Which answer is right?")),
}
"""Name -> task. "prompts:FILE" is one too: any file that dex_jax.prompt_files reads."""


def read_task(name: str, data: str | Path | None) -> list[Asked]:
    """All prompts of a task.

    Args:
      name: of TASKS, or "prompts:FILE" for any .txt, .jsonl or .json file of prompts, or "prompts" for that of `data`.
      data: a folder with a folder of each task's name, as gsm8k/train.jsonl; None reads from the hub.

    Raises:
      DexError: an unknown task, no file, a damaged or empty one (by line), or no package `datasets`.
    """
    if name == "prompts" and data is not None:
        name = f"prompts:{data if Path(data).is_file() else task_file(name, data)}"
    if name.startswith("prompts:"):
        file = Path(name.removeprefix("prompts:"))
        called = file.name.split(".")[0]
        return [Asked(called, str(number), prompt) for number, prompt in enumerate(read_prompts(str(file)))]
    if name not in TASKS:
        raise DexError(f"unknown task {name!r}: choose among {', '.join(TASKS)} and prompts:FILE")
    task = TASKS[name]
    found: dict[str, Asked] = {}
    for number, (row, where) in enumerate(rows_of(name, data)):
        asked = _asked(name, task, row, number, where)
        if asked.id in found:
            raise DexError(f"{where}: another item has the same id, {asked.id}: give each its own")
        found[asked.id] = asked
    if not found:
        raise DexError(f"{name if data is None else task_file(name, data)} is empty: give it at least one item")
    return list(found.values())


def rows_of(name: str, data: str | Path | None) -> Iterator[tuple[Any, str]]:
    """(row, where it stands) of each row of a task of TASKS, from a folder of data or the hub."""
    hub = TASKS[name].hub
    if data is None and hub is None:
        raise DexError(f"task {name} is not on the hub in one known form: give --data DIR with {name}/*.jsonl")
    return dataset_rows(*hub) if data is None and hub is not None else read_rows(str(task_file(name, data or "")))


def _asked(name: str, task: Task, row: Any, number: int, where: str) -> Asked:
    if not isinstance(row, dict):
        raise DexError(f"{where} is {type(row).__name__}, not an item: make it an object with named fields")
    given = None if task.id_field is None else row.get(task.id_field)
    return Asked(name, str(number if given is None else given), task.ask(row, where))


def task_file(name: str, data: str | Path) -> Path:
    """The file of a task in a folder of data: in a folder of its name, or NAME.jsonl itself.

    Raises:
      DexError: there is none.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise DexError(f"there is no folder of data {folder}: check --data")
    beside = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    inside = sorted((folder / name).iterdir()) if (folder / name).is_dir() else []
    files = [file for file in (*inside, *beside) if file.name.endswith(SUFFIXES) and file.is_file()]
    if not files:
        raise DexError(
            f"{folder} has no file of task {name}: put one into {folder / name} (.jsonl or .json, gzipped or not)"
        )
    return min(files, key=lambda file: next((at for at, split in enumerate(SPLITS) if split in file.name), len(SPLITS)))


def spread(count: int, wanted: int, taken: Sequence[int] = ()) -> list[int]:
    """`wanted` indices evenly spread over 0 .. count - 1, those in `taken` left out; fewer if there are fewer.

    They begin a quarter of a step in: what one explorer's trees were fitted on begins at 0,
    and is to be no part of what is reported.

    Examples:
      >>> spread(10, 3), spread(10, 2, taken=(0, 3, 6))
      ([0, 4, 7], [1, 7])
    """
    gone = set(taken)
    free = [index for index in range(count) if index not in gone]
    wanted = min(wanted, len(free))
    return [free[(4 * at + 1) * len(free) // (4 * wanted)] for at in range(wanted)]


def choose(count: int, wanted: dict[str, int], make: Callable[[int], T | None]) -> tuple[dict[str, dict[int, T]], int]:
    """(split -> index -> what `make` gives for it, as many as wanted or fewer; for how many it gave None).

    Indices are evenly spread over 0 .. count - 1, and so are those that stand in for others; none is in two splits.
    """
    taken: list[int] = []
    chosen: dict[str, dict[int, T]] = {split: {} for split in wanted}
    for split, own in chosen.items():
        while fresh := spread(count, wanted[split] - len(own), taken):
            taken += fresh
            own |= {at: made for at in fresh if (made := make(at)) is not None}
    return chosen, len(taken) - sum(map(len, chosen.values()))
