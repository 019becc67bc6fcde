"""train_exits.py as a person runs it: train, go on, export, evaluate, decode with what came out, and bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import chex
import numpy as np
import pytest
from reference.small_models import LLAMA, small_model, train_tokenizer

from dex_jax.cli import decode, train
from dex_jax.cli.train_arguments import configured, folder_of, train_parser
from dex_jax.io.exits_file import load_exits
from dex_jax.training.journal import read_journal

PROGRAM = Path(__file__).resolve().parents[1] / "train_exits.py"
CONFIGURATIONS = sorted((PROGRAM.parent / "configs").glob("*.py"))
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60
SIZES = {"vocab_size": 270, "num_layers": 3, "width": 128, "head_dim": 32, "context": 128}
MODEL = dataclasses.replace(LLAMA, **SIZES, eos_ids=(3,), bos_id=4)

EXITS = """
from dex_jax.config import ExitsConfig
from dex_jax.training.config import TrainConfig
from dex_jax.training.exit_training import ExitTraining
from dex_jax.training.sources import SourceOptions

config = ExitTraining(
    model={model!r},
    exits=ExitsConfig(kind="linear", depths=(1, 2), width=1, fused=True, draft_size=64),
    data=({prompts!r}, "self"),
    sources=SourceOptions(length=48, answer_limit=16, held_out_least=2),
    tokens=120,
    evaluation_texts=2,
    evaluation_tokens=8,
    train=TrainConfig(steps=4, batch=2, warmup_steps=1, checkpoint_every=2, eval_every=2, log_every=1),
)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with a tiny model, prompts, and a configuration."""
    place = tmp_path_factory.mktemp("place")
    model, prompts = place / "model", place / "prompts.txt"
    small_model(MODEL, tokenizer=train_tokenizer(TEXT, 270)).save(model)
    prompts.write_text("\n".join(f"fox number {i} jumps" for i in range(8)), encoding="utf-8")
    (place / "exits.py").write_text(EXITS.format(model=str(model), prompts=str(prompts)), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def trained(place) -> Path:
    """Run a training of exits to its end, and return its folder."""
    assert train.main(["--config", str(place / "exits.py"), "--folder", str(place / "run")]) == 0
    return place / "run"


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    """Run train_exits.py, and return (exit code, stdout, stderr)."""
    capsys.readouterr()
    code = train.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_training_leaves_exits_and_metrics(trained) -> None:
    exits = load_exits(trained)
    assert (exits.config.depths, exits.config.width, exits.config.draft_size) == ((1, 2), MODEL.width, 64)
    assert exits.metadata["steps"] == 4
    assert np.any(exits.parameters["map"])
    evaluations = [record["step"] for record in read_journal(trained) if record["kind"] == "evaluation"]
    assert evaluations == [2, 4]


def test_the_same_command_again_finds_nothing_left_to_do(capsys, trained, place) -> None:
    before = load_exits(trained)
    code, out, err = run(capsys, "--config", place / "exits.py", "--folder", trained)
    assert code == 0
    assert "nothing is left to do" in err
    assert f"decode.py --model {place / 'model'} --exits {trained}" in out
    chex.assert_trees_all_equal(dict(load_exits(trained).parameters), dict(before.parameters))


@pytest.mark.slow
def test_export_is_small_and_decodes_to_the_same_text(capsys, trained, place) -> None:
    small, large = place / "small.safetensors", place / "large.safetensors"
    code, out, _ = run(capsys, "export", trained, small)
    assert code == 0
    assert out.startswith(f"{small}: {small.stat().st_size / 1e6:.2f} MB, int8, linear exits at depths 1, 2")
    assert run(capsys, "export", trained, large, "--float32")[0] == 0
    assert small.stat().st_size < 0.4 * large.stat().st_size
    exact, rounded, whole = load_exits(trained), load_exits(small), load_exits(large)
    for name, value in exact.parameters.items():
        np.testing.assert_array_equal(whole.parameters[name], value)
        np.testing.assert_allclose(rounded.parameters[name], value, atol=np.abs(value).max() / 250 + 1e-9)
    for source in (trained, small):
        flags = ["--model", str(place / "model"), "--exits", str(source), "--prompt", "the fox", "--no-chat"]
        assert decode.main([*flags, "--explorers", "2", "--max-new-tokens", "8", "--check", "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["check"]["identical"]
        assert record["exits_source"] == str(source)


def test_evaluate_measures_exits_on_the_models_answers(capsys, trained, place, tmp_path) -> None:
    found, output = {}, tmp_path / "figures.json"
    flags = ["--model", place / "model", "--data", place / "prompts.txt", "--prompts", "3", "--max-new-tokens", "6"]
    for exits in (str(trained), "shared"):
        code, out, _ = run(capsys, "evaluate", "--exits", exits, *flags, "--batch", "2", "--output", output)
        assert code == 0
        assert "**prompts**" in out
        figures = json.loads(output.read_text())
        assert figures["exits"] == exits
        found[exits] = figures["groups"]["prompts"]
    one, other = found.values()
    assert (one["texts"], one["depths"]) == (3, [1, 2])  # the model has 3 layers, so K = 2 and 3
    assert (one["tokens"], one["depths"]) == (other["tokens"], other["depths"])
    assert one["divergence"] != other["divergence"]


def test_flags_change_the_configuration(place) -> None:
    command = ["--config", str(place / "exits.py"), "--model", "m", "--data", "self=2", "x.txt", "--seed", "9"]
    args = train_parser().parse_args([*command, "--learning-rate", "0.5", "--dtype", "bfloat16"])
    config = configured(args)
    assert (config.model, config.data) == ("m", ("self=2", "x.txt"))
    assert (config.train.seed, config.train.learning_rate, config.train.dtype) == (9, 0.5, "bfloat16")
    assert config.train.steps == 4
    assert folder_of(args) == Path("runs/exits")


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.stem)
def test_configurations_of_the_repository_are_read(file) -> None:
    args = train_parser().parse_args(["--config", str(file)])
    config = configured(args)
    assert config.train.steps > config.train.warmup_steps
    assert folder_of(args) == Path("runs") / file.stem


CASES = {
    "--config {place}/none.py": "none.py",
    "--config {place}/refused.py": "refused.py: steps",
    "--config {place}/exits.py --steps 0": "steps",
    "--config {place}/exits.py --devices 128": "--devices 128",
    "--config {place}/exits.py --init-from {place}/none": "no exits",
    "--config {place}/exits.py --init-from default": "--init-from",
    "export {place}/none {place}/x.safetensors": "no folder",
    "export {place} {place}/x.safetensors": "holds no exits yet",
    "evaluate --exits default --model {place}/model --data x.txt": "no trained exits",
}
"""Arguments, and a word of the sentence that refuses them."""


@pytest.mark.parametrize(("arguments", "keyword"), CASES.items())
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, place, trained, arguments, keyword) -> None:
    (place / "refused.py").write_text("from dex_jax.training.config import TrainConfig\nTrainConfig(steps=0)")
    code, out, err = run(capsys, *arguments.format(place=place).split())
    assert (code, out) == (2, "")
    assert err.count("error: ") == 1
    assert keyword in err.splitlines()[-1]


def test_too_little_memory_is_one_sentence(capsys, monkeypatch) -> None:
    def full(path):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")

    monkeypatch.setattr("dex_jax.cli.train_arguments.read_config", full)
    code, out, err = run(capsys, "--config", "x.py")
    assert (code, out) == (2, "")
    assert "lower --batch" in err.splitlines()[-1]
