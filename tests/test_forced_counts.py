"""Answers in batches, and the counts that follow from them without a loop."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import slow
from reference.small_models import GEMMA, LLAMA, random_parameters, small_model

import dex_jax
from dex_jax.config import ExitsConfig
from dex_jax.decoding.counting import ticks_of
from dex_jax.forced import run
from dex_jax.forced.asks import dex_asks
from dex_jax.forced.counts import dex_counts
from dex_jax.forced.run import force
from dex_jax.forced.texts import answers, batches
from dex_jax.io.exits_file import TrainedExits

TOKENS = 24
DEPTHS = (1, 2, 3, 4)


def random_exits(kind: str, **more) -> TrainedExits:
    config = ExitsConfig(kind, DEPTHS[:-1], LLAMA.width, heads=2, head_dim=8, hidden=16, rank=4, window=5, **more)
    vocabulary = None if config.draft_size is None else np.arange(0, LLAMA.vocab_size, 2, dtype=np.int32)
    return TrainedExits(config, random_parameters(config), vocabulary, "0", {}, "random")


def prompts(count: int = 6) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, LLAMA.vocab_size, length).tolist() for length in rng.integers(2, 14, count)]


@pytest.mark.parametrize(
    ("config", "kind", "more", "depths"),
    [
        slow(GEMMA, "linear", {"fused": True}, (1, 2, 4)),
        # Four stages: a node can lie three behind the newest committed position.
        slow(LLAMA, "attn", {"draft_size": LLAMA.vocab_size // 2}, DEPTHS),
    ],
)
def test_counts_are_those_of_the_loops(config, kind, more, depths):
    lm, exits, ids = small_model(config), random_exits(kind, **more), prompts()
    asks = dex_asks(depths, exits.config)
    if kind == "attn":
        assert max(ask.lag for ask in asks) == 3
    texts = answers(lm, ids, TOKENS, batch=8)
    forced = force(lm, exits, texts, sorted(asks), count=len(depths) - 1)
    plain = dex_jax.generate(lm, ids, method=dex_jax.AR(), max_new_tokens=TOKENS)
    for row, (_, tokens) in enumerate(texts):
        assert tokens == plain.tokens[row, : plain.lengths[row]].tolist()
    options = {"max_new_tokens": TOKENS, "exits": exits}
    dex = dex_jax.generate(lm, ids, method=dex_jax.Dex(depths=depths, rows="full", draft=False), **options)
    early = 0
    for row, count in enumerate(dex_counts(forced, depths)):
        assert count.exits.tolist() == dex.stats.exits[row, : dex.lengths[row]].tolist()
        assert ticks_of(count.exits, len(count.exits), len(depths)) == dex.stats.ticks[row]
        early += int((count.exits[1:] < len(depths)).sum())
    assert early > 5


def test_batches_are_full_and_by_length():
    lengths = [5, 300, 17, 16, 200, 31, 16, 2]
    found = list(batches(lengths, 3))
    assert sorted(i for members in found for i in members) == list(range(len(lengths)))
    assert [[lengths[i] for i in members] for members in found] == [[2, 5, 16], [16, 17, 31], [200, 300]]


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of top_k is another matter elsewhere")
def test_no_vocabulary_is_sorted(monkeypatch):
    """A sort of the vocabulary in place of its best few takes ten times as long as all else that is asked."""
    seen = []

    def compiled(*args):
        seen.append(forced_ask.lower(*args).compile().as_text())
        return forced_ask(*args)

    forced_ask = run.ask_exits
    monkeypatch.setattr(run, "ask_exits", compiled)
    lm = small_model(dataclasses.replace(LLAMA, vocab_size=4096))
    exits = dataclasses.replace(random_exits("attn"), vocabulary=None)
    force(lm, exits, [(prompt, prompt) for prompt in prompts()], dex_asks(DEPTHS, exits.config), count=3)
    assert 'custom_call_target="TopK"' in seen[0]
    assert " sort(" not in seen[0]
