"""Compiled programs on disk: a process that finds one traces nothing, and what is wrong with one does no harm."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.small_models import LLAMA, small_model, train_tokenizer, weights_of

from dex_jax.config import LayerKind
from dex_jax.decoding import program_store
from dex_jax.decoding.program import Program, side_by_side
from dex_jax.io.save import save_model
from dex_jax.io.whole_files import cache_folder

PROGRAM = Path(__file__).resolve().parents[1] / "decode.py"
X = jax.ShapeDtypeStruct((3,), jnp.float32)


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """Where programs are kept."""
    (tmp_path / "programs").mkdir(mode=0o700)
    program_store.keep_in(tmp_path / "programs")
    yield tmp_path / "programs"
    program_store.keep_in(None)


def power(x: jax.Array, sums: dict, exponent: int, kind: object = None) -> dict:
    return {"power": x**exponent, "sum": sums["sum"] + jnp.sum(x)}


def made(**static: object) -> Program:
    """A program as a process that begins has it, compiled for X."""
    program = Program(power, static=("exponent", "kind"), donate=(1,))
    traced = [0]
    lower = program.jitted.lower

    class Counting:
        def lower(self, *args: object, **static: object) -> object:
            traced[0] += 1
            return lower(*args, **static)

        def clear_cache(self) -> None:
            pass

    program.jitted = Counting()
    with side_by_side() as begin:
        out = begin(program, X, {"sum": jax.ShapeDtypeStruct((), jnp.float32)}, **static).out_info
    assert (out["power"].shape, out["sum"].dtype) == ((3,), jnp.float32)
    found = program(jnp.arange(3.0), {"sum": jnp.float32(1)}, **static)
    np.testing.assert_array_equal(found["power"], np.arange(3.0) ** static["exponent"])
    assert found["sum"] == 4
    program.traced = traced[0]
    return program


def test_a_program_is_found_again_by_what_it_is_made_of(folder) -> None:
    assert made(exponent=2).traced == 1
    assert made(exponent=2).traced == 0
    assert [file.name.split("-")[0] for file in folder.iterdir()] == ["power"]
    assert {file.stat().st_mode & 0o077 for file in folder.iterdir()} == {0}
    assert made(exponent=3).traced == made(exponent=2, kind=LayerKind(4)).traced == 1
    assert made(exponent=2, kind=LayerKind(4)).traced == 0
    assert made(exponent=2, kind=LayerKind(5)).traced == 1


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Of a user, whose code may change."""

    number: int = 1


def test_statics_of_other_packages_are_not_trusted(folder) -> None:
    for kind in (Foreign(), (1, Foreign()), np.arange(3).tobytes()):
        assert made(exponent=2, kind=kind).traced == 1
    assert list(folder.iterdir()) == []


def test_other_sources_settings_and_devices_are_other_programs(monkeypatch) -> None:
    assert made(exponent=2).traced == 1
    monkeypatch.setattr(program_store, "_here", lambda: "elsewhere")
    assert made(exponent=2).traced == 1
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert made(exponent=2).traced == 1
    monkeypatch.undo()
    assert made(exponent=2).traced == 0


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "another", "writable", "refused"])
def test_what_is_wrong_is_made_again(folder, damage, monkeypatch) -> None:
    made(exponent=2)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    if damage == "writable":
        file.chmod(0o622)
    elif damage == "refused":
        monkeypatch.setattr(program_store.serialize_executable, "deserialize_and_load", None)
    else:
        flipped = content[:99] + bytes([content[99] ^ 255]) + content[100:]
        file.write_bytes({"empty": b"", "cut": content[:-7], "flipped": flipped, "another": b"hello"}[damage])
    assert made(exponent=2).traced == 1


def test_the_oldest_files_go_and_a_full_disk_is_no_error(folder, monkeypatch) -> None:
    monkeypatch.setattr(program_store, "MOST", 2)
    for exponent in (2, 3, 4):
        made(exponent=exponent)
        for file in folder.iterdir():
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 10))
    assert [made(exponent=exponent).traced for exponent in (4, 3, 2)] == [0, 0, 1]

    def full(path: object, content: object) -> None:
        raise program_store.DexError("no room")

    monkeypatch.setattr(program_store, "write_whole", full)
    assert made(exponent=7).traced == 1


def test_jaxs_own_cache_goes_on_afterwards_and_where_it_is_off_nothing_is_kept(folder) -> None:
    made(exponent=2)
    assert jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert made(exponent=2).traced == made(exponent=2).traced == 1
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.slow
def test_a_second_run_traces_nothing(tmp_path) -> None:
    config, own = dataclasses.replace(LLAMA, num_layers=1, vocab_size=300), tmp_path / "dex_jax"
    model = save_model(
        tmp_path / "model", config, weights_of(small_model(config)), train_tokenizer("Hi there" * 40, 300)
    )
    command = [sys.executable, str(PROGRAM), "--model", str(model), "--method", "ar", "--prompt", "Hi"]
    command += ["--max-new-tokens", "4"]
    # C++ that is there need not be built again.
    (cache_folder() / "native").mkdir(mode=0o700, exist_ok=True)
    own.mkdir(mode=0o700)
    (own / "native").symlink_to(cache_folder() / "native")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout.splitlines()[0] == runs[1].stdout.splitlines()[0]
    assert [bool(re.search("tracing", run.stderr)) for run in runs] == [True, False]
