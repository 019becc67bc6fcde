import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import training_worker
from test_trainer import silent, step_of, without_times
from training_worker import LinearMap

from dex_jax.errors import DexError
from dex_jax.training.checkpoints import Checkpoints, Record, list_checkpoints, read_newest, restore, saved_arrays
from dex_jax.training.config import TrainConfig
from dex_jax.training.journal import read_journal
from dex_jax.training.trainer import train

CONFIG = TrainConfig(steps=6, batch=4, warmup_steps=0, checkpoint_every=2, keep=2)
WORKER = Path(__file__).with_name("training_worker.py")


def state(value=1.0):
    return {
        "params": {"map": jnp.full((64, 64), value) * jnp.arange(64.0)[None], "half": jnp.ones(3, jnp.bfloat16)},
        "empty": jnp.zeros((0, 3)),
        "pair": (jnp.uint32(7), [jnp.int32(3)]),
    }


def record(step, cursor=None):
    return Record(step, 10 * step, cursor or {"batch": step}, {"steps": 9}, "toy", {}, "abc")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with checkpoints of steps 1, 2 and 3 of a hand-made state."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, 3, silent) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state(step), record(step))
    return folder


@pytest.fixture
def copy(three, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(three, folder)
    return folder


def steps_in(folder):
    return [step for step, _ in list_checkpoints(folder)]


def test_what_was_saved_comes_back(three):
    saved = read_newest(three)
    assert saved.record == record(3)
    back = restore(saved, state(0.0))
    np.testing.assert_array_equal(back["params"]["map"], state(3.0)["params"]["map"])
    assert back["params"]["half"].dtype == jnp.bfloat16
    assert back["empty"].shape == (0, 3)
    assert int(back["pair"][1][0]) == 3
    params = saved_arrays(saved, state()["params"], "params.")
    np.testing.assert_array_equal(params["map"], state(3.0)["params"]["map"])


def test_a_save_copies_before_it_returns(tmp_path):
    source = np.ones(1000, np.float32)
    with Checkpoints(tmp_path, 1, silent) as checkpoints:
        returned = checkpoints.save({"params": source}, record(1, {"pair": (1, 2), "none": None}))
        source[:] = 2.0
    # A cursor comes back as it will after a restore.
    assert returned == read_newest(tmp_path).record
    assert returned.cursor == {"pair": [1, 2], "none": None}
    np.testing.assert_array_equal(read_newest(tmp_path).arrays["params"], np.ones(1000, np.float32))


def flip(path):
    data = bytearray(largest(path).read_bytes())
    data[len(data) // 2] ^= 1
    largest(path).write_bytes(data)


def change_record(path):
    file = path / "_CHECKPOINT_METADATA"
    text = file.read_text()
    assert text.count('\\"tokens\\": 30') == 1
    file.write_text(text.replace('\\"tokens\\": 30', '\\"tokens\\": 31'))


def lose_arrays(path):
    shutil.rmtree(path / "state")


def largest(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("damage", [flip, change_record, lose_arrays])
def test_a_damaged_checkpoint_is_passed_over(copy, damage):
    damage(copy / "step_00000003")
    told = []
    assert read_newest(copy, told.append).record.step == 2
    with Checkpoints(copy, 3, told.append) as checkpoints:
        assert checkpoints.newest().record == record(2)
        assert checkpoints.saved_step == 2
    line, again = told
    assert line == again
    assert "step_00000003 is damaged" in line
    assert steps_in(copy) == [2, 1]
    assert (copy / "step_00000003.damaged").is_dir()


def test_damaged_checkpoints_do_not_count_as_kept(copy):
    flip(copy / "step_00000003")
    flip(copy / "step_00000002")
    with Checkpoints(copy, 1, silent) as checkpoints:
        assert checkpoints.newest().record.step == 1
        checkpoints.save(state(5.0), record(2))
    assert steps_in(copy) == [2]
    assert read_newest(copy).record.step == 2


def test_when_all_are_damaged_training_begins_anew(copy):
    for path in copy.glob("step_*"):
        flip(path)
    told = []
    with Checkpoints(copy, 3, told.append) as checkpoints:
        assert checkpoints.newest() is None
    assert len(told) == 3
    with pytest.raises(DexError, match="no whole checkpoint"):
        read_newest(copy)


def test_one_process_at_a_time(tmp_path):
    with (
        Checkpoints(tmp_path, 1, silent),
        pytest.raises(DexError, match="another process trains"),
        Checkpoints(tmp_path, 1, silent),
    ):
        pass
    with Checkpoints(tmp_path, 1, silent):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DexError, match="cannot be written"), Checkpoints(tmp_path / "file" / "run", 1, silent):
        pass


@pytest.mark.parametrize(
    "other",
    [
        {"params": {"map": jnp.zeros((64, 63))}},
        {"params": {"map": jnp.zeros((64, 64), jnp.int32)}},
        {"params": {"another": jnp.zeros((64, 64))}},
    ],
)
def test_what_does_not_fit_is_refused(three, other):
    with pytest.raises(DexError, match="but this run means"):
        restore(read_newest(three), {**state(), **other})


# Full disks


def test_a_full_disk_is_told_and_nothing_saved_is_lost(tmp_path, monkeypatch):
    """Told at once; the next test has one that is found out in the background."""
    config = dataclasses.replace(CONFIG, keep=1)
    save, folder, told = ocp.CheckpointManager.save, tmp_path / "run", []

    def failing(self, step, **options):
        if step != 4:
            return save(self, step, **options)
        (self.directory / "step_00000004.orbax-checkpoint-tmp").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", failing)
        with pytest.raises(DexError, match=r"step 4 could not be written .*the disk is full\); step 2 is still there"):
            train(LinearMap(config), config, folder, notify=silent)
    assert [path.name for path in folder.glob("step_*")] == ["step_00000002"]
    # After the trouble the run goes on to what a run without trouble gives.
    resumed = train(LinearMap(CONFIG), CONFIG, folder, notify=told.append)
    assert "from step 2 " in told[0]
    clean = train(LinearMap(CONFIG), CONFIG, tmp_path / "clean", notify=silent)
    np.testing.assert_array_equal(resumed.params["map"], clean.params["map"])


def test_a_write_that_the_system_cuts_off(tmp_path):
    width = 128
    config = dataclasses.replace(CONFIG, steps=2)
    train(LinearMap(config, width), config, tmp_path, notify=silent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limiting(event):
        if step_of(event) == 3:  # not before: a compiled program is kept on disk, too
            # Less than one array takes, however arrays share files.
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))

    try:
        with pytest.raises(DexError, match=r"the disk is full\); step 2 is still there"):
            train(LinearMap(CONFIG, width), CONFIG, tmp_path, notify=limiting)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000002"]
    assert read_newest(tmp_path).record.step == 2


# Kills


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_never_killed(tmp_path):
    """Kills at random moments, one of them for certain during a save, then the end: bit for bit the same."""
    command = [sys.executable, str(WORKER), str(tmp_path / "killed"), "--seconds", "0.02"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    rng = np.random.default_rng(0)
    in_a_save, resumed = 0, 0

    def lines():
        return len(read_journal(tmp_path / "killed"))

    def half_written():
        return any((tmp_path / "killed").glob("*.orbax-checkpoint-tmp*"))

    def stopped_in_a_later_save(process):
        """Whether the process, held still, has one whole checkpoint and half of another; else it goes on."""
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if half_written() and steps_in(tmp_path / "killed"):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    for kill in range(2):
        before, more = lines(), int(rng.integers(3, 6))
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 300
            # The journal shrinks when a run resumes; what counts is that it grew from there.
            while process.poll() is None and time.monotonic() < deadline:
                before = min(before, lines())
                far_enough = lines() >= before + more
                if far_enough and (kill > 0 or (half_written() and stopped_in_a_later_save(process))):
                    break
                time.sleep(0.001 if far_enough else 0.02)
            time.sleep(0.0 if kill == 0 else float(rng.uniform(0, 0.1)))
            process.kill()
            resumed += "Resuming from step" in process.stderr.read()
        assert process.returncode == -signal.SIGKILL
        in_a_save += half_written()
    assert resumed == 1
    assert in_a_save > 0
    told, task = [], LinearMap(training_worker.CONFIG, training_worker.WIDTH)
    killed = train(task, training_worker.CONFIG, tmp_path / "killed", notify=told.append)
    assert "Resuming from step" in told[0]

    task = LinearMap(training_worker.CONFIG, training_worker.WIDTH)
    whole = train(task, training_worker.CONFIG, tmp_path / "whole", notify=silent)
    chex.assert_trees_all_equal(killed.params, whole.params)
    assert without_times(read_journal(tmp_path / "killed")) == without_times(read_journal(tmp_path / "whole"))
    assert read_newest(tmp_path / "killed").record == read_newest(tmp_path / "whole").record


def test_what_a_kill_left_half_written_is_cleared_away(copy):
    half = copy / "step_00000004.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    with Checkpoints(copy, 3, silent) as checkpoints:
        assert checkpoints.newest().record.step == 3
    assert not half.exists()
