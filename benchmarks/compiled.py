"""What XLA's compilers make of decoding on GPUs and TPUs that are not here, from shapes alone.

Needs what docs/howto_gpu_tpu.md installs to compile for NVIDIA GPUs and for TPUs; lines whose compiler is missing are
left out. Cycles are libtpu's own estimate. Wide models are compiled with two and with four layers, and the figures go
on as these do.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dex_jax.config import ModelConfig
from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.footprint import session_shapes
from dex_jax.decoding.methods import AR, Dex, Method
from dex_jax.decoding.spec import Spec
from dex_jax.errors import DexError
from dex_jax.evaluation.compiled import read
from dex_jax.evaluation.targets import lower, target
from dex_jax.hardware import DEVICES
from dex_jax.io.opening import open_checkpoint
from dex_jax.nn.attention import SCOPE
from dex_jax.nn.packed import INT8
from dex_jax.nn.planes import PLANES
from dex_jax.nn.transformer import Unrolled
from dex_jax.nn.weights import packed_alike
from dex_jax.planner import SHAPES
from dex_jax.sharding import nbytes
from dex_jax.tables import markdown

TREE = Dex(explorers=1, draft=TreeShape((2, 2, 1, 1, 1), drafted=0, lookup=(0.5,) * 8))
"""Ticks of eight rows, always all of them, drafted from the text."""

V5E_CLOCK = 1.5e9
"""Cycles a second; with the bandwidth it says how many cycles the reading of so many bytes takes."""

CHUNK, PROMPT = 512, 8192


class Figures(NamedTuple):
    """Of one step, or of one chunk of a prompt."""

    kernels: float
    moved: float  # bytes
    attention: float  # ... of them by attention
    cycles: float
    read: float  # bytes of the weights that a step reads: all but a separate embedding


def of_layers(
    name: str, config: ModelConfig, layers: int, method: Method, dtype: str, cache: int, format: str
) -> Figures:
    """A program of `config` with so many layers: a step, or where the cache holds a long prompt, a chunk of it."""
    config = dataclasses.replace(config, num_layers=layers)
    schedule = method.schedule_for(layers)
    packing = packed_alike(config, format) if format else ()
    shapes = session_shapes(config, jnp.dtype(dtype), schedule, Unrolled(), 1, cache, capacity=256, packing=packing)
    with target(name) as devices:
        which = "prefill" if cache > PROMPT else "run"
        program = read(lower(which, shapes, Spec(config, Unrolled(), schedule), devices[0], CHUNK).compile().as_text())
    where = program.entry if which == "prefill" else program.loops[0]
    embedding = 0 if config.tied else config.vocab_size * config.width * jnp.dtype(dtype).itemsize
    moved, attention = program.moved(where), program.moved(where, SCOPE)
    read_bytes = nbytes(shapes.weights) - embedding
    return Figures(program.kernels(where), moved, attention, program.cycles(where), read_bytes)


def figures(
    name: str,
    config: ModelConfig,
    method: Method,
    dtype: str = "bfloat16",
    cache: int = 1024,
    format: str = "",
) -> Figures:
    """Those of the whole model, whose kernels are in a format of packed weights, or dense."""
    if config.num_layers <= 8 or config.width < 1024:
        return of_layers(name, config, config.num_layers, method, dtype, cache, format)
    few, more = (of_layers(name, config, layers, method, dtype, cache, format) for layers in (2, 4))
    turns = (config.num_layers - 2) / 2
    return Figures(*(a + turns * (b - a) for a, b in zip(few, more, strict=True)))


def rows() -> list[tuple[str, str, str]]:
    """(what, unit, figure) of every line of the table whose compiler is here."""
    eight, small = SHAPES["llama-3-8b"], open_checkpoint("smollm2-135m").config
    one = dataclasses.replace(eight, width=2048, num_layers=16, mlp_width=8192, head_dim=64, tied=True)  # Llama 3.2 1B
    short, four = dataclasses.replace(eight, num_layers=8), Dex(explorers=4, draft=False)
    found = []

    def add(what: str, unit: str, figure: Callable[..., str], *arguments) -> None:
        try:
            found.append((what, unit, figure(*arguments)))
        except DexError as error:
            print(error, file=sys.stderr)

    def over_bytes() -> str:
        ar = figures("v5e", eight, AR())
        return f"{ar.cycles / V5E_CLOCK * DEVICES['v5e'].bandwidth / ar.read:.2f}"

    def megacycles(config: ModelConfig, method: Method, format: str = "") -> str:
        return f"{figures('v5e', config, method, format=format).cycles / 1e6:.2f}"

    def over_weights(name: str, config: ModelConfig, method: Method, dtype: str = "bfloat16") -> str:
        step = figures(name, config, method, dtype)
        return f"{step.moved / step.read:.2f}"

    def prefill() -> str:
        chunks = PROMPT // CHUNK
        return f"{chunks * figures('h100', eight, AR(), cache=PROMPT + 1024).attention / 1e12:.3f}"

    def kernels(method: Method) -> str:
        return f"{figures('h100', small, method).kernels:.0f}"

    add("v5e, Llama 3 8B, AR step over reading its weights", "cycles", over_bytes)
    for format in ("", INT8, "Q4_K" + PLANES):
        add(f"v5e, Llama 3 8B, AR step, {format or 'dense'}", "Mcycles", megacycles, eight, AR(), format)
    add("v5e, SmolLM2, AR step", "Mcycles", megacycles, small, AR())
    add("v5e, SmolLM2, tick of one explorer, 8 rows", "Mcycles", megacycles, small, TREE)
    add("T4, Llama 3.2 1B, AR step over reading its weights", "bytes", over_weights, "t4", one, AR(), "float16")
    add("H100, 8 layers of 8B, four explorers, over their weights", "bytes", over_weights, "h100", short, four)
    add("H100, Llama 3 8B, attention of a prompt of 8,192 tokens", "TB", prefill)
    add("H100, SmolLM2, AR step", "kernels", kernels, AR())
    add("H100, SmolLM2, tick of one explorer, 8 rows", "kernels", kernels, TREE)
    return found


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    print(markdown(["what", "unit", "figure"], rows()))


if __name__ == "__main__":
    main()
