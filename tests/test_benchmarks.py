"""The benchmarks: each runs or makes its page of made-up figures, and figures that are kept are not measured again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import lossless
import measuring
import numpy as np
import one_explorer
import pytest
import weights_distance
from reference.small_models import LLAMA, LetterTokenizer, small_model
from test_io_gguf import write_gguf

import dex_jax
from dex_jax.errors import DexError
from dex_jax.nn.few_rows import language


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A small model instead of the one that a benchmark loads, and a file of prompts."""
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2), tokenizer=LetterTokenizer())
    monkeypatch.setattr(dex_jax, "load", lambda source, dtype=None, weights=None: lm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("HELLO\nWORLDS\nDEPTHS\n", encoding="utf-8")
    return lm


def test_figures_are_kept_and_those_of_others_refused(tmp_path, capsys):
    output = str(tmp_path / "found")
    measuring.Figures(output, {"rounds": 2, "depths": (1, 2)}).add("one", {"ms": 3})
    again = measuring.Figures(output, {"rounds": 2, "depths": (1, 2)})
    assert again.runs == {"one": {"ms": 3}}
    again.publish("# Page", "words")
    assert (tmp_path / "found.md").read_text().startswith("# Page\n\nwords\n\nrounds 2; depths [1, 2].")
    with pytest.raises(DexError, match="name another --output"):
        measuring.Figures(output, {"rounds": 3})


@pytest.mark.slow
def test_one_explorer_measures_what_is_missing(model, monkeypatch, capsys):
    flags = ["--data", "prompts.txt", "--exits", "shared", "--rounds", "1", "--max-new-tokens", "5", "--output", "out"]
    args = one_explorer.parser().parse_args(flags)
    assert one_explorer.run(args) == 0
    page = capsys.readouterr().out
    assert "AR's in 3 of 3 groups" in page
    runs = json.loads(Path("out.json").read_text(encoding="utf-8"))["runs"]
    assert runs["prompts 1, batch 1, context 0"]["tokens"] == 4
    monkeypatch.setattr(one_explorer, "measure", lambda *_: pytest.fail("measured again"))
    assert one_explorer.run(args) == 0
    assert capsys.readouterr().out == page


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
    assert f"{sum(run['identical'])} of 2" in lossless.table({"one": run})


def test_weights_distance(monkeypatch, tmp_path, capsys):
    """Stored weights are the dense model; int8 ones are another, and AR on them parts where the figures say."""
    load, file = dex_jax.load, str(write_gguf(tmp_path / "model.gguf", "llama3", "Q4_1"))

    def lettered(source, dtype, weights):
        lm = load(file, dtype, weights=weights)
        lm.tokenizer, lm.config = LetterTokenizer(), dataclasses.replace(lm.config, eos_ids=())
        return lm

    monkeypatch.setattr(dex_jax, "load", lettered)
    monkeypatch.setattr(weights_distance, "SHORTEST", 64)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("HELLO\nWORLDS\nDEPTHS\n", encoding="utf-8")
    (tmp_path / "text.txt").write_text("THEQUICKBROWNFOX" * 2, encoding="utf-8")
    flags = ["--data", "prompts.txt", "--text", "text.txt", "--window", "16", "--windows", "2", "--output", "out"]
    args = weights_distance.parser().parse_args([*flags, "--max-new-tokens", "24"])
    assert weights_distance.run(args) == 0
    page = capsys.readouterr().out
    runs = json.loads(Path("out.json").read_text(encoding="utf-8"))["runs"]
    int8, parts = lettered("", "float32", "int8"), []
    for number, prompt in enumerate(("HELLO", "WORLDS", "DEPTHS"), 1):
        answer, other = runs[f"answer; prompts {number}"], runs[f"int8; prompts {number}"]
        options = {"method": dex_jax.AR(), "max_new_tokens": 24, "exits": "shared"}
        (theirs,) = dex_jax.generate(int8, [prompt], **options).tokens.tolist()
        parts.append(
            next((at for at, pair in enumerate(zip(answer, theirs, strict=True)) if len(set(pair)) == 2), None)
        )
        assert other["first"] == parts[-1]
        assert 0 < other["nats"] < 0.1 * other["tokens"]
        stored = runs[f"stored; prompts {number}"]
        assert (stored["agree"], stored["first"]) == (24, None)
        assert stored["nats"] == 0 or language() == "XLA"
    assert any(part is not None for part in parts)
    assert "3 of 3" in page
    assert f"{parts.count(None)} of 3" in page
    monkeypatch.setattr(weights_distance, "log_probabilities", lambda *_: pytest.fail("measured again"))
    assert weights_distance.run(args) == 0
    assert capsys.readouterr().out == page


def test_weights_distance_counts():
    """In nats, as by hand: log 2 for a coin that the other weights know nothing of."""
    dense = np.log([[0.5, 0.5 - 1e-9, 1e-9], [1 - 2e-9, 1e-9, 1e-9]])
    other = np.log([[0.25, 0.75 - 1e-9, 1e-9], [0.5, 0.25, 0.25]])
    found = weights_distance.distance(dense, other, [0, 0])
    assert (found["tokens"], found["agree"], found["first"]) == (2, 1, 0)
    assert found["nats"] == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3) + np.log(2), abs=1e-6)
    assert weights_distance.distance(dense, dense, [0, 0]) == {"tokens": 2, "nats": 0, "agree": 2, "first": None}
