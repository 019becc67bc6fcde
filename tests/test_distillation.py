"""Test what exits read in training, against a slow twin and against what decoding gives them."""

from __future__ import annotations

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.distillation_twin import ItemTwin
from reference.exit_metrics_twin import TRUE
from reference.small_models import LLAMA, random_parameters, small_model

from dex_jax.config import ExitsConfig
from dex_jax.decoding.dex.interface import Chunk, StageView
from dex_jax.decoding.dex.trained_exits import TrainedHeads, exit_arrays, trained_exits
from dex_jax.language_model import LanguageModel
from dex_jax.lattice import NO_NODE
from dex_jax.nn.exits import exit_graph, heads_of
from dex_jax.nn.forward import depth_states
from dex_jax.nn.weights import merge_model
from dex_jax.training.answers import Text
from dex_jax.training.distillation import draft_vocabulary, read_for_training
from dex_jax.training.packing import NOTHING, Activations

DEPTHS = (1, 2, 3)
WIDTH, WINDOW, STEPS = LLAMA.width, 5, 13
KINDS = [("mlp", True), ("attn", False)]
"""The kinds of exits, fused or not; a fused MLP has all that a fused map has, and more."""
ROWS = ((3, 9, 1), (8, 2))
"""Numbers of tokens of the texts in each row, one after the other."""


def exits_config(kind: str, fused: bool) -> ExitsConfig:
    return ExitsConfig(kind, DEPTHS, WIDTH, fused, hidden=12, heads=2, head_dim=8, window=WINDOW, draft_size=20)


@functools.cache
def parameters(kind: str, fused: bool) -> dict[str, np.ndarray]:
    return random_parameters(exits_config(kind, fused), seed=len(kind), spread=0.5)


def heads_parameters(config: ExitsConfig, values: dict[str, np.ndarray]):
    return nnx.state(heads_of(config, values, jnp.float32))


@dataclasses.dataclass
class RowOfItems:
    """A row's steps, (item, position within it) or None if idle, and the model's arrays of each item."""

    steps: list[tuple[int, int] | None]
    items: list[dict[str, np.ndarray]]

    def at(self, step: int) -> dict[str, np.ndarray]:
        if self.steps[step] is None:
            return {"token": NOTHING, "final": np.ones(WIDTH, np.float32), "states": np.ones((3, WIDTH), np.float32)}
        item, position = self.steps[step]
        return {name: field[position] for name, field in self.items[item].items()}


@functools.cache
def rows_of_items() -> tuple[RowOfItems, ...]:
    rng = np.random.default_rng(3)
    rows = []

    def item(length: int) -> dict[str, np.ndarray]:
        final, states = (rng.standard_normal((length, *shape)).astype(np.float32) for shape in ((WIDTH,), (3, WIDTH)))
        return {"token": rng.integers(0, LLAMA.vocab_size, length), "final": final, "states": states}

    for lengths in ROWS:
        items = [item(length) for length in lengths]
        steps = [(item, position) for item, length in enumerate(lengths) for position in range(length)]
        rows.append(RowOfItems(steps, items))
    # Row 1 is idle for two steps before its second text, and for one after it.
    rows[1].steps[8:8] = [None, None]
    rows[1].steps.append(None)
    return tuple(rows)


def batch_of_rows() -> Activations:
    """Return all steps of all rows."""
    rows = rows_of_items()

    def field(name: str) -> np.ndarray:
        return np.stack([np.stack([row.at(step)[name] for step in range(STEPS)]) for row in rows])

    position = [[NOTHING if step is None else step[1] for step in row.steps] for row in rows]
    token, states = field("token").astype(np.int32), np.moveaxis(field("states"), 2, 0)
    embedded, weight = embeddings()[np.maximum(token, 0)], np.ones(token.shape, np.float32)
    return Activations(states, field("final"), embedded, token, np.asarray(position, np.int32), weight)


def normed(x: np.ndarray) -> np.ndarray:
    """Apply the final norm, with a scale of its own."""
    scale = 1 + 0.1 * np.arange(WIDTH, dtype=np.float32)[None, None] / WIDTH
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale).astype(np.float32)


@functools.cache
def embeddings() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((LLAMA.vocab_size, WIDTH)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def features(config: ExitsConfig, params, batch: Activations, now, own_outputs, key: jax.Array) -> jax.Array:
    heads = nnx.merge(exit_graph(config), params)
    return read_for_training(heads, batch, now, own_outputs, key)


def read(kind: str, fused: bool, own_outputs: float, key: jax.Array) -> np.ndarray:
    config, batch = exits_config(kind, fused), batch_of_rows()
    params = heads_parameters(config, parameters(kind, fused))
    return np.asarray(features(config, params, batch, normed(batch.final), own_outputs, key))


def drawn(key: jax.Array, own_outputs: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return whether a step may read an estimate, the exit that gives it, and how many positions are hidden, [B, n]."""
    draw, which = jax.random.split(key)
    shape = (len(ROWS), STEPS)
    may = jax.random.uniform(draw, shape) < own_outputs
    hidden = jax.random.randint(jax.random.fold_in(key, 1), (*shape, 1), 1, 4)[..., 0]
    return np.asarray(may), np.asarray(jax.random.randint(which, shape, 0, len(DEPTHS))), np.asarray(hidden)


@pytest.mark.parametrize(("kind", "fused"), KINDS)
def test_every_exit_reads_at_every_step_what_the_twin_reads(kind, fused) -> None:
    key, own_outputs = jax.random.key(5), 0.9
    found = read(kind, fused, own_outputs, key)
    may, source_of, hidden = drawn(key, own_outputs)
    true = estimated = firsts = 0
    for b, row in enumerate(rows_of_items()):
        wide = [{name: field.astype(np.float64) for name, field in item.items()} for item in row.items]
        twins = [
            ItemTwin(
                prompt=item["token"].astype(int).tolist(),
                answer=[],
                states={depth: item["states"][:, x] for x, depth in enumerate(DEPTHS)},
                final=normed(item["final"][None])[0].astype(np.float64),
                exits=exits_config(kind, fused),
                parameters={name: p.astype(np.float64) for name, p in parameters(kind, fused).items()},
                embed=embeddings().astype(np.float64),
                unembed=np.zeros((0, WIDTH)),
                vocabulary=[],
            )
            for item in wide
        ]
        for i in range(STEPS):
            if row.steps[i] is None:
                continue
            item, position = row.steps[i]
            for x, depth in enumerate(DEPTHS):
                owned = may[b, i] and position > 0 and x < source_of[b, i]
                source = DEPTHS[source_of[b, i]] if owned else TRUE
                expected = twins[item].with_rest(depth, position, source, int(hidden[b, i]))
                np.testing.assert_allclose(found[x, b, i], expected, rtol=2e-4, atol=2e-5, err_msg=f"{b} {i} {depth}")
                true, estimated, firsts = true + (not owned), estimated + owned, firsts + (position == 0)
    assert true >= 3
    assert firsts == 3 * 5
    assert estimated >= 3


@pytest.mark.parametrize(("kind", "fused"), KINDS)
def test_estimates_get_no_gradient(kind, fused) -> None:
    """Exit 1 reads estimates of deeper exits, and its gradient does not train these."""
    config, key = exits_config(kind, fused), jax.random.key(5)
    batch = batch_of_rows()
    now = normed(batch.final)

    @jax.jit
    @jax.value_and_grad
    def of_first_exit(params) -> jax.Array:
        return jnp.sum(jnp.square(features(config, params, batch, now, 1.0, key)[0]))

    value, gradient = of_first_exit(heads_parameters(config, parameters(kind, fused)))
    for name in ("map", "norm"):
        assert np.abs(gradient[name][...][0]).max() > 0
        assert not np.asarray(gradient[name][...][1:]).any()
    others = parameters(kind, fused) | {"map": parameters(kind, fused)["map"] + np.array([[[0]], [[0.1]], [[0.1]]])}
    moved, _ = of_first_exit(heads_parameters(config, others))
    assert abs(moved - value) > 1e-3, "exit 1 reads no estimate: this would test nothing"


@functools.cache
def told() -> tuple[LanguageModel, jax.Array, jax.Array]:
    """Return a model, tokens [B, n], and states [L, B, n, D] after every layer."""
    lm = small_model()
    model = merge_model(lm.config, lm.weights)
    shape = (len(ROWS), STEPS)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, LLAMA.vocab_size, shape), jnp.int32)
    return lm, tokens, jax.jit(functools.partial(depth_states, depths=(1, 2, 3, 4)))(model, tokens)


@pytest.mark.parametrize(("kind", "fused"), KINDS)
def test_training_on_the_truth_is_what_a_root_gets_in_decoding(kind, fused) -> None:
    lm, tokens, states = told()
    config, model = exits_config(kind, fused), merge_model(lm.config, lm.weights)
    position = np.broadcast_to(np.arange(STEPS, dtype=np.int32), tokens.shape)
    weight = np.ones(tokens.shape, np.float32)
    batch = Activations(states[:-1], states[-1], model.embed_tokens(tokens), tokens, position, weight)
    params = heads_parameters(config, parameters(kind, fused))
    found = features(config, params, batch, model.normed(batch.final), 0.0, jax.random.key(0))

    # There is a sequence for each position of a root. Every stage sees the root as if it had just reached it.
    roots = np.array([1, WINDOW, STEPS - 1])
    shape = (len(DEPTHS) + 1, len(roots), 1)

    @jax.jit
    def decode(tokens, final, hidden) -> jax.Array:
        arrays = exit_arrays(model, config, parameters(kind, fused), np.arange(config.draft_size, dtype=np.int32))
        memory = TrainedHeads(config).empty(len(roots), 0, jnp.float32)
        chunk = Chunk(tokens, final, jnp.int32(0), jnp.asarray(roots))
        memory = TrainedHeads(config).extend(model, arrays, memory, chunk)
        view = StageView(
            ring=jnp.arange(shape[0]),
            token=jnp.broadcast_to(tokens[0, roots][None, :, None], shape),
            position=jnp.broadcast_to(roots[None, :, None], shape),
            live=jnp.ones(shape, bool),
            ancestors=jnp.zeros((*shape, shape[0]), bool),
            parent=jnp.full(shape, NO_NODE),
            prefix=jnp.asarray(roots),
            slots=jnp.broadcast_to(jnp.asarray(roots)[:, None], (len(roots), shape[0])),
        )
        exits = trained_exits(model, config, arrays)
        return exits.features(types.SimpleNamespace(exits=memory), hidden, view)

    rows = [jnp.broadcast_to(x[0], (len(roots), *x.shape[1:])) for x in (tokens, states[-1])]
    root = decode(*rows, states[:, 0, roots, None])
    chex.assert_trees_all_close(root[:, :, 0], found[:, 0, roots], atol=2e-5, rtol=1e-4)


def test_the_draft_vocabulary_holds_what_texts_go_on_with() -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=1, eos_ids=(31, 5)))
    rng = np.random.default_rng(0)
    texts = [Text(rng.integers(0, 40, 30).astype(np.int32), rng.choice([0, 0.25, 1], 30), 1) for _ in range(9)]
    chosen = draft_vocabulary(lm, texts, 12)
    assert chosen.dtype == np.int32
    assert (np.diff(chosen) > 0).all()
    assert {31, 5} <= set(chosen.tolist())
    counts = [sum(t.weight[i - 1] for t in texts for i in range(1, 30) if t.token[i] == token) for token in range(48)]
    out = [token for token in range(48) if token not in chosen]
    assert min(counts[token] for token in chosen if token not in (31, 5)) >= max(counts[token] for token in out)
