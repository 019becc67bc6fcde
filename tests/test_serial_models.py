"""Serial rounds on small transformers: tokens of AR, and a drafter that sees in decoding what it saw in training."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference.small_models import LLAMA, assert_same_tokens, ragged_prompts, small_model

import dex_jax
from dex_jax.config import ExitsConfig
from dex_jax.decoding.costs import ROWS, StepCosts
from dex_jax.decoding.drafter import transformer_drafter
from dex_jax.decoding.drafts import TreeShape
from dex_jax.decoding.exits import resolve_method
from dex_jax.decoding.known_trees import LOOKUP_TRUST, KnownTree, known_trees, with_trees
from dex_jax.decoding.output import rounds_of
from dex_jax.decoding.trained_exits import empty_memory, exit_arrays, read_chunk
from dex_jax.evaluation import tree_search
from dex_jax.evaluation.tree_search import first_tree, large_tree, neighbours, search_trees
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import merge_model
from dex_jax.nn.exits import exit_parameters, heads_of
from dex_jax.nn.forward import depth_states
from dex_jax.training.drafting import read_drafts
from dex_jax.training.stream import Activations

CONFIG = ExitsConfig("mlp", (0,), LLAMA.width, fused=True, hidden=12, draft_size=40)
KINDS = {kind: dataclasses.replace(CONFIG, kind=kind) for kind in ("mlp", "linear")}
SERIAL = dex_jax.Dex(schedule="serial")


@functools.cache
def drafter(kind: str = "mlp", widths: tuple[int, ...] = (3, 2, 1, 1), drafted: int = 3) -> TrainedExits:
    """A random drafter, near the model's own head."""
    rng = np.random.default_rng(1)
    parameters = {}
    for name, (shape, start) in exit_parameters(KINDS[kind]).items():
        scale = 0.3 / np.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        parameters[name] = (rng.standard_normal(shape) * scale + (start in ("norm", "scale"))).astype(np.float32)
    vocabulary = np.sort(rng.permutation(LLAMA.vocab_size)[:40]).astype(np.int32)
    tree = KnownTree(TreeShape(widths, drafted, (0.3, *[0.7] * 7)), 1.5)
    return with_trees(TrainedExits(KINDS[kind], parameters, vocabulary, "0", {}, "random"), [tree])


@pytest.fixture(scope="module")
def lm():
    return small_model()


SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


@pytest.mark.parametrize(
    ("exits", "options"),
    [
        ("mlp", {}),
        ("lookup", SAMPLED),
        slow("mlp", SAMPLED),
        slow("linear", {}),
        slow("linear", SAMPLED),
        slow("lookup", {}),
    ],
)
def test_tokens_are_those_of_ar(lm, exits, options) -> None:
    prompts, given = ragged_prompts(3), "shared" if exits == "lookup" else drafter(exits)
    plain = dex_jax.generate(lm, prompts, method=dex_jax.AR(), max_new_tokens=40, **options)
    out = dex_jax.generate(lm, prompts, method=SERIAL, exits=given, max_new_tokens=40, **options)
    filters = {name: options[name] for name in ("temperature", "top_p") if name in options}
    assert_same_tokens(lm, out, plain, **filters)
    stats = out.stats
    assert stats.ticks is None
    assert stats.depth_side_speedup is None
    for row, length in enumerate(out.lengths):
        assert stats.rounds[row] == stats.stage_steps[row] == rounds_of(stats.exits[row], length)
        assert stats.tokens_per_round[row] == pytest.approx((length - 1) / stats.rounds[row])
    assert stats.rounds.sum() < (out.lengths - 1).sum(), "nothing drafted was ever right: this would test nothing"
    assert stats.exits_source == (None if exits == "lookup" else "random")


@pytest.mark.slow
def test_the_stacked_layout_gives_the_same(lm) -> None:
    prompts = ragged_prompts(2)
    before = dex_jax.generate(lm, prompts, method=SERIAL, exits=drafter(), max_new_tokens=24)
    other = small_model()
    other.arrange(dex_jax.Stacked((1, 3, LLAMA.num_layers)))
    out = dex_jax.generate(other, prompts, method=SERIAL, exits=drafter(), max_new_tokens=24)
    assert out.tokens.tolist() == before.tokens.tolist()
    assert out.stats.rounds.tolist() == before.stats.rounds.tolist()


@pytest.mark.slow
def test_a_batch_is_its_single_runs(lm) -> None:
    prompts = ragged_prompts(4)
    together = dex_jax.generate(lm, prompts, method=SERIAL, exits=drafter(), max_new_tokens=24, **SAMPLED)
    for row, prompt in enumerate(prompts):
        options = SAMPLED | {"seed": SAMPLED["seed"] + row}
        alone = dex_jax.generate(lm, [prompt], method=SERIAL, exits=drafter(), max_new_tokens=24, **options)
        length = int(alone.lengths[0])
        assert together.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert together.stats.rounds[row] == alone.stats.rounds[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_drafter_reads_in_decoding_what_it_read_in_training(lm, kind) -> None:
    """A chain of drafts after a prompt, read in two pieces, against `read_drafts` at the same positions."""
    model = merge_model(lm.config, lm.layout, lm.weights)
    given, config, drafted, prefix = drafter(kind), KINDS[kind], 4, 6
    # What bfloat16 holds exactly, as a drafter may be kept in it.
    exact = {name: value.astype(jnp.bfloat16).astype(np.float32) for name, value in given.parameters.items()}
    given = dataclasses.replace(given, parameters=exact)
    arrays = exit_arrays(model, config, given.parameters, given.vocabulary)
    tokens = np.random.default_rng(3).integers(0, LLAMA.vocab_size, (1, prefix + drafted)).astype(np.int32)
    hidden = depth_states(model, jnp.asarray(tokens), (LLAMA.num_layers,))[0]

    memory = empty_memory(config, 1, jnp.float32)
    drafter_of = transformer_drafter(model, config, arrays)
    for start, end in ((0, 4), (4, prefix)):
        piece, lengths = slice(start, end), jnp.asarray([end])
        memory = read_chunk(
            model,
            config,
            arrays,
            memory,
            jnp.asarray(tokens[:, piece]),
            hidden[:, piece],
            jnp.asarray([start]),
            lengths,
        )
    before = memory.previous[:, None]
    found = []
    for row in range(drafted):
        at = slice(prefix + row, prefix + row + 1)
        features, before = drafter_of.features(before, jnp.asarray(tokens[:, at]), jnp.asarray([[prefix + row]]))
        found.append(np.array(features[0, 0]))

    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    normed = model.normed(hidden)
    states = model.embed_tokens(jnp.asarray(tokens[:, prefix:]))[None]
    batch = Activations(states, normed, jnp.asarray(tokens), position, jnp.ones((1, drafted)))
    trained, _ = read_drafts(heads_of(config, given.parameters, jnp.float32), batch, normed, drafted)
    for row in range(drafted):
        np.testing.assert_allclose(found[row], trained[row, 0, row], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused(lm) -> None:
    for changes, says in (
        ({"depths": (1,)}, r"random has fused exits of kind mlp at depths 1: train one"),
        ({"fused": False}, r"random has exits of kind mlp at depths 0"),
        ({"kind": "attn"}, r"one fused exit at depth 0 without attention .* of kind attn at depths 0"),
    ):
        other = dataclasses.replace(drafter(), config=dataclasses.replace(CONFIG, **changes))
        with pytest.raises(dex_jax.DexError, match=says):
            resolve_method(SERIAL, other, lm.config, "0")
    with pytest.raises(dex_jax.DexError, match="width 32, and this one has 64"):
        resolve_method(SERIAL, drafter(), dataclasses.replace(LLAMA, width=64), "0")
    with pytest.raises(dex_jax.DexError, match='explorers belongs to schedule="parallel"'):
        dex_jax.Dex(explorers=3, schedule="serial").schedule_for(4)
    with pytest.raises(dex_jax.DexError, match="schedule must be one of auto, serial, parallel"):
        dex_jax.Dex(schedule="both").schedule_for(4)
    resolved = resolve_method(SERIAL, drafter(), lm.config, "another")
    assert "trained on another model" in resolved.remarks[0]
    assert resolved.schedule.tree == TreeShape((3, 2, 1, 1), 3, (0.3, *[0.7] * 7))
    assert resolve_method(SERIAL, "default", lm.config, "none ships").trained is None


def test_a_tree_of_ones_own_replaces_the_drafters(lm) -> None:
    shape = TreeShape((2, 1), 1, (0.5,) * 8)
    method = dex_jax.Dex(schedule="serial", tree=shape)
    assert resolve_method(method, drafter(), lm.config, "0").schedule.tree == shape
    assert resolve_method(method, "shared", lm.config, "0").schedule.rows == 4
    with pytest.raises(dex_jax.DexError, match='tree belongs to schedule="serial"'):
        dex_jax.Dex(tree=shape, schedule="parallel").schedule_for(4)
    with pytest.raises(dex_jax.DexError, match="3 of \\(2, 1\\)"):
        dataclasses.replace(shape, drafted=3)
    with pytest.raises(dex_jax.DexError, match="8 probabilities"):
        dataclasses.replace(shape, lookup=(0.5,))


def test_trees_around_one() -> None:
    around = neighbours(TreeShape((2, 1), 1, (0.5,) * 8), drafts=True)
    found = {(each.widths, each.drafted) for each in around}
    assert found == {((3,), 1), ((1, 1, 1), 1), ((2, 1), 2)}
    assert all(each.rows == 4 for each in around)
    assert neighbours(TreeShape((1, 1), 0, (0.5,) * 8), drafts=False) == []
    assert [first_tree(rows, True).rows for rows in ROWS[1:4]] == list(ROWS[1:4])
    assert first_tree(4, False) == TreeShape((1, 1, 1), 0, LOOKUP_TRUST)
    for rows in ROWS[1:]:
        large = large_tree(rows)
        assert large.rows == rows
        assert large.drafted == len(large.widths)
    assert large_tree(16).widths == (4, 3, 2, 2, 1, 1, 1, 1)


@pytest.mark.parametrize("drafted", [slow(True), False])
def test_the_search_climbs_for_each_size(lm, monkeypatch, drafted) -> None:
    cheap = StepCosts(ROWS, tuple(1 + 0.01 * (rows - 1) for rows in ROWS), 10**12)
    monkeypatch.setattr(tree_search, "step_costs", lambda *about: cheap)
    tried, prompts, given = [], [[3, 4, 5], [9, 8]], drafter() if drafted else None
    options = {"new_tokens": 16, "steps": 1, "tell": tried.append}
    found = search_trees(lm, given, prompts, sizes=(2, 4), largest=8, **options)
    if drafted:
        assert found.pop().tree.shape == large_tree(8)
    assert sorted(each.tree.shape.rows for each in found) == [2, 4]
    assert found[0].speedup >= found[1].speedup
    for best in found:
        rivals = [each for each in tried if each.tree.shape.rows == best.tree.shape.rows]
        assert best.speedup == max(each.speedup for each in rivals)
        method = dex_jax.Dex(schedule="serial", tree=best.tree.shape)
        out = dex_jax.generate(lm, prompts, method=method, exits=given or "shared", max_new_tokens=16)
        assert best.tree.tokens_per_round == (out.lengths - 1).sum() / out.stats.rounds.sum()
    kept = with_trees(drafter(), [each.tree for each in found])
    assert known_trees(kept) == tuple(each.tree for each in found)
    assert resolve_method(SERIAL, kept, lm.config, "0").schedule.tree == found[0].tree.shape
    with pytest.raises(dex_jax.DexError, match="sizes must be among 2, 4, 8, 16, not 3"):
        search_trees(lm, given, prompts, sizes=(3,), largest=None)
    with pytest.raises(dex_jax.DexError, match="more rows than 4, not 4"):
        search_trees(lm, given, prompts, sizes=(4,), largest=4)


def test_a_stop_string_counts_the_rounds_up_to_it(lm) -> None:
    whole = jax.tree.map(np.asarray, dex_jax.generate(lm, [[3, 4, 5]], method=SERIAL, max_new_tokens=24).stats.exits[0])
    for length in range(1, len(whole) + 1):
        rounds = rounds_of(whole, length)
        assert rounds == rounds_of(whole, length - 1) + (length > 1 and (length == 2 or whole[length - 2] == 1))
