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

HELD = 24
"""Programs of one function that are remembered: a process may hold only so many mappings of memory, and they take many.
Where that ends the compiler fails for good."""

SOON = 3.0
"""Seconds of compiling after which a user is told why nothing happens."""

COMPILERS = ThreadPoolExecutor(thread_name_prefix="compiling")
"""Threads that compile or read programs, for all that a decoding needs at once."""

_traced, _seconds = 0, 0.0


def compile_seconds() -> float:
    """Seconds that this process has spent on tracing programs and on waiting for compilers."""
    return _seconds


def compiler_options(level: int | None = 1) -> dict[str, str | bool] | None:
    """What XLA is told of programs that do most of their work in C++ (nn/few_rows.py), where that is.

    At level 1 LLVM unrolls nothing, which takes a third less to compile and runs as fast; at level 0 it optimises
    nothing, which takes another third less and is for what runs once.
    """
    return None if level is None or not few_rows.ready() else {"xla_backend_optimization_level": str(level)}


class Begun(NamedTuple):
    """A program that a thread beside this one compiles."""

    out_info: Any  # the shapes that it gives
    made: Future[Any]  # the compiled program


class Program:
    """Compiles `function` ahead of time for each new set of static arguments and shapes, and remembers the latest.

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
        self._begun: dict[Any, Begun] = {}

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Runs the function; compiles it first when these shapes and statics are new."""
        return self.compile(*args, **static)(*args)

    @property
    def held(self) -> int:
        """How many compiled programs it remembers."""
        return len(self._begun)

    def forget(self) -> None:
        """Drops what has been compiled."""
        self._begun.clear()

    def compile(self, *args: Any, **static: Any) -> Any:
        """The program for these shapes; arguments may be jax.ShapeDtypeStruct."""
        with side_by_side() as begin:
            found = begin(self, *args, **static)
        return found.made.result()

    def begin(self, *args: Any, **static: Any) -> Begun:
        """As `compile`, without waiting for the compiler."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        key = (tree, shapes, tuple(sorted(static.items())))
        found = self._begun.pop(key, None)
        if found is None:
            global _traced
            _traced += 1
            while len(self._begun) >= HELD:  # the first is the one that was used longest ago
                del self._begun[next(iter(self._begun))]
            notify(f"tracing {self.name}")
            with _uncollected():
                lowered = self.jitted.lower(*args, **static)
            self.jitted.clear_cache()
            options = compiler_options(self.level)
            found = Begun(lowered.out_info, COMPILERS.submit(lowered.compile, compiler_options=options))
        self._begun[key] = found
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
