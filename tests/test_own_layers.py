"""Drafters with layers of their own, EAGLE-3 heads and small models: what they compute, and that tokens are AR's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference.checkpoints import write_checkpoint
from reference.eagle_heads import MODEL, ROOTS, STEPS, VARIANTS, example, write_head
from reference.small_models import GEMMA, LLAMA, assert_same_tokens, ragged_prompts, random_transformer, small_model

import dex_jax
from dex_jax.decoding.dex.drafters import draft_model
from dex_jax.decoding.dex.interface import Chunk, DraftRows
from dex_jax.decoding.dex.own_layers import EagleDrafter, eagle_arrays
from dex_jax.errors import DexError
from dex_jax.io.eagle import fit_eagle
from dex_jax.language_model import LanguageModel
from dex_jax.lattice import NO_NODE
from dex_jax.nn.weights import merge_model

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "eagle3.json").read_text(encoding="utf-8"))
CHAIN = dex_jax.TreeShape((1, 1, 1), drafter_levels=3, lookup=(0.0,) * 8)
TREE = dex_jax.TreeShape((3, 2, 2), drafter_levels=3, lookup=(0.0, 0.5, *[0.7] * 6))
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / MODEL, MODEL)


@pytest.fixture(scope="module")
def target(checkpoint) -> dex_jax.LanguageModel:
    return dex_jax.load(str(checkpoint), dtype="float32")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_eagle_head_computes_what_speculators_does(variant, target, tmp_path) -> None:
    """A chain of drafts goes on with given tokens, below several roots of one text."""
    model = merge_model(target.config, target.weights)
    head = fit_eagle(dex_jax.load_eagle(write_head(tmp_path / variant, variant)), target.config)
    arrays, drafter = eagle_arrays(head, jnp.float32), EagleDrafter(head.config)
    tokens, states = example(variant)
    hidden = jnp.pad(jnp.asarray(states), ((0, 0), (target.config.width, 0)))[None]
    reading = drafter.drafter(model, arrays)
    read = jax.jit(lambda memory, *chunk: drafter.extend(model, arrays, memory, Chunk(*chunk)))

    @jax.jit
    def drafted(memory, rows, step, *below):
        below = DraftRows(*below, memory.previous[:, None])
        features, own = reading.features(SimpleNamespace(exits=memory), rows, below)
        rows = type(rows)(*(old.at[:, step].set(new[:, 0]) for old, new in zip(rows, own, strict=True)))
        return reading.logits(features[0])[0], rows

    for place, root in enumerate(ROOTS):
        memory, end = drafter.empty(1, 16, jnp.float32), np.array([root + 1])
        for start in range(0, root + 1, 4):
            piece = slice(start, start + 4)
            memory = read(memory, tokens[None, piece], hidden[:, piece], start, end)
        rows = reading.blank(1, STEPS)
        for step in range(STEPS):
            parent, at = [[NO_NODE if step == 0 else step - 1]], root + 1 + step
            logits, rows = drafted(memory, rows, step, tokens[None, at : at + 1], np.array([[at]]), np.array(parent))
            expected = GOLDEN["logits"][variant][step][place]
            np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max(), err_msg=f"{root} {step}")


@pytest.mark.parametrize(
    ("variant", "options", "dtype"),
    [("safeailab", {}, "float32"), slow("safeailab", {}, "bfloat16"), slow("residual", SAMPLED, "float32")],
)
def test_tokens_with_an_eagle_head_are_those_of_ar(variant, options, dtype, checkpoint, tmp_path) -> None:
    lm, path = dex_jax.load(str(checkpoint), dtype=dtype), str(write_head(tmp_path / variant, variant))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, lm.config.vocab_size, length).tolist() for length in (1, 5, 17)]
    about = {"max_new_tokens": 24, **options}
    plain = dex_jax.generate(lm, prompts, method=dex_jax.AR(), **about)
    out = dex_jax.generate(lm, prompts, method=dex_jax.Dex(explorers=1, draft=TREE), exits=path, **about)
    assert_same_tokens(lm, out, plain, **options)
    assert out.stats.plan.drafter_source == path


@pytest.mark.parametrize(("config", "options"), [slow(GEMMA, {}), slow(LLAMA, SAMPLED)])
def test_a_model_that_drafts_for_itself_is_always_right(config, options) -> None:
    """Every tick but the last emits a whole path, which needs right keys and values."""
    config = dataclasses.replace(config, num_layers=2, layer_kinds=config.layer_kinds[:2])
    lm, prompts, new = small_model(config), ragged_prompts(3), 21
    about = {"max_new_tokens": new, **options}
    plain = dex_jax.generate(lm, prompts, method=dex_jax.AR(), **about)
    method = dex_jax.Dex(explorers=1, draft=CHAIN)
    out = dex_jax.generate(lm, prompts, method=method, draft_model=lm, **about)
    assert out.tokens.tolist() == plain.tokens.tolist()
    assert out.stats.ticks.tolist() == [-(-(new - 1) // (len(CHAIN.widths) + 1))] * 3
    assert out.stats.plan.drafter_source == "random"


@pytest.mark.slow
def test_another_model_drafts_in_its_own_dtype() -> None:
    half = random_transformer(dataclasses.replace(LLAMA, num_layers=1), 1, jnp.bfloat16)
    lm, small, prompts = small_model(), LanguageModel(half, None, "half", "1"), ragged_prompts(2)
    plain = dex_jax.generate(lm, prompts, method=dex_jax.AR(), max_new_tokens=24)
    method = dex_jax.Dex(explorers=1, draft=TREE)
    out = dex_jax.generate(lm, prompts, method=method, draft_model=small, max_new_tokens=24)
    assert_same_tokens(lm, out, plain)


def test_a_smaller_vocabulary_drafts_what_it_knows() -> None:
    """Without a tokenizer nothing says which tokens are the same."""
    lm = small_model()
    other = small_model(dataclasses.replace(LLAMA, vocab_size=40))
    with pytest.raises(DexError, match="vocabulary"):
        draft_model(lm, other)


ANCHORS = {
    "vocabulary": ({"vocab_size": 212}, "another model"),
    "depths": ({"eagle_aux_hidden_state_layer_ids": [2, 3, 9]}, "another model"),
    "states": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4, 5]}, "fit"),
    "layers": ({"num_hidden_layers": 2}, "more than one layer"),
    "type": ({"model_type": "mistral"}, "mistral"),
    "window": ({"draft_vocab_size": "many"}, "draft_vocab_size"),
    "no head": ({"draft_vocab_size": None}, "no EAGLE-3 head"),
    "final layer": ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
    "heads": ({"num_attention_heads": 4}, "do not belong together"),
}


@pytest.mark.parametrize("name", ANCHORS)
def test_a_head_that_does_not_fit_gets_one_sentence(name, target, tmp_path) -> None:
    changes, said = ANCHORS[name]
    path = write_head(tmp_path / "head", "safeailab", **changes)
    with pytest.raises(DexError, match=said) as refusal:
        dex_jax.generate(target, [[1, 2]], exits=str(path), method=dex_jax.Dex(explorers=1), max_new_tokens=4)
    assert "\n" not in str(refusal.value)


def test_what_needs_other_devices_or_explorers_is_refused(target, tmp_path) -> None:
    path = str(write_head(tmp_path / "head", "safeailab"))
    with pytest.raises(DexError, match="one explorer"):
        dex_jax.generate(target, [[1, 2]], exits=path, method=dex_jax.Dex(explorers=2), max_new_tokens=4)
    with pytest.raises(DexError, match="leave one of them out"):
        dex_jax.generate(target, [[1, 2]], exits=path, draft_model=target, max_new_tokens=4)
    small = small_model(dataclasses.replace(LLAMA, context=16))
    with pytest.raises(DexError, match="context of 16"):
        dex_jax.generate(small_model(), [[1, 2]], draft_model=small, method=dex_jax.Dex(explorers=1), max_new_tokens=20)
    with pytest.raises(DexError, match="no EAGLE-3 head"):
        dex_jax.load_eagle(tmp_path)
