"""CONTRIBUTING.md: its recipes, followed step by step on a copy of the package, its house and its quick tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import LEFT_OUT, OPTIONAL_MARKERS

import dex_jax

PACKAGE = Path(dex_jax.__file__).parent
ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("A decoding method", "An exit kind", "A model family")
FILE = re.compile(r"^Write `([^`]+)`:\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)
DIFF = re.compile(r"^```diff\n(.*?)```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"^[\w/.]+(?:\.(?:py|md|h|cc|toml)|/)$")
CHECK = re.compile(r"this holds[^`]*?\n\n```python\n(.*?)```", re.DOTALL)


def recipe(title: str) -> str:
    (text,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S)
    return text


def follow(text: str, folder: Path) -> int:
    """Apply the steps to the package in `folder`, and return their number."""
    new = FILE.findall(text)
    for name, content in new:
        (folder / name).write_text(content, encoding="utf-8")
    changes = 0
    for diff in DIFF.findall(text):
        _, *parts = re.split(r"^\+\+\+ (.*)\n", diff, flags=re.MULTILINE)
        for name, hunks in zip(parts[::2], parts[1::2], strict=True):
            for hunk in hunks.split("@@\n"):
                changes += 1
                lines = hunk.splitlines(keepends=True)
                before, after = ("".join(line[1:] for line in lines if line[0] in (" ", sign)) for sign in "-+")
                content = (folder / name).read_text("utf-8")
                assert content.count(before) == 1, f"{name} no longer has the line: {before}"
                (folder / name).write_text(content.replace(before, after), encoding="utf-8")
    return len(new) + changes


@pytest.mark.slow
def test_the_recipes_work_as_they_are_written(tmp_path) -> None:
    """All recipes change one copy of the package, as they change different files."""
    ignored = shutil.ignore_patterns("__pycache__", "default_exits")
    shutil.copytree(PACKAGE, tmp_path / "dex_jax", ignore=ignored)
    checks = []
    for title, count in zip(RECIPES, (2, 3, 3), strict=True):
        text = recipe(title)
        assert follow(text, tmp_path) == count
        (check,) = CHECK.findall(text)
        assert check.count("assert ") >= 3
        checks.append(check)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    program = "\n".join([*checks, f"assert dex_jax.__file__.startswith({str(tmp_path)!r})"])
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
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


def test_every_file_that_is_named_is_there() -> None:
    """A name may leave out the folders in front, which the text around it gives; recipes write files of their own."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    named = {name for span in re.findall(r"`([^`]+)`", prose) for name in NAMED.findall(span)}
    named -= {name for name, _ in FILE.findall(text)}
    assert len(named) > 50
    homes = (PACKAGE, *(ROOT / name for name in ("docs", "tests", "studies", "benchmarks", "configs", "notebooks")))
    places = {f"/{home.name}/{path.relative_to(home).as_posix()}" for home in homes for path in home.rglob("*")}
    places |= {f"/{path.name}" for path in (*ROOT.iterdir(), *homes)}
    assert [name for name in sorted(named) if not any(place.endswith(f"/{name.rstrip('/')}") for place in places)] == []


def test_every_file_has_tests_that_are_not_slow(request) -> None:
    quick = {item.path for item in request.session.items}
    left_out = [item for item in request.config.stash[LEFT_OUT] if item.get_closest_marker("slow")]
    slow = {item.path for item in left_out if not any(map(item.get_closest_marker, OPTIONAL_MARKERS))}
    assert not slow - quick
