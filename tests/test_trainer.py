"""The training loop: a plain loop's numbers, and the same bits after interrupts, kills and full disks."""

import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_worker
from reference.training_twin import train_linear_map
from training_worker import LinearMap, checkpoints_in, step_of

from dex_jax.errors import DexError
from dex_jax.training.checkpoints import Checkpoints
from dex_jax.training.config import MAY_CHANGE, TrainConfig
from dex_jax.training.journal import FILE_NAME, Journal, read_journal
from dex_jax.training.trainer import train

EVERY = {"checkpoint_every": 4, "eval_every": 6, "log_every": 3}
CONFIG = TrainConfig(**EVERY, steps=12, batch=4, learning_rate=0.02, warmup_steps=3, weight_decay=0.1, clip_norm=0.5)
TIMES = ("seconds", "tokens_per_second")


def silent(event):
    pass


def without_times(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_a_field_that_will_not_do_is_named():
    numbers = {"steps": 0, "batch": True, "seed": -1, "learning_rate": math.nan, "final_rate": 1.5, "beta2": 1.0}
    for field, value in (numbers | {"dtype": "float64"}).items():
        with pytest.raises(DexError, match=field):
            TrainConfig(**{field: value})


class Given(LinearMap):
    """A LinearMap that keeps the weights that training starts from."""

    def init(self, key):
        self.given = super().init(key)
        return self.given


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run a training without interruption, and return (its result, its folder, its task, its events)."""
    folder, told = tmp_path_factory.mktemp("whole"), []
    task = Given(CONFIG)
    return train(task, CONFIG, folder, notify=told.append), folder, task, told


def test_training_is_the_plain_loop_in_numpy(tmp_path):
    config = dataclasses.replace(CONFIG, log_every=1)
    trained = train(LinearMap(config), config, tmp_path, notify=silent)
    init_key, key = jax.random.split(jax.random.key(config.seed))
    twin = LinearMap(config)
    params, losses = train_linear_map(twin, config, twin.init(init_key), key)
    logged = [record["loss"] for record in read_journal(tmp_path) if record["kind"] == "train"]
    np.testing.assert_allclose(logged, losses, rtol=1e-4)
    for name, value in params.items():
        np.testing.assert_allclose(trained.params[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_run_learns_logs_evaluates_and_traces_once(whole):
    trained, folder, task, told = whole
    assert (trained.step, trained.tokens) == (12, 4 * 12 - 6)
    assert task.traces == 1
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
    # Training leaves constants and the weights that it starts from alone.
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
    assert re.fullmatch(rf"Stopped at step {stop}\. .*run the same command again: .*{expected}.*", told[-1])
    resumed = train(LinearMap(CONFIG), CONFIG, tmp_path, notify=again.append)
    chex.assert_trees_all_equal(resumed.params, whole[0].params)
    assert resumed.tokens == whole[0].tokens
    assert without_times(read_journal(tmp_path)) == without_times(read_journal(whole[1]))
    assert isinstance(again[0], str) == (stop >= 4)
    # A finished run does nothing.
    again.clear()
    done = train(LinearMap(CONFIG), CONFIG, tmp_path, notify=again.append)
    chex.assert_trees_all_equal(done.params, whole[0].params)
    (line,) = again
    assert "nothing is left to do" in line


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_names_the_step_and_is_never_saved(tmp_path, what):
    class Steep(LinearMap):
        def loss(self, params, constants, batch, key, step):
            loss, figures = super().loss(params, constants, batch, key, step)
            steep = lambda value: jnp.sqrt(0 * value)  # noqa: E731
            return loss + jax.lax.cond(step == 7, steep, jnp.zeros_like, params["bias"][0]), figures

    task = LinearMap(CONFIG, broken_from=7) if what == "loss" else Steep(CONFIG)
    with pytest.raises(DexError, match=f"{what} of step 8 is nan"):
        train(task, CONFIG, tmp_path, notify=silent)
    assert checkpoints_in(tmp_path) == [4]


def test_other_settings_are_refused_by_name_and_some_may_change(tmp_path, whole):
    def refused(task, config, why):
        with pytest.raises(DexError, match=why):
            train(task, config, whole[1], notify=silent)

    other = dataclasses.replace(CONFIG, seed=3, learning_rate=0.5, log_every=1)
    refused(LinearMap(other), other, r"learning_rate was 0.02, is 0.5; seed was 0, is 3\)")
    task = LinearMap(CONFIG)
    task.settings = lambda: {"kind": "linear"}
    refused(task, CONFIG, "kind was None, is linear")
    task.name = "another"
    refused(task, CONFIG, "training of linear_map, not another")
    folder = tmp_path / "copy"
    shutil.copytree(whole[1], folder)
    free = {"steps": 14, "minutes": 99.0, "keep": 1, "checkpoint_every": 7, "eval_every": None, "log_every": 1}
    assert free.keys() == set(MAY_CHANGE)
    longer, told = dataclasses.replace(CONFIG, **free), []
    task = LinearMap(longer)
    task.backbone = "backbone-b"
    assert train(task, longer, folder, notify=told.append).step == 14
    assert all(word in told[0] for word in ("warning", "backbone-a", "backbone-b"))
    assert checkpoints_in(folder) == [14]


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


def test_a_folder_is_one_processes_at_a_time_and_must_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DexError, match="cannot be written"), Checkpoints(tmp_path / "file" / "run", 1):
        pass
    for _ in range(2):
        with Checkpoints(tmp_path, 1), pytest.raises(DexError, match="another process"), Checkpoints(tmp_path, 1):
            pass


def test_a_full_disk_and_a_damaged_checkpoint_are_told_and_nothing_before_is_lost(tmp_path):
    """The system cuts a process's write off; once there is room the run ends like one that always had it."""
    folder, config, width = tmp_path / "run", training_worker.CONFIG, training_worker.WIDTH
    # This is less than one array takes, however arrays share files.
    command = [sys.executable, training_worker.__file__, folder, "100000"]
    full = subprocess.run(command, capture_output=True, text=True)
    assert re.search(r"DexError: .*cannot be written .*run the same command again", full.stderr), full.stderr
    assert checkpoints_in(folder) == [4]
    told = []
    resumed = train(LinearMap(config, width), config, folder, notify=told.append)
    assert "from step 4 " in told[0]
    clean = train(LinearMap(config, width), config, tmp_path / "clean", notify=silent)
    chex.assert_trees_all_equal(resumed.params, clean.params)
    assert checkpoints_in(folder) == [28, 30]
    shutil.rmtree(folder / "30" / "rest")
    with pytest.raises(DexError, match=r"30.*: remove it, and training goes on from the one before"):
        train(LinearMap(config, width), config, folder, notify=silent)
    shutil.rmtree(folder / "30")
    again = train(LinearMap(config, width), config, folder, notify=silent)
    chex.assert_trees_all_equal(again.params, clean.params)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_never_killed(tmp_path):
    """It is killed at random moments, one of them during a save, and then ends bit for bit the same."""
    folder = tmp_path / "killed"
    command, environment = [sys.executable, training_worker.__file__, folder], os.environ | {"JAX_PLATFORMS": "cpu"}
    rng = np.random.default_rng(0)

    def half_written():
        return any(folder.glob("*.orbax-checkpoint-tmp*"))

    def stopped_in_a_later_save(process):
        """Return whether the process, held still, has one whole checkpoint and half of another; else it goes on."""
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if half_written() and checkpoints_in(folder):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    for kill in range(2):
        lines = len(read_journal(folder))
        more = int(rng.integers(3, 6))
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 300
            # The journal shrinks when a run resumes; what counts is that it grew from there.
            while process.poll() is None and time.monotonic() < deadline:
                lines = min(lines, len(read_journal(folder)))
                far_enough = len(read_journal(folder)) >= lines + more
                if far_enough and (kill > 0 or (half_written() and stopped_in_a_later_save(process))):
                    break
                time.sleep(0.001 if far_enough else 0.02)
            time.sleep(0.0 if kill == 0 else float(rng.uniform(0, 0.1)))
            process.kill()
            assert ("Resuming from step" in process.stderr.read()) == (kill > 0)
        assert process.returncode == -signal.SIGKILL
        assert kill > 0 or half_written()
    runs = [(folder, told := []), (tmp_path / "whole", [])]
    config, width = training_worker.CONFIG, training_worker.WIDTH
    killed, whole = (train(LinearMap(config, width), config, where, notify=tell.append) for where, tell in runs)
    assert "Resuming from step" in told[0]
    chex.assert_trees_all_equal(killed.params, whole.params)
    assert without_times(read_journal(folder)) == without_times(read_journal(tmp_path / "whole"))
    assert not half_written()
