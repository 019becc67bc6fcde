"""Compiled programs on disk, found again by what they are made of: a process that finds one traces nothing.

JAX's own cache saves compiling alone, and tracing takes longer than reading. Programs for one CPU are kept, where
`keep_in` has named a folder.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import platform
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jaxlib
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from dex_jax.errors import DexError
from dex_jax.io.whole_files import only_the_user_wrote, write_whole
from dex_jax.nn import few_rows

MOST = 64
"""Files that are kept, those that were used last."""

_folder: Path | None = None
_turn, _compiling = threading.Lock(), 0


class Kept(NamedTuple):
    """A program that was found."""

    out_info: Any  # the shapes that it gives, as of jax.stages.Lowered
    read: Callable[[], Any]  # gives a jax.stages.Compiled


def keep_in(folder: Path | None) -> None:
    """Names the folder, which only the user may write to; None keeps nothing."""
    global _folder
    _folder = folder


def name_of(program: str, tree: Any, shapes: Any, static: Mapping[str, Any], level: int | None) -> str | None:
    """The file of a program for arguments of that tree and shapes; None where it is not kept."""
    here = _folder is not None and jax.default_backend() == "cpu" and jax.device_count() == 1
    # Whoever switches JAX's cache off wants none.
    wanted = _compiling > 0 or jax.config.values["jax_enable_compilation_cache"]
    if not here or not wanted or not all(map(_tells_all, static.values())):
        return None
    told = repr((str(tree), shapes, sorted(static.items()), level))
    return f"{program}-{hashlib.sha256(f'{told}{_here()}'.encode()).hexdigest()[:24]}"


def find(name: str | None) -> Kept | None:
    """What was kept under a name of `name_of`; None for nothing, and for what is damaged."""
    if _folder is None or name is None:
        return None
    file = _folder / name
    # Whatever is wrong with it, it can be made again.
    with contextlib.suppress(Exception):
        if only_the_user_wrote(file):
            trees, shapes, formats, executable = pickle.loads(zlib.decompress(file.read_bytes()))
            few_rows.load(formats)
            os.utime(file)
            out_info = jax.tree.unflatten(trees[1], [jax.ShapeDtypeStruct(*shape) for shape in shapes])
            return Kept(out_info, functools.partial(serialize_executable.deserialize_and_load, executable, *trees))
    return None


def keep(name: str, compiled: Any, out_info: Any) -> None:
    """Keeps a program under a name of `name_of`, if it can be written."""
    if _folder is None:
        return
    executable, *trees = serialize_executable.serialize(compiled)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(out_info)]
    content = pickle.dumps((trees, shapes, few_rows.loaded(), executable))
    with contextlib.suppress(DexError, OSError):
        write_whole(_folder / name, zlib.compress(content, 1))
        (_folder / name).chmod(0o600)
        for old in sorted(_folder.iterdir(), key=lambda file: file.stat().st_mtime)[:-MOST]:
            old.unlink(missing_ok=True)


@contextlib.contextmanager
def in_place_of_jax() -> Iterator[None]:
    """Within it, in any thread, JAX keeps nothing itself: what it has read cannot be written again."""
    global _compiling
    with _turn:
        _compiling += 1
        if _compiling == 1:
            _jax_keeps(False)
    try:
        yield
    finally:
        with _turn:
            _compiling -= 1
            if _compiling == 0:
                _jax_keeps(True)


def _jax_keeps(whether: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", whether)
    compilation_cache.reset_cache()  # it asks once


def _tells_all(value: Any) -> bool:
    """Whether what a static says of itself is all that it is; its code is of this package, which `_here` knows."""
    ours = type(value).__module__.startswith("dex_jax.")
    if type(value) is tuple or ours:
        return all(map(_tells_all, value if isinstance(value, tuple) else vars(value).values()))
    return type(value) in (type(None), bool, int, float, str) or isinstance(value, np.dtype)


@functools.cache
def _here() -> str:
    """What programs depend on beside their arguments: this package, the versions, the processor, and settings."""
    package = Path(__file__).resolve().parents[1]
    sources = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        sources.update(file.read_bytes())
    versions = [module.__version__ for module in (jax, jaxlib, flax, np)] + [platform.python_version()]
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else [platform.processor()]
    able = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    kinds = (bool, int, float, str, type(None))
    settings = {k: v for k, v in jax.config.values.items() if isinstance(v, kinds) and "cache" not in k}
    named = {name: os.environ.get(name) for name in ("XLA_FLAGS", "DEX_JAX_NATIVE")}
    return repr((sources.hexdigest(), versions, able, few_rows.version(), sorted(settings.items()), named))
