"""Items of multiple choice with a known answer, as their data sets publish them: hellaswag and mmlu.

An item keeps question, options and answer apart, so that a prompt template can put them together in its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec

from dex_jax.errors import DexError


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a task.

    Attributes:
      task: "hellaswag" or "mmlu".
      id: distinguishes the item from all others of its file.
      subject: what it is about: hellaswag's activity, mmlu's subject; "" where there is none.
      question: the text to continue, or the question.
      options: the choices in their order.
      answer: index of the right one.
      row: all fields of the item as the file holds them.
    """

    task: str
    id: str
    subject: str
    question: str
    options: tuple[str, ...]
    answer: int
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return 1 / len(self.options)


Text = Annotated[str, msgspec.Meta(pattern=r"\S")]
Options = Annotated[tuple[Text, ...], msgspec.Meta(min_length=2)]


class _Hellaswag(msgspec.Struct):
    ctx: Text
    endings: Options
    label: int  # also published as a text
    activity_label: str | None = None
    ind: int | None = None  # the row of the original file

    def item(self, number: int, row: Any) -> Item:
        name = f"hellaswag-{number if self.ind is None else self.ind}"
        return Item("hellaswag", name, self.activity_label or "", self.ctx, self.endings, self.label, row)


class _Mmlu(msgspec.Struct):
    subject: Text
    question: Text
    choices: Options
    answer: int
    idx: int | None = None

    def item(self, number: int, row: Any) -> Item:
        name = f"mmlu-{self.subject}-{number if self.idx is None else self.idx}"
        return Item("mmlu", name, self.subject, self.question, self.choices, self.answer, row)


ROWS: dict[str, type[_Hellaswag | _Mmlu]] = {"hellaswag": _Hellaswag, "mmlu": _Mmlu}


def read_items(task: str, rows: Iterable[tuple[Any, str]]) -> list[Item]:
    """The items of a task, hellaswag or mmlu, from (row, where it stands) of each, as files and the hub hold them.

    Raises:
      DexError: an unknown task, no items, two of one id, or one that lacks something; says where.
    """
    if task not in ROWS:
        raise DexError(f"unknown task {task!r}: choose one of {', '.join(ROWS)}")
    found: dict[str, Item] = {}
    for number, (row, where) in enumerate(rows):
        try:
            item = msgspec.convert(row, ROWS[task], strict=False).item(number, row)
        except msgspec.ValidationError as error:
            raise DexError(f"{where} is no item of {task}: {error}") from error
        if not 0 <= item.answer < len(item.options):
            raise DexError(f"{where} is no item of {task}: its answer is {item.answer} of {len(item.options)} options")
        if item.id in found:
            raise DexError(f"{where} is another item with the id {item.id}: give each its own")
        found[item.id] = item
    if not found:
        raise DexError(f"the data of task {task} is empty: give it at least one item")
    return list(found.values())
