"""Find the arrays that a traced function makes."""

from __future__ import annotations

import re

import jax


def arrays_of(function, *arguments) -> set[tuple[int, ...]]:
    """The shapes of all float32 arrays in a function's jaxpr, loops and calls included."""
    text = str(jax.make_jaxpr(function)(*arguments))
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
