"""The committed goldens are what transformers computes today; these tests need torch and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reference.checkpoints import FAMILIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from reference import make_goldens  # noqa: E402 - needs both of the above

pytestmark = pytest.mark.reference

GOLDENS = Path(__file__).parent / "goldens"


def _read(name: str) -> dict:
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


def _assert_same_decoding(made: list[dict], committed: list[dict]) -> None:
    """Assert that prompts and tokens are equal, and that margins, which rounding may move, are close."""
    for new, old in zip(made, committed, strict=True):
        assert new["prompt_ids"] == old["prompt_ids"]
        assert new["new_tokens"] == old["new_tokens"]
        assert new["min_margin"] == pytest.approx(old["min_margin"], abs=1e-5)


def _assert_same_logits(made: list, committed: list) -> None:
    """Assert equality to 4e-6 of max |logit|, as torch in float32 is 2e-6 from float64, to a side per machine."""
    np.testing.assert_allclose(made, committed, rtol=0, atol=4e-6 * np.abs(committed).max())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_family_golden_has_not_drifted(family) -> None:
    made, committed = make_goldens.family_golden(family), _read("families.json")["families"][family]
    assert made["eos_ids"] == committed["eos_ids"]
    _assert_same_decoding(made["prompts"], committed["prompts"])
    for new, old in zip(made["prompts"], committed["prompts"], strict=True):
        _assert_same_logits(new["last_logits"], old["last_logits"])
    first = "all_logits_of_prompt_0"
    _assert_same_logits(made[first], committed[first])


def test_smollm2_golden_has_not_drifted() -> None:
    made, committed = make_goldens.smollm2_golden(count=3), _read("smollm2.json")
    _assert_same_decoding(made["prompts"], committed["prompts"][:3])
    for new, old in zip(made["last_logits"], committed["last_logits"], strict=True):
        # The best 50 ids may change places where they tie, so ids are matched first.
        old_logits = dict(zip(old["ids"], old["logits"], strict=True))
        pairs = [(value, old_logits[i]) for i, value in zip(new["ids"], new["logits"], strict=True) if i in old_logits]
        assert len(pairs) >= len(old_logits) - 2
        np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=0, atol=1e-5 * old["max_abs"])


def test_acceptance_of_early_exit_drafts_has_not_drifted() -> None:
    assert make_goldens.layerskip_golden(numbers=(0, 3))["runs"] == _read("layerskip.json")["runs"][:2]
