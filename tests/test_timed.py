"""Training for a number of minutes: it ends by the clock, goes on where it was, and recommends what was faster."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
from reference.small_models import LLAMA, small_model, train_tokenizer
from training_worker import LinearMap

from dex_jax.cli import train as train_cli
from dex_jax.errors import DexError
from dex_jax.io.exits_file import load_exits
from dex_jax.training import timed, trainer
from dex_jax.training.config import TrainConfig
from dex_jax.training.journal import read_journal
from dex_jax.training.trainer import train

TEXT = "the quick brown fox jumps over the lazy dog.\n" * 60
SIZES = {"vocab_size": 270, "num_layers": 4, "width": 128, "head_dim": 32, "context": 384}
MODEL = dataclasses.replace(LLAMA, **SIZES, eos_ids=(3,), bos_id=4)


@pytest.fixture(scope="module")
def lm():
    return small_model(MODEL, tokenizer=train_tokenizer(TEXT, 270))


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"fox number {i} jumps" for i in range(24)), encoding="utf-8")
    return (str(file),)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Return the clock of a training: each look at it is later by as much, whatever the speed of the machine."""
    seconds = itertools.count(step=0.1)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    for module in (timed, trainer):
        monkeypatch.setattr(module, "time", clock)
    return clock


def test_minutes_end_a_training_and_its_learning_rate_falls_by_them(tmp_path, monkeypatch) -> None:
    config = TrainConfig(steps=10**6, minutes=0.03, batch=4, warmup_steps=1, learning_rate=0.02, final_rate=0.1)
    config = dataclasses.replace(config, log_every=1, eval_every=None, checkpoint_every=5)
    task, seconds = LinearMap(config), itertools.count(step=0.01)
    # Each look at the clock is 0.01 s later, so that the machine's speed does not matter.
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    first = train(task, config, tmp_path, notify=lambda _: None)
    assert 10 < first.step < 180
    rates = [record["learning_rate"] for record in read_journal(tmp_path) if record["kind"] == "train"]
    assert rates[-1] < max(rates)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert train(task, config, tmp_path, notify=lambda _: None).step == first.step
    more = dataclasses.replace(config, minutes=10 * config.minutes, steps=first.step + 3)
    assert train(task, more, tmp_path, notify=lambda _: None).step == first.step + 3


@pytest.mark.parametrize(
    ("speeds", "chosen"), [((1, 1.4, 1.5), 2), ((1, 1.4, 1.41), 1), ((1, 1.02, 1.02), 0), ((1, 0.9, 1.2), 2)]
)
def test_what_is_recommended_was_measured_to_be_faster(speeds, chosen) -> None:
    ways = [timed.Way(str(number), 1.0, 1.0, speed) for number, speed in enumerate(speeds)]
    assert timed.best(ways) == str(chosen)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ((), "say how long with --minutes"),
        (("--minutes", "5", "--steps", "3"), "--steps is for a training with --config"),
        (("--config", "x.py", "--explorers", "3"), "--explorers is for a training without --config"),
        (("--minutes", "5", "--model", "no-such-model"), "no-such-model"),
        (("--minutes", "5", "--devices", "2", "--batch", "3"), "cannot share a batch of 3 rows"),
    ],
)
def test_flags_that_mean_nothing_are_refused(capsys, flags, why) -> None:
    assert train_cli.main([*flags]) == 2
    assert why in capsys.readouterr().err


def test_more_explorers_than_layers_are_refused(lm) -> None:
    with pytest.raises(DexError, match="2 to 4 explorers"):
        timed.choices(lm, 5, timed.DATA, {})


@pytest.mark.slow
def test_writing_that_was_stopped_goes_on_with_its_texts_and_its_time(lm, data, tmp_path, monkeypatch, clock) -> None:
    def stopped(timing, texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(timed, "LENGTH", 48)
    monkeypatch.setattr(timed, "EPOCHS", 10**6)  # one shard is enough
    with monkeypatch.context() as patch:
        patch.setattr(timed._Timing, "seconds_a_token", stopped)
        with pytest.raises(KeyboardInterrupt):
            timed.train_for(lm, 1, tmp_path / "run", data=data)
    shard = tmp_path / "run" / "answers" / "000000.npz"
    written = shard.stat().st_mtime_ns
    with pytest.raises(DexError, match=r"0\.001 minutes leave no time to learn"):
        timed.train_for(lm, 0.001, tmp_path / "run", data=data)
    assert shard.stat().st_mtime_ns == written
    budget = json.loads((tmp_path / "run" / timed.BUDGET).read_text())
    assert budget["tokens"] > 0
    assert budget["seconds"] > 0
    with pytest.raises(DexError, match=r"0\.002 minutes leave no time to learn"):
        timed.train_for(lm, 0.002, tmp_path / "run", data=data)
    assert json.loads((tmp_path / "run" / timed.BUDGET).read_text()) == budget


@pytest.mark.slow
def test_a_drafter_in_so_many_minutes_with_what_it_brings(lm, data, tmp_path, monkeypatch, clock, steady_ticks) -> None:
    monkeypatch.setattr(timed, "LENGTH", 48)
    monkeypatch.setattr(timed, "compile_seconds", lambda: 1000.0)  # what this process compiled before does not count
    started = clock.perf_counter()
    ways = timed.train_for(lm, 1, tmp_path, data=data)
    assert clock.perf_counter() - started < 75
    drafter = load_exits(tmp_path)
    assert drafter.config.is_drafter
    assert drafter.config.draft_size <= 270
    assert [way.name for way in ways] == ["plain decoding", "decode.py without it", "decode.py with it"]
    assert ways[0].tokens_per_tick == ways[0].over_plain == 1
    assert ways[2].tokens_per_tick > 1  # a model of random weights repeats itself
    steps = drafter.metadata["steps"]
    timed.train_for(lm, 1.5, tmp_path, data=data)
    assert load_exits(tmp_path).metadata["steps"] > steps


@pytest.mark.slow
def test_exits_for_explorers(lm, data, tmp_path, monkeypatch, clock) -> None:
    monkeypatch.setattr(timed, "LENGTH", 48)
    heard = []
    assert timed.train_for(lm, 0.5, tmp_path, explorers=4, data=data, tell=heard.append) == []
    assert load_exits(tmp_path).config.depths == (1, 2, 3)
    figures = "\n".join(heard)
    assert "depth-side speedup" in figures
    assert "\n| 2 " in figures
    assert "\n| 4 " in figures
