"""Answers in batches, and the counts that follow from them without a loop."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from reference.small_models import GEMMA, LLAMA, random_exits, small_model

import dex_jax
from dex_jax.decoding.counting import ticks_of
from dex_jax.forced import run
from dex_jax.forced.asks import dex_asks
from dex_jax.forced.counts import dex_counts
from dex_jax.forced.run import force
from dex_jax.forced.texts import answers, batches

TOKENS = 24
DEPTHS = (1, 2, 3, 4)


def prompts(count: int = 6) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, LLAMA.vocab_size, length).tolist() for length in rng.integers(2, 14, count)]


@pytest.mark.slow
def test_counts_are_those_of_the_loops():
    lm, exits, ids = small_model(GEMMA), random_exits("attn", draft=LLAMA.vocab_size // 2), prompts()
    asks = dex_asks(DEPTHS, exits.config)
    # Four stages: a node can lie three behind the newest committed position.
    assert max(ask.lag for ask in asks) == 3
    texts = answers(lm, ids, TOKENS, batch=len(ids))
    forced = force(lm, exits, texts, sorted(asks), count=len(DEPTHS) - 1)
    method = dex_jax.Dex(depths=DEPTHS, rows="full", draft=False)
    dex = dex_jax.generate(lm, ids, method=method, max_new_tokens=TOKENS, exits=exits)
    early = 0
    for row, count in enumerate(dex_counts(forced, DEPTHS)):
        assert texts[row][1] == dex.tokens[row, : dex.lengths[row]].tolist()
        assert count.exits.tolist() == dex.stats.exits[row, : dex.lengths[row]].tolist()
        assert ticks_of(count.exits, len(count.exits), len(DEPTHS)) == dex.stats.ticks[row]
        early += int((count.exits[1:] < len(DEPTHS)).sum())
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

    class Seen(Exception):
        """Holds the compiled program, which need not run."""

    def compiled(*args):
        raise Seen(forced_ask.lower(*args).compile().as_text())

    forced_ask = run.ask_exits
    monkeypatch.setattr(run, "ask_exits", compiled)
    lm, exits = small_model(dataclasses.replace(LLAMA, vocab_size=4096)), random_exits("attn")
    with pytest.raises(Seen) as seen:
        force(lm, exits, [(prompt, prompt) for prompt in prompts()], dex_asks(DEPTHS, exits.config), count=3)
    assert 'custom_call_target="TopK"' in str(seen.value)
    assert " sort(" not in str(seen.value)
