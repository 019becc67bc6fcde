"""A jitted function whose compilations are explicit and timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import jax

from dex_jax.host_memory import return_free_memory
from dex_jax.nn import few_rows
from dex_jax.progress import notify

HELD = 24
"""Programs of one function that are remembered: a process may hold only so many mappings of memory, and they take many.
Where that ends the compiler fails for good."""


def compiler_options(level: int | None = 1) -> dict[str, str | bool] | None:
    """What XLA is told of programs that do most of their work in C++ (nn/few_rows.py), where that is.

    At level 1 LLVM unrolls nothing, which takes a third less to compile and runs as fast; at level 0 it optimises
    nothing, which takes another third less and is for what runs once.
    """
    return None if level is None or not few_rows.ready() else {"xla_backend_optimization_level": str(level)}


class Program:
    """Compiles `function` ahead of time for each new set of static arguments and shapes, and remembers the latest.

    It takes positional arrays, those at `donate` reused, and keyword statics. `level` as of `compiler_options`, None
    for what XLA does by itself. `compile_seconds` are those spent on compiling.
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
        self._compiled: dict[Any, Any] = {}

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
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        key = (tree, shapes, tuple(sorted(static.items())))
        found = self._compiled.pop(key, None)
        if found is None:
            notify(f"compiling {self.name}")
            begin = time.perf_counter()
            while len(self._compiled) >= HELD:  # the first is the one that was used longest ago
                del self._compiled[next(iter(self._compiled))]
            found = self.jitted.lower(*args, **static).compile(compiler_options=compiler_options(self.level))
            # What the trace leaves behind is never used again, and weighs as much as the program itself.
            self.jitted.clear_cache()
            gc.collect()
            return_free_memory()
            self.compile_seconds += time.perf_counter() - begin
        self._compiled[key] = found
        return found
