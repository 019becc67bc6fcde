"""LayerSkip accepts as many drafts as transformers' `assistant_early_exit` does, prompt by prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dex_jax

GOLDENS = Path(__file__).parent / "goldens"


def counts_of(lm, golden: dict, depth: int, draft_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """([rounds, drafted, accepted] of each prompt here, and there)."""
    runs = [run for run in golden["runs"] if (run["exit"], run["draft_length"]) == (depth, draft_length)]
    prompts = json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
    method = dex_jax.LayerSkip(exit=depth, draft_length=draft_length)
    options = {"method": method, "exits": "shared", "max_new_tokens": golden["new_tokens"]}
    stats = dex_jax.generate(lm, [prompts[run["prompt"]]["prompt_ids"] for run in runs], **options).stats
    ours = np.stack([stats.rounds, stats.drafted, stats.accepted], axis=1).tolist()
    return ours, [[run["rounds"], run["drafted"], run["accepted"]] for run in runs]


@pytest.mark.parametrize(("depth", "draft_length"), [(24, 4)])
def test_acceptance_is_that_of_transformers(smollm2, monkeypatch, depth, draft_length) -> None:
    golden = json.loads((GOLDENS / "layerskip.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(dex_jax.LanguageModel, "eos_ids", ())
    ours, theirs = counts_of(smollm2, golden, depth, draft_length)
    _, drafted, accepted = np.sum(ours, axis=0)
    _, drafted_there, accepted_there = np.sum(theirs, axis=0)
    assert drafted_there > 4 * len(theirs)
    assert accepted / drafted == pytest.approx(accepted_there / drafted_there, rel=0.01)
    # A tie in floating point may change a round of one prompt, but hardly of two.
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1, (ours, theirs)
