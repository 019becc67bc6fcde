"""The benchmark as a command, on a small model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from reference.small_models import LLAMA, LetterTokenizer, small_model

import dex_jax
from studies.bench import __main__ as bench
from studies.bench import bench as bench_runs
from studies.bench import report
from studies.bench.results import read_results
from studies.bench.runs import Run

PROMPTS = "ABC\nBCDA\nQRSTUV\nZYX\nMNOPQ\nKLM\nEFGHI\nXXYYZ\n"


@pytest.fixture(scope="module")
def small():
    """A small model whose answers end where they are told to."""
    return small_model(dataclasses.replace(LLAMA, num_layers=2, eos_ids=()), tokenizer=LetterTokenizer())


def flags_for(folder: Path) -> list[str]:
    """Flags of a benchmark of a second or two a method, without its methods and its folder."""
    (folder / "letters.txt").write_text(PROMPTS, encoding="utf-8")
    flags = ["--tasks", f"prompts:{folder / 'letters.txt'}", "--prompts", "4", "--tune-prompts", "4"]
    flags += ["--max-new-tokens", "12", "--explorers", "2", "--batch", "4", "--exit-depths", "1"]
    return [*flags, "--draft-lengths", "1,2"]


@pytest.fixture
def command(small, monkeypatch, tmp_path):
    monkeypatch.setattr("dex_jax.language_model.load", lambda name, dtype: small)
    return [*flags_for(tmp_path), "--thresholds", "0.1"]


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """A whole benchmark: flags and folder."""
    folder = tmp_path_factory.mktemp("bench")
    flags = [*flags_for(folder), "--by-explorers", "1", "--output", str(folder / "out")]
    flags += ["--methods", "ar,dex,layerskip,oracle", "--timed", "ar,layerskip", "--timed-settings", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dex_jax.language_model.load", lambda name, dtype: small)
        assert bench.main(flags) == 0
    return flags, folder / "out"


@pytest.mark.slow
def test_a_benchmark_writes_every_run_once_and_timed_methods_take_turns(made, small) -> None:
    _, folder = made
    runs = read_results(folder)
    assert len({run.key for run in runs}) == len(runs)
    counted = [run for run in runs if run.kind == "depth"]
    timed = [run for run in runs if run.kind == "wall"]
    # AR on eight prompts, two settings on four, DEX with two K, LayerSkip and the oracle on four.
    assert len(counted) == 8 + 2 * 4 + 4 * 4
    # Two settings on four tuning prompts, AR and the best on four, twice each.
    assert len(timed) == 2 * (2 * 4 + 2 * 4)
    assert all(run.seconds is None for run in counted)
    assert all(run.batch == 1 and run.seconds > 0 for run in timed)
    assert all(run.match or run.tie for run in runs if run.match is not None)
    reported = [run for run in timed if run.split == "report"]
    turns = [(run.method, run.round) for run in reported if run.prompt_id == reported[0].prompt_id]
    assert turns == [("ar", 0), ("layerskip", 0), ("layerskip", 1), ("ar", 1)]
    method = dex_jax.Dex(explorers=2, draft=False)
    explored = [run for run in counted if run.name == "dex explorers=2"]
    asked = [PROMPTS.split()[int(run.prompt_id)] for run in explored]
    whole = dex_jax.generate(small, asked, method=method, exits="shared", max_new_tokens=12)
    assert len(explored) == 4
    for row, run in enumerate(explored):
        assert (run.tokens, run.ticks) == (whole.tokens[row].tolist(), int(whole.stats.ticks[row]))
        assert run.layer_steps == run.ticks * 2 // run.setting["explorers"]
        assert run.work == 2 * run.ticks
    for run in counted:
        assert run.work is None if run.method == "oracle" else run.work >= 2 * 11
        if run.method == "layerskip":
            # Every round runs its drafts and its root through all layers.
            assert run.work == 2 * (run.drafted + run.rounds)
            assert run.accepted + run.rounds == 11


@pytest.mark.slow
def test_the_report_is_made_again_from_the_lines(made, tmp_path, capsys) -> None:
    _, folder = made
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("results.jsonl", "study.json"):
        shutil.copy(folder / name, copy / name)
    assert report.main([str(copy)]) == 0
    again = (copy / "summary.md").read_text(encoding="utf-8")
    assert again == (folder / "summary.md").read_text(encoding="utf-8")
    for name in ("speedup_depth", "speedup_wall", "work", "speedup_by_k", "ead"):
        assert (copy / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
        assert (folder / f"{name}.png").exists()
    # One figure by hand: the median over prompts of AR's layer steps over DEX's.
    runs = [run for run in read_results(folder) if run.kind == "depth" and run.split == "report"]
    steps = {(run.name, run.prompt_id): run.layer_steps / (run.new_tokens - 1) for run in runs}
    by_hand = np.median([steps["ar", p] / steps["dex explorers=2", p] for n, p in steps if n == "ar"])
    row = next(line for line in again.splitlines() if line.startswith("| dex explorers=2 "))
    assert f" {by_hand:.2f} [" in row


@pytest.mark.slow
def test_a_killed_benchmark_goes_on_and_another_is_refused(made, small, monkeypatch, capsys) -> None:
    flags, folder = made
    monkeypatch.setattr("dex_jax.language_model.load", lambda name, dtype: small)
    file = folder / "results.jsonl"
    whole = file.read_bytes()
    lines = whole.split(b"\n")[:-1]
    asked = []
    generate = bench_runs.generate

    def counted(lm, prompts, **options):
        asked.append(len(prompts))
        return generate(lm, prompts, **options)

    monkeypatch.setattr(bench_runs, "generate", counted)
    assert bench.main(flags) == 0
    assert asked == []
    assert file.read_bytes() == whole
    file.write_bytes(b"\n".join(lines[:-2]) + b"\n" + lines[-2][:40])
    assert bench.main(flags) == 0
    assert len(asked) == 2
    assert [run.key for run in read_results(folder)] == [Run(**json.loads(line)).key for line in lines]
    file.write_bytes(whole)
    assert bench.main([*flags, "--max-new-tokens", "9"]) == 2
    assert "max_new_tokens was 12, now 9" in capsys.readouterr().err


@pytest.mark.slow
def test_wrong_tokens_fail_the_run(command, small, monkeypatch, tmp_path, capsys) -> None:
    generate = bench_runs.generate

    def wrong(lm, prompts, **options):
        out = generate(lm, prompts, **options)
        if isinstance(options["method"], dex_jax.Dex):
            tokens = out.tokens.copy()
            # The least likely token of all is no tie.
            prefix = [*out.prompt_tokens[0], *tokens[0, :3].tolist()]
            tokens[0, 3] = int(np.argmin(np.asarray(small.logits([prefix])[0, -1])))
            out = dataclasses.replace(out, tokens=tokens)
        return out

    monkeypatch.setattr(bench_runs, "generate", wrong)
    output = tmp_path / "out"
    assert bench.main([*command, "--methods", "ar,dex,layerskip", "--rounds", "0", "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert "token 3 is not AR's" in captured.err
    assert "NOT LOSSLESS" in captured.out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--methods", "ar,medusa"], "--methods ar,medusa is not as it should be"),
        (["--tasks", "prompts:{folder}/letters.txt,prompts:{folder}/other/letters.txt"], "two of the tasks are called"),
        (["--tasks", "boolq", "--data", "."], "unknown task 'boolq'"),
        (["--tasks", "gsm8k", "--data", "nowhere"], "there is no folder of data nowhere"),
        (["--max-new-tokens", "1"], "Expected int >= 2"),
        (["--prompts", "8"], "none left for split tune"),
        (["--exit-depths", "2"], "LayerSkip's exit must lie below the model's last layer"),
        (["--by-explorers", "3"], "explorers must be from 1 to the model's 2 layers"),
    ],
)
def test_bad_flags_are_told_in_a_sentence(flags, says, command, tmp_path, capsys) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letters.txt").write_text(PROMPTS, encoding="utf-8")
    flags = [flag.format(folder=tmp_path) for flag in flags]
    assert bench.main([*command, *flags, "--output", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
