"""decode.py as a person runs it: text, summary, JSON, --check, interruptions, and one sentence for bad input."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference.small_models import LLAMA, small_model, train_tokenizer, weights_of

import dex_jax
from dex_jax.cli import decode, devices
from dex_jax.cli.arguments import parser, prompts_of
from dex_jax.cli.display import _check_lines
from dex_jax.decoding import costs
from dex_jax.decoding.check import Check
from dex_jax.errors import DexError
from dex_jax.io.save import save_model
from dex_jax.language_model import outline
from dex_jax.nn.transformer import parameter_shapes

PROGRAM = Path(__file__).resolve().parents[1] / "decode.py"
# Two stages of one layer and one row each compile fastest; all runs below share the compiled programs.
COMMON = ["--explorers", "2", "--no-draft", "--max-new-tokens", "8", "--exits", "shared"]
SKY = "Why is the sky blue?"
SMOLLM2, FINGERPRINT = "smollm2-135m", "268a3187a3ebf69e"

JSON_TYPES = {
    str: ("prompt", "text", "method", "exits_source", "device", "dtype", "weights"),
    list: ("tokens", "depths", "exits"),
    int: ("prompt_tokens", "new_tokens", "rows", "ticks"),
    float: ("depth_side_speedup", "compile_seconds", "prefill_seconds", "decode_seconds", "tokens_per_second"),
    bool: ("finished", "draft"),
    type(None): ("choice", "drafter_source", "seed", "row_seconds"),
    dict: ("check", "rows_run"),
}
"""The keys of the JSON by type, for one greedy sequence that explorers without drafts have decoded."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of a model of two layers that emits printable characters alone."""
    config, tokenizer = dataclasses.replace(LLAMA, num_layers=2, vocab_size=300), train_tokenizer(SKY * 40, 300)
    weights = weights_of(small_model(config))
    said = [tokenizer.decode([token]) for token in range(300)]
    shown = np.array([[text.isascii() and text.isprintable()] for text in said])
    weights["embed"] = np.where(shown, weights["embed"], 0)
    return save_model(tmp_path_factory.mktemp("model") / "small", config, weights, tokenizer)


@pytest.fixture
def run(capsys, monkeypatch, folder):
    """Return a function (arguments) -> (exit code, stdout, stderr) of decode.py, by default with the small model."""

    def run(*arguments: str, model: str = str(folder)) -> tuple[int, str, str]:
        code = decode.main([*arguments, "--model", model])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_text_then_summary(run, folder) -> None:
    code, out, err = run("--prompt", SKY, *COMMON)
    lm = dex_jax.load(folder, "float32")
    assert code == 0
    assert out == dex_jax.generate(lm, [SKY], method=dex_jax.AR(), max_new_tokens=8).texts[0] + "\n"
    assert "DEX, K = 2" in err
    assert "8 tokens" in err
    assert "ticks, depth-side speedup" in err
    assert "wall-clock:" in err
    assert "exit 1 (depth   1)" in err
    assert "final layer (depth   2)" in err


def test_json_is_typed_and_consistent(run) -> None:
    code, out, err = run("--prompt", SKY, "--json", "--check", *COMMON)
    assert code == 0
    assert "decoding" in err
    record = json.loads(out)
    expected = {name: kind for kind, names in JSON_TYPES.items() for name in names}
    assert {name: type(value) for name, value in record.items()} == expected
    assert record["check"] == {"identical": True, "first_divergence": None, "top2_margin": None}
    assert record["new_tokens"] == len(record["tokens"]) == len(record["exits"])
    assert record["ticks"] == 2 + sum(record["exits"][1:-1])
    assert record["depth_side_speedup"] == 2 * (record["new_tokens"] - 1) / record["ticks"]


@pytest.mark.slow
def test_what_was_drafted_is_counted_and_coloured_on_terminals_only(run, monkeypatch) -> None:
    options = ["--prompt", SKY, "--rows", "8", "--exits", "shared", "--max-new-tokens", "24"]
    record = json.loads(run(*options, "--json", "--check")[1])
    assert (record["draft"], record["exits_source"], record["drafter_source"]) == (True, None, None)
    assert record["check"]["identical"]
    assert record["ticks"] == record["exits"][:-1].count(1) + 1
    assert record["depth_side_speedup"] == 23 / record["ticks"]
    assert 0 < record["exits"].count(0) < 23
    for terminal in (False, True):
        if terminal:
            monkeypatch.setenv("TERM", "xterm-256color")
            monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        code, out, err = run(*options, "--color-depth")
        assert code == 0
        assert out.count("\x1b[38;5;") == record["exits"].count(0) * terminal
        assert ("\x1b" in out) is terminal
        assert f"DEX, K = 1 with drafts on cpu:cpu, float32: 24 tokens, {record['ticks']} ticks" in err
        assert "8 rows; drafts from the text\n" in err
        # The legend of the colours is above the bars.
        assert "drafted  final layer" in err
        assert "drafted (depth   0)" in err
        assert ("terminals only" in err) is not terminal


@pytest.mark.slow
def test_a_draft_model_is_said_and_counted(run, folder) -> None:
    """The draft model is the model itself, which is always right."""
    arguments = ["--prompt", SKY, "--rows", "8", "--draft-model", str(folder), "--max-new-tokens", "13"]
    record = json.loads(run(*arguments, "--json", "--check")[1])
    assert record["drafter_source"] == str(folder)
    assert record["check"]["identical"]
    assert record["exits"].count(0) > 4
    drafts = ["--draft-model", str(folder)]
    without, drafting, halved = (
        json.loads(run("--dry-run", "--json", *each)[1])
        for each in (["--exits", "shared"], drafts, [*drafts, "--hardware", "h100"])
    )
    more = drafting["exits_bytes"] - without["exits_bytes"]
    assert more > without["weights_bytes"], "weights and cache of the small model"
    assert halved["exits_bytes"] < 0.6 * drafting["exits_bytes"], "in bfloat16 there"


def test_a_draft_model_of_little_context_need_hold_no_more_than_the_text(run, folder, tmp_path) -> None:
    """The length of caches is rounded up beyond the draft model's context."""
    short = Path(shutil.copytree(folder, tmp_path / "short"))
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    arguments = ["--dry-run", "--prompt", SKY, "--draft-model", str(short)]
    assert run(*arguments, "--max-new-tokens", "13")[0] == 0
    refused(run(*arguments, "--max-new-tokens", "128"), "a context of 128")


@pytest.mark.slow
def test_what_was_chosen_is_said(run, steady_ticks, monkeypatch) -> None:
    arguments = ["--prompt", SKY, "--max-new-tokens", "8", "--exits", "shared"]
    record = json.loads(run(*arguments, "--json", "--check")[1])
    assert (record["method"], record["draft"]) == ("dex", True)
    assert record["check"]["identical"]
    monkeypatch.setattr(costs, "_LEARNT", {})  # the second run knows as little of its ticks as the first did
    code, _, err = run(*arguments)
    assert code == 0
    assert f"\nchosen: {record['choice']}\n" in err
    assert sum(record["rows_run"].values()) == record["ticks"]
    assert f"\nticks of {', '.join(n for n, ran in record['rows_run'].items() if ran)} rows: " in err
    assert "K = 1 with drafts, on one device" in run("--dry-run", "--prompt", SKY)[1]


def test_json_of_one_token_has_nulls(run) -> None:
    arguments = ["--prompt", SKY, "--json", "--method", "ar", "--max-new-tokens", "1", "--temperature", "1"]
    # There are two samples, as below, so that programs are shared.
    _, out, _ = run(*arguments, "--seed", "5", "--num-samples", "2")
    record, other = map(json.loads, out.splitlines())
    undefined = ("exits_source", "drafter_source", "depth_side_speedup", "tokens_per_second")
    assert [record[key] for key in undefined] == [None] * len(undefined)
    assert (record["method"], record["ticks"], record["exits"], record["seed"]) == ("ar", 0, [-1], 5)
    assert other["seed"] == 6


def test_batches_answer_as_one(run) -> None:
    prompts = [flag for text in (SKY, "Who?", "Where is it?") for flag in ("--prompt", text)]
    arguments = [*prompts, "--method", "ar", "--max-new-tokens", "4", "--temperature", "1", "--seed", "3"]
    several, one = (
        [json.loads(line) for line in run(*arguments, "--json", "--batch", size)[1].splitlines()] for size in ("2", "3")
    )
    assert [(each["prompt"], each["tokens"], each["seed"]) for each in several] == [
        (each["prompt"], each["tokens"], each["seed"]) for each in one
    ]
    _, out, err = run(*arguments, "--batch", "2")
    assert re.findall(r"^\[(\d)\] ", out, re.MULTILINE) == ["1", "2", "3"]
    assert err.count("wall-clock: ") == 2


@pytest.mark.slow
def test_samples_are_headed_and_checked(run) -> None:
    sampled = ["--temperature", "1", "--num-samples", "2", "--check"]
    code, out, err = run("--prompt", SKY, *COMMON, *sampled)
    assert code == 0
    assert f"[1] {SKY}\n" in out
    assert f"\n[2] {SKY}\n" in out
    assert err.count("identical to plain AR decoding") == 2


def test_a_difference_is_told_and_changes_the_exit_code(run, monkeypatch) -> None:
    from dex_jax.decoding import check

    monkeypatch.setattr(check, "compare", lambda *args: [check.Check(False, 3, 0.25)])
    code, _, err = run("--prompt", SKY, "--check", *COMMON)
    assert code == 1
    assert "differs from plain AR decoding at token 3, top-2 margin 2.50e-01 (NOT a tie" in err


BAD_INPUT = {
    "--explorers 3": "2 layers",
    "--mesh rows=2": "rows=2",
    "--mesh stage=500": "500 devices",
    "--max-new-tokens 9000": "context",
    "--player . ": "is a folder",
    "--player x.html --method ar": "--player plays DEX",
    "--player x.html --mesh stage=1": "leave --mesh out",
    "--player x.html --stop x": "to its end",
    "--method ar --rows 2": "--rows",
    "--method ar --no-draft": "--no-draft",
    "--exits no/such/exits": "no/such/exits",
    "--draft-model no/such/model/": "no/such/model",
    "--draft-model smollm2-135m": "another vocabulary",
    "--draft-model smollm2-135m --exits shared": "--exits",
    "--draft-model smollm2-135m --method ar": "--draft-model",
    "--draft-model smollm2-135m --dry-run": "another vocabulary",
    "--prompt-file no/such/file.txt": "no/such/file.txt",
}
"""Flags, and a word of the sentence that refuses them."""


@pytest.mark.parametrize(("flags", "keyword"), BAD_INPUT.items())
def test_bad_input_is_one_sentence_and_exit_code_2(run, flags, keyword) -> None:
    refused(run("--prompt", SKY, *flags.split()), keyword)


def refused(found: tuple[int, str, str], keyword: str) -> None:
    """Assert exit code 2, and one sentence after the lines of phases."""
    code, out, err = found
    *phases, sentence = err.splitlines()
    assert (code, out) == (2, "")
    assert all(line.startswith("[") for line in phases)
    assert sentence.startswith("error: ")
    assert keyword in sentence


@pytest.mark.parametrize(
    "flag",
    ["--dtype float8", "--depths 6;x", "--rows many", "--rows 0", "--rows 1000000000000", "--method magic", "--top-k 0",
     "--max-new-tokens 0", "--seed 9223372036854775808", "--num-samples 0", "--num-samples 1000000000000"],
)  # fmt: skip
def test_bad_flags_name_the_flag(capsys, flag) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main(["--prompt", SKY, *flag.split()])
    assert stopped.value.code == 2
    assert f"argument {flag.split()[0]}" in capsys.readouterr().err


def test_prompt_files(tmp_path, monkeypatch) -> None:
    text, lines = tmp_path / "prompts", tmp_path / "b.jsonl"
    text.write_text("one\n\n two \n", encoding="utf-8")
    arguments = parser().parse_args(["--prompt", "zero", "--prompt-file", str(text)])
    assert prompts_of(arguments) == ["zero", "one", "two"]
    lines.write_text('{"question": "three"}', encoding="utf-8")
    assert prompts_of(parser().parse_args(["--prompt-file", str(lines)])) == ["three"]
    monkeypatch.setattr("sys.stdin", io.StringIO("four\nfive\n"))
    assert prompts_of(parser().parse_args(["--prompt-file", "-"])) == ["four", "five"]
    with pytest.raises(DexError, match="stdin holds no prompt"):
        prompts_of(parser().parse_args(["--prompt", "zero", "--prompt-file", "-"]))


def test_dry_run_loads_nothing_and_adds_up(run, monkeypatch) -> None:
    monkeypatch.setattr(dex_jax.io.checkpoint.Checkpoint, "read", None)
    monkeypatch.setattr(devices, "free_memory", lambda: 10**9)  # not every system says how much it has
    code, out, err = run("--dry-run", "--prompt", SKY)
    assert (code, err.count("\n")) == (0, 1)  # the phase of imports
    assert "weights" in out
    assert "fits" in out
    sizes, packed = (
        json.loads(run("--dry-run", "--json", "--prompt", SKY, "--weights", kind, model=SMOLLM2)[1])
        for kind in ("dense", "stored")
    )
    numbers = sum(map(math.prod, parameter_shapes(outline(SMOLLM2).config).values()))
    assert sizes["weights_bytes"] == 4 * numbers > 5 * packed["weights_bytes"]
    assert (sizes["weights"], packed["weights"]) == ("float32", "Q4_1 and Q8_0")
    parts = [sizes[f"{name}_bytes"] for name in ("weights", "cache", "lattice", "exits")]
    assert sum(parts) == sizes["total_bytes"]
    assert run("--dry-run", "--depths", "40")[0] == 2


def test_a_dry_run_takes_and_refuses_what_a_real_run_does(run) -> None:
    shipped = Path(dex_jax.__file__).parent / "default_exits"
    at_depths, drafter = shipped / f"{FINGERPRINT}.safetensors", shipped / f"{FINGERPRINT}.drafter.safetensors"
    for exits in (at_depths, drafter):
        said = run("--dry-run", "--exits", str(exits), model=SMOLLM2)[1]
        assert "float32, DEX, K = 1 with drafts, on one device" in said
    refused(run("--dry-run", "--explorers", "5", "--no-draft", "--exits", str(drafter), model=SMOLLM2), "drafter")
    for flags, keyword in (
        ("--max-new-tokens 100000", "context"),
        ("--temperature -1", "temperature"),
        ("--temperature 1 --top-p 7", "top_p"),
    ):
        refused(run("--dry-run", "--prompt", "Hi", *flags.split()), keyword)


def test_a_dry_run_judges_a_device_that_is_not_here(run) -> None:
    code, out, _ = run("--dry-run", "--hardware", "h100", "--prompt", SKY)
    assert (code, "bfloat16" in out, "on one h100" in out, "73.60 GB" in out) == (0, True, True, True)
    assert "float16" in run("--dry-run", "--hardware", "t4")[1]
    for flags, keyword in (("--hardware h100", "--dry-run"), ("--dry-run --hardware abacus", "abacus")):
        refused(run("--prompt", "Hi", *flags.split()), keyword)
    refused(run("--dry-run", "--hardware", "h100", "--mesh", "stage=2"), "--mesh")


def test_a_parting_is_judged_by_the_dtype() -> None:
    close = Check(False, 3, 5e-3)
    assert close.is_tie("bfloat16")
    assert not close.is_tie("float32")
    assert not Check(False, 3, 5e-2).is_tie("bfloat16")
    assert "(a tie in floating point)" in _check_lines([close], "bfloat16")[0]
    assert "(NOT a tie: please report this)" in _check_lines([close], "float32")[0]


def test_help_and_refusals_come_before_jax() -> None:
    code = """
import contextlib, io, sys
from dex_jax import planner, selfcheck
from dex_jax.cli import decode, train
for program, flags in (
    (selfcheck, ["--help"]), (planner, ["--help"]), (decode, ["--help"]), (decode, ["--rows", "0"]), (decode, []),
    (decode, ["--exit-depth", "5", "--prompt", "x"]),
    (decode, ["--prompt-file", "no/such/file"]), (train, ["--help"]), (train, ["evaluate", "--help"]),
    (train, ["--config", "no/such/file"]),
):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
        assert program.main(flags) == 2
    assert "--help" not in flags or out.getvalue().startswith("usage: ")
heavy = {"jax", "flax", "tokenizers", "scipy"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, stderr=subprocess.DEVNULL)


def test_filters_without_sampling_are_told(run) -> None:
    _, _, err = run("--prompt", SKY, "--top-p", "0.9", "--dry-run")
    assert err.splitlines()[0].startswith("--top-p changes nothing at temperature 0")


def test_a_closed_stdin_is_told() -> None:
    command = f"{sys.executable} {PROGRAM} --prompt-file - <&-"
    found = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert found.returncode == 2
    assert "stdin is closed" in found.stderr
