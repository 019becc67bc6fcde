"""The sweep of the rivals: what it chooses on which prompts, and that it goes on where it stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from reference.small_models import LetterTokenizer, small_model

import dex_jax

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "rivals.py"


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """The benchmark's module, on a small model and two prompts, with made-up counts, and the settings that it ran."""
    spec = importlib.util.spec_from_file_location("rivals_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(dex_jax, "load", lambda name: small_model(tokenizer=LetterTokenizer()))
    # On the first prompt LayerSkip is best at depth 1, on the second at depth 3.
    steps = {"LayerSkip(exit=1": [20, 50], "LayerSkip(exit=3": [30, 32], "DEL": [32, 40], "AR": [40, 40]}
    ran = []

    def run(lm, prompts, method, args):
        ran.append(method)
        assert len(prompts) == 2
        found = next((cost for name, cost in steps.items() if repr(method).startswith(name)), [36, 36])
        return {"digest": ["a", "b"], "lengths": [11, 11], "layer_steps": found, "drafted": [4, 4], "accepted": [1, 2]}

    monkeypatch.setattr(module, "run", run)
    (tmp_path / "prompts.txt").write_text("ABC\nBCD\n", encoding="utf-8")
    command = ["--data", str(tmp_path / "prompts.txt"), "--exit-depths", "1,3", "--draft-lengths", "2"]
    return module, [*command, "--explorers", "2", "--output", str(tmp_path / "out")], ran


def test_settings_are_chosen_on_other_prompts_than_those_reported(sweep, capsys, tmp_path) -> None:
    module, command, ran = sweep
    assert module.main(command) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "out.md").read_text(encoding="utf-8") + "\n"
    assert "| AR | 4.00 | 1.00 | 0.50 | 2 of 2 |" in text
    assert "| LayerSkip 1, 2 | 5.00 | 0.80 | 0.50 | 2 of 2 |" in text
    assert "oracle (a bound, no decoder)" in text
    assert "DEL over LayerSkip 1, 2, the best static setting on the other prompts: 1.250" in text
    assert "DEL over LayerSkip 3, 2, the best static setting on these very prompts: 0.800" in text
    assert "| 3, 2 | 3.20 | 0.50 |" in text
    assert len(ran) == 6 + 4 + 2


def test_a_sweep_goes_on_where_it_stopped(sweep, capsys, tmp_path) -> None:
    module, command, ran = sweep
    module.main(command)
    whole, lines = capsys.readouterr().out, (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    cut = "\n".join([*lines[:5], lines[5][:20]])
    (tmp_path / "out.jsonl").write_text(cut, encoding="utf-8")
    ran.clear()
    assert module.main(command) == 0
    assert len(ran) == len(lines) - 5
    assert capsys.readouterr().out == whole
    ran.clear()
    assert module.main(command) == 0
    assert ran == []
    assert module.main([*command, "--max-new-tokens", "9"]) == 2
    assert "holds results for other prompts or options" in capsys.readouterr().err
