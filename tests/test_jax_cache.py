"""Compiled programs on disk: JAX's own cache serves the command and Python alike, and a long wait is announced."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from reference.small_models import LLAMA, small_model, train_tokenizer, weights_of

from dex_jax.decoding import program
from dex_jax.io.jax_cache import keep_programs
from dex_jax.io.save import save_model
from dex_jax.io.whole_files import cache_folder
from dex_jax.progress import listening

ROOT = Path(__file__).resolve().parents[1]


def test_a_users_own_setting_wins(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    try:
        keep_programs()
        assert {name: jax.config.values[name] for name in names} == before
        jax.config.update(names[0], None)
        jax.config.update(names[1], False)
        keep_programs()
        assert jax.config.values[names[0]] is None
        jax.config.update(names[1], True)
        keep_programs()
        assert jax.config.values[names[0]] == str(tmp_path / "dex_jax" / "compiled")
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_long_wait_is_told_where_nobody_listens(monkeypatch, capsys) -> None:
    # The compiler ends after the wait was told: where it ran at once, it could end before anybody waited.
    compilers, say, told = program.COMPILERS, program.say_wait, threading.Event()

    def submit(work, **options):
        told.clear()
        return compilers.submit(lambda: told.wait(60) and work(**options))

    monkeypatch.setattr(program, "COMPILERS", SimpleNamespace(submit=submit))
    monkeypatch.setattr(program, "say_wait", lambda why: (say(why), told.set()))
    monkeypatch.setattr(program, "SOON", 0.0)
    heard: list[str] = []
    with listening(heard.append):
        program.CompiledFunction(lambda x: jnp.sort(x) @ jnp.sin(x))(jnp.ones(3))
    assert heard == ["tracing <lambda>", "compiling <lambda>"]
    assert capsys.readouterr().err == ""
    program.CompiledFunction(lambda x: jnp.sort(x) @ jnp.cos(x))(jnp.ones(3))
    assert capsys.readouterr().err.startswith("compiling <lambda>, once for calls of this kind")


@pytest.mark.slow
def test_python_finds_what_the_command_has_compiled(tmp_path) -> None:
    config, own = dataclasses.replace(LLAMA, num_layers=1, vocab_size=300), tmp_path / "dex_jax"
    model = save_model(
        tmp_path / "model", config, weights_of(small_model(config)), train_tokenizer("Hi there" * 40, 300)
    )
    # The C++ libraries that are there need not be built again.
    (cache_folder() / "native").mkdir(mode=0o700, exist_ok=True)
    own.mkdir(mode=0o700)
    (own / "native").symlink_to(cache_folder() / "native")
    unset = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "TF_CPP_MIN_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [
        str(ROOT / "decode.py"),
        "--model",
        str(model),
        "--method",
        "ar",
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "4",
    ]
    python = f"import dex_jax; lm = dex_jax.load({str(model)!r}); options = dict(max_new_tokens=4, ticks_per_update=4)"
    python += "; print(dex_jax.generate(lm, 'Hi', method=dex_jax.AR(), **options).texts[0])"

    def run(*arguments: str) -> tuple[str, str, set[str]]:
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept = {
            file.name for file in (own / "compiled").iterdir() if file.name.startswith("jit_") and "-cache" in file.name
        }
        return done.stdout, done.stderr, kept

    first, second = run(*command), run("-c", python)
    assert second[0] == first[0]
    assert second[1] == ""
    large = ("jit_prefill_chunk", "jit_start_decoding", "jit_run_ticks")
    assert sum(name.startswith(large) for name in first[2]) == 3
    assert not [name for name in second[2] - first[2] if name.startswith(large)]
