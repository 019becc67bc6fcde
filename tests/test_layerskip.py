"""The LayerSkip recipe against its plain twin, and a whole model trained by it for a few steps."""

from __future__ import annotations

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import layerskip_twin as twin
from reference.jaxprs import arrays_of
from reference.small_models import GEMMA, LLAMA, QWEN3, small_model

import dex_jax
from dex_jax import DexError
from dex_jax.nn.forward import depth_states
from dex_jax.training import corpus as corpora
from dex_jax.training import layerskip, whole_model
from dex_jax.training.config import TrainConfig
from dex_jax.training.layerskip import LayerSkip
from dex_jax.training.whole_model import WholeModel, WholeModelConfig

VOCABULARY = 272
STEPS = 30
MODEL = dataclasses.replace(LLAMA, vocab_size=VOCABULARY, context=96)
STRONG = LayerSkip(dropout=0.3, exit_scale=0.5, curriculum="rotational", period=2)


@functools.cache
def toy_text() -> str:
    """Sentences of a tiny grammar: a model of two dozen steps learns most of it."""
    rng = np.random.default_rng(0)
    subjects, verbs = ["the cat", "a dog", "my friend", "the old king"], ["sees", "hears", "likes"]
    lines = [f"{rng.choice(subjects)} {rng.choice(verbs)} {rng.choice(subjects)}." for _ in range(900)]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "toy.txt"
    path.write_text(toy_text(), encoding="utf-8")
    return path


def settings(data, **changes) -> WholeModelConfig:
    train = TrainConfig(batch=8, steps=STEPS)
    values = {"model": MODEL, "train": train, "data": str(data), "window": 24, "explorers": (2, 3, 4)}
    return WholeModelConfig(**{**values, "evaluation_windows": 24, **changes})


def random_model_and_batch(config, seed: int = 0):
    params = whole_model.canonical_weights(small_model(config, seed=seed))
    batch = np.random.default_rng(seed).integers(0, config.vocab_size, (3, 9)).astype(np.int32)
    return params, batch


def task_for(config, **changes) -> WholeModel:
    """A task around a model of 48 tokens, with a text of random ones."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, 400).astype(np.int32)
    text = corpora.Corpus(tokens[:300], tokens[300:], tokenizer=None, fingerprint="0")
    return WholeModel(settings("random", model=config, **changes), text)


def test_layer_dropout_grows_exponentially_with_depth() -> None:
    for num_layers in (2, 3, 8):
        found = layerskip.dropout_by_layer(num_layers, 0.2)
        expected = [0.2 * (np.exp(np.log(2) * n / (num_layers - 1)) - 1) for n in range(num_layers)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert layerskip.dropout_by_layer(1, 0.2).tolist() == [0.0]
    assert [float(layerskip.dropout_over_time(step, 11)) for step in (0, 10, 20)] == [0.0, 1.0, 1.0]
    np.testing.assert_allclose(layerskip.dropout_over_time(5, 11), 2**0.5 - 1, rtol=1e-6)


def test_layers_are_skipped_as_often_as_their_probability_says() -> None:
    recipe, sequences, step = LayerSkip(dropout=0.5), 20_000, 50
    kept = layerskip.kept_layers(recipe, jax.random.key(3), 5, sequences, step, 100)
    expected = layerskip.dropout_by_layer(5, 0.5) * (2 ** (step / 99) - 1)
    # Four standard deviations of a share of 20,000 draws at most.
    np.testing.assert_allclose(1 - np.asarray(kept).mean(axis=1), expected, atol=4 * 0.5 / sequences**0.5)
    always = layerskip.kept_layers(dataclasses.replace(recipe, warm_dropout=False), jax.random.key(3), 5, 4000, 0, 100)
    np.testing.assert_allclose(1 - np.asarray(always)[-1].mean(), 0.5, atol=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
@pytest.mark.parametrize("num_layers", [1, 5])
def test_the_weights_of_exits_are_the_papers(curriculum: str, num_layers: int) -> None:
    recipe, steps = LayerSkip(exit_scale=0.3, curriculum=curriculum, period=3), 40
    if num_layers == 1:
        assert layerskip.exit_weights(recipe, 1, 7, steps).tolist() == [1.0]
        return
    found = jax.vmap(lambda step: layerskip.exit_weights(recipe, num_layers, step, steps))(jnp.arange(steps))
    expected = np.array([twin.exit_weights(recipe, num_layers, step, steps) for step in range(steps)])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (np.asarray(found)[:, -1] > 0).all()


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_hidden_states_and_losses_are_the_twins(config) -> None:
    params, batch = random_model_and_batch(config)
    kept = np.ones((4, 3), bool)
    kept[1, 0] = kept[3, 0] = kept[2, 1] = False
    states = whole_model.hidden_states(config, params, batch[:, :-1], jnp.asarray(kept))
    expected = twin.depth_states(config, params, batch[:, :-1], kept)
    np.testing.assert_allclose(states, expected, rtol=2e-4, atol=2e-4)
    # What is not kept is the identity, to the bit.
    chex.assert_trees_all_equal(states[1, 0], states[0, 0])
    chex.assert_trees_all_equal(states[2, 1], states[1, 1])
    assert (states[1, 1] != states[0, 1]).any()
    losses = whole_model.exit_losses(config, params, states, batch[:, 1:], jnp.array([0.5, 0.0, 0.25, 0.25]))
    wanted = [twin.exit_loss(config, params, hidden, batch[:, 1:]) for hidden in expected]
    np.testing.assert_allclose(losses, [wanted[0], 0.0, wanted[2], wanted[3]], rtol=1e-4)


def test_layers_of_different_kinds_are_trained_as_they_decode() -> None:
    params, batch = random_model_and_batch(GEMMA)
    model = whole_model.transformer(GEMMA, params)
    states = whole_model.hidden_states(GEMMA, params, batch)
    chex.assert_trees_all_close(states, depth_states(model, jnp.asarray(batch), (1, 2, 3, 4)), atol=1e-4)


def test_without_a_recipe_the_loss_is_plain_cross_entropy_whatever_ends_a_text() -> None:
    params, batch = random_model_and_batch(LLAMA)
    logits = small_model(LLAMA).logits(batch[:, :-1])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
    task = task_for(LLAMA)
    loss, figures = task.loss(params, task.constants(), jnp.asarray(batch), jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert loss == figures["final_loss"]
    other = task_for(dataclasses.replace(LLAMA, eos_ids=(3,)))
    assert other.evaluate(params) == task.evaluate(params)
    assert settings("x", train=TrainConfig(batch=8, steps=STEPS, tokens=8 * 24 * 10 - 1)).total_steps == 10


def test_the_recipes_loss_and_gradient_are_the_twins() -> None:
    """One compiled program for all steps; the gradient of one weight against a difference of the twin's loss."""
    config, steps, name = LLAMA, STEPS, "layers.1.down"
    task = task_for(config, recipe="layerskip", layerskip=STRONG)
    params, batch = random_model_and_batch(config)
    update = jax.jit(jax.value_and_grad(task.loss, has_aux=True))

    def expected(params: dict, key: jax.Array, step: int) -> float:
        kept = np.asarray(layerskip.kept_layers(STRONG, key, 4, 3, step, steps))
        states = twin.depth_states(config, params, batch[:, :-1], kept)
        weights = twin.exit_weights(STRONG, 4, step, steps)
        return sum(w * twin.exit_loss(config, params, x, batch[:, 1:]) for w, x in zip(weights, states, strict=True))

    for step in (0, 1, STEPS - 1):
        key = jax.random.key(step)
        (loss, _), gradient = update(params, (), jnp.asarray(batch), key, jnp.int32(step))
        np.testing.assert_allclose(loss, expected(params, key, step), rtol=1e-4)
    direction = np.random.default_rng(2).standard_normal(params[name].shape)
    ends = [expected({**params, name: params[name] + sign * 1e-3 * direction}, key, step) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-3
    np.testing.assert_allclose(np.sum(np.asarray(gradient[name]) * direction), slope, rtol=2e-2, atol=1e-4)


@functools.cache
def trained(data: str) -> tuple[WholeModel, dict, dict, dict, dict]:
    """(task, parameters before, after, figures before, after) of a few steps of the recipe."""
    task = WholeModel.open(settings(data, recipe="layerskip", layerskip=LayerSkip()))
    optimizer = optax.adam(3e-3)
    before = params = task.init(jax.random.key(0))
    state, cursor = optimizer.init(params), task.start(0)

    @jax.jit
    def update(params, state, batch, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        gradient, _ = jax.grad(task.loss, has_aux=True)(params, task.constants(), batch, key, step)
        changes, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, changes), state

    again, _, _ = WholeModel.open(task.config).next_batch({**cursor})
    assert any((task.corpus.train[i : i + 25] == again[0]).all() for i in range(len(task.corpus.train) - 24))
    for step in range(STEPS):
        batch, cursor, learnt = task.next_batch(cursor)
        assert learnt == 8 * 24
        # Batches depend on the cursor alone.
        assert (batch == again).all() == (step == 0)
        params, state = update(params, state, batch, jnp.int32(step))
    assert update._cache_size() == 1
    return task, before, params, task.evaluate(before), task.evaluate(params)


def test_training_changes_every_parameter_and_lowers_the_held_out_loss(text_file) -> None:
    _, before, after, figures_before, figures = trained(str(text_file))
    assert all((before[name] != after[name]).any() for name in before)
    assert figures_before["held_out_loss"] == pytest.approx(np.log(VOCABULARY), rel=0.1)
    assert figures["held_out_loss"] < figures_before["held_out_loss"] - 1.0
    found = figures["groups"]["held-out"]
    assert (len(found["agreement"]), len(found["ead"])) == (3, 4)
    assert found["ead"][0] == found["agreement"][0]
    assert sum(found["ead"]) == pytest.approx(1.0)
    assert [grid["explorers"] for grid in found["grids"]] == [2, 3, 4]
    assert all(1 <= grid["depth_side_speedup"] <= grid["explorers"] for grid in found["grids"])
    assert (found["tokens"], found["off_greedy"]) == (24 * 24, 0)


def test_training_goes_on_from_a_model(text_file) -> None:
    start_from = small_model(MODEL, seed=4)
    start_from.tokenizer = corpora.train_tokenizer(toy_text(), VOCABULARY)
    other = dataclasses.replace(MODEL, num_layers=6)
    task = WholeModel.open(settings(text_file, model=other), start_from)
    assert task.config.model == MODEL
    batch = jnp.arange(50).reshape(2, 25)
    loss, _ = task.loss(task.init(jax.random.key(0)), (), batch, jax.random.key(0), jnp.int32(0))
    logits = start_from.logits(batch[:, :-1])
    np.testing.assert_allclose(
        loss, optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean(), rtol=1e-5
    )
    start_from.arrange(dex_jax.Stacked((2, 4)))
    with pytest.raises(DexError, match="not in the unrolled layout"):
        task.init(jax.random.key(0))


def test_the_fingerprint_tells_texts_and_shapes_apart(text_file, tmp_path) -> None:
    longer, renamed = tmp_path / "longer.txt", tmp_path / "renamed.txt"
    longer.write_text(toy_text() + "the end.\n", encoding="utf-8")
    renamed.write_text(toy_text(), encoding="utf-8")
    wide = dataclasses.replace(MODEL, mlp_width=64)
    tasks = [WholeModel.open(each) for each in (settings(text_file), settings(longer), settings(text_file, model=wide))]
    assert len({task.fingerprint() for task in tasks}) == 3
    recipe, same = (WholeModel.open(settings(file, recipe="layerskip")) for file in (text_file, renamed))
    assert recipe.fingerprint() == tasks[0].fingerprint()
    assert json.loads(json.dumps(recipe.settings())) == recipe.settings() == same.settings()
    assert recipe.settings() != tasks[0].settings()


def test_a_vocabulary_is_learnt_alike_every_time_and_loses_nothing() -> None:
    text = "".join(dict.fromkeys(toy_text().splitlines(keepends=True)))  # few lines, so many pairs are equally frequent
    first = corpora.train_tokenizer(text, VOCABULARY)
    assert all(corpora.train_tokenizer(text, VOCABULARY).backend.to_str() == first.backend.to_str() for _ in range(5))
    assert first.vocab_size == VOCABULARY
    odd = "été, 東京\t\x00  the cat\r\n"
    for tokenizer in (first, corpora.train_tokenizer(text, 256)):
        assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert len(corpora.train_tokenizer(text, 256).encode(odd)) == len(odd.encode())
    assert len(first.encode(text)) < 0.8 * len(text)


def test_the_end_of_a_text_is_held_out(text_file) -> None:
    corpus = corpora.read_corpus(text_file, 256, held_out=0.25)
    text = toy_text()
    assert corpus.tokenizer.decode([*corpus.train, *corpus.held_out]) == text
    assert len(corpus.held_out) == round(len(text) * 0.25)
    # A pair that only the held-out part has is not learnt.
    (text_file.parent / "end.txt").write_text("a b c " * 50 + "zqzqzqzqzq " * 30, encoding="utf-8")
    learnt = corpora.read_corpus(text_file.parent / "end.txt", 260, held_out=330 / 630)
    assert "zq" not in learnt.tokenizer.backend.get_vocab()


def test_bad_input_is_refused_in_one_sentence(text_file, tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "short.txt").write_text("x")
    cases = [
        (lambda: corpora.read_corpus(tmp_path / "absent.txt", 300), r"absent\.txt cannot be read"),
        (lambda: corpora.read_corpus(tmp_path / "latin.txt", 300), "UTF-8"),
        (lambda: corpora.read_corpus(tmp_path / "short.txt", 300), "too few"),
        (lambda: corpora.read_corpus(text_file, 255), "from 256"),
        (lambda: corpora.read_corpus(text_file, 300, held_out=1.0), "between 0 and 1"),
        (lambda: WholeModel.open(settings(text_file, held_out=0.001)), "held-out part .* a window takes 25"),
        (lambda: settings(text_file, recipe="skip"), "recipe = 'skip' is not"),
        (lambda: settings(text_file, window=97), "from 1 to the context's 96"),
        (lambda: settings(text_file, explorers=(2, 5)), "4 layers"),
        (lambda: settings(text_file, train=TrainConfig(dtype="float16")), "float16"),
        (lambda: LayerSkip(dropout=1.0), "dropout = 1.0 is not .* < 1.0"),
        (lambda: LayerSkip(curriculum="linear"), "curriculum = 'linear' is not"),
    ]
    for action, sentence in cases:
        with pytest.raises(DexError, match=sentence):
            action()
    task = WholeModel.open(settings(text_file))
    with pytest.raises(DexError, match="no model of the given configuration"):
        WholeModel(task.config, task.corpus, small_model(LLAMA))


def test_no_array_holds_the_logits_of_several_exits() -> None:
    config = dataclasses.replace(LLAMA, vocab_size=47)  # a width that nothing else has
    task = task_for(config, recipe="layerskip", layerskip=LayerSkip(curriculum="all"))
    params, batch = random_model_and_batch(config)
    shapes = arrays_of(jax.grad(task.loss, has_aux=True), params, (), batch, jax.random.key(0), jnp.int32(0))
    vocabulary_wide = {shape for shape in shapes if 47 in shape and 32 not in shape}
    assert (3, 8, 47) in vocabulary_wide
    assert max(map(np.prod, vocabulary_wide)) == 3 * 8 * 47
