"""Files are written as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dex_jax.errors import DexError
from dex_jax.io.whole_files import cache_folder, write_json, write_whole


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

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DexError, match=r"kept\.json cannot be written: No space left"):
        write_json(file, 22)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
    assert file.read_text() == "1"


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("spoil", ["writable", "foreign", "no home", "a file", "relative"])
def test_a_cache_that_only_its_user_may_write(tmp_path, monkeypatch, capsys, spoil) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder == tmp_path / "dex_jax"
    assert folder.stat().st_mode & 0o077 == 0
    if spoil == "writable":
        folder.chmod(0o770)
    elif spoil == "foreign":
        monkeypatch.setattr(os, "geteuid", lambda: 10**6)
    else:
        named = {"no home": "", "a file": str(tmp_path / "file"), "relative": "here"}[spoil]
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        monkeypatch.setattr(Path, "home", no_home)
    other = cache_folder()
    assert other.is_dir()
    assert other == cache_folder()
    assert tmp_path not in other.parents
    assert capsys.readouterr().err.count("\n") <= 1
