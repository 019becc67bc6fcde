"""The self-check on a tiny random model: what it prints, and that it notices what is wrong."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import pytest
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax import selfcheck

LM = small_model(dataclasses.replace(LLAMA, num_layers=2))


@pytest.mark.slow
def test_every_check_holds(capsys, monkeypatch) -> None:
    monkeypatch.setattr("dex_jax.language_model.load", lambda model, dtype, weights: LM)
    assert selfcheck.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok   ") for line in lines) == 9
    assert all(any(line.startswith(f"{what}: ") and "ms a tick" in line for line in lines) for what in ("AR", "K = 2"))
    assert lines[-1] == "all checks hold"


def test_wrong_tokens_and_ticks_are_found(capsys, monkeypatch) -> None:
    explored, plain = (
        dex_jax.generate(LM, [[1, 2, 3]], method=method, exits="shared", max_new_tokens=24)
        for method in (dex_jax.Dex(explorers=2, draft=False), dex_jax.AR())
    )
    assert selfcheck.counted_ticks("greedy", explored).holds
    assert selfcheck.same_tokens(LM, "greedy", explored, plain, 0.0).holds
    explored.tokens[0, 5] = (explored.tokens[0, 5] + 1) % LLAMA.vocab_size
    explored.stats.exits[0, 3] = explored.stats.exits[0, 3] % 2 + 1
    finding = selfcheck.same_tokens(LM, "greedy", explored, plain, 0.0)
    assert not finding.holds
    assert "part at token 5" in finding.detail
    assert "too wide to be rounding" in finding.detail
    assert not selfcheck.counted_ticks("greedy", explored).holds
    monkeypatch.setattr("dex_jax.language_model.load", lambda model, dtype, weights: LM)
    monkeypatch.setattr(selfcheck, "selfcheck", lambda lm: ({"device": "cpu"}, [finding]))
    assert selfcheck.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED"


def test_this_jax_computes_what_others_did_not() -> None:
    assert selfcheck.canaries().holds


@pytest.mark.parametrize(("name", "issue"), [("arctan", "39352"), ("sum", "39103")])
def test_a_wrong_result_is_found(name, issue, monkeypatch) -> None:
    right = getattr(jnp, name)
    monkeypatch.setattr(jnp, name, lambda x: right(x) * 0.99)
    finding = selfcheck.canaries()
    assert not finding.holds
    assert issue in finding.detail
