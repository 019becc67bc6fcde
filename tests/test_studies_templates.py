"""The template study as a command, on a small model: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json

import pytest
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax import language_model
from studies.bench.results import read_results
from studies.templates import __main__ as templates
from studies.templates import report as template_report
from studies.templates import runs as template_runs


class ByteTokenizer:
    """A token for each of the text's bytes, several bytes to a token."""

    has_chat_template = False
    eos_ids = ()

    def encode(self, text: str) -> list[int]:
        return [byte % LLAMA.vocab_size for byte in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("A") + token % 26) + " ."[token % 2] for token in tokens)


OPTIONS = ["up", "down", "left", "right"]
BODIES = ["Q {question} {options}", "{options} {question}?", "{question} ({options}) so"]
FLAGS = ["--items", "3", "--tune-items", "1", "--max-new-tokens", "12", "--loop-share", "0.4", "--batch", "4"]
FLAGS += ["--explorers", "2", "--exit-depths", "1,2", "--draft-lengths", "2", "--exits", "shared", "--tasks", "mmlu"]


@pytest.fixture(scope="module")
def lm():
    return small_model(tokenizer=ByteTokenizer())


@pytest.fixture
def command(tmp_path, monkeypatch, lm):
    """(arguments) -> exit code, for a folder of data, a file of templates and a folder of results."""
    monkeypatch.setattr(language_model, "load", lambda source, dtype=None: lm)
    folder = tmp_path / "data" / "mmlu"
    folder.mkdir(parents=True)
    rows = [
        {"subject": "moves", "idx": n, "question": f"Where to {n}?", "choices": OPTIONS, "answer": n % 4}
        for n in range(5)
    ]
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bodies.json").write_text(json.dumps(BODIES))
    fixed = ["--data", str(tmp_path / "data"), "--templates", str(tmp_path / "bodies.json")]
    return lambda *more: templates.main([*FLAGS, *fixed, "--output", str(tmp_path / "out"), *more])


@pytest.mark.slow
def test_the_study_runs_goes_on_and_notices_what_is_wrong(command, tmp_path, monkeypatch, capsys, lm):
    pytest.importorskip("matplotlib", reason="the report draws a picture")
    assert command() == 0
    said = capsys.readouterr()
    out = tmp_path / "out"
    assert (out / template_report.PLOT).stat().st_size > 5000
    runs = read_results(out)
    plain = [run for run in runs if run.method == "ar" and run.split == "report"]
    assert len(plain) == 9
    assert {run.template for run in plain} == {"01", "02", "03"}
    for name in ("dex", "layerskip"):
        forced = [run for run in runs if run.method == name and run.counted == "forced" and run.split == "report"]
        loops = [run for run in runs if run.method == name and run.counted == "loop"]
        assert len(forced) == 9
        assert len(loops) == 4  # 40% of nine
        assert all(run.match for run in loops)
        found = {(run.template, run.prompt_id): run for run in forced}
        for run in loops:
            same = found[run.template, run.prompt_id]
            assert all(getattr(run, x) == getattr(same, x) for x in ("exits", "layer_steps", "ticks", "rounds"))
    tuned = {run.prompt_id for run in runs if run.split == "tune"}
    assert len(tuned) == 1
    assert not tuned & {run.prompt_id for run in plain}  # settings are chosen elsewhere
    ids = ByteTokenizer().encode("Q Where to 0? A. up\nB. down\nC. left\nD. right")
    theirs = dex_jax.generate(lm, [ids], method=dex_jax.AR(), max_new_tokens=12)
    ours = next(run for run in plain if run.template == "01" and run.prompt_id.endswith("-0"))
    assert ours.tokens == theirs.tokens[0].tolist()
    assert all(words in said.out for words in ("median [min, max]", "cannot settle", "no evidence", "chance 0.25"))

    # Again, after a kill that took the last lines: only what is missing is made, and the end is the same.
    whole = (out / "results.jsonl").read_bytes()
    lines = whole.split(b"\n")
    (out / "results.jsonl").write_bytes(b"\n".join(lines[:-4]) + b'\n{"kind": "dep')
    monkeypatch.setattr(template_runs, "answers", lambda *a, **k: pytest.fail("an answer was made twice"))
    assert command() == 0
    assert (out / "results.jsonl").read_bytes() == whole
    assert (out / "summary.md").read_text() == said.out.removesuffix("\n")
    monkeypatch.undo()

    # A loop that does not agree with what was counted fails the run.
    monkeypatch.setattr(language_model, "load", lambda source, dtype=None: lm)
    at = next(i for i, line in enumerate(lines) if b'"dex"' in line and b'"loop"' in line)
    wrong = json.loads(lines[at])
    wrong["exits"][3] = 3 - wrong["exits"][3]
    (out / "results.jsonl").write_bytes(b"\n".join([*lines[:at], json.dumps(wrong).encode(), *lines[at + 1 :]]))
    assert command() == 1
    assert "dex explorers=2 on mmlu" in capsys.readouterr().err

    # Another study does not mix with it.
    assert command("--max-new-tokens", "13") == 2
    assert "max_new_tokens was 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--items", "0"], "--items"),
        (["--items", "9"], "5 are left where 9 are asked"),
        (["--longest-prompt", "10"], "5 of them too long"),
        (["--tasks", "chess"], "chess"),
        (["--methods", "ar,del"], "--methods ar,del"),
        (["--methods", "dex"], "needs ar"),
        (["--explorers", "9"], "--explorers"),
        (["--formats", "3"], "--formats"),
        (["--exit-depths", "4"], "--exit-depths"),
        (["--templates", "none.json"], "none.json"),
        (["--second-dtype", "float32"], "--second-dtype"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_refused_and_nothing_is_written(command, tmp_path, capsys, more, said):
    assert command(*more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert template_report.main([str(tmp_path)]) == 2
