"""Drafts on small transformers: tokens are AR's, and a drafter sees in decoding what it saw in training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference.small_models import LLAMA, assert_same_tokens, ragged_prompts, random_drafter, random_exits, small_model

import dex_jax
from dex_jax.decoding import plan as planning
from dex_jax.decoding.dex.interface import Chunk, DraftRows
from dex_jax.decoding.dex.trained_exits import TrainedHeads, exit_arrays
from dex_jax.decoding.dex.trees import DRAFTED_TREES, TreeShape
from dex_jax.decoding.plan import resolve
from dex_jax.decoding.record import ticks_of
from dex_jax.lattice import NO_NODE
from dex_jax.nn.exits import heads_of
from dex_jax.nn.forward import depth_states
from dex_jax.nn.weights import merge_model
from dex_jax.training.distillation import read_drafts
from dex_jax.training.packing import Activations

ONE = dex_jax.Dex(explorers=1)


@pytest.fixture(scope="module")
def lm():
    return small_model()


SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


@pytest.mark.parametrize(("explorers", "kind", "options"), [(1, "mlp", {}), slow(2, "linear", SAMPLED)])
def test_tokens_are_those_of_ar_and_exits_no_later(explorers, kind, options) -> None:
    lm, prompts = small_model(dataclasses.replace(LLAMA, num_layers=2)), ragged_prompts(3)
    method = dex_jax.Dex(explorers=explorers, rows=40)  # never pruned
    plain, out = (
        dex_jax.generate(lm, prompts, method=each, exits=exits, max_new_tokens=40, **options)
        for each, exits in ((dex_jax.AR(), "shared"), (method, random_drafter(kind)))
    )
    assert_same_tokens(lm, out, plain, **options)
    stats = out.stats
    if explorers > 1:
        alone = dataclasses.replace(method, draft=False)
        silent = dex_jax.generate(lm, prompts, method=alone, exits="shared", max_new_tokens=40, **options)
        assert (stats.exits[:, 1:] <= silent.stats.exits[:, 1:]).all()
    for row, length in enumerate(out.lengths):
        assert stats.ticks[row] == ticks_of(stats.exits[row], length, explorers)
        assert stats.depth_side_speedup[row] == pytest.approx(explorers * (length - 1) / stats.ticks[row])
    assert (stats.exits == 0).any(), "nothing drafted was ever right: this would test nothing"
    assert stats.counts == {}
    assert stats.plan.exits_source == (None if explorers == 1 else "shared")
    assert stats.plan.drafter_source == "random"


@pytest.mark.slow
def test_trained_exits_and_a_drafter_work_together(lm, monkeypatch, steady_ticks) -> None:
    monkeypatch.setattr(planning, "default_drafter", lambda fingerprint: random_drafter())
    exits, prompts = random_exits("attn", draft=30), ragged_prompts(2)
    plain = dex_jax.generate(lm, prompts, method=dex_jax.AR(), max_new_tokens=30)
    out = dex_jax.generate(lm, prompts, method=dex_jax.Dex(explorers=4), exits=exits, max_new_tokens=30)
    assert_same_tokens(lm, out, plain)
    assert (out.stats.plan.exits_source, out.stats.plan.drafter_source) == ("random", "default")
    assert {0, 4} < set(out.stats.exits[:, 1:].ravel().tolist()), "drafts, and exits beside them"


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_the_drafter_reads_in_decoding_what_it_read_in_training(lm, kind) -> None:
    """A chain of drafts after a prompt, read in two pieces, equals `read_drafts` at the same positions."""
    model = merge_model(lm.config, lm.weights)
    given, drafted, prefix = random_drafter(kind), 4, 6
    config = given.config
    # bfloat16 holds these values exactly, as a drafter may be kept in it.
    exact = {name: value.astype(jnp.bfloat16).astype(np.float32) for name, value in given.parameters.items()}
    given = dataclasses.replace(given, parameters=exact)
    arrays = exit_arrays(model, config, given.parameters, given.vocabulary)
    tokens = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (1, prefix + drafted)).astype(np.int32)
    hidden = jax.jit(lambda tokens: depth_states(model, tokens, (LLAMA.num_layers,))[0])(tokens)

    heads = TrainedHeads(config)
    memory, drafter_of = heads.empty(1, 16, jnp.float32), heads.drafter(model, arrays)
    read = jax.jit(lambda memory, *chunk: heads.extend(model, arrays, memory, Chunk(*chunk)))
    draft = jax.jit(lambda *below: drafter_of.features(None, drafter_of.blank(1, 1), DraftRows(*below)))
    for start in (0, 4):
        piece = slice(start, start + 4)
        memory = read(memory, tokens[:, piece], hidden[:, piece], np.array([start]), np.array([min(start + 4, prefix)]))
    before = memory.previous[:, None]
    found = []
    for at in range(prefix, prefix + drafted):
        features, before = draft(tokens[:, at : at + 1], np.array([[at]]), np.array([[NO_NODE]]), before)
        found.append(np.array(features[0, 0]))

    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    normed = model.normed(hidden)
    embedded = model.embed_tokens(jnp.asarray(tokens))
    batch = Activations(embedded[None], hidden, embedded, jnp.asarray(tokens), position, jnp.ones(tokens.shape))
    trained, _ = read_drafts(heads_of(config, given.parameters, jnp.float32), batch, normed, drafted)
    for row in range(drafted):
        np.testing.assert_allclose(found[row], trained[row, 0, prefix + row], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(lm) -> None:
    for changes, says in (({"fused": False}, "kind mlp"), ({"kind": "attn"}, "kind attn")):
        other = dataclasses.replace(random_drafter(), config=dataclasses.replace(random_drafter().config, **changes))
        with pytest.raises(dex_jax.DexError, match=f"one fused exit at depth 0 .* random has one of {says}"):
            resolve(ONE, other, lm.config, "0")
    with pytest.raises(dex_jax.DexError, match="width 32, and this one has 64"):
        resolve(ONE, random_drafter(), dataclasses.replace(LLAMA, width=64), "0")
    with pytest.raises(dex_jax.DexError, match="random holds exits at depths, and one explorer has none"):
        resolve(ONE, random_exits("linear"), lm.config, "0")
    with pytest.raises(dex_jax.DexError, match="random holds a drafter, and the method asks none"):
        resolve(dex_jax.Dex(explorers=2, draft=False), random_drafter(), lm.config, "0")
    resolved = resolve(ONE, random_drafter(), lm.config, "another")
    assert "trained on another model" in resolved.remarks[0]
    assert resolved.drafts.widths == DRAFTED_TREES[-1].widths
    assert resolve(ONE, "default", lm.config, "none ships").heads.drafter is None


@dataclasses.dataclass(frozen=True)
class Own:
    """A method of one's own that plans what Dex does, or a tree that stays."""

    tree: TreeShape | None = None

    def plan_for(self, num_layers: int) -> planning.Plan:
        plan = planning.plan_for(ONE, num_layers)
        return plan if self.tree is None else dataclasses.replace(plan, drafts=self.tree, tree_for=None)


def test_a_method_of_ones_own_gets_the_tree_of_what_drafts(lm) -> None:
    assert resolve(Own(), random_drafter(), lm.config, "0").drafts == resolve(ONE, random_drafter(), LLAMA, "0").drafts
    assert resolve(Own(), "shared", lm.config, "0").drafts == resolve(ONE, "shared", LLAMA, "0").drafts
    shape = TreeShape((2, 1), 1, (0.5,) * 8)
    assert resolve(Own(shape), random_drafter(), lm.config, "0").drafts == shape


def test_a_tree_of_ones_own_replaces_the_drafters(lm) -> None:
    shape = TreeShape((2, 1), 1, (0.5,) * 8)
    method = dex_jax.Dex(explorers=1, draft=shape)
    assert resolve(method, random_drafter(), lm.config, "0").drafts == shape
    assert resolve(method, "shared", lm.config, "0").rows == 4
    silent = dex_jax.Dex(explorers=1, draft=dataclasses.replace(shape, drafter_levels=0))
    with pytest.raises(dex_jax.DexError, match="and the method asks none"):
        resolve(silent, random_drafter(), lm.config, "0")
    with pytest.raises(dex_jax.DexError, match="3 of \\(2, 1\\)"):
        dataclasses.replace(shape, drafter_levels=3)
    with pytest.raises(dex_jax.DexError, match="8 probabilities"):
        dataclasses.replace(shape, lookup=(0.5,))
