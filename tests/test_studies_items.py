"""Items of multiple-choice tasks: what is read from their files, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dex_jax.errors import DexError
from dex_jax.prompt_files import read_rows
from studies.bench.tasks import rows_of
from studies.templates.items import read_items

DATA = Path(__file__).parents[2] / "shared" / "data"
HELLASWAG = {
    "ind": 7,
    "activity_label": "Rowing",
    "ctx": "Two people row. they",
    "endings": ["sink", "win"],
    "label": 1,
}
MMLU = {"subject": "logic", "idx": 3, "question": "What follows?", "choices": ["A", "B", "C", "D"], "answer": 2}
ROWS = {"hellaswag": HELLASWAG, "mmlu": MMLU}


def written(path: Path, *rows) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def items_in(task: str, file: Path):
    return read_items(task, read_rows(str(file)))


def test_every_field_is_read(tmp_path):
    (item,) = items_in("hellaswag", written(tmp_path / "a.jsonl", HELLASWAG))
    assert (item.id, item.subject, item.question) == ("hellaswag-7", "Rowing", "Two people row. they")
    assert (item.options, item.answer, item.chance) == (("sink", "win"), 1, 0.5)
    (item,) = items_in("mmlu", written(tmp_path / "b.jsonl", MMLU))
    assert (item.id, item.question, item.answer, item.chance) == ("mmlu-logic-3", "What follows?", 2, 0.25)
    (item,) = items_in("hellaswag", written(tmp_path / "c.jsonl", HELLASWAG | {"label": "0"}))
    assert item.answer == 0


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
def test_the_shared_files_are_read(task):
    items = read_items(task, rows_of(task, DATA))
    assert len(items) > 200
    assert len({item.id for item in items}) == len(items)


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("hellaswag", {"endings": None}, "endings"),
        ("hellaswag", {"endings": ["one"]}, "endings"),
        ("hellaswag", {"label": 2}, "2 of 2 options"),
        ("mmlu", {"answer": "C"}, "answer"),
        ("mmlu", {"answer": -1}, "-1 of 4 options"),
        ("mmlu", {"question": " "}, "question"),
    ],
)
def test_bad_items_are_named_by_file_and_line(tmp_path, task, change, said):
    with pytest.raises(DexError, match=rf"line 2 of .*bad\.jsonl.*{said}"):
        items_in(task, written(tmp_path / "bad.jsonl", ROWS[task], ROWS[task] | change))


@pytest.mark.parametrize("task", ROWS)
def test_missing_fields_are_named(tmp_path, task):
    for name in set(ROWS[task]) - {"ind", "idx", "activity_label"}:
        row = {key: value for key, value in ROWS[task].items() if key != name}
        with pytest.raises(DexError, match=f"line 1 of .*{name}"):
            items_in(task, written(tmp_path / "bad.jsonl", row))


def test_bad_files(tmp_path):
    with pytest.raises(DexError, match="unknown task 'chess'"):
        read_items("chess", [])
    with pytest.raises(DexError, match="is empty"):
        items_in("mmlu", written(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DexError, match=r"line 1 of .* is no JSON"):
        items_in("mmlu", written(tmp_path / "broken.jsonl", "{"))
    with pytest.raises(DexError, match="no item"):
        items_in("mmlu", written(tmp_path / "list.jsonl", "[1]"))
    with pytest.raises(DexError, match=r"line 2 of .* is another item with the id mmlu-logic-3"):
        items_in("mmlu", written(tmp_path / "twice.jsonl", MMLU, MMLU))
