"""Items with a known answer, as their data sets publish them: hellaswag and mmlu (choices), gsm8k (a number).

An item keeps question, options and answer apart, so that a prompt template can put them together in its own way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dex_jax.errors import DexError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a task.

    Attributes:
      task: "hellaswag", "mmlu" or "gsm8k".
      id: distinguishes the item from all others of its file.
      subject: what it is about: hellaswag's activity, mmlu's subject; "" where there is none.
      question: the text to continue, or the question.
      options: the choices in their order; none for a task that is answered by a number.
      answer: index of the right option; None without options.
      number: the right number; None for a task with options.
      row: all fields of the item as the file holds them.
    """

    task: str
    id: str
    subject: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    number: float | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def chance(self) -> float:
        """Accuracy of guessing: 0 without options."""
        return 1 / len(self.options) if self.options else 0.0


def read_items(task: str, rows: Iterable[tuple[Any, str]]) -> list[Item]:
    """The items of a task.

    Args:
      task: hellaswag, mmlu or gsm8k.
      rows: (row, where it stands) of each, as files and the hub hold them.

    Raises:
      DexError: an unknown task, no items, two of one id, or one that lacks something; says where.
    """
    if task not in READERS:
        raise DexError(f"unknown task {task!r}: choose one of {', '.join(READERS)}")
    found: dict[str, Item] = {}
    for number, (row, where) in enumerate(rows):
        item = item_of(task, row, number, where)
        if item.id in found:
            raise DexError(f"{where} is another item with the id {item.id}: give each its own")
        found[item.id] = item
    if not found:
        raise DexError(f"the data of task {task} is empty: give it at least one item")
    return list(found.values())


def item_of(task: str, row: Any, number: int, where: str) -> Item:
    """The item of one row, the `number`-th from 0, as files and the hub hold it; `where` it stands is for the error.

    Raises:
      DexError: something is missing or of another kind.
    """
    return READERS[task](_Row(row, where), number)


def number_in(text: str) -> float | None:
    """The last number of a text, None if there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


class _Row:
    """One row of a file, whose fields are checked as they are read."""

    def __init__(self, row: Any, where: str):
        if not isinstance(row, dict):
            raise DexError(f"{where} is {type(row).__name__}, not an item: make it an object with named fields")
        self.row, self.where = row, where

    def text(self, name: str) -> str:
        value = self._field(name)
        if not isinstance(value, str) or not value.strip():
            raise DexError(f'{self.where}: "{name}" is {value!r}, not a text: mend or remove the item')
        return value

    def options(self, name: str) -> tuple[str, ...]:
        value = self._field(name)
        if not isinstance(value, list) or len(value) < 2 or not all(isinstance(x, str) and x.strip() for x in value):
            raise DexError(f'{self.where}: "{name}" is no list of at least two texts: mend or remove the item')
        return tuple(value)

    def index(self, name: str, count: int) -> int:
        value = self._field(name)
        # hellaswag is also published with its label as a text.
        given = int(value) if isinstance(value, str) and value.isdigit() else value
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given < count:
            raise DexError(f'{self.where}: "{name}" is {value!r}, not an option from 0 to {count - 1}')
        return given

    def _field(self, name: str) -> Any:
        if name not in self.row:
            held = ", ".join(f'"{key}"' for key in self.row) or "nothing"
            raise DexError(f'{self.where} has no "{name}", only {held}: is it a file of this task?')
        return self.row[name]


def _hellaswag(row: _Row, number: int) -> Item:
    options = row.options("endings")
    # `ind` is the row of the original file.
    name = row.row.get("ind", number)
    subject = row.row.get("activity_label")
    answer = row.index("label", len(options))
    return Item(
        "hellaswag",
        f"hellaswag-{name}",
        subject if isinstance(subject, str) else "",
        row.text("ctx"),
        options,
        answer,
        row=row.row,
    )


def _mmlu(row: _Row, number: int) -> Item:
    options, subject = row.options("choices"), row.text("subject")
    name = f"mmlu-{subject}-{row.row.get('idx', number)}"
    return Item("mmlu", name, subject, row.text("question"), options, row.index("answer", len(options)), row=row.row)


def _gsm8k(row: _Row, number: int) -> Item:
    _, mark, end = row.text("answer").rpartition("####")
    value = number_in(end) if mark else None
    if value is None:
        raise DexError(f'{row.where}: "answer" does not end with #### and a number: mend or remove the item')
    return Item("gsm8k", f"gsm8k-{number}", "", row.text("question"), (), None, value, row=row.row)


READERS: dict[str, Callable[[_Row, int], Item]] = {"hellaswag": _hellaswag, "mmlu": _mmlu, "gsm8k": _gsm8k}
"""Task -> (row, number of the row from 0) -> item."""
