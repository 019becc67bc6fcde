"""Files are written as a whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dex_jax.errors import DexError
from dex_jax.io.whole_files import write_json, write_whole


def test_text_and_bytes_with_their_folders(tmp_path) -> None:
    write_whole(tmp_path / "a" / "b.txt", "ü\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "ü\n".encode()
    write_whole(tmp_path / "a" / "b.txt", b"\x00\xff")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\x00\xff"
    write_json(tmp_path / "c.json", {"a": [1, None]})
    assert json.loads((tmp_path / "c.json").read_text()) == {"a": [1, None]}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b.txt", "c.json"]


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch) -> None:
    file = tmp_path / "kept.json"
    write_json(file, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, float("nan"))
    with pytest.raises(DexError, match=r"kept\.json/below cannot be written: "):
        write_whole(file / "below", "")

    def full(path: Path, content: bytes) -> int:
        with path.open("wb") as half:
            half.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DexError, match=r"kept\.json cannot be written: No space left"):
        write_json(file, 22)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert file.read_text() == "1"
