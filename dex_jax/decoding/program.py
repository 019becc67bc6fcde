"""Jitted functions that are compiled explicitly, side by side, and timed."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from dex_jax.host_memory import return_free_memory
from dex_jax.nn import few_rows
from dex_jax.progress import notify, say_wait

MOST_CHARACTERS = 2_500_000
"""The most characters of all kept programs together, as JAX prints them. Each stands for 40 to 60 bytes of memory. A
process may also hold only so many memory mappings, and once it has them all, the compiler fails for good."""

FEWEST_PROGRAMS = 6
"""Number of programs that are kept however long they are: those of two generations that share none. With fewer, a
comparison of two methods in turns would compile at every turn."""

SOON = 3.0
"""Number of seconds of compiling after which a user is told why nothing happens."""

COMPILERS = ThreadPoolExecutor(3, thread_name_prefix="compiling")
"""The threads that compile or load programs, enough for all that a decoding needs at once; each keeps little memory."""

_traced, _forgotten, _seconds = 0, 0, 0.0


def compile_seconds() -> float:
    """Return the seconds that this process has spent on tracing programs and on waiting for compilers."""
    return _seconds


def forgotten() -> int:
    """Return the number of programs that were dropped so far; while it stays the same, no kept program is gone."""
    return _forgotten


def forget(characters: int = 0, fewest: int = 0) -> None:
    """Drop the programs used longest ago, until at most `characters` characters or `fewest` programs are left."""
    global _forgotten
    while len(_PROGRAMS) > fewest and sum(each.size for each in _PROGRAMS.values()) > characters:
        del _PROGRAMS[next(iter(_PROGRAMS))]
        _forgotten += 1


def compiler_options(level: int | None = 1) -> dict[str, str | bool] | None:
    """Return XLA's options for programs that do most of their work in C++ (nn/few_rows.py), where that is ready.

    At level 1 LLVM unrolls nothing, which takes a third less to compile and runs as fast; at level 0 it optimises
    nothing, which takes another third less and suits programs that run once.
    """
    return None if level is None or not few_rows.ready() else {"xla_backend_optimization_level": str(level)}


class Compiling(NamedTuple):
    """A program that another thread compiles, or has compiled."""

    out_info: Any  # the shapes that it gives
    size: int  # characters, as in MOST_CHARACTERS
    made: Future[Any]  # the compiled program


_PROGRAMS: dict[Any, Compiling] = {}
"""The programs that are kept, by function, shapes and static arguments; the first was used longest ago."""


class CompiledFunction:
    """A function that is compiled ahead of time for each new set of static arguments and shapes; the latest are kept.

    It takes positional arrays, those at `donate` reused, and static arguments by keyword. `level` is as in
    `compiler_options`, None for XLA's defaults.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        static: tuple[str, ...] = (),
        donate: tuple[int, ...] = (),
        level: int | None = None,
    ):
        self.name = function.__name__
        self.level = level
        self.jitted: Any = jax.jit(function, static_argnames=static, donate_argnums=donate)

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Run the function; compile it first when these shapes and static arguments are new."""
        return self.compile(*args, **static)(*args)

    @property
    def held(self) -> int:
        """Number of compiled programs of this function that are kept."""
        return sum(key[0] is self for key in _PROGRAMS)

    def compile(self, *args: Any, **static: Any) -> Any:
        """Return the program for these shapes; arguments may be jax.ShapeDtypeStruct."""
        with side_by_side() as start:
            found = start(self, *args, **static)
        return found.made.result()

    def start(self, *args: Any, **static: Any) -> Compiling:
        """Begin to compile, as `compile` does, without waiting for the compiler."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        key = (self, tree, shapes, tuple(sorted(static.items())))
        found = _PROGRAMS.pop(key, None)
        if found is None:
            global _traced
            _traced += 1
            notify(f"tracing {self.name}")
            with _uncollected():
                lowered = self.jitted.lower(*args, **static)
            self.jitted.clear_cache()
            size, options = len(lowered.as_text()), compiler_options(self.level)
            forget(MOST_CHARACTERS - size, FEWEST_PROGRAMS - 1)
            found = Compiling(lowered.out_info, size, COMPILERS.submit(lowered.compile, compiler_options=options))
        _PROGRAMS[key] = found
        return found


@contextlib.contextmanager
def side_by_side() -> Iterator[Callable[..., Compiling]]:
    """Yield a function of (program, *args, **static) that begins to compile it; all programs are ready at the end."""
    global _seconds
    since, traced = time.perf_counter(), _traced
    started: list[tuple[str, Future[Any]]] = []

    def start(program: CompiledFunction, *args: Any, **static: Any) -> Compiling:
        found = program.start(*args, **static)
        started.append((program.name, found.made))
        return found

    try:
        yield start
    finally:
        # A process that ends while a compiler runs crashes.
        for name, made in started:
            if not made.done():
                _wait(name, made)
    for _, made in started:
        made.result()
    if _traced > traced:
        _seconds += time.perf_counter() - since
        # What traces leave behind is never used again, and weighs as much as the programs themselves.
        gc.collect()
        return_free_memory()


def _wait(name: str, made: Future[Any]) -> None:
    notify(f"compiling {name}")
    try:
        made.exception(SOON)
    except TimeoutError:
        folder = jax.config.values["jax_compilation_cache_dir"]
        kept = f", and later processes find it in {folder}" if folder else ""
        say_wait(f"compiling {name}, once for calls of this kind{kept}")
        made.exception()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Turn Python's garbage collection off: tracing leaves little garbage, and much to look through."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
