import dataclasses
import math
import re
import shutil
import sys
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.training_twin import train_linear_map
from training_worker import LinearMap

from dex_jax.errors import DexError
from dex_jax.training.config import MAY_CHANGE, TrainConfig
from dex_jax.training.journal import FILE_NAME, Journal, read_journal
from dex_jax.training.optimizer import learning_rate
from dex_jax.training.trainer import train

EVERY = {"checkpoint_every": 4, "eval_every": 6, "log_every": 3}
CONFIG = TrainConfig(**EVERY, steps=12, batch=4, learning_rate=0.02, warmup_steps=3, weight_decay=0.1)
TIMES = ("seconds", "tokens_per_second")


def silent(event):
    pass


def without_times(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


# Configuration


def test_a_field_that_will_not_do_is_named():
    numbers = {"steps": 0, "batch": True, "seed": -1, "learning_rate": math.nan, "final_rate": 1.5, "beta2": 1.0}
    for field, value in (numbers | {"dtype": "float64", "tensorboard": "yes"}).items():
        with pytest.raises(DexError, match=field):
            TrainConfig(**{field: value})


# Optimizer


@pytest.mark.parametrize(("accumulate", "clip_norm"), [(1, 0.5), (3, 1e9)])
def test_training_is_the_plain_loop_in_numpy(tmp_path, accumulate, clip_norm):
    config = dataclasses.replace(CONFIG, accumulate=accumulate, clip_norm=clip_norm, log_every=1)
    trained = train(LinearMap(config), config, tmp_path, notify=silent)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    twin = LinearMap(config)
    params, losses = train_linear_map(twin, config, twin.init(init_key), key)
    logged = [record["loss"] for record in read_journal(tmp_path) if record["kind"] == "train"]
    np.testing.assert_allclose(logged, losses, rtol=1e-4)
    for name, value in params.items():
        np.testing.assert_allclose(trained.params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_learning_rate_rises_then_follows_steps_or_tokens():
    config = TrainConfig(steps=100, tokens=1000, learning_rate=2.0, warmup_steps=4, final_rate=0.1)
    assert learning_rate(config, 0, 0) == pytest.approx(2.0 / 4)
    assert learning_rate(config, 50, 0) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 10, 500) == learning_rate(config, 50, 100)
    assert learning_rate(config, 100, 0) == learning_rate(config, 10, 5000) == pytest.approx(0.2)


# The loop


class Given(LinearMap):
    """Keeps the weights that training starts from."""

    def init(self, key):
        self.given = super().init(key)
        return self.given


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: (what it gives, its folder, its task, what it told)."""
    folder, told = tmp_path_factory.mktemp("whole"), []
    task = Given(CONFIG)
    return train(task, CONFIG, folder, notify=told.append), folder, task, told


def step_of(event) -> int | None:
    """The step that a Standing tells of; None for lines of text."""
    return None if isinstance(event, str) else int(event.what.removeprefix("step ").partition("/")[0])


def test_a_run_learns_logs_evaluates_and_traces_once(whole):
    trained, folder, task, told = whole
    assert (trained.step, trained.tokens) == (12, 4 * 12 - 6)
    assert (task.traces, task.boundaries) == (1, 3)
    assert all(value.dtype == jnp.float32 for value in trained.params.values())
    records = read_journal(folder)
    assert [record["step"] for record in records if record["kind"] == "train"] == [3, 4, 6, 8, 9, 12]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in evaluations] == [6, 12]
    assert evaluations[1]["distance"] == task.evaluate(trained.params)["distance"] < evaluations[0]["distance"]
    assert evaluations[1]["undefined"] is None
    assert {"loss", "gradient_norm", "worst", "learning_rate", *TIMES} <= records[0].keys()
    assert [step_of(event) for event in told] == list(range(1, 13))
    assert [step_of(event) for event in told if event.logged] == [3, 4, 6, 8, 9, 12]
    assert re.fullmatch(r"step 12/12, 42 tokens, [0-9.]+k? tokens/s, loss [0-9.]+, 0 s left", told[-1].describe())
    assert told[0].seconds_left is None
    assert told[-1].seconds_left == 0.0
    # Constants and the weights that training starts from are left alone.
    np.testing.assert_array_equal(task.target, LinearMap(CONFIG).target)
    assert all(not value.is_deleted() for value in task.given.values())


@pytest.mark.parametrize(("stop", "expected"), [(3, "begins anew"), (6, "goes on from step 4")])
def test_ctrl_c_says_how_to_resume_and_a_resumed_run_comes_to_the_same_end(tmp_path, whole, stop, expected):
    told, again = [], []

    def interrupting(event):
        told.append(event)
        if step_of(event) == stop:
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        train(LinearMap(CONFIG), CONFIG, tmp_path, notify=interrupting)
    assert ended.value.code == 130
    assert f"Stopped at step {stop}." in told[-1] or f"Stopped at step {stop - 1}." in told[-1]
    assert "run the same command again" in told[-1]
    assert expected in told[-1]
    assert "\n" not in told[-1]
    resumed = train(LinearMap(CONFIG), CONFIG, tmp_path, notify=again.append)
    chex.assert_trees_all_equal(resumed.params, whole[0].params)
    assert resumed.tokens == whole[0].tokens
    assert without_times(read_journal(tmp_path)) == without_times(read_journal(whole[1]))
    assert isinstance(again[0], str) == (stop >= 4)


def test_a_run_that_is_done_does_nothing(whole):
    trained, folder, _, _ = whole
    told, before = [], read_journal(folder)
    again = train(LinearMap(CONFIG), CONFIG, folder, notify=told.append)
    chex.assert_trees_all_equal(again.params, trained.params)
    assert read_journal(folder) == before
    (line,) = told
    assert "nothing is left to do" in line


def test_a_budget_of_tokens_ends_training(tmp_path):
    config = dataclasses.replace(CONFIG, tokens=11)
    trained = train(LinearMap(config), config, tmp_path, notify=silent)
    assert (trained.step, trained.tokens) == (3, 11)
    assert [record["step"] for record in read_journal(tmp_path) if record["kind"] == "evaluation"] == [3]


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_what_was_saved(tmp_path):
    with pytest.raises(DexError, match="loss of step 7 is nan"):
        train(LinearMap(CONFIG, broken_from=6), CONFIG, tmp_path, notify=silent)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000004"]


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    class Steep(LinearMap):
        def loss(self, params, constants, batch, key, step):
            loss, figures = super().loss(params, constants, batch, key, step)
            steep = lambda value: jnp.sqrt(0 * value)  # noqa: E731
            return loss + jax.lax.cond(step == 3, steep, jnp.zeros_like, params["bias"][0]), figures

    with pytest.raises(DexError, match="gradient of step 4"):
        train(Steep(CONFIG), CONFIG, tmp_path, notify=silent)
    assert not list(tmp_path.glob("step_*"))


# What a folder refuses


def test_other_settings_are_refused_by_name_and_some_may_change(whole):
    other = dataclasses.replace(CONFIG, seed=3, learning_rate=0.5, log_every=1)
    with pytest.raises(DexError, match=r"learning_rate was 0.02, is 0.5; seed was 0, is 3\)"):
        train(LinearMap(other), other, whole[1], notify=silent)
    free = {"tokens": 5, "keep": 9, "eval_every": None, "log_every": 1, "steps": 1}
    assert {*free, "tensorboard"} == set(MAY_CHANGE)
    assert dataclasses.replace(CONFIG, **free).conflicts(dataclasses.asdict(CONFIG)) == []


def test_other_tasks_and_settings_of_tasks_are_refused(whole):
    task = LinearMap(CONFIG)
    task.settings = lambda: {"kind": "linear"}
    with pytest.raises(DexError, match="kind was None, is linear"):
        train(task, CONFIG, whole[1], notify=silent)
    task = LinearMap(CONFIG)
    task.name = "another"
    with pytest.raises(DexError, match="training of linear_map, not another"):
        train(task, CONFIG, whole[1], notify=silent)


def test_another_backbone_warns_and_more_steps_go_on(tmp_path, whole):
    folder = tmp_path / "copy"
    shutil.copytree(whole[1], folder)
    longer, told = dataclasses.replace(CONFIG, steps=14, keep=1, log_every=1), []
    task = LinearMap(longer)
    task.backbone = "backbone-b"
    assert train(task, longer, folder, notify=told.append).step == 14
    assert all(word in told[0] for word in ("warning", "backbone-a", "backbone-b"))


# Journal


def test_a_resumed_journal_drops_half_lines_and_lines_beyond(tmp_path):
    journal = Journal(tmp_path, 0)
    for step in (1, 2, 3):
        journal.write("train", step, {"loss": np.float32(0.5), "list": (1, math.inf), "deep": {1: jnp.ones(1)}})
    journal.close()
    path = tmp_path / FILE_NAME
    whole_lines = path.read_bytes()
    path.write_bytes(whole_lines + b'{"kind": "train", "st')
    assert len(read_journal(tmp_path)) == 3
    Journal(tmp_path, 3).close()
    assert path.read_bytes() == whole_lines
    journal = Journal(tmp_path, 2)
    journal.write("train", 3, {"loss": 0.25})
    journal.close()
    assert [record["loss"] for record in read_journal(tmp_path)] == [0.5, 0.5, 0.25]
    first = read_journal(tmp_path)[0]
    assert (first["list"], first["deep"]) == ([1, None], {"1": [1.0]})


def test_tensorboard_is_optional_and_purges_what_is_done_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(DexError, match="pip install tensorboardX"):
        Journal(tmp_path, 0, tensorboard=True)
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", types.SimpleNamespace(SummaryWriter=Writer))
    journal = Journal(tmp_path, 5, tensorboard=True)
    journal.write("train", 6, {"loss": 0.5, "list": [1]})
    journal.close()
    assert written == [("tensorboard", 6), ("train/loss", 0.5, 6), "closed"]
