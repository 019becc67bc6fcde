"""Jitted functions whose compilations are explicit, timed, and beside one another."""

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

HELD = 2_500_000
"""Characters of the programs that are remembered, as JAX writes them down. Each stands for 40 to 60 bytes of memory. A
process may hold only so many mappings of memory, too, and where that ends the compiler fails for good."""

FEWEST = 6
"""Programs that are remembered however long they are: those of two generations that differ in all. With fewer, who
compares two methods in turns compiles at every turn."""

SOON = 3.0
"""Seconds of compiling after which a user is told why nothing happens."""

COMPILERS = ThreadPoolExecutor(3, thread_name_prefix="compiling")
"""Threads that compile or read programs, for all that a decoding needs at once. What each leaves behind stays small."""

_traced, _forgotten, _seconds = 0, 0, 0.0


def compile_seconds() -> float:
    """Seconds that this process has spent on tracing programs and on waiting for compilers."""
    return _seconds


def forgotten() -> int:
    """Return the number of programs this process has forgotten: whoever relies on one checks whether it has grown."""
    return _forgotten


def forget(characters: int = 0, fewest: int = 0) -> None:
    """Drops the programs that were used longest ago: what stays has so many characters at most, or is so few."""
    global _forgotten
    while len(_REMEMBERED) > fewest and sum(each.size for each in _REMEMBERED.values()) > characters:
        del _REMEMBERED[next(iter(_REMEMBERED))]
        _forgotten += 1


def compiler_options(level: int | None = 1) -> dict[str, str | bool] | None:
    """Return XLA's options for programs that do most of their work in C++ (nn/few_rows.py), where that is ready.

    At level 1 LLVM unrolls nothing, which takes a third less to compile and runs as fast; at level 0 it optimises
    nothing, which takes another third less and is for what runs once.
    """
    return None if level is None or not few_rows.ready() else {"xla_backend_optimization_level": str(level)}


class Begun(NamedTuple):
    """A program that a thread beside this one compiles."""

    out_info: Any  # the shapes that it gives
    size: int  # characters, as of HELD
    made: Future[Any]  # the compiled program


_REMEMBERED: dict[Any, Begun] = {}
"""By function, shapes and static arguments; the first is the one that was used longest ago."""


class Program:
    """Compiles `function` ahead of time for each new set of static arguments and shapes; the latest are remembered.

    It takes positional arrays, those at `donate` reused, and keyword statics. `level` as of `compiler_options`, None
    for what XLA does by itself.
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
        """Runs the function; compiles it first when these shapes and statics are new."""
        return self.compile(*args, **static)(*args)

    @property
    def held(self) -> int:
        """The number of compiled programs of it that are remembered."""
        return sum(key[0] is self for key in _REMEMBERED)

    def compile(self, *args: Any, **static: Any) -> Any:
        """The program for these shapes; arguments may be jax.ShapeDtypeStruct."""
        with side_by_side() as begin:
            found = begin(self, *args, **static)
        return found.made.result()

    def begin(self, *args: Any, **static: Any) -> Begun:
        """Begin what `compile` does, without waiting for the compiler."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        key = (self, tree, shapes, tuple(sorted(static.items())))
        found = _REMEMBERED.pop(key, None)
        if found is None:
            global _traced
            _traced += 1
            notify(f"tracing {self.name}")
            with _uncollected():
                lowered = self.jitted.lower(*args, **static)
            self.jitted.clear_cache()
            size, options = len(lowered.as_text()), compiler_options(self.level)
            forget(HELD - size, FEWEST - 1)
            found = Begun(lowered.out_info, size, COMPILERS.submit(lowered.compile, compiler_options=options))
        _REMEMBERED[key] = found
        return found


@contextlib.contextmanager
def side_by_side() -> Iterator[Callable[..., Begun]]:
    """Within it the given function begins programs, one with what Program.begin takes; all are there at the end."""
    global _seconds
    start, traced = time.perf_counter(), _traced
    begun: list[tuple[str, Future[Any]]] = []

    def begin(program: Program, *args: Any, **static: Any) -> Begun:
        found = program.begin(*args, **static)
        begun.append((program.name, found.made))
        return found

    try:
        yield begin
    finally:
        # A process that ends while a compiler runs crashes.
        for name, made in begun:
            if not made.done():
                _wait(name, made)
    for _, made in begun:
        made.result()
    if _traced > traced:
        _seconds += time.perf_counter() - start
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
    """Within it Python looks for no garbage: of what is traced there is little, and a lot to look through."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
