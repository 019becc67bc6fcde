"""The benchmarks: each runs or makes its page of made-up figures, and figures that are kept are not measured again."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import depth_side
import few_rows
import lossless
import measuring
import one_explorer
import pytest
import speed
import two_processes
from outside import Outside
from reference.small_models import LLAMA, LetterTokenizer, small_model

import dex_jax
from dex_jax.errors import DexError


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A small model instead of the one that a benchmark loads, and a file of prompts."""
    config = dataclasses.replace(LLAMA, num_layers=5)
    lm = small_model(config, tokenizer=LetterTokenizer())
    monkeypatch.setattr(dex_jax, "load", lambda source, dtype=None: lm)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("HELLO\nWORLDS\nDEPTHS\n", encoding="utf-8")
    return lm


def test_measures_take_turns():
    calls = []
    measures = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    found = measuring.in_turns(measures, 2)
    assert "".join(calls) == "baabba"
    assert found == {"a": [3, 6], "b": [4, 5]}
    assert measuring.quartiles([1, 2, 3, 4, 5]) == "3.00 (2.00 - 4.00)"


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


@pytest.mark.slow
def test_speed(model, monkeypatch, capsys):
    monkeypatch.setattr(speed, "PROMPT", "HELLO")
    speed.run(speed.parser().parse_args(["--rounds", "1", "--max-new-tokens", "4"]))
    assert "DEX-1/5 tick over an AR step" in capsys.readouterr().out


def test_few_rows(monkeypatch, capsys):
    monkeypatch.setattr(few_rows, "LAYERS", 1)
    monkeypatch.setattr(few_rows, "ROWS", (1, 2))
    few_rows.run(few_rows.parser().parse_args(["--rounds", "1"]))
    assert "| weights x columns, kept " in capsys.readouterr().out


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


def test_two_processes_page():
    names = (two_processes.AR, two_processes.TREES)
    group = {"batch": 1, "tokens": 20, "identical": True}
    group |= {key: dict(zip(names, pair, strict=True)) for key, pair in (("seconds", (1.0, 0.5)), ("ticks", (20, 10)))}
    page = "\n".join(two_processes.page({"one": group | {"rows": dict.fromkeys(names, 8)}}, "stage=2"))
    for cell in ("2.00 (2.00 - 2.00)", "0.50 (0.50 - 0.50)", "0.50", "50.0", "1 of 1"):
        assert cell in page


def test_depth_side_table():
    runs = {}
    for k, draft, ticks in ((1, "drafts", 10), (1, "none", 20), (2, "drafts", 16), (2, "none", 32)):
        for prompt in ("HumanEval 1", "HumanEval 2", "question_240 1"):
            runs[f"K = {k}; {draft}; {prompt}"] = {"tokens": 21, "ticks": ticks, "identical": True}
    one, two = depth_side.table(runs, [1, 2, 5]).splitlines()[-2:]
    assert [cell.strip() for cell in one.split("|")[1:-1]] == ["1", "2.00", "2.00", "2.00", "1.00", "2.00", ""]
    assert [float(cell) for cell in two.split("|")[1:-1]] == [2, 2.5, 2.5, 2.5, 1.25, 2, 1.25]


WORKER = """
import json, sys
print(json.dumps({"ready": True, "torch": "9.9", "transformers": "8.8", "threads": 2, "dtype": "float32"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["new_tokens"] > 50:
        print(json.dumps({"error": "too many"}), flush=True)
        continue
    tokens = [7] * asked["new_tokens"]
    print(json.dumps({"tokens": tokens, "prefill_seconds": 0.5, "decode_seconds": 2.0}), flush=True)
"""


def test_transformers_is_asked_for_tokens_and_gives_a_line(tmp_path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    outside = Outside(sys.executable, "smollm2-135m", worker)
    answer = outside.run([1, 2], 5)
    assert (answer["tokens"], answer["prefill_seconds"], answer["decode_seconds"]) == ([7] * 5, 0.5, 2.0)
    assert (outside.versions["torch"], outside.versions["transformers"]) == ("9.9", "8.8")
    assert outside.run([1], 3)["tokens"] == [7] * 3
    with pytest.raises(DexError, match="too many"):
        outside.run([1], 51)
    outside.close()


def test_a_contender_that_cannot_run_is_told(tmp_path) -> None:
    with pytest.raises(DexError, match="compares with smollm2-135m alone, not with other"):
        Outside(sys.executable, "other")
    with pytest.raises(DexError, match="needs a checkout of the repository"):
        Outside(sys.executable, "smollm2-135m", tmp_path / "none.py")
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(DexError, match="ended with code 3: does it have what"):
        Outside(sys.executable, "smollm2-135m", worker)
    with pytest.raises(DexError, match="does not start"):
        Outside(str(tmp_path / "python"), "smollm2-135m", worker)
