"""Models and exits on an object store: fsspec's own store in memory stands for gs://."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import pytest
from reference.checkpoints import write_checkpoint
from reference.small_models import random_exits

import dex_jax
from dex_jax.cli.decode import main as decode
from dex_jax.cli.train import main as train
from dex_jax.errors import DexError
from dex_jax.io import open_checkpoint
from dex_jax.io.exits_file import FILE_NAME, load_exits, save_exits

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "smollm2_135m.py"


@pytest.fixture
def store():
    """The store, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def put(store, directory, at: str) -> None:
    for file in directory.iterdir():
        if file.is_file():
            store.pipe_file(f"/{at}/{file.name}", file.read_bytes())


def test_a_stored_checkpoint_is_the_same(store, tmp_path, monkeypatch):
    here = open_checkpoint(str(write_checkpoint(tmp_path, "qwen3", 3)))
    put(store, tmp_path, "bucket/model")
    there = open_checkpoint("memory://bucket/model/")
    assert there.config == here.config
    assert there.shapes() == here.shapes()
    for name in here.shapes():
        np.testing.assert_array_equal(there.read(name), here.read(name))
    assert there.fingerprint() == here.fingerprint()

    # A tensor's bytes are all that is fetched for it.
    fetched: list[int] = []
    whole = type(store).cat_file

    def counting(self, path, start=None, end=None, **options):
        data = whole(self, path, start=start, end=end, **options)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(type(store), "cat_file", counting)
    assert there.read("layers.1.down").nbytes == sum(fetched)


def test_a_stored_model_and_stored_exits_are_loaded(store, tmp_path):
    directory = write_checkpoint(tmp_path / "model", "llama2")
    put(store, directory, "bucket/model")
    exits = random_exits("linear", depths=(2,))
    save_exits(tmp_path / "exits" / FILE_NAME, exits)
    put(store, tmp_path / "exits", "bucket/exits-0.5b")
    for url in ("memory://bucket/exits-0.5b", f"memory://bucket/exits-0.5b/{FILE_NAME}"):
        found = load_exits(url)
        assert (found.config, found.source) == (exits.config, url)
    one, two = (dex_jax.load(source).logits([[5, 9, 30]]) for source in (directory, "memory://bucket/model"))
    np.testing.assert_array_equal(one, two)


def test_damaged_and_absent(store, tmp_path):
    put(store, write_checkpoint(tmp_path, "llama2"), "bucket/model")
    with pytest.raises(DexError, match="There is nothing at memory://bucket/other"):
        open_checkpoint("memory://bucket/other")
    with pytest.raises(DexError, match="there are no exits at memory://bucket/model"):
        load_exits("memory://bucket/model")
    whole = store.cat_file("/bucket/model/model.safetensors")
    store.pipe_file("/bucket/model/model.safetensors", b"\xff" * 64)
    with pytest.raises(DexError, match=r"model\.safetensors is truncated or damaged"):
        open_checkpoint("memory://bucket/model")
    store.pipe_file("/bucket/model/model.safetensors", whole[: len(whole) // 2])
    with pytest.raises(DexError, match=r"model\.safetensors is truncated"):
        open_checkpoint("memory://bucket/model")
    store.rm("/bucket/model/model.safetensors")
    with pytest.raises(DexError, match="holds no safetensors weights"):
        open_checkpoint("memory://bucket/model")


def test_stores_that_cannot_be_had(monkeypatch, capsys):
    with pytest.raises(DexError, match="on no kind of store that fsspec knows"):
        open_checkpoint("nowhere://bucket/model")
    with pytest.raises(DexError, match=r"A \.gguf file is read from a disk: copy gs://bucket/model\.gguf"):
        open_checkpoint("gs://bucket/model.gguf")

    def missing(*_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert decode(["--model", "gs://bucket/model", "--prompt", "x"]) == 2
    assert "needs a package that is not installed (Please install gcsfs" in capsys.readouterr().err
    assert train(["--config", str(CONFIG), "--folder", "gs://bucket/run"]) == 2
    assert "trainings need a disk, and gs://bucket/run is on an object store" in capsys.readouterr().err
