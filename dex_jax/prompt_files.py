"""Prompts and texts from files, Hugging Face data sets and the source of Python's standard library."""

from __future__ import annotations

import ast
import gzip
import importlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dex_jax.errors import DexError
from dex_jax.foreign import local_path, parsed, reading

Prompt = str | list[dict[str, Any]]

RECOGNISED = '"messages", "prompt", "turns", "instruction", "question" or "text"'

SPLIT_NAME = re.compile(r"(train|test|validation|dev|all)\b")
SHORTEST_DOCSTRING = 60
LONGEST_CODE = 1500
NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def read_prompts(path: str, other: str | None = None) -> list[Prompt]:
    """Read the prompts of a file: .jsonl, .json (a list) or .txt (one a line), gzipped or not.

    A file with another name is read as one that ends in `other`; None refuses it. Raise DexError for a file that is
    missing, of another kind or damaged, or a row without a prompt.
    """
    with reading(path, "mend it"):
        return _not_empty([prompt_of(row, where) for row, where in read_rows(path, other)], path)


def read_texts(path: str) -> list[str]:
    """Read the texts of a file: a .txt as a whole, or "text" of each row of .jsonl or .json, as in `read_prompts`."""
    if _kind(path) == ".txt":
        return _not_empty([text for text in [_read(path)] if text.strip()], path)
    texts = []
    for row, where in read_rows(path):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str) or not text.strip():
            raise DexError(f'{where} has no "text", {_found(row)}: give texts, or leave "text:" away for prompts')
        texts.append(text)
    return _not_empty(texts, path)


def read_dataset(name: str, config: str | None, split: str) -> list[Prompt]:
    """Read the prompts of a Hugging Face data set; raise DexError as `dataset_rows` does, or for a missing prompt."""
    return _not_empty([prompt_of(row, where) for row, where in dataset_rows(name, config, split)], name)


def dataset_rows(name: str, config: str | None, split: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (row, where it stands, in words) for each row of a Hugging Face data set.

    Raise DexError where the package `datasets` is missing, or cannot load the data set.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DexError(f"{name} needs the package datasets: pip install datasets, or give a file") from error
    try:
        rows = datasets.load_dataset(name, config, split=split)
    # Its errors come from many packages below it, down to those of the network.
    except Exception as error:
        raise DexError(f"datasets cannot load {name} (config {config}, split {split}): {error}; give a file") from error
    for number, row in enumerate(rows):
        yield dict(row), f"row {number} of {name}"


def parse_dataset(text: str) -> tuple[str, str | None, str]:
    """Parse NAME[:CONFIG][:SPLIT] to (name, config, split), "train" if left out; a slice, train[:100], is a split."""
    name, *rest = re.split(r":(?![^\[]*\])", text)
    if not name or len(rest) > 2 or not all(rest):
        raise DexError(f"datasets:{text} is not understood: write datasets:NAME, then :CONFIG or :SPLIT or both")
    if len(rest) == 1 and SPLIT_NAME.match(rest[0]):
        return name, None, rest[0]
    return name, (rest[0] if rest else None), (rest[1] if len(rest) == 2 else "train")


def prompt_of(row: Any, where: str) -> Prompt:
    """Return the prompt in a row of a data set: text, or messages without the assistant's at their end.

    A row is text, or a dictionary with "messages", "prompt", "turns" (the first), "instruction" (with "input", or the
    input of the first of "instances"), "question" (with "choices") or "text"; the first of these that is there. Raise
    DexError, which says `where` the row is, if there is none of them, or nothing in it.
    """
    prompt = row if isinstance(row, str) else _from_keys(row) if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        asked = list(prompt)
        while asked and asked[-1].get("role") == "assistant":
            asked.pop()
        if asked:
            return asked
    raise DexError(f"{where} has no prompt, {_found(row)}: give each row {RECOGNISED}")


def standard_library_prompts() -> list[str]:
    """Return the signatures and docstrings of functions in Python's standard library, which is read and never run.

    They depend on the version of Python, and their order is the same on all machines. Raise DexError where the library
    has no source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if not NOT_LIBRARY.intersection(path.relative_to(root).parts):
            found.update(dict.fromkeys(_functions(path)))
    if not found:
        raise DexError(f"python-stdlib found no documented functions in {root}: give other data")
    return list(found)


def _functions(path: Path) -> Iterator[str]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError):
        return  # a template, or a file kept to be wrong
    lines = source.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring, first = ast.get_docstring(node), node.body[0]
        if docstring is None or len(docstring) <= SHORTEST_DOCSTRING or first.lineno == node.lineno:
            continue
        # textwrap.dedent would not do: lines of a docstring may stand further left than the function.
        code = "".join(
            re.sub(rf"^ {{,{node.col_offset}}}", "", line) + "\n" for line in lines[node.lineno - 1 : first.end_lineno]
        )
        if len(code) < LONGEST_CODE:
            yield code


def _from_keys(row: dict[str, Any]) -> Any:
    for key in ("messages", "prompt"):
        if row.get(key):
            return row[key]
    if row.get("turns") and isinstance(row["turns"], list):
        return row["turns"][0]
    if isinstance(row.get("instruction"), str):
        instances, given = row.get("instances"), row.get("input")
        if isinstance(instances, list) and instances and isinstance(instances[0], dict):
            given = instances[0].get("input")
        return row["instruction"] + (f"\n\n{given}" if isinstance(given, str) and given.strip() else "")
    if isinstance(row.get("question"), str):
        choices = row.get("choices")
        named = choices if isinstance(choices, list) else []
        return "\n".join([row["question"], *(f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(named))])
    return row.get("text")


def _found(row: Any) -> str:
    if isinstance(row, dict):
        return "only " + (", ".join(f'"{key:.40}"' for key in list(row)[:10]) or "no keys at all")
    return f"it is {type(row).__name__} {str(row)[:40]!r}"


def _kind(path: str, other: str | None = None) -> str:
    if found := re.search(r"(\.jsonl|\.json|\.txt)(\.gz)?$", path):
        return found[1]
    if other is not None:
        return other
    raise DexError(
        f'data "{path}" is not understood: give a .jsonl, .json, .txt file (or .gz of one), text:FILE, '
        "datasets:NAME, python-stdlib or self"
    )


def _read(path: str) -> str:
    with reading(path, "save it as UTF-8"):
        data = local_path(path).read_bytes()
        return (gzip.decompress(data) if path.endswith(".gz") else data).decode("utf-8-sig")


def read_rows(path: str, other: str | None = None) -> Iterator[tuple[Any, str]]:
    """Yield (row, where it stands, in words) for each row of a file that `read_prompts` takes; errors as there."""
    kind, text = _kind(path, other), _read(path)
    if kind == ".json":
        rows = parsed(text, list[Any], path, "make it a list of rows")
        yield from ((row, f"row {number} of {path}") for number, row in enumerate(rows, 1))
        return
    for number, line in lines_of(text):
        where = f"line {number} of {path}"
        yield (line if kind == ".txt" else parsed(line, Any, where, "mend or remove it")), where


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Return (number from 1, line without the blanks at its ends) of each line with anything in it."""
    # splitlines would not do: JSON strings may hold line separators that end no line of a file.
    lines = enumerate(map(str.strip, re.split(r"\r\n?|\n", text)), 1)
    return ((number, line) for number, line in lines if line)


def _not_empty(rows: list[Any], path: str) -> list[Any]:
    if not rows:
        raise DexError(f"{path} is empty: give it at least one row")
    return rows
