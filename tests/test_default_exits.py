"""The exits that ship for the default model."""

from __future__ import annotations

import numpy as np
import pytest
from reference.held_out_prompts import PROMPTS

import dex_jax
from dex_jax.decoding.exits import DEFAULTS, default_exits, resolve_method

SERVED = (2, 3, 5, 6, 10)
LARGEST_BYTES = 12e6


@pytest.fixture(scope="module")
def exits(smollm2):
    found = default_exits(smollm2.fingerprint)
    assert found is not None, "no exits ship for the default model"
    return found


def test_they_are_small_and_say_what_made_them(exits) -> None:
    files = list(DEFAULTS.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= LARGEST_BYTES
    assert exits.metadata["tokens"] > 0
    assert exits.metadata["minutes"] > 0
    assert exits.metadata["data"]


@pytest.mark.parametrize("explorers", SERVED)
def test_even_grids_need_no_other_depths(smollm2, exits, explorers) -> None:
    method = dex_jax.Dex(explorers=explorers)
    resolved = resolve_method(method, "default", smollm2.config, smollm2.fingerprint)
    assert resolved.schedule == method.schedule_for(smollm2.config.num_layers)
    assert resolved.source == "default"
    assert resolved.remarks == ()


def test_a_text_is_that_of_ar_in_fewer_ticks_than_without_training(smollm2) -> None:
    options = {"max_new_tokens": 32}
    prompts = [PROMPTS[i] for i in (0, 4, 9)]
    plain = dex_jax.generate(smollm2, prompts, method=dex_jax.AR(), **options)
    options["method"] = dex_jax.Dex(schedule="parallel")
    runs = {name: dex_jax.generate(smollm2, prompts, exits=name, **options) for name in ("default", "shared")}
    for out in runs.values():
        assert np.array_equal(out.tokens, plain.tokens)
    assert runs["default"].stats.exits_source == "default"
    # About 1.2 against 2 on average; a loose bound, as three prompts are few.
    assert runs["default"].stats.ticks.sum() < 0.8 * runs["shared"].stats.ticks.sum()


def test_an_uneven_grid_moves_to_trained_depths_or_says_why_not(smollm2) -> None:
    moved = resolve_method(dex_jax.Dex(explorers=4), "default", smollm2.config, smollm2.fingerprint)
    assert moved.source == "default"
    assert "the exit depths are" in moved.remarks[0]
    many = resolve_method(dex_jax.Dex(explorers=30), "default", smollm2.config, smollm2.fingerprint)
    assert many.source == "shared"
    by_hand = resolve_method(dex_jax.Dex(depths=(7, 30)), "default", smollm2.config, smollm2.fingerprint)
    assert by_hand.source == "shared"
    assert by_hand.remarks
