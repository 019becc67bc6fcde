"""Jitted functions whose compilations are explicit, timed, and beside one another."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from dex_jax.decoding import program_store
from dex_jax.host_memory import return_free_memory
from dex_jax.nn import few_rows
from dex_jax.progress import notify

HELD = 24
"""Programs of one function that are remembered: a process may hold only so many mappings of memory, and they take many.
Where that ends the compiler fails for good."""

COMPILERS = ThreadPoolExecutor(thread_name_prefix="compiling")
"""Threads that compile or read programs, for all that a decoding needs at once."""


def compiler_options(level: int | None = 1) -> dict[str, str | bool] | None:
    """What XLA is told of programs that do most of their work in C++ (nn/few_rows.py), where that is.

    At level 1 LLVM unrolls nothing, which takes a third less to compile and runs as fast; at level 0 it optimises
    nothing, which takes another third less and is for what runs once.
    """
    return None if level is None or not few_rows.ready() else {"xla_backend_optimization_level": str(level)}


class Pending:
    """A program that `make` compiles or reads, in a thread beside this one."""

    def __init__(self, program: Program, out_info: Any, make: Callable[[], Any]):
        self.out_info = out_info  # the shapes that it gives
        self._program = program
        self._future = COMPILERS.submit(make)
        self._waited = False

    def result(self) -> Any:
        """The compiled program, once it is there."""
        self.wait()
        return self._future.result()

    def wait(self) -> bool:
        """Waits until the compiler is done or has failed; whether nobody has before."""
        if self._waited:
            return False
        begin = time.perf_counter()
        notify(f"compiling {self._program.name}")
        self._future.exception()
        self._waited = True
        self._program.compile_seconds += time.perf_counter() - begin
        return True


class Program:
    """Compiles `function` ahead of time for each new set of static arguments and shapes, and remembers the latest.

    It takes positional arrays, those at `donate` reused, and keyword statics. `level` as of `compiler_options`, None
    for what XLA does by itself. `compile_seconds` are those in which callers waited for compilations.
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
        self.compile_seconds = 0.0
        self._compiled: dict[Any, Pending] = {}

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Runs the function; compiles it first when these shapes and statics are new."""
        return self.compile(*args, **static)(*args)

    @property
    def held(self) -> int:
        """How many compiled programs it remembers."""
        return len(self._compiled)

    def forget(self) -> None:
        """Drops what has been compiled."""
        self._compiled.clear()

    def compile(self, *args: Any, **static: Any) -> Any:
        """The program for these shapes; arguments may be jax.ShapeDtypeStruct."""
        with side_by_side() as begin:
            found = begin(self, *args, **static)
        return found.result()

    def begin(self, *args: Any, **static: Any) -> Pending:
        """As `compile`, without waiting for the compiler."""
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        key = (tree, shapes, tuple(sorted(static.items())))
        found = self._compiled.pop(key, None)
        if found is None:
            begin = time.perf_counter()
            while len(self._compiled) >= HELD:  # the first is the one that was used longest ago
                del self._compiled[next(iter(self._compiled))]
            name = program_store.name_of(self.name, tree, shapes, static, self.level)
            kept = program_store.find(name)
            if kept is None:
                notify(f"tracing {self.name}")
                lowered = self._lowered(*args, **static)
                found = Pending(self, lowered.out_info, lambda: self._made(lowered, name))
            else:

                def read() -> Any:
                    # XLA may refuse what it wrote, on another processor say.
                    with contextlib.suppress(Exception):
                        return kept.read()
                    return self._made(self._lowered(*args, **static), None)

                found = Pending(self, kept.out_info, read)
            self.compile_seconds += time.perf_counter() - begin
        self._compiled[key] = found
        return found

    def _lowered(self, *args: Any, **static: Any) -> Any:
        with _uncollected():
            lowered = self.jitted.lower(*args, **static)
        self.jitted.clear_cache()
        return lowered

    def _made(self, lowered: Any, name: str | None) -> Any:
        """Compiles what was traced, and keeps it under a name."""
        options = compiler_options(self.level)
        if name is None:
            return lowered.compile(compiler_options=options)
        with program_store.in_place_of_jax():
            compiled = lowered.compile(compiler_options=options)
        program_store.keep(name, compiled, lowered.out_info)
        return compiled


@contextlib.contextmanager
def side_by_side() -> Iterator[Callable[..., Pending]]:
    """Within it the given function begins programs, one with what Program.begin takes; all are there at the end."""
    begun: list[Pending] = []

    def begin(program: Program, *args: Any, **static: Any) -> Pending:
        begun.append(program.begin(*args, **static))
        return begun[-1]

    try:
        yield begin
    finally:
        # A process that ends while a compiler runs crashes.
        new = [each.wait() for each in begun]
    for each in begun:
        each.result()
    if any(new):
        # What traces leave behind is never used again, and weighs as much as the programs themselves.
        gc.collect()
        return_free_memory()


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
