"""Saved models load as they were, and are written as a whole or not at all."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from reference.checkpoints import FAMILIES, tensor_shapes, write_checkpoint
from reference.small_models import LLAMA, small_model, train_tokenizer, weights_of

import dex_jax
from dex_jax import DexError
from dex_jax.io.opening import open_checkpoint
from dex_jax.io.save import config_json, save_model

TEXT = "Whereof one cannot speak, thereof one must be silent.\n" * 4


def random_weights(config) -> dict:
    return weights_of(small_model(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path) -> None:
    original = open_checkpoint(str(write_checkpoint(tmp_path / "original", family)))
    weights = {name: original.read(name) for name in original.shapes()}
    saved = open_checkpoint(str(save_model(tmp_path / "saved", original.config, weights)))
    assert saved.config == original.config
    assert saved.fingerprint() == original.fingerprint()
    for name, value in weights.items():
        np.testing.assert_array_equal(saved.read(name), value)
    tensors = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == tensor_shapes(FAMILIES[family])


def test_load_gives_the_same_model_and_tokenizer(tmp_path) -> None:
    config = dataclasses.replace(LLAMA, vocab_size=270, eos_ids=(3, 5), bos_id=4)
    tokenizer = train_tokenizer(TEXT, 270)
    lm = small_model(config, tokenizer=tokenizer)
    loaded = dex_jax.load(str(lm.save(tmp_path / "runs" / "model")))
    tokens = loaded.encode(TEXT, chat=False)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode(tokens) == TEXT
    assert tokens == tokenizer.encode(TEXT)
    assert loaded.config == lm.config
    jax.tree.map(np.testing.assert_array_equal, weights_of(loaded), weights_of(lm))


def test_dtypes_are_kept_or_widened(tmp_path) -> None:
    stored = {"float32": "float32", "float16": "float16", "bfloat16": "float32"}
    for name, expected in stored.items():
        weights = {key: value.astype(name) for key, value in random_weights(LLAMA).items()}
        folder = save_model(tmp_path / name, LLAMA, weights)
        checkpoint = open_checkpoint(str(folder))
        assert checkpoint.read("embed").dtype == expected
        np.testing.assert_array_equal(checkpoint.read("layers.2.down"), weights["layers.2.down"].astype(expected))
        assert json.loads((folder / "config.json").read_text())["torch_dtype"] == expected


def test_a_full_disk_leaves_nothing_and_what_is_there_stays(tmp_path, monkeypatch) -> None:
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    (tmp_path / "empty").mkdir()
    assert len([*save_model(tmp_path / "empty", LLAMA, random_weights(LLAMA)).iterdir()]) == 2
    (tmp_path / "file").write_text("mine")
    for there in ("empty", "file"):
        with pytest.raises(DexError, match="is there already"):
            save_model(tmp_path / there, LLAMA, random_weights(LLAMA))
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(DexError, match=r"No space left on device.*make room"):
        save_model(tmp_path / "other", LLAMA, random_weights(LLAMA))
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}


def test_weights_and_configurations_that_do_not_fit_are_refused(tmp_path) -> None:
    weights = random_weights(LLAMA)
    cases = [
        ({name: value for name, value in weights.items() if name != "layers.3.out"}, "lack layers.3.out"),
        ({**weights, "layers.3.out": np.zeros((32, 31))}, r"layers.3.out has the shape \(32, 31\).*\(32, 32\)"),
        ({**weights, "unembed": weights["embed"]}, "hold unembed"),
    ]
    for wrong, sentence in cases:
        with pytest.raises(DexError, match=sentence):
            save_model(tmp_path / "m", LLAMA, wrong)
    assert not list(tmp_path.iterdir())
    for family, change in (("llama", {"qk_norm": True}), ("mamba", {})):
        with pytest.raises(DexError, match=family):
            config_json(dataclasses.replace(LLAMA, family=family, **change))


@pytest.mark.reference
def test_transformers_reads_a_saved_model(tmp_path) -> None:
    import torch
    import transformers

    config = dataclasses.replace(LLAMA, vocab_size=270, rope_theta=5e4)
    tokenizer = train_tokenizer(TEXT, 270)
    lm = small_model(config, tokenizer=tokenizer)
    folder = lm.save(tmp_path / "m")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    assert tokens == tokenizer.encode(TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(logits, lm.logits([tokens]), atol=1e-4)
