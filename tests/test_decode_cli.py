"""decode.py as a person runs it: text, summary, JSON, --check, interruptions, and one sentence for bad input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dex_jax
from dex_jax.cli import decode
from dex_jax.cli.arguments import parser, prompts_of
from dex_jax.cli.display import _check_lines
from dex_jax.decoding import auto
from dex_jax.decoding.costs import ROWS, StepCosts
from dex_jax.evaluation.check import Check

PROGRAM = Path(__file__).resolve().parents[1] / "decode.py"
# Two stages of one row each compile fastest; every run below shares the compiled programs of this process.
COMMON = ["--explorers", "2", "--max-new-tokens", "8", "--exits", "shared"]
SKY = "Why is the sky blue?"
FINGERPRINT = "268a3187a3ebf69e"

JSON_TYPES = {
    "prompt": str,
    "text": str,
    "tokens": list,
    "prompt_tokens": int,
    "new_tokens": int,
    "finished": bool,
    "method": str,
    "schedule": str,
    "depths": list,
    "rows": int,
    "exits_source": str,
    "layer_steps": int,
    "ticks": int,
    "exits": list,
    "depth_side_speedup": float,
    "compile_seconds": float,
    "prefill_seconds": float,
    "decode_seconds": float,
    "tokens_per_second": float,
    "device": str,
    "dtype": str,
}


@pytest.fixture(autouse=True)
def one_model(monkeypatch, smollm2):
    """The session's model instead of loading it for every call, and no compilation cache on disk."""
    monkeypatch.setattr(dex_jax.language_model.Outline, "load", lambda *args, **options: smollm2)
    monkeypatch.setattr(decode, "remember_compilations", lambda: None)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of decode.py."""
    code = decode.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_text_then_summary(capsys, smollm2) -> None:
    code, out, err = run(capsys, "--prompt", SKY, *COMMON)
    expected = dex_jax.generate(smollm2, [SKY], method=dex_jax.AR(), max_new_tokens=8)
    assert code == 0
    assert out == expected.texts[0] + "\n"
    assert "DEX, K = 2" in err
    assert "8 tokens" in err
    assert "ticks, depth-side speedup" in err
    assert "wall-clock:" in err
    assert "exit 1 (depth  15)" in err
    assert "final layer (depth  30)" in err


def test_json_is_typed_and_consistent(capsys) -> None:
    code, out, err = run(capsys, "--prompt", SKY, "--json", "--check", *COMMON)
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert {key: type(record[key]) for key in JSON_TYPES} == JSON_TYPES
    others = ("choice", "rounds", "stage_steps", "tokens_per_round", "drafted", "accepted")
    assert set(record) == {*JSON_TYPES, "seed", "check", *others}
    assert [record[key] for key in others] == [None] * len(others)
    assert record["layer_steps"] == 15 * record["ticks"]
    assert record["seed"] is None
    assert record["check"] == {"identical": True, "first_divergence": None, "top2_margin": None}
    assert record["new_tokens"] == len(record["tokens"]) == len(record["exits"])
    assert record["ticks"] == 2 + sum(record["exits"][1:-1])
    assert record["depth_side_speedup"] == 2 * (record["new_tokens"] - 1) / record["ticks"]


def test_serial_rounds_have_counts_of_their_own(capsys) -> None:
    arguments = ["--prompt", SKY, "--schedule", "serial", "--exits", "shared", "--max-new-tokens", "8", "--check"]
    record = json.loads(run(capsys, *arguments, "--json")[1])
    assert [record[key] for key in ("schedule", "ticks", "depth_side_speedup")] == ["serial", None, None]
    assert record["check"]["identical"]
    assert record["rounds"] == record["stage_steps"] == record["exits"].count(1) + (record["exits"][-1] == 0)
    assert record["tokens_per_round"] == 7 / record["rounds"]
    code, _, err = run(capsys, *arguments)
    assert code == 0
    assert f"DEX, serial on cpu:cpu, float32: 8 tokens, {record['rounds']} rounds" in err
    assert "8 rows a round, drafted from the text itself\n" in err


def test_what_auto_chose_is_said(capsys, monkeypatch) -> None:
    cheap = StepCosts(ROWS, (1.0, 1.01, 1.02, 1.3, 1.6), 10**12)
    monkeypatch.setattr(auto, "step_costs", lambda *about: cheap)
    arguments = ["--prompt", SKY, "--max-new-tokens", "8", "--exits", "shared", "--check"]
    record = json.loads(run(capsys, *arguments, "--json")[1])
    assert (record["method"], record["schedule"]) == ("dex", "serial")
    assert record["check"]["identical"]
    code, _, err = run(capsys, *arguments)
    assert code == 0
    assert f"\nauto chose {record['choice']}\n" in err
    assert "at most 8 rows a round" in err
    # A dry run measures nothing: it says what serial rounds need.
    monkeypatch.setattr(auto, "step_costs", lambda *about: pytest.fail("measured"))
    assert "float32, serial, on one device" in run(capsys, "--dry-run", "--prompt", SKY)[1]


def test_json_of_one_token_has_nulls(capsys) -> None:
    arguments = ["--prompt", SKY, "--json", "--method", "ar", "--max-new-tokens", "1", "--temperature", "1"]
    _, out, _ = run(capsys, *arguments, "--seed", "5")
    record = json.loads(out)
    undefined = ("schedule", "exits_source", "depth_side_speedup", "tokens_per_second")
    assert [record[key] for key in undefined] == [None] * len(undefined)
    assert (record["method"], record["ticks"], record["exits"], record["seed"]) == ("ar", 0, [-1], 5)


def test_samples_are_headed_and_checked(capsys) -> None:
    sampled = ["--temperature", "1", "--num-samples", "2", "--check"]
    code, out, err = run(capsys, "--prompt", SKY, *COMMON, *sampled)
    assert code == 0
    assert f"[1] {SKY}\n" in out
    assert f"\n[2] {SKY}\n" in out
    assert err.count("identical to plain AR decoding") == 2


def test_a_difference_is_told_and_changes_the_exit_code(capsys, monkeypatch) -> None:
    from dex_jax.evaluation import check

    monkeypatch.setattr(check, "compare", lambda *args: [check.Check(False, 3, 0.25)])
    code, _, err = run(capsys, "--prompt", SKY, "--check", *COMMON)
    assert code == 1
    assert "differs from plain AR decoding at token 3, top-2 margin 2.50e-01 (NOT a tie" in err


def test_stop_cuts_the_text(capsys) -> None:
    _, whole, _ = run(capsys, "--prompt", SKY, *COMMON)
    word = whole.split()[3]
    _, out, _ = run(capsys, "--prompt", SKY, "--stop", word, *COMMON)
    assert out == whole[: whole.index(word)] + "\n"


def test_color_depth_colours_early_tokens_only(capsys) -> None:
    code, out, _ = run(capsys, "--prompt", SKY, "--color-depth", "--max-new-tokens", "24", "--explorers", "2")
    record = json.loads(run(capsys, "--prompt", SKY, "--json", "--max-new-tokens", "24", "--explorers", "2")[1])
    assert 0 < record["exits"].count(1) < 23
    assert code == 0
    assert out.count("\x1b[38;5;") == record["exits"].count(1)


def test_an_interruption_keeps_the_text_and_the_summary(capsys, monkeypatch, smollm2) -> None:
    real = decode._stream

    def interrupted(*args):
        updates = real(*args)
        yield next(updates)
        yield next(updates)
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "_stream", interrupted)
    code, out, err = run(capsys, "--prompt", SKY, *COMMON)
    assert code == 130
    assert out.strip()
    assert dex_jax.generate(smollm2, [SKY], max_new_tokens=8, method=dex_jax.AR()).texts[0].startswith(out.strip())
    assert "DEX, K = 2" in err


def test_a_closed_pipe_ends_quietly() -> None:
    command = [sys.executable, str(PROGRAM), "--prompt", SKY, "--method", "ar", "--max-new-tokens", "40"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait()) == ("", 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "there is no prompt"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--prompt", SKY, "--explorers", "31"], "explorers must be from 1 to the model's 30 layers, not 31"),
        (["--prompt", SKY, "--mesh", "rows=2"], "'rows=2' is no mesh"),
        (["--prompt", SKY, "--mesh", "stage=500"], "the mesh stage=500 needs 500 devices and there are 1 (cpu)"),
        (
            ["--prompt", SKY, "--mesh", "stage=1", "--explorers", "5"],
            "stage=1 and the schedule 5 explorers",
        ),
        (["--prompt", SKY, "--mesh", "stage=1", "--schedule", "serial"], "serial rounds are for one device"),
        (["--prompt", SKY, "--mesh", "stage=1", "--layout", "stacked"], "--layout stacked is for one device"),
        (["--prompt", SKY, "--explorers", "0"], "explorers must be from 1 to the model's 30 layers, not 0"),
        (["--prompt", SKY, "--explorers", "2", "--depths", "15,30"], "give explorers or depths, not both"),
        (["--prompt", SKY, "--depths", "20,10,30"], "depths must ascend without repeats, not 20,10,30"),
        (["--prompt", SKY, "--depths", "10,20"], "depths must end at the model's last layer, 30, not at 20"),
        (["--prompt", SKY, "--depths", "0,30"], "depths must lie between 1 and the model's 30 layers, not 0,30"),
        (["--prompt", SKY, "--rows", "0"], 'rows must be a whole number of at least 1, or "full", not 0'),
        (["--prompt", SKY, "--explorers", "9", "--rows", "full"], "it is offered up to K = 8"),
        (["--prompt", SKY, "--temperature", "-1"], "temperature must be 0 (greedy) or above, not -1.0"),
        (["--prompt", SKY, "--temperature", "nan"], "temperature must be 0 (greedy) or above, not nan"),
        (["--prompt", SKY, "--top-p", "0"], "top_p must lie in (0, 1], not 0.0"),
        (["--prompt", SKY, "--top-p", "1.5"], "top_p must lie in (0, 1], not 1.5"),
        (["--prompt", SKY, "--top-k", "0"], "top_k must be a whole number of at least 1, not 0"),
        (["--prompt", SKY, "--max-new-tokens", "0"], "max_new_tokens must be a whole number of at least 1, not 0"),
        (["--prompt", SKY, "--max-new-tokens", "9000"], "passes the model's context of 8192"),
        (["--prompt", SKY, "--num-samples", "0"], "num_samples must be a whole number of at least 1, not 0"),
        (["--prompt", SKY, "--method", "ar", "--rows", "2"], "--rows belongs to --method dex"),
        (["--prompt", SKY, "--method", "ar", "--schedule", "serial"], "--schedule belongs to --method dex"),
        (["--prompt", SKY, "--method", "ar", "--threshold", "0.5"], "--threshold means nothing with --method ar"),
        (["--prompt", SKY, "--exit-depth", "5"], "--exit-depth means nothing with --method dex"),
        (["--prompt", SKY, "--method", "del", "--exit-depth", "5"], "--exit-depth means nothing with --method del"),
        (["--prompt", SKY, "--method", "layerskip", "--depths", "5,30"], "--depths means nothing with --method layer"),
        (["--prompt", SKY, "--method", "oracle", "--rows", "2"], "--rows means nothing with --method oracle"),
        (["--prompt", SKY, "--method", "adadecode", "--no-decs"], "--no-decs means nothing with --method adadecode"),
        (["--prompt", SKY, "--method", "layerskip", "--exit-depth", "30"], "below the model's last layer, 30"),
        (["--prompt", SKY, "--method", "adadecode", "--threshold", "2"], "a probability, from 0 to 1, and not 2.0"),
        (["--prompt", SKY, "--schedule", "serial", "--explorers", "3"], 'explorers belongs to schedule="parallel"'),
        (["--prompt", SKY, "--exits", "no/such/exits"], "there are no exits at no/such/exits"),
        (["--prompt", SKY, "--stop", ""], "a stop string must not be empty"),
        (["--prompt-file", "no/such/file.txt"], "cannot read the prompt file no/such/file.txt"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, arguments, sentence) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err


@pytest.mark.parametrize(
    "flag", [["--dtype", "float8"], ["--depths", "6,x"], ["--rows", "many"], ["--method", "magic"]]
)
def test_bad_flags_name_the_flag(capsys, flag) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main(["--prompt", SKY, *flag])
    assert stopped.value.code == 2
    assert f"argument {flag[0]}" in capsys.readouterr().err


def test_prompt_files(tmp_path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\n\n two \n", encoding="utf-8")
    messages = [{"role": "user", "content": "hi"}]
    lines.write_text(json.dumps({"prompt": "three"}) + "\n" + json.dumps({"messages": messages}), encoding="utf-8")
    arguments = parser().parse_args(["--prompt", "zero", "--prompt-file", str(text)])
    assert prompts_of(arguments) == ["zero", "one", " two "]
    assert prompts_of(parser().parse_args(["--prompt-file", str(lines)])) == ["three", messages]
    odd = "what str.splitlines() cuts: \u2028 \x85 \x0c"
    lines.write_bytes("\ufeff".encode() + json.dumps({"prompt": odd}, ensure_ascii=False).encode() + b"\r\n")
    assert prompts_of(parser().parse_args(["--prompt-file", str(lines)])) == [odd]
    stdin = parser().parse_args(["--prompt-file", "-"])
    assert prompts_of(stdin, io.StringIO("four\nfive\n")) == ["four", "five"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{broken", "line 2: not valid JSON"),
        ('{"text": "x"}', 'line 2: needs an object with "prompt"'),
        ("[1, 2]", 'line 2: needs an object with "prompt"'),
    ],
)
def test_a_bad_jsonl_line_is_named(capsys, tmp_path, line, sentence) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n", encoding="utf-8")
    code, _, err = run(capsys, "--prompt-file", str(file))
    assert code == 2
    assert f"{file}, {sentence}" in err


def test_dry_run_loads_nothing_and_adds_up(capsys, monkeypatch, smollm2) -> None:
    monkeypatch.setattr(dex_jax.io.Checkpoint, "read", None)
    code, out, err = run(capsys, "--dry-run", "--prompt", SKY)
    assert (code, err) == (0, "")
    assert "weights" in out
    assert "fits" in out
    sizes = json.loads(run(capsys, "--dry-run", "--json", "--prompt", SKY)[1])
    assert sizes["weights_bytes"] == smollm2.parameter_bytes
    parts = [sizes[f"{name}_bytes"] for name in ("weights", "cache", "lattice", "exits", "workspace")]
    assert sum(parts) == sizes["total_bytes"]
    assert run(capsys, "--dry-run", "--depths", "40")[0] == 2


def test_a_dry_run_takes_and_refuses_what_a_real_run_does(capsys) -> None:
    shipped = Path(dex_jax.__file__).parent / "default_exits"
    at_depths, drafter = shipped / f"{FINGERPRINT}.safetensors", shipped / f"{FINGERPRINT}.drafter.safetensors"
    assert "float32, parallel, on one device" in run(capsys, "--dry-run", "--exits", str(at_depths))[1]
    assert "float32, serial, on one device" in run(capsys, "--dry-run", "--exits", str(drafter))[1]
    assert run(capsys, "--dry-run", "--layout", "stacked", "--exits", str(drafter))[0] == 0
    for flags, sentence in [
        (["--prompt", SKY, "--max-new-tokens", "100000"], "passes the model's context of 8192"),
        (["--max-new-tokens", "0"], "max_new_tokens must be"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--temperature", "1", "--top-p", "7"], "top_p must lie in"),
        (
            ["--explorers", "5", "--exits", str(drafter)],
            "holds a drafter, an exit at depth 0, which only",
        ),
    ]:
        code, _, err = run(capsys, "--dry-run", *flags)
        assert (code, err.count("\n")) == (2, 1)
        assert sentence in err


def test_a_parting_is_judged_by_the_dtype(capsys) -> None:
    close = Check(False, 3, 5e-3)
    assert close.is_tie("bfloat16")
    assert not close.is_tie("float32")
    assert not Check(False, 3, 5e-2).is_tie("bfloat16")
    assert "(a tie in floating point)" in _check_lines([close], "bfloat16")[0]
    assert "(NOT a tie: please report this)" in _check_lines([close], "float32")[0]


def test_help_names_every_flag(capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model", "--prompt-file", "--explorers", "--depths", "--rows", "--exits", "--check", "--dry-run"):
        assert flag in text
