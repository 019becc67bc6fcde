"""What steps take on the device at hand, by their rows: measured on a layer of the model's shapes.

Nothing of it depends on the values of weights, on how many sequences there are or on how long texts get: one
measurement serves all, kept on disk in one file for all models and devices.

Letters: B sequences, N rows of each, S cache length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from dex_jax.config import ModelConfig
from dex_jax.decoding.dex.drafters import GivenDrafter, read_bytes
from dex_jax.decoding.program import compiler_options
from dex_jax.errors import DexError
from dex_jax.io.whole_files import cache_folder, write_whole
from dex_jax.nn import cache, few_rows
from dex_jax.nn.forward import run_tree
from dex_jax.nn.transformer import parameter_shapes
from dex_jax.nn.weights import Packing, abstract_weights, merge_model, weight_bytes
from dex_jax.progress import notify

ROWS = (1, 2, 4, 8, 16)
TOTALS = (*ROWS, 32, 64, 128)
"""Rows of all sequences together: products see no more of them. As many are measured as a batch may need."""

LENGTH = 256
"""Cache positions of what is measured."""

MEASURED_BYTES, MOST_COPIES = 1e8, 8
"""Copies of the measured layer take turns until they are as large as this, which no processor's cache holds."""

REPEATS, SECONDS = 20, 0.5
"""Every size is run so often, one after the other, unless that takes longer; the fastest counts, as other load on the
machine can only slow a run down."""

DRAFTING = 2.0
"""Drafting a level takes so many times what reading the drafter does."""

_KNOWN: dict[str, list[float]] = {}
"""What this process has measured or read, as it is kept on disk."""


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Seconds of one step over all layers and the final logits, for some B and S."""

    rows: tuple[int, ...]  # N, ascending, 1 the first
    seconds: tuple[float, ...]  # for each of them; they never fall
    drafting: float = 0.0  # of drafting one level of a tree; 0 without a drafter

    def step(self, rows: float) -> float:
        """Seconds of a step with so many rows a sequence: what the next larger measured number takes.

        What lies between is no cheaper everywhere: on CPUs five rows take longer than eight.
        """
        return _at(self.rows, self.seconds, rows)


def step_costs(
    config: ModelConfig,
    dtype: Any,
    batch: int,
    length: int,
    drafter: GivenDrafter | None = None,
    packing: Packing = (),
) -> StepCosts:
    """Measures, or remembers, what steps of `batch` sequences with `length` cache positions take on this device.

    `dtype` is of caches, and of weights that are not packed as `packing` says. Without a `drafter` the text drafts.
    """
    dtype = jnp.dtype(dtype)
    count = int(np.searchsorted(TOTALS[:-1], batch * ROWS[-1])) + 1
    kept = _known(config, dtype, packing, count)
    total = _read_bytes(config, dtype, packing)
    # Fewer rows take no longer: where they did, something else was running.
    seconds = np.minimum.accumulate(kept[::-1])[::-1].tolist()
    position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize
    caches = seconds[0] * batch * max(0, length - LENGTH) * position / total
    rows = tuple(_at(TOTALS[: len(seconds)], seconds, batch * each) + caches for each in ROWS)
    drafter_bytes = 0 if drafter is None else read_bytes(drafter, config, dtype, packing)
    return StepCosts(ROWS, rows, DRAFTING * seconds[0] * drafter_bytes / total)


def _read_bytes(config: ModelConfig, dtype: np.dtype, packing: Packing) -> int:
    """Bytes of weights that a step reads: all but an embedding that is not tied."""
    sizes = weight_bytes(config, dtype, packing)
    return sum(size for name, size in sizes.items() if name != "embed" or config.tied)


def _at(rows: tuple[int, ...], seconds: Any, wanted: float) -> float:
    index = int(np.searchsorted(rows, wanted))
    return seconds[index] if index < len(rows) else seconds[-1] * wanted / rows[-1]


def costs_file() -> Path:
    """Where figures are kept, a JSON object by device and shapes: $DEX_JAX_STEP_COSTS, or among the user's caches."""
    named = os.environ.get("DEX_JAX_STEP_COSTS")
    return Path(named) if named else cache_folder() / "step_costs.json"


def _known(config: ModelConfig, dtype: np.dtype, packing: Packing, count: int) -> list[float]:
    """What is kept of such a model, measured first where it is less than the first `count` of TOTALS."""
    key, file = _key(config, dtype, packing), costs_file()
    kept = _KNOWN.get(key) or _read(file).get(key)
    if not (isinstance(kept, list) and len(kept) >= count and all(isinstance(s, float) and 0 < s < 1e4 for s in kept)):
        notify("measuring what steps cost here")
        kept = _measure(config, dtype, packing, TOTALS[:count])
        with contextlib.suppress(DexError):  # without a place to write, the next process measures again
            write_whole(file, json.dumps(_read(file) | {key: kept}, indent=1) + "\n")
    _KNOWN[key] = kept
    return kept


def _key(config: ModelConfig, dtype: np.dtype, packing: Packing) -> str:
    """All that figures depend on, in words."""
    device = jax.devices()[0]
    shapes = [size for size in dataclasses.astuple(config) if isinstance(size, int)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = (device.platform, device.device_kind, cores, jax.__version__, dtype, few_rows.version())
    packed = f"packed {zlib.crc32(repr(packing).encode()):x}" if packing else "dense"
    return " ".join(map(str, (*about, packed, *shapes)))


def _read(file: Path) -> dict[str, Any]:
    """What a file keeps, nothing where it is damaged."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _measure(config: ModelConfig, dtype: np.dtype, packing: Packing, totals: tuple[int, ...]) -> list[float]:
    """Seconds of a step over all layers and the final logits for each of `totals`, by those of one layer."""
    short, own = _one_layer(config, packing)
    abstract = abstract_weights(short, dtype, own)
    size = _read_bytes(short, dtype, own)
    # From the host, and not by jnp.asarray: each shape that a device fills or copies is a program of its own.
    weights = [jax.tree.map(_filled, abstract) for _ in range(min(MOST_COPIES, math.ceil(MEASURED_BYTES / size)))]
    memory = jax.tree.map(
        lambda s: jax.device_put(np.zeros(s.shape, s.dtype)), cache.shapes(short, 1, LENGTH, 0, dtype)
    )

    def run(weights: Any, memory: cache.Memory, token: jax.Array, position: jax.Array, among: jax.Array) -> Any:
        model = merge_model(short, weights)
        hidden, _ = run_tree(model, memory, model.embed_tokens(token), position, among, position[:, 0])
        return jnp.argmax(model.logits(hidden), axis=-1)

    # As a device of a mesh runs it, whose products may be others than those of a process with several devices.
    alone = jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:1])
    run = jax.shard_map(run, mesh=alone, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    programs: list[tuple[Any, tuple[Any, ...]]] = []
    for rows in totals:
        token = np.zeros((1, rows), np.int32)
        arguments = (memory, token, token + LENGTH // 2, np.tril(np.ones((1, rows, rows), bool)))
        programs.append((jax.jit(run).lower(weights[0], *arguments).compile(compiler_options()), arguments))
    # Layers may be packed in different ways: those of as many bytes take as long.
    scale = _read_bytes(config, dtype, packing) / size
    return [scale * seconds for seconds in _fastest(programs, weights)]


def _filled(like: jax.ShapeDtypeStruct) -> jax.Array:
    """Small numbers: packed blocks get a byte that gives them a small scale, codes of 4 bits their largest."""
    value = min(33, jnp.iinfo(like.dtype).max) if jnp.issubdtype(like.dtype, jnp.integer) else 0.01
    return jax.device_put(np.full(like.shape, value, like.dtype))


def _one_layer(config: ModelConfig, packing: Packing) -> tuple[ModelConfig, Packing]:
    """A model of one layer, and of as large a share of the vocabulary, packed as it is."""
    vocabulary = -(-config.vocab_size // config.num_layers)
    short = dataclasses.replace(config.with_layers(1), vocab_size=vocabulary)
    kept = parameter_shapes(short)
    runs = {name: each if name.startswith("layers.") else ((each[0][0], vocabulary),) for name, each in packing}
    return short, tuple((name, each) for name, each in runs.items() if name in kept)


def _fastest(programs: list[tuple[Any, tuple[Any, ...]]], weights: list[Any]) -> list[float]:
    """Seconds of each program's fastest run, with one of the weights."""
    seconds: list[list[float]] = [[] for _ in programs]
    end = time.perf_counter() + SECONDS
    for repeat in range(REPEATS):
        for number, (program, arguments) in enumerate(programs):
            begin = time.perf_counter()
            jax.block_until_ready([program(each, *arguments) for each in weights])
            if repeat:  # the first run of a program touches memory that is new
                seconds[number].append((time.perf_counter() - begin) / len(weights))
        if repeat > 2 and time.perf_counter() > end:
            break
    return [min(each) for each in seconds]
