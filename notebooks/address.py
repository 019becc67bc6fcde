"""Brings the repository's address from pyproject.toml into the files that spell it out; writes only what changes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = re.compile(r"(?P<before>github\.com/|research\.google\.com/github/)[\w.-]+/dex_jax\b")
FILES = [
    file
    for file in (*sorted(ROOT.glob("notebooks/*.ipynb")), *sorted(ROOT.glob("docs/*.md")), ROOT / "mkdocs.yml")
    if ADDRESS.search(file.read_text(encoding="utf-8"))
]


def repository() -> str:
    """The address, as "https://github.com/owner/dex_jax"."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def with_address(text: str, address: str) -> str:
    """The text, with every mention of the repository on GitHub or Colab moved to `address`."""
    path = address.removeprefix("https://github.com/")
    return ADDRESS.sub(lambda found: found["before"] + path, text)


if __name__ == "__main__":
    for file in FILES:
        before = file.read_text(encoding="utf-8")
        after = with_address(before, repository())
        if after != before:
            file.write_text(after, encoding="utf-8")
            print(file.relative_to(ROOT))
