"""Trained exits in the lattice: tokens never change, and what they see of the position before is what it should be."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference.small_models import LLAMA, assert_same_tokens, ragged_prompts, random_exits, small_model

import dex_jax
from dex_jax.config import EXIT_KINDS, ExitsConfig
from dex_jax.decoding.dex.interface import Chunk
from dex_jax.decoding.dex.trained_exits import TrainedHeads, exit_arrays
from dex_jax.decoding.forced import forced_exits
from dex_jax.decoding.plan import plan_for, resolve
from dex_jax.errors import DexError
from dex_jax.grid import nearest_depths
from dex_jax.io.exits_file import TrainedExits, load_exits, quantize, save_exits
from dex_jax.nn.exits import exit_parameters, initial_heads
from dex_jax.nn.weights import merge_model

WIDTH = LLAMA.width
UNPRUNED = dex_jax.Dex(explorers=4, rows="full", draft=False)


@pytest.fixture(scope="module")
def lm():
    return small_model()


@pytest.fixture(scope="module")
def plain(lm):
    return dex_jax.generate(lm, ragged_prompts(3), method=dex_jax.AR(), max_new_tokens=20)


@pytest.mark.parametrize(
    ("kind", "fused", "draft"),
    [slow("linear", True, 30), slow("attn", False, 30), ("linear, of the position before alone", True, 30)],
)
def test_tokens_are_those_of_ar_and_exits_those_of_teacher_forcing(lm, plain, kind, fused, draft) -> None:
    exits = random_exits(kind.split(",")[0], fused=fused, draft=draft)
    if "alone" in kind:  # wrong wiring of the position before would change which exits are right
        exits = dataclasses.replace(exits, parameters=exits.parameters | {"norm": np.zeros((3, WIDTH), np.float32)})
    # There are three explorers here: see `forced.force`.
    method = dex_jax.Dex(depths=(1, 2, 4), rows="full", draft=False) if kind == "attn" else UNPRUNED
    out = dex_jax.generate(lm, ragged_prompts(3), method=method, exits=exits, max_new_tokens=20)
    assert_same_tokens(lm, out, plain)
    assert out.stats.plan.exits_source == "random"
    assert (out.stats.exits[:, 1:] < out.stats.plan.stages).any(), "no proposal was ever right: this would test nothing"
    for row, prompt in enumerate(out.prompt_tokens):
        tokens = out.tokens[row, : out.lengths[row]].tolist()
        expected = forced_exits(lm, prompt, tokens, out.stats.plan, exits=exits)
        assert expected.tolist() == out.stats.exits[row, : len(tokens)].tolist()


@pytest.mark.slow
def test_sampled_tokens_are_those_of_ar(lm) -> None:
    options = {"temperature": 0.9, "top_k": 12, "max_new_tokens": 16, "seed": 3}
    exits = random_exits("linear", fused=True, draft=30)
    out = dex_jax.generate(lm, ragged_prompts(3), method=dex_jax.Dex(explorers=4, draft=False), exits=exits, **options)
    reference = dex_jax.generate(lm, ragged_prompts(3), method=dex_jax.AR(), **options)
    assert_same_tokens(lm, out, reference, **options)


@pytest.mark.parametrize("kind", EXIT_KINDS)
def test_untrained_heads_are_the_models_own(lm, kind) -> None:
    model = merge_model(lm.config, lm.weights)
    config = ExitsConfig(kind, (1, 3), WIDTH, fused=kind != "shared", hidden=8, heads=2, head_dim=8)
    heads = initial_heads(config, model.final_norm[...])
    states = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, WIDTH)), jnp.float32)
    other = states[::-1] if config.needs_previous else None
    found = heads.features(states, other, other if kind == "attn" else None)[..., :-1]
    chex.assert_trees_all_close(found, model.normed(states), atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_a_file_gives_back_what_was_saved(tmp_path, int8) -> None:
    exits = random_exits("mlp", fused=True, draft=20)
    large = {"map": np.random.default_rng(0).standard_normal((3, 128, 128)).astype(np.float32)}
    config = ExitsConfig("linear", (1, 2, 3), 128)
    stored = {name: np.ones(shape, np.float32) for name, (shape, _) in exit_parameters(config).items()} | large
    for number, each in enumerate((exits, TrainedExits(config, stored, None, "f", {"tokens": 5}, "x"))):
        path = tmp_path / f"{number}.safetensors"
        save_exits(path, each, int8=int8)
        back = load_exits(path)
        assert back.config == each.config
        assert back.metadata == each.metadata
        assert back.fingerprint == each.fingerprint
        for name, value in each.parameters.items():
            bound = np.abs(value).max(axis=-1, keepdims=True) / 254 * 1.001 if int8 and value.size >= 2**14 else 0
            assert (np.abs(back.parameters[name] - value) <= bound).all(), name
    whole, steps = quantize(large["map"])
    assert whole.dtype == np.int8
    assert (np.abs(whole * steps - large["map"]) <= steps * 0.5001).all()


def test_a_folder_is_loaded_and_nothing_is_refused_clearly(tmp_path) -> None:
    save_exits(tmp_path / "exits.safetensors", random_exits("linear"))
    assert load_exits(tmp_path).config.kind == "linear"
    with pytest.raises(DexError, match="there are no exits at"):
        load_exits(tmp_path / "nowhere")
    (tmp_path / "broken.safetensors").write_bytes(b"no exits at all")
    with pytest.raises(DexError, match="damaged"):
        load_exits(tmp_path / "broken.safetensors")


def test_depths_move_to_trained_ones_and_a_sentence_says_so(lm) -> None:
    exits = random_exits("linear", depths=(1, 3))
    assert plan_for(dex_jax.Dex(explorers=2), 4).depths == (2, 4)
    resolved = resolve(dex_jax.Dex(explorers=2), exits, lm.config, "0")
    assert resolved.depths == (3, 4)
    assert "the exit depths are 3, 4" in resolved.remarks[0]
    with pytest.raises(DexError, match="at most 3 explorers"):
        resolve(dex_jax.Dex(explorers=4), exits, lm.config, "0")
    with pytest.raises(DexError, match="choose depths among them"):
        resolve(dex_jax.Dex(depths=(2, 4)), exits, lm.config, "0")
    other = resolve(dex_jax.Dex(depths=(1, 3, 4)), exits, lm.config, "another model")
    assert "trained on another model" in other.remarks[0]


def test_every_wanted_depth_takes_the_nearest_trained_one_that_is_left() -> None:
    assert nearest_depths((5, 6, 7), (3, 6, 20), "x") == (3, 6, 20)
    shipped = (3, 5, 6, 9, 10, 12, 15, 18, 20, 21, 24, 25, 27)
    assert nearest_depths((4, 8, 12, 15, 19, 23, 27), shipped, "x") == (5, 9, 12, 15, 20, 24, 27)


def test_exits_that_do_not_fit_are_refused(lm) -> None:
    method = dex_jax.Dex(depths=(1, 2, 3))
    wide = dataclasses.replace(LLAMA, width=64)
    with pytest.raises(DexError, match="width 32, and this one has 64"):
        resolve(dex_jax.Dex(explorers=3), random_exits("linear"), wide, "0")
    with pytest.raises(DexError, match="has 3 layers"):
        resolve(method, random_exits("linear"), dataclasses.replace(LLAMA, num_layers=3), "0")
    with pytest.raises(DexError, match="vocabulary ends at 9"):
        resolve(
            dex_jax.Dex(explorers=3), random_exits("linear", draft=30), dataclasses.replace(LLAMA, vocab_size=10), "0"
        )
    with pytest.raises(DexError, match="unknown kind"):
        ExitsConfig("cubic", (1,), 8)
    with pytest.raises(DexError, match="ascend"):
        ExitsConfig("linear", (2, 1), 8)


def test_rest_counts_in_probabilities_only(lm) -> None:
    """If the rest of the vocabulary outweighs all, paths score worse, and without a cap nothing else changes."""
    exits = random_exits("linear", fused=True, draft=30)
    heavy = exits.parameters | {"rest_bias": np.full(3, 50.0, np.float32)}
    runs = [
        dex_jax.generate(lm, ragged_prompts(3), method=UNPRUNED, exits=each, max_new_tokens=20)
        for each in (exits, dataclasses.replace(exits, parameters=heavy))
    ]
    assert np.array_equal(runs[0].stats.exits, runs[1].stats.exits)


def test_context_memory_after_a_prompt_is_what_commits_one_by_one_make(lm) -> None:
    exits = random_exits("attn")
    model, heads = merge_model(lm.config, lm.weights), TrainedHeads(exits.config)
    arrays = exit_arrays(model, exits.config, exits.parameters, None)
    rng = np.random.default_rng(0)
    lengths = np.array([3, 7, 12])
    tokens = jnp.asarray(rng.integers(0, LLAMA.vocab_size, (3, 12)), jnp.int32)
    hidden = jnp.asarray(rng.standard_normal((3, 12, WIDTH)), jnp.float32)
    reading = jax.jit(lambda memory, *given: heads.extend(model, arrays, memory, Chunk(*given)))
    whole = heads.empty(3, 0, jnp.float32)
    for start in (0, 4, 8):
        part = slice(start, start + 4)
        whole = reading(whole, tokens[:, part], hidden[:, part], start, lengths)
    single = heads.empty(3, 0, jnp.float32)
    for n in range(12):
        row, start = slice(n, n + 1), jnp.full(3, n, jnp.int32)  # as a commit of one position, or of none
        ends = start + jnp.asarray(n < lengths, jnp.int32)
        single = reading(single, tokens[:, row], hidden[:, row], start, ends)
    used = np.asarray(single.context.position) >= 0
    assert np.array_equal(whole.context.position, single.context.position)
    assert used.sum(axis=1).tolist() == [3, 5, 5]
    chex.assert_trees_all_close(whole.previous, single.previous, atol=1e-5)
    for name in ("keys", "values"):
        both = [np.swapaxes(np.asarray(getattr(m.context, name)), 1, 2)[used] for m in (whole, single)]
        chex.assert_trees_all_close(*both, atol=1e-5)
