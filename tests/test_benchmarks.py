"""The benchmarks: each runs or judges made-up figures, and figures that are saved are not measured again."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import lossless
import measuring
import numpy as np
import outside
import pytest
import speed
import weights_distance
from reference.small_models import LLAMA, LetterTokenizer, small_model

import dex_jax
from dex_jax.errors import DexError


def test_figures_are_kept_and_those_of_others_refused(tmp_path, capsys):
    output = str(tmp_path / "found")
    measuring.Figures(output, {"rounds": 2, "depths": (1, 2)}).each({"one": 3}, lambda ms: {"ms": ms})
    again = measuring.Figures(output, {"rounds": 2, "depths": (1, 2)})
    assert again.each({"one": 4}, lambda _: pytest.fail("measured again")) == {"one": {"ms": 3}}
    again.publish("# Page", "words")
    assert (tmp_path / "found.md").read_text().startswith("# Page\n\nwords\n\nrounds 2; depths [1, 2].")
    with pytest.raises(DexError, match="name another --output"):
        measuring.Figures(output, {"rounds": 3})


@pytest.mark.slow
def test_speed(monkeypatch, tmp_path, capsys):
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2), tokenizer=LetterTokenizer())
    monkeypatch.setattr(dex_jax, "load", lambda source, dtype=None, weights=None: lm)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("HELLO\nWORLDS\nDEPTHS\n", encoding="utf-8")
    flags = ["--data", "prompts.txt", "--exits", "shared", "--rounds", "1", "--max-new-tokens", "5", "--output", "out"]
    assert speed.run(speed.parser().parse_args([*flags, "--batch", "2"])) == 0
    page = capsys.readouterr().out
    assert "AR's in 2 of 2 groups" in page
    assert "| batches of 1 | stored, default |" in page
    ways = json.loads(Path("out.json").read_text(encoding="utf-8"))["runs"]["batches of 2; prompts 1"]["seconds"]
    assert all(first > 0 and token > 0 for first, token in ways.values())


def test_another_python_that_cannot_run_it_is_told():
    with pytest.raises(DexError, match="does it have what it should run"):
        outside.Outside(sys.executable, "no/such/file.gguf")


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        ({}, True),
        ({"identical": [True, False]}, False),
        ({"ticks": [9, 13]}, False),
        ({"ticks": [9, 13], "explorers": 10}, True),
        ({"ticks": [9, 11], "explorers": 10}, False),
    ],
)
def test_lossless_holds(change, holds):
    run = {"explorers": 3, "rows": 8, "identical": [True, True], "ticks": [9, 12], "forced_ticks": [9, 12]} | change
    assert lossless.holds(run) == holds


def test_weights_distance_counts():
    """The distance is in nats, as by hand: log 2 for a token that dense weights are sure of and others half sure."""
    dense = np.log([[0.5, 0.5 - 1e-9, 1e-9], [1 - 2e-9, 1e-9, 1e-9]])
    other = np.log([[0.25, 0.75 - 1e-9, 1e-9], [0.5, 0.25, 0.25]])
    nats = 0.5 * np.log(2) + 0.5 * np.log(2 / 3) + np.log(2)
    assert weights_distance.distance(dense, other, [0, 0]) == [2, pytest.approx(nats, abs=1e-6), 1, 0]
    assert weights_distance.distance(dense, dense, [0, 0]) == [2, 0, 2, 1]
