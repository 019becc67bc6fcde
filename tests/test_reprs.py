"""What print(lm) and print(out) show."""

from __future__ import annotations

import dataclasses

import pytest
from reference.small_models import small_model

import dex_jax


@pytest.fixture(scope="module")
def lm():
    return small_model()


@pytest.fixture(scope="module")
def out(lm):
    return dex_jax.generate(lm, [[1, 2, 3], [4, 5]], method=dex_jax.AR(), max_new_tokens=6)


def test_a_model_says_what_it_is(lm) -> None:
    shown = repr(lm)
    for part in (lm.source, f"{lm.config.num_layers} layers", str(lm.config.vocab_size), "float32", "MB"):
        assert part in shown
    assert "\n" not in shown


def test_an_output_shows_texts_and_what_they_took(out) -> None:
    shown = str(out)
    head, first, second, times = shown.splitlines()
    assert head.startswith("AR on cpu")
    assert f"{out.lengths.sum()} tokens" in head
    assert " ".join(map(str, out.tokens[0, :6].tolist())) in first
    assert f"{out.stats.ticks[1]} ticks" in second
    assert "prefill" in times
    texts = ["word " * 100, "b"] * 5
    many = dataclasses.replace(
        out, texts=texts, tokenizer=object(), tokens=out.tokens.repeat(5, 0), lengths=out.lengths.repeat(5)
    )
    stats = dataclasses.replace(out.stats, ticks=None, depth_side_speedup=None, decode_seconds=0.0)
    shown = str(dataclasses.replace(many, stats=stats))
    assert "…" in shown
    assert "ticks" not in shown
    assert "and 2 more" in shown
    assert max(map(len, shown.splitlines())) < 120
