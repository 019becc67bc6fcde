"""The benchmark's tasks: rows of files and of the hub become prompts, and which of them are drawn."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from dex_jax.errors import DexError
from studies.bench.tasks import TASKS, read_task, spread

ROWS = {
    "gsm8k": {"question": "2 + 2?", "answer": "#### 4"},
    "humaneval": {"task_id": "HumanEval/9", "prompt": "def f():"},
    "spec_bench": {"question_id": 7, "turns": ["first", "second"]},
    "mt_bench": {"question_id": 81, "prompt": ["first", "second"]},
    "xsum": {"id": "x1", "document": "A long article.", "summary": "Short."},
    "hellaswag": {"ind": 4, "activity_label": "Tea", "ctx": "She pours", "endings": ["tea.", "sand."], "label": 0},
    "mmlu": {"subject": "law", "idx": 3, "question": "Which?", "choices": ["this", "that"], "answer": 1},
}
EXPLAIN = "\n\nName the letter and explain your choice."
ASKED = {
    "gsm8k": ("0", "2 + 2?"),
    "humaneval": ("HumanEval/9", "def f():"),
    "spec_bench": ("7", "first"),
    "mt_bench": ("81", "first"),
    "xsum": ("x1", "Summarise this article in a few sentences.\n\nA long article."),
    "hellaswag": ("4", f"She pours\n\nHow does this go on?\nA. tea.\nB. sand.{EXPLAIN}"),
    "mmlu": ("0", f"Which?\n\nWhich answer is right?\nA. this\nB. that{EXPLAIN}"),
}


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


@pytest.mark.parametrize("task", TASKS)
def test_a_row_of_a_file_becomes_a_prompt(task, tmp_path) -> None:
    write(tmp_path, f"{task}/rows.jsonl.gz", json.dumps(ROWS[task]) + "\n")
    (asked,) = read_task(task, tmp_path)
    assert (asked.task, asked.id, asked.prompt) == (task, *ASKED[task])


@pytest.mark.parametrize("task", [task for task, about in TASKS.items() if about.hub is not None])
def test_a_row_of_the_hub_becomes_the_same_prompt(task, monkeypatch) -> None:
    loaded = []

    def load_dataset(name, config, split):
        loaded.append((name, config, split))
        return [ROWS[task]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (asked,) = read_task(task, None)
    assert (asked.id, asked.prompt) == ASKED[task]
    assert loaded == [TASKS[task].hub]


def test_what_the_hub_cannot_give_is_told(monkeypatch) -> None:
    with pytest.raises(DexError, match="spec_bench is not on the hub in one known form: give --data"):
        read_task("spec_bench", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DexError, match=r"needs the package datasets: pip install datasets"):
        read_task("gsm8k", None)

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DexError, match=r"datasets cannot load openai/gsm8k .*no network; give a file"):
        read_task("gsm8k", None)


@pytest.mark.parametrize(
    ("task", "lines", "says"),
    [
        ("gsm8k", '{"question": "a"}\n{"answer": "4"}\n', 'line 2 of .*rows.jsonl has no text "question"'),
        ("gsm8k", '{"question": "a"}\n\n{"question": \n', "line 3 of .*rows.jsonl is no JSON"),
        ("gsm8k", "", "rows.jsonl is empty"),
        ("humaneval", '{"task_id": "a", "prompt": "x"}\n' * 2, "line 2 of .*: another item has the same id, a"),
        ("spec_bench", '{"question_id": 1, "turns": []}\n', 'line 1 of .* has no "turns"'),
        ("mmlu", '{"subject": "a", "question": "b", "choices": ["c"], "answer": 0}\n', 'line 1 of .*"choices"'),
    ],
)
def test_damaged_files_are_told_by_line(task, lines, says, tmp_path) -> None:
    write(tmp_path, f"{task}/rows.jsonl", lines)
    with pytest.raises(DexError, match=says):
        read_task(task, tmp_path)


def test_any_file_of_prompts_is_a_task(tmp_path) -> None:
    file = write(tmp_path, "mine.txt", "One?\n\nTwo?\n")
    assert read_task(f"prompts:{file}", None) == [("mine", "0", "One?"), ("mine", "1", "Two?")]
    assert read_task("prompts", file) == read_task(f"prompts:{file}", None)
    write(tmp_path, "prompts/own.jsonl", json.dumps({"prompt": "Three?"}) + "\n")
    assert read_task("prompts", tmp_path) == [("own", "0", "Three?")]
    with pytest.raises(DexError, match="cannot be read"):
        read_task(f"prompts:{tmp_path / 'other.txt'}", None)


def test_prompts_are_evenly_spread() -> None:
    assert spread(100, 4) == [6, 31, 56, 81]
    assert spread(3, 5) == [0, 1, 2]
    assert set(spread(100, 4)).isdisjoint(spread(100, 50, taken=spread(100, 4)))
    assert spread(4, 2, taken=range(4)) == []
