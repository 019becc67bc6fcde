"""Prompts and texts as files, data sets and the standard library hold them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dex_jax import prompt_files
from dex_jax.errors import DexError
from dex_jax.prompt_files import parse_dataset, prompt_of, read_prompts, read_texts, standard_library_prompts

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="needs the prompts in ../shared/data, which are not committed"
)


def write(path: Path, rows) -> str:
    path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("plain", "plain"),
        ({"prompt": "def f():", "text": "not this"}, "def f():"),
        ({"prompt": [USER, ASSISTANT]}, [USER]),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT, ASSISTANT]}, [USER, ASSISTANT, USER]),
        ({"turns": ["first", "second"], "category": "qa"}, "first"),
        ({"instruction": "Sum up.", "input": "Long text", "output": "Text"}, "Sum up.\n\nLong text"),
        ({"instruction": "Tell a joke.", "input": "  "}, "Tell a joke."),
        ({"instruction": "Relate.", "instances": [{"input": "day : night", "output": "o"}]}, "Relate.\n\nday : night"),
        ({"instruction": "Relate.", "instances": []}, "Relate."),
        ({"question": "2 + 2?", "answer": "4"}, "2 + 2?"),
        ({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}, "2 + 2?\nA. 3\nB. 4"),
        ({"text": "Once"}, "Once"),
    ],
)
def test_prompt_of_a_row(row, prompt) -> None:
    assert prompt_of(row, "here") == prompt


def test_files_of_every_kind(tmp_path: Path) -> None:
    one = "one\u2028 what \x85 str.splitlines() \x0c cuts"
    rows = [{"prompt": one}, {"question": "two"}]
    jsonl = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(jsonl).read_bytes()))
    array = write(tmp_path / "a.json", json.dumps(rows))
    lines = write(tmp_path / "a.txt", "\ufeffone\r\n\n  two \n")
    assert read_prompts(jsonl) == read_prompts(str(zipped)) == read_prompts(array) == [one, "two"]
    assert read_prompts(lines) == ["one", "two"]
    assert read_prompts(write(tmp_path / "b.txt", "one \r two\r")) == ["one", "two"]
    assert read_prompts(write(tmp_path / "a.jsonlines", "one"), other=".txt") == ["one"]
    assert read_texts(lines) == ["one\r\n\n  two \n"]
    assert read_texts(write(tmp_path / "t.jsonl", [{"text": "one"}, "two"])) == ["one", "two"]
    with pytest.raises(DexError, match=r'line 1 of \S* has no "text", only "prompt"'):
        read_texts(jsonl)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n\n{"ctx": "y"}\n', r'line 3 of \S*a.jsonl has no prompt, only "ctx"'),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt"\n', r"line 2 of \S*a.jsonl is no JSON"),
        ("a.json", b'[{"ctx": "x"}]', r"row 1 of \S*a.json"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.txt", b"caf\xe9", "UTF-8"),
        ("a.csv", b"x", "not understood"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}' * 50, mtime=0)[:-12], "damaged"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DexError, match=says):
        read_prompts(str(path))


def test_parse_dataset() -> None:
    parsed = {
        "squad": ("squad", None, "train"),
        "owner/name:main": ("owner/name", "main", "train"),
        "owner/name:test": ("owner/name", None, "test"),
        "owner/name:main:train[:10%]": ("owner/name", "main", "train[:10%]"),
    }
    assert {text: parse_dataset(text) for text in parsed} == parsed
    for text in ("", "a:b:c:d", "a::test"):
        with pytest.raises(DexError, match="write datasets:NAME"):
            parse_dataset(text)


def test_standard_library_prompts(tmp_path: Path, monkeypatch) -> None:
    long = "Adds two numbers and says so at a length that makes it worth asking for."
    source = f'''
import os
@cache
def outer(a, b=(1,
    2)):
    """{long}"""
    return a
class A:
    async def method(self):
        """{long}

        More.
        """
        return self
def short(): "{long}"
def brief():
    """Too brief."""
def huge():
    """{long * 30}"""
'''
    (tmp_path / "test").mkdir()
    for name in ("a.py", "b.py", "test/c.py"):
        (tmp_path / name).write_text(source if name != "test/c.py" else source.replace("outer", "hidden"))
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(prompt_files.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert standard_library_prompts() == [
        f'def outer(a, b=(1,\n    2)):\n    """{long}"""\n',
        f'async def method(self):\n    """{long}\n\n    More.\n    """\n',
    ]
    (tmp_path / "a.py").unlink()
    (tmp_path / "b.py").unlink()
    with pytest.raises(DexError, match="no documented functions"):
        standard_library_prompts()


@needs_data
def test_the_shared_prompts_are_all_understood() -> None:
    files = {
        "gsm8k/train.jsonl": 7470,
        "humaneval/HumanEval.jsonl.gz": 164,
        "spec_bench/question_240.jsonl": 240,
        "mmlu/mmlu_dev.jsonl": 285,
        "instruct_rasbt/instruction-data.json": 1100,
        "instruct_selfinstruct/seed_tasks.jsonl": 175,
        "instruct_selfinstruct/user_oriented_instructions.jsonl": 252,
    }
    assert {name: len(read_prompts(str(DATA / name))) for name in files} == files
    with pytest.raises(DexError, match='"activity_label"'):
        read_prompts(str(DATA / "hellaswag" / "hellaswag_val_500.jsonl"))
