"""CONTRIBUTING.md's recipes, followed step by step on a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dex_jax

PACKAGE = Path(dex_jax.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("A decoding method", "An exit kind", "A model family")
STEP = re.compile(
    r"^(?:Write `(?P<new>[^`]+)`|In `(?P<file>[^`]+)`, (?P<how>after|replace))[^\n]*\n\n```python\n(?P<first>.*?)```"
    r"(?:\n\n(?:add|with)\b[^\n]*\n\n```python\n(?P<second>.*?)```)?",
    re.MULTILINE | re.DOTALL,
)
CHECK = re.compile(r"this holds[^`]*?\n\n```python\n(.*?)```", re.DOTALL)


def recipe(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S)
    return text


def follow(text: str, folder: Path) -> int:
    """Does the steps to the package in `folder`; returns how many there were."""
    steps = list(STEP.finditer(text))
    for step in steps:
        if step["new"]:
            (folder / step["new"]).write_text(step["first"], encoding="utf-8")
            continue
        file = folder / step["file"]
        before = file.read_text("utf-8")
        assert before.count(step["first"]) == 1, f"{step['file']} no longer has the line: {step['first']}"
        after = step["second"] if step["how"] == "replace" else step["first"] + step["second"]
        file.write_text(before.replace(step["first"], after), encoding="utf-8")
    return len(steps)


@pytest.mark.slow
@pytest.mark.parametrize(("title", "count"), [*zip(RECIPES, (2, 3, 3), strict=True)])
def test_a_recipe_works_as_it_is_written(title: str, count: int, tmp_path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "default_exits")
    shutil.copytree(PACKAGE, tmp_path / "dex_jax", ignore=ignored)
    text = recipe(title)
    assert follow(text, tmp_path) == count
    (check,) = CHECK.findall(text)
    assert check.count("assert ") >= 3
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    command = [sys.executable, "-P", "-c", f"{check}\nassert dex_jax.__file__.startswith({str(tmp_path)!r})"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_house_is_all_there() -> None:
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    whole = [name if "/" in name else f"dex_jax/{name}" for name in named]
    places = [PACKAGE.parent / name if name.startswith("dex_jax/") else ROOT / name for name in whole]
    assert len(places) > 8
    assert all(place.exists() for place in places)
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders <= {place.name for place in places}
