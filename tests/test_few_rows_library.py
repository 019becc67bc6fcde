"""The library of C++ kernels: it is built once, safe from others, clean under sanitizers, and not required."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import environment
import jax
import numpy as np
import pytest
import sanitized_kernels
from builds import BUILDS, BYTES, PAIRS, ROUNDING, built, format_of
from conftest import slow
from reference.blocks import random_blocks
from test_few_rows import COMPILER, needs_compiler

from dex_jax.errors import DexError
from dex_jax.nn import few_rows, native
from dex_jax.nn.blocks import FORMATS
from dex_jax.nn.packed import INT8
from dex_jax.nn.tiles import in_tiles

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
    """Return `ready()` and `kept_dtype(float32)` of a process of its own, in which a product must be right."""
    own = {"XDG_CACHE_HOME": str(tmp_path)} | variables
    run = subprocess.run([sys.executable, "-c", SAYS], env=os.environ | own, capture_output=True, text=True, check=True)
    ready, library_file, product = json.loads(run.stdout)
    x, kernel = np.arange(24).reshape(3, 8), np.arange(40).reshape(5, 8)
    assert product == (x @ kernel.T).tolist()
    return ready, library_file


def quick_compiler(tmp_path, *flags: str) -> str:
    """Return a compiler that does not optimise, as these tests run too few rows to need fast code."""
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
    assert [file.name.split("-")[0] for file in built] == ["float32", "float32", "kernels", "kernels"]
    made = [file.stat().st_mtime_ns for file in built]
    # Two devices must propose what one does, so they keep bfloat16 too.
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
    """Return the arguments of `native.loaded` for a source that is built quickly, in caches of its own."""
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
    library_file = native.library(*answer)
    made = library_file.read_bytes()
    assert native.library(*answer) == library_file
    assert not capfd.readouterr().err, "what is whole is used"
    library_file.unlink()
    library_file.write_bytes(DAMAGES[damage](made))
    library_file.chmod(0o600)
    if vouched:  # the checksum is right, so only the loader can refuse it
        library_file.with_suffix(".sha256").write_text(hashlib.sha256(library_file.read_bytes()).hexdigest())
    native._builds.clear()
    assert native.loaded(*answer).answer() == 42
    assert "built again" in capfd.readouterr().err
    assert library_file.read_bytes() == made
    native._builds.clear()
    assert native.loaded(*answer).answer() == 42
    assert not capfd.readouterr().err, "it is built once more, and not ever again"


@needs_compiler
def test_a_library_that_another_process_is_loading_never_disappears(answer, monkeypatch) -> None:
    library_file, write_whole = native.library(*answer), native.write_whole
    library_file.with_suffix(".sha256").write_text("another")
    written = []

    def seen(file: Path, content: bytes) -> None:
        assert library_file.exists()
        written.append(file.suffix)
        write_whole(file, content)

    monkeypatch.setattr(native, "write_whole", seen)
    assert native.library(*answer) == library_file
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


@needs_compiler
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(
    "format", ["Q4_1", INT8, "Q6_K", *(slow(each) for each in FORMATS if each not in ("Q4_1", "Q6_K"))]
)
def test_products_are_the_same_to_the_last_bit_whatever_instructions_there_are(format, name) -> None:
    """The library of a format is compiled again as another CPU would, and goes by another name."""
    few_rows._load(format)
    other = f"{format} by {name}"
    few_rows.load_as(other, format_of(built(format, name)))
    generator = np.random.default_rng(0)
    for rows, outputs, blocks in [(1, 16, 1), (7, 37, 2), (16, 64, 3), (45, 5, 1)]:
        if format == INT8:
            kernel = generator.integers(-128, 128, (outputs, 96 * blocks + rows), np.int8)
        else:
            kernel = random_blocks(generator, format, outputs, blocks)
        width = kernel.shape[1] if format == INT8 else kernel.shape[1] // FORMATS[format][1] * FORMATS[format][0]
        x = generator.normal(size=(rows, width)).astype("f") * 10.0 ** generator.integers(-9, 9, (rows, 1))
        tiles, shape = in_tiles(kernel, format), jax.ShapeDtypeStruct((rows, outputs), np.float32)
        found = [
            jax.ffi.ffi_call(few_rows.PRODUCT, shape)(x.astype("f"), tiles, format=each) for each in (format, other)
        ]
        np.testing.assert_array_equal(*found)


@needs_compiler
def test_a_format_that_reads_rows_in_another_layout_is_refused() -> None:
    assert few_rows.ready()
    bytes_, pairs = (ctypes.CDLL(str(few_rows.library("Q4_1", (layout,)))) for layout in (BYTES, PAIRS))
    for reads, rounds in ((bytes_, pairs), (pairs, bytes_)):
        wrong = type(format_of(reads))(*format_of(reads))
        few_rows.load_as("a copy", wrong)
        wrong[ROUNDING] = format_of(rounds)[ROUNDING]
        with pytest.raises(DexError, match="kernels for a wrong pair do not fit"):
            few_rows.load_as("a wrong pair", wrong)
        call = jax.ffi.ffi_call(few_rows.PRODUCT, jax.ShapeDtypeStruct((1, 1), np.float32))
        with pytest.raises(jax.errors.JaxRuntimeError, match="a wrong pair have not been loaded"):
            call(np.zeros((1, 32), np.float32), np.zeros((1, 20), np.uint8), format="a wrong pair")
    numbers = ctypes.CDLL(str(few_rows.library("float32")))
    wrong = type(format_of(numbers))(*format_of(numbers))
    wrong[1] = 24 - wrong[1]  # vectors of 16 numbers where there are 8, and of 8 where there are 16
    with pytest.raises(DexError, match="layout"):
        few_rows.load_as("numbers of another CPU", wrong)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", [name for name in BUILDS if name.startswith("none")])
def test_all_kernels_are_the_same_without_vector_instructions(tmp_path, name) -> None:
    own = {"XDG_CACHE_HOME": str(tmp_path), "CXX": quick_compiler(tmp_path, *BUILDS[name].flags)}
    for test in ("test_a_product_is_that_of_rounded_rows", "test_what_is_not_finite"):
        file = str(Path(__file__).with_name("test_packed.py"))
        command = [sys.executable, "-m", "pytest", "-q", "-n0", file, "-k", test]
        subprocess.run(command, env=os.environ | own, check=True)


@needs_compiler
def test_a_format_that_cannot_be_built_is_one_sentence(tmp_path, monkeypatch) -> None:
    assert few_rows.ready()
    monkeypatch.setattr(native, "_compiler", lambda: ((shutil.which("false"),), b""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_builds", {})
    few_rows._load.cache_clear()
    with pytest.raises(DexError, match="DEX_JAX_NATIVE=0"):
        few_rows.tiles_product(np.zeros((1, 32)), np.zeros((1, 18), np.uint8), "Q4_0")


@needs_compiler
def test_ziglang_compiles_where_nothing_else_does(answer, tmp_path, monkeypatch) -> None:
    """A package that passes its arguments on to a compiler stands for PyPI's, which takes minutes at first."""
    package = tmp_path / "ziglang"
    package.mkdir()
    (package / "__init__.py").touch()
    passes_on = f"import subprocess, sys\nsys.exit(subprocess.call([{COMPILER!r}, *sys.argv[2:]]))\n"
    (package / "__main__.py").write_text(passes_on)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native, "COMPILERS", ())
    native._compiler.cache_clear()
    try:
        assert native._compiler()[0][1:4] == ("-m", "ziglang", "c++")
        assert native.loaded(*answer).answer() == 42
    finally:
        native._compiler.cache_clear()


@pytest.mark.slow
def test_without_it_the_product_is_xlas(tmp_path) -> None:
    assert says(tmp_path, DEX_JAX_NATIVE="0") == (False, "float32")
    assert says(tmp_path, CXX=shutil.which("false") or "false") == (False, "float32")
    assert not (tmp_path / "dex_jax" / "native").exists()
