"""C++ libraries, compiled for this machine when they are first needed and kept in the user's cache.

A checksum lies beside each library: one that does not match it, or cannot be loaded, is built again and never run.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path

import jax
import jaxlib

from dex_jax import interrupts
from dex_jax.io.whole_files import cache_folder, only_the_user_wrote, write_whole
from dex_jax.progress import notify

COMPILERS = ("c++", "g++", "clang++")

_builds: dict[str, Future[Path]] = {}  # results of `library`, by name
_running: dict[subprocess.Popen[bytes], str] = {}  # compilers, and the folders that they write into


def start_build(name: str, source: Path, flags: tuple[str, ...]) -> Future[Path]:
    """Call `library` in a thread, once for each name in a process, and return the future of its result."""

    def build(made: Future[Path]) -> None:
        try:
            made.set_result(library(name, source, flags))
        except BaseException as error:
            made.set_exception(error)

    if name not in _builds:
        _builds[name] = Future()
        threading.Thread(target=build, args=(_builds[name],), daemon=True).start()
    return _builds[name]


def loaded(name: str, source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the library, building it once more if it cannot be loaded; errors are those of `library`."""
    try:
        library_file = start_build(name, source, flags).result()
        try:
            return ctypes.CDLL(str(library_file))
        except OSError as error:
            print(f"{library_file.name} cannot be loaded ({error}): it is built again", file=sys.stderr)
            library_file.unlink(missing_ok=True)
            return ctypes.CDLL(str(library(name, source, flags)))
    except BaseException:
        _builds.pop(name, None)  # whoever asks again tries again
        raise


def library(name: str, source: Path, flags: tuple[str, ...]) -> Path:
    """Return the shared library of a C++ file and those beside it, compiled for this machine unless it is cached.

    Raise OSError without a compiler or a folder, CalledProcessError where the compiler refuses, DexError without room.
    """
    native, instructions = _compiler()
    # A product and a sum after it round twice on every machine, unless the source says otherwise.
    options = [*native, "-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-w", *flags]
    sources = [each.read_bytes() for each in sorted(source.parent.iterdir()) if each.suffix in (".cc", ".h")]
    # The digest leaves out where the sources lie, so that one build serves all environments.
    made_of = (*sources, instructions, " ".join(options).encode(), jaxlib.__version__.encode())
    digest = _digest(b"\0".join(made_of))[:16]
    library_file = cache_folder() / "native" / f"{name}-{digest}.so"
    library_file.parent.mkdir(mode=0o700, exist_ok=True)
    library_file.parent.chmod(0o700)
    checksum = library_file.with_suffix(".sha256")
    there = only_the_user_wrote(library_file)
    if there and only_the_user_wrote(checksum) and checksum.read_text() == _digest(library_file.read_bytes()):
        return library_file
    if there:
        print(
            f"{library_file.name} in {library_file.parent} is not what was written there: it is built again",
            file=sys.stderr,
        )
    notify(f"building the C++ library {name}, once")
    made = _compiled([*options, f"-I{jax.ffi.include_dir()}", str(source)])
    # The library comes last, and takes the place of what is there: another process may be loading it.
    for file, content in ((checksum, _digest(made).encode()), (library_file, made)):
        write_whole(file, content)
        file.chmod(0o600)
    return library_file


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _compiled(command: list[str]) -> bytes:
    """Run a compiler and return the library's bytes; an end of this process ends the compiler too, without a trace."""
    folder = tempfile.mkdtemp(prefix="dex_jax_")
    made = Path(folder) / "made.so"
    compiler = subprocess.Popen(
        [*command, "-o", str(made)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    _running[compiler] = folder
    try:
        said, _ = compiler.communicate()
        if compiler.returncode:
            raise subprocess.CalledProcessError(compiler.returncode, command, said)
        return made.read_bytes()
    finally:
        _running.pop(compiler, None)
        shutil.rmtree(folder, ignore_errors=True)


@interrupts.at_end
@atexit.register
def _stop() -> None:
    for compiler, folder in [*_running.items()]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(compiler.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def _compiler() -> tuple[tuple[str, ...], bytes]:
    """Return the command that compiles for this machine, and the macros that it defines; errors are `library`'s."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    command = shlex.split(compiler) if compiler else []
    if not command and importlib.util.find_spec("ziglang"):
        command = [sys.executable, "-m", "ziglang", "c++"]
    if not command or platform.system() not in ("Linux", "Darwin"):
        raise OSError("no C++ compiler")
    native = (*command, "-march=native")
    # The macros say what "native" means here: a home directory may belong to machines of several kinds.
    asked = [*native, "-dM", "-E", "-x", "c++", os.devnull]
    return native, subprocess.run(asked, capture_output=True, check=True).stdout
