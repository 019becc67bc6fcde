"""The library of C++ kernels: built once, kept from others, clean under sanitizers, and not needed."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment
import numpy as np
import pytest
import sanitized_kernels
from test_few_rows import COMPILER, needs_compiler

from dex_jax.errors import DexError
from dex_jax.nn import few_rows, native

SAYS = """
import json, jax, numpy as np
from dex_jax.nn import few_rows
from dex_jax.nn.layers import linear
x = np.arange(24, dtype=np.float32).reshape(3, 8)
kernel = np.arange(40, dtype=np.float32).reshape(5, 8)
kept = few_rows.kept_dtype(jax.numpy.dtype("float32"))
print(json.dumps([few_rows.ready(), str(kept), np.asarray(jax.jit(linear)(x, kernel)).tolist()]))
"""


def says(tmp_path, **variables: str) -> tuple[bool, str]:
    """What a process of its own says of `ready()` and of `kept_dtype(float32)`, when its product is right."""
    own = {"XDG_CACHE_HOME": str(tmp_path)} | variables
    run = subprocess.run([sys.executable, "-c", SAYS], env=os.environ | own, capture_output=True, text=True, check=True)
    ready, kept, product = json.loads(run.stdout)
    x, kernel = np.arange(24).reshape(3, 8), np.arange(40).reshape(5, 8)
    assert product == (x @ kernel.T).tolist()
    return ready, kept


def quick_compiler(tmp_path, *flags: str) -> str:
    """A compiler that takes no time to make fast code, which is nothing to a few rows."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" {" ".join(flags)} -O0\n')
    compiler.chmod(0o700)
    return str(compiler)


@pytest.mark.slow
@needs_compiler
def test_what_is_needed_is_compiled_once_and_kept_and_what_others_may_have_written_is_not_loaded(tmp_path) -> None:
    own = {"CXX": quick_compiler(tmp_path)}
    assert says(tmp_path, **own) == (True, "bfloat16")
    built = sorted((tmp_path / "dex_jax" / "native").iterdir())
    assert [file.name.split("-")[0] for file in built] == [
        "float32",
        "float32",
        "kernels",
        "kernels",
    ]
    made = [file.stat().st_mtime_ns for file in built]
    # Two devices have to propose what one does.
    assert says(tmp_path, **own, XLA_FLAGS=environment.flags_for_devices(2)) == (False, "bfloat16")
    assert [file.stat().st_mtime_ns for file in sorted(built[0].parent.iterdir())] == made
    for file in built:
        file.unlink()  # what this process may have loaded stays whole
        file.write_bytes(b"not a library")
        file.chmod(0o666)
    built[0].parent.chmod(0o777)
    assert says(tmp_path, **own) == (True, "bfloat16")
    assert not any(path.stat().st_mode & 0o022 for path in (*built, built[0].parent))


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """A source that takes no time to build, among caches of its own: what `native.loaded` takes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(native, "_builds", {})
    source = tmp_path / "source" / "answer.cc"
    source.parent.mkdir()
    source.write_text('extern "C" int answer() { return 42; }')
    return "answer", source, ()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle : middle + 64]) + content[middle + 64 :]


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": flipped,
    "empty": lambda content: b"",
    "random": lambda content: os.urandom(len(content)),
}


@needs_compiler
@pytest.mark.parametrize(("damage", "vouched"), [*((damage, False) for damage in DAMAGES), ("random", True)])
def test_a_damaged_library_is_built_again_and_said_to_be(answer, damage, vouched, capfd) -> None:
    kept = native.library(*answer)
    made = kept.read_bytes()
    assert native.library(*answer) == kept
    assert not capfd.readouterr().err, "what is whole is used"
    kept.unlink()
    kept.write_bytes(DAMAGES[damage](made))
    kept.chmod(0o600)
    if vouched:  # what the loader refuses by itself
        kept.with_suffix(".sha256").write_text(hashlib.sha256(kept.read_bytes()).hexdigest())
    native._builds.clear()
    assert native.loaded(*answer).answer() == 42
    assert "built again" in capfd.readouterr().err
    assert kept.read_bytes() == made
    native._builds.clear()
    assert native.loaded(*answer).answer() == 42
    assert not capfd.readouterr().err, "it is built once more, and not ever again"


@needs_compiler
def test_a_library_that_another_process_is_loading_never_disappears(answer, monkeypatch) -> None:
    kept, write_whole = native.library(*answer), native.write_whole
    kept.with_suffix(".sha256").write_text("another")
    written = []

    def seen(file: Path, content: bytes) -> None:
        assert kept.exists()
        written.append(file.suffix)
        write_whole(file, content)

    monkeypatch.setattr(native, "write_whole", seen)
    assert native.library(*answer) == kept
    assert written == [".sha256", ".so"], "what vouches for a library is there before it"


INTERRUPTED = """
import pathlib, sys
from dex_jax import interrupts
from dex_jax.nn import native
with interrupts.heeded():
    native.library("slow", pathlib.Path(sys.argv[1]), ())
"""


@pytest.mark.skipif(shutil.which("ps") is None, reason="asks ps which processes run")
def test_ctrl_c_ends_compilers_and_leaves_nothing_behind(answer, tmp_path) -> None:
    pid = tmp_path / "pid"
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-E*) exit 0;; esac\nsleep 60 &\necho $! > {pid}\nwait\n')
    compiler.chmod(0o700)
    own = {"CXX": str(compiler), "TMPDIR": str(tmp_path / "temporary"), "JAX_PLATFORMS": "cpu"}
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", INTERRUPTED, str(answer[1])]
    process = subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1].strip() == b"Stopped."
    assert process.returncode == 130
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True).stdout
    assert state.strip() in ("", "Z"), "the compiler still runs"
    assert not [*(tmp_path / "temporary").iterdir()]
    assert not [*(tmp_path / "caches" / "dex_jax" / "native").iterdir()]


@pytest.mark.slow
@needs_compiler
def test_sanitizers_find_nothing_in_the_kernels_on_ragged_empty_and_wrong_shapes() -> None:
    runtimes = [
        Path(subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip())
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(runtime.is_file() for runtime in runtimes):
        pytest.skip(f"{COMPILER} has no address sanitizer")
    # The stacks on which GCC 12 watches returned frames are aligned to less than AVX-512's vectors: it crashes there.
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    own = {"LD_PRELOAD": ":".join(map(str, runtimes)), "ASAN_OPTIONS": options, "JAX_PLATFORMS": "cpu"}
    built = [str(few_rows.library(part, sanitized_kernels.FLAGS)) for part in sanitized_kernels.PARTS]
    command = [sys.executable, sanitized_kernels.__file__, *built]
    run = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "clean"), run.stderr[:4000]


PACKED = """
import sys
import jax.numpy as jnp, numpy as np
sys.path.insert(0, sys.argv[1])
from reference.blocks import dequantised, random_blocks
from dex_jax.nn import few_rows
from dex_jax.nn.blocks import FORMATS
assert few_rows.ready()
random = np.random.default_rng(0)
for format, (columns, _) in FORMATS.items():
    blocks = random_blocks(random, format, 65, 768 // columns)
    rows, numbers = random.normal(size=(19, 768)).astype("f"), jnp.asarray(dequantised(blocks, format))
    for x in (rows[:1], rows[:4], rows):
        found = few_rows.packed_product(jnp.asarray(x), jnp.asarray(blocks), format)
        np.testing.assert_array_equal(found, few_rows.few_rows_product(jnp.asarray(x), numbers), format)
"""


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names instructions of x86")
def test_blocks_are_read_without_vector_instructions_too(tmp_path) -> None:
    compiler = quick_compiler(tmp_path, "-mno-avx2", "-mno-avx", "-mno-fma", "-mno-f16c")
    own = {"XDG_CACHE_HOME": str(tmp_path), "CXX": compiler}
    command = [sys.executable, "-c", PACKED, str(Path(__file__).parent)]
    subprocess.run(command, env=os.environ | own, check=True)


@needs_compiler
def test_a_format_that_cannot_be_built_is_one_sentence(tmp_path, monkeypatch) -> None:
    assert few_rows.ready()
    monkeypatch.setattr(native, "_compiler", lambda: ((shutil.which("false"),), b""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_builds", {})
    few_rows._load.cache_clear()
    with pytest.raises(DexError, match="DEX_JAX_NATIVE=0"):
        few_rows.packed_product(np.zeros((1, 32)), np.zeros((1, 18), np.uint8), "Q4_0")


@pytest.mark.slow
def test_without_it_the_product_is_xlas(tmp_path) -> None:
    assert says(tmp_path, DEX_JAX_NATIVE="0") == (False, "float32")
    assert says(tmp_path, CXX=shutil.which("false") or "false") == (False, "float32")
    assert not (tmp_path / "dex_jax" / "native").exists()
