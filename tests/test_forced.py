"""The teacher-forcing pass and its figures against a slow twin, and untrained exits against plain decoding."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from reference.exit_metrics_twin import TRUE, TextTwin
from reference.greedy import is_greedy
from reference.small_models import LLAMA, random_parameters, small_model

from dex_jax.config import ExitsConfig
from dex_jax.decoding import forced
from dex_jax.decoding.forced import Forced, batches, dex_exits, first_exits, force
from dex_jax.decoding.record import ticks_of
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.nn.forward import depth_states
from dex_jax.nn.weights import merge_model
from dex_jax.training.figures import answers, figures_of, grouped_figures

EOS = 63
SMALL = {"vocab_size": 64, "width": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 24, "context": 256}
MODEL = dataclasses.replace(LLAMA, **SMALL, tied=False, eos_ids=(EOS,))
DEPTHS = (1, 2, 3)
GRIDS = ((2, 4), (2, 3, 4), (1, 2, 3, 4))
DRAFT = np.asarray([2, 3, 5, 8, 13, 21, 34, 55], np.int32)
KINDS = {
    "shared": {"kind": "shared"},
    "linear, fused, draft": {"kind": "linear", "fused": True, "draft_size": len(DRAFT)},
    "mlp, draft": {"kind": "mlp", "hidden": 8, "draft_size": len(DRAFT)},
    "attn, draft": {"kind": "attn", "hidden": 8, "heads": 2, "head_dim": 4, "window": 5, "draft_size": len(DRAFT)},
}


@functools.cache
def _model() -> LanguageModel:
    return small_model(MODEL)


@functools.cache
def _texts() -> list[tuple[list[int], list[int]]]:
    """Return texts with random answers, mostly of the draft vocabulary, so that exits are often right by chance."""
    rng = np.random.default_rng(5)
    lengths = [(1, 9), (12, 24), (3, 1), (7, 2), (20, 24)]
    likely = np.concatenate([np.repeat(DRAFT, 8), np.arange(EOS)])
    return [(rng.integers(0, EOS, p).tolist(), rng.choice(likely, n).tolist()) for p, n in lengths]


@functools.cache
def _exits(name: str) -> TrainedExits:
    config = ExitsConfig(depths=DEPTHS, width=MODEL.width, **KINDS[name])
    parameters = random_parameters(config, seed=len(name), spread=0.5)
    return TrainedExits(config, parameters, DRAFT if config.draft_size else None, "0", {}, "random")


@functools.cache
def _measured(name: str) -> Forced:
    return force(_model(), _exits(name), _texts(), GRIDS, batch=2)


@functools.cache
def _states() -> list[np.ndarray]:
    """Return states [L, T, D] of each text, run one at a time, all padded to one length."""
    lm = _model()
    model = merge_model(lm.config, lm.weights)
    of_text = jax.jit(lambda ids: depth_states(model, ids, (1, 2, 3, 4)))
    found = []
    for prompt, answer in _texts():
        ids = np.zeros((1, 64), np.int32)
        ids[0, : len(prompt) + len(answer) - 1] = [*prompt, *answer[:-1]]
        found.append(np.asarray(of_text(ids), float)[:, 0])
    return found


@functools.cache
def _twins(name: str) -> list[TextTwin]:
    lm, exits = _model(), _exits(name)
    model = merge_model(lm.config, lm.weights)
    embed, unembed, norm = (np.asarray(x[...], float) for x in (model.embed, model.unembed, model.final_norm))
    vocabulary = range(MODEL.vocab_size) if exits.vocabulary is None else DRAFT
    parameters = {name: value.astype(float) for name, value in exits.parameters.items()}
    twins = []
    for (prompt, answer), states in zip(_texts(), _states(), strict=True):
        last = states[3]
        final = last / np.sqrt((last * last).mean(axis=1, keepdims=True) + MODEL.norm_eps) * norm
        by_depth = dict(zip((1, 2, 3), states, strict=False))
        shape = (by_depth, final, exits.config, parameters, embed, unembed, [int(t) for t in vocabulary])
        twins.append(TextTwin(prompt, answer, *shape))
    return twins


def _positions(name: str) -> list[tuple[TextTwin, int]]:
    return [(twin, i) for twin in _twins(name) for i in range(len(twin.answer))]


every_kind = pytest.mark.parametrize("name", KINDS)


@every_kind
def test_every_position_says_what_the_twin_says(name: str) -> None:
    measured, where = _measured(name), _positions(name)
    own = {(1, 2), (1, 3), (2, 3)} if _exits(name).config.needs_previous else set()
    assert set(measured.asks) == {(d, 4) for d in DEPTHS} | own
    assert measured.answer_tokens.tolist() == [twin.answer[i] for twin, i in where]
    for p, (depth, previous) in enumerate(measured.asks):
        source = TRUE if previous == 4 else previous
        for (twin, i), best in zip(where, measured.outputs.best[:, p].tolist(), strict=True):
            logits = twin.logits(depth, i, source)[0]
            assert len(set(best)) == len(best)
            # Logits are compared, as rounding may swap tokens that tie.
            assert [logits[token] for token in best] == pytest.approx(sorted(logits.values())[:-4:-1], abs=1e-5)
        if source is TRUE:
            expected = [twin.divergence(depth, i) for twin, i in where]
            np.testing.assert_allclose(measured.outputs.divergence[:, p], expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_predicted_exits_are_the_twins(name: str) -> None:
    measured, twins = _measured(name), _twins(name)
    for grid in GRIDS:
        predicted = [exits.tolist() for exits in dex_exits(measured, grid)]
        assert predicted == [twin.predicted_exits(grid) for twin in twins]
    # The chain of exits is only tested if a token's birth changes which exit comes first for the next.
    fresh, *others = (first_exits(measured, GRIDS[2], born) for born in (4, 1, 2, 3))
    assert any((other != fresh).any() for other in others) == _exits(name).config.needs_previous


@every_kind
def test_figures_are_the_twins(name: str) -> None:
    figures, where, twins = figures_of(_measured(name)), _positions(name), _twins(name)
    tokens = len(where)
    assert (figures.texts, figures.tokens, figures.depths) == (5, 60, DEPTHS)
    right = {d: [twin.best(d, i) == twin.answer[i] for twin, i in where] for d in DEPTHS}
    assert figures.agreement == pytest.approx([np.mean(right[d]) for d in DEPTHS])
    for depth, previous, share in figures.agreement_own:
        assert share == pytest.approx(np.mean([twin.best(depth, i, previous) == twin.answer[i] for twin, i in where]))
    assert figures.divergence == pytest.approx(
        [np.mean([twin.divergence(d, i) for twin, i in where]) for d in DEPTHS], rel=1e-4
    )
    earliest = [twin.earliest_depth(i) for twin, i in where]
    assert figures.ead == pytest.approx([earliest.count(d) / tokens for d in (*DEPTHS, None)])
    assert figures.draft_share == pytest.approx(np.mean([twin.answer[i] in twin.vocabulary for twin, i in where]))
    for grid, found in zip(GRIDS, figures.grids, strict=True):
        k = len(grid)
        assert found.explorers == k
        fresh = [twin.first_exit(grid, i, k) for twin, i in where]
        assert found.coverage == pytest.approx([np.mean([first <= m for first in fresh]) for m in range(1, k)])
        ticks = sum(ticks_of(np.asarray(twin.predicted_exits(grid)), len(twin.answer), k) for twin in twins)
        assert found.ticks_per_token == pytest.approx(ticks / (tokens - 5))
        assert found.depth_side_speedup == pytest.approx(k * (tokens - 5) / ticks)


def test_answers_are_greedy_and_come_in_the_order_of_their_prompts() -> None:
    lm, longest = _model(), 24
    prompts = [*(prompt for prompt, _ in _texts()), np.random.default_rng(3).integers(0, EOS, 50).tolist()]
    texts = answers(lm, prompts, longest, batch=3)
    for prompt, (given, answer) in zip(prompts, texts, strict=True):
        assert given == prompt
        assert is_greedy(lm, prompt, answer)
        assert len(answer) == longest or answer[-1] == EOS


def test_nothing_counts_after_the_first_eos() -> None:
    kept = [(prompt, [*answer[:23], EOS]) for prompt, answer in _texts()]
    texts = [(prompt, [*answer, 2, EOS, 3]) for prompt, answer in kept]
    measured = force(_model(), _exits("shared"), texts, batch=2)
    assert measured.lengths == tuple(len(answer) for _, answer in kept)
    assert measured.answer_tokens.tolist() == [token for _, answer in kept for token in answer]


def test_groups_and_their_mean() -> None:
    texts = _texts()
    groups = {"humaneval": texts[:2], "spec_bench": texts[2:]}
    figures = grouped_figures(_model(), _exits("mlp, draft"), groups, batch=2)
    assert list(figures) == ["humaneval", "spec_bench", "mean"]
    parts = [figures[name] for name in groups]
    # All depths below 4 layers serve two, three and four explorers.
    assert parts == [figures_of(_measured("mlp, draft").of(texts)) for texts in ([0, 1], [2, 3, 4])]
    mean = figures["mean"]
    assert (mean.texts, mean.tokens, mean.depths) == (5, 60, DEPTHS)
    assert mean.agreement == pytest.approx(np.mean([part.agreement for part in parts], axis=0))
    speedups = [part.grids[1].depth_side_speedup for part in parts]
    assert mean.grids[1].depth_side_speedup == pytest.approx(np.mean(speedups))
    assert mean.grids[1].explorers == 3
    assert json.loads(json.dumps(mean.to_json()))["grids"][1]["coverage"] == list(mean.grids[1].coverage)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "0 texts"),
        ({"texts": [([], [1])]}, "text 1 has no prompt"),
        ({"texts": [([1], [2]), ([1], [])]}, "text 2 has no answer"),
        ({"texts": [([1] * 200, [2] * 57)]}, "text 1 has 257 tokens"),
        ({"texts": [([1], [64])]}, "text 1 holds token ids outside"),
        ({"vocabulary": None}, "draft vocabulary of 8 tokens and were given None"),
        ({"vocabulary": DRAFT[::-1]}, "ascending"),
        ({"lm": dataclasses.replace(MODEL, num_layers=3)}, "do not fit"),
    ],
)
def test_bad_input_is_refused(change: dict, message: str) -> None:
    with pytest.raises(DexError, match="at least one text in each"):
        grouped_figures(_model(), _exits("shared"), {"empty": []})
    lm = small_model(change["lm"]) if "lm" in change else _model()
    exits = dataclasses.replace(_exits("mlp, draft"), vocabulary=change.get("vocabulary", DRAFT))
    with pytest.raises(DexError, match=message):
        force(lm, exits, change.get("texts", [([1], [2])]))


def test_batches_are_full_and_by_length() -> None:
    lengths = [5, 300, 17, 16, 200, 31, 16, 2]
    found = list(batches(lengths, 3))
    assert sorted(i for members in found for i in members) == list(range(len(lengths)))
    assert [[lengths[i] for i in members] for members in found] == [[2, 5, 16], [16, 17, 31], [200, 300]]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of top_k is another matter elsewhere")
def test_no_vocabulary_is_sorted(monkeypatch) -> None:
    """A sort of the vocabulary in place of a top-k takes ten times as long as the rest of `ask_exits_along`."""
    found = []

    def compiled(*args):
        found.append(ask_exits_along.lower(*args).compile().as_text())
        return ask_exits_along(*args)

    ask_exits_along = forced.ask_exits_along
    monkeypatch.setattr(forced, "ask_exits_along", compiled)
    model = dataclasses.replace(MODEL, vocab_size=4096)
    exits = dataclasses.replace(_exits("attn, draft").config, draft_size=None)
    exits = TrainedExits(exits, random_parameters(exits, seed=1, spread=0.5), None, "0", {}, "random")
    force(small_model(model), exits, _texts(), GRIDS)
    assert 'custom_call_target="TopK"' in found[0]
    assert " sort(" not in found[0]
