"""What steps and rounds take on the device at hand: steps by their rows, on a few layers of the model's shapes.

Nothing of it depends on the values of weights, so it is known before they are loaded. Figures are kept on disk, one
file for all models and devices.

Letters: B sequences, N rows of each, S cache length, V vocabulary, D model width, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax import cache
from dex_jax.config import ModelConfig
from dex_jax.decoding import serial
from dex_jax.decoding.interface import StageView
from dex_jax.decoding.known_trees import known_trees
from dex_jax.decoding.network import commit_rows, run_tree, transformer_network
from dex_jax.decoding.record import Limits
from dex_jax.decoding.serial_network import commit_drafts, tree_drafter
from dex_jax.decoding.trained_exits import ExitArrays, empty_memory, exit_arrays
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.io.whole_files import cache_folder, write_whole
from dex_jax.language_model import abstract_weights, merge_model
from dex_jax.lattice import NO_NODE, NO_TOKEN, default_rows
from dex_jax.nn import few_rows
from dex_jax.nn.layers import causal_rows
from dex_jax.nn.transformer import Layout, Stacked, parameter_shapes
from dex_jax.progress import notify
from dex_jax.sampling import best_column

ROWS = (1, 2, 4, 8, 16)
MEASURED_BYTES = 1e8
"""Layers are measured until their weights are as large as this, which no processor's cache holds."""

TOGETHER = 16
"""Rounds, and at most so many steps of a small model, that are measured in one program: one of them alone takes hardly
longer than it takes to start it."""

LEVELS = 3
"""Of a tree are measured at most so many: one takes about as long as another, and all of them long to compile."""

REPEATS, SECONDS = 30, 2.0
"""Every size is run so often, one after the other, unless that takes longer; the fastest counts, as other load on the
machine can only slow a run down."""

_KNOWN: dict[str, dict[str, Any]] = {}
"""What this process has measured or read, as it is kept on disk."""


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """Seconds of one step over all layers and the final logits, and of what else a method does, for some B and S.

    Attributes:
      rows: N, ascending, 1 the first.
      seconds: for each of them; they never fall.
      weight_bytes: that a step reads.
      round: seconds of a serial round beside its step and its drafting: to look up, to choose rows, to commit.
      drafting: seconds of drafting one level of a tree; 0 without a drafter.
      tick: seconds of all stages side by side with the default rows and no head; None for the unrolled layout, where a
        tick runs its stages one after the other.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    weight_bytes: int
    round: float = 0.0
    drafting: float = 0.0
    tick: float | None = None

    def step(self, rows: float) -> float:
        """Seconds of a step with so many rows a sequence: what the next larger measured number takes.

        What lies between is no cheaper everywhere: on CPUs five rows take longer than eight.
        """
        index = int(np.searchsorted(self.rows, rows))
        return self.seconds[index] if index < len(self.rows) else self.seconds[-1] * rows / self.rows[-1]

    def reading(self, size: float) -> float:
        """Seconds in which a step of one row reads `size` bytes of weights."""
        return self.seconds[0] * size / self.weight_bytes


def step_costs(
    config: ModelConfig, layout: Layout, dtype: Any, batch: int, length: int, drafter: TrainedExits | None = None
) -> StepCosts:
    """Measures, or remembers, what steps of `batch` sequences with `length` cache positions take on this device.

    Args:
      config: the model's shapes.
      layout: of its weights.
      dtype: of weights and caches.
      batch: B.
      length: S; rounded up to a power of two.
      drafter: of serial rounds, None for the text alone.
    """
    length = 1 << max(7, (length - 1).bit_length())
    key, file = _key(config, layout, jnp.dtype(dtype), batch, length, drafter), costs_file()
    kept = _KNOWN.get(key) or _read(file).get(key)
    if kept is None:
        notify("measuring what steps cost here, once")
        kept = _measure(config, layout, jnp.dtype(dtype), batch, length, drafter)
        # Only a convenience: without a place to write, the next process measures again.
        with contextlib.suppress(DexError):
            write_whole(file, json.dumps(_read(file) | {key: kept}, indent=1) + "\n")
    _KNOWN[key] = kept
    sizes = [shape for name, shape in parameter_shapes(config).items() if name != "embed" or config.tied]
    total = sum(map(math.prod, sizes)) * jnp.dtype(dtype).itemsize
    rows = tuple(np.maximum.accumulate(kept["rows"]).tolist())
    return StepCosts(ROWS, rows, total, kept["round"], kept["drafting"], kept["tick"])


def _key(config: ModelConfig, layout: Layout, dtype: Any, batch: int, length: int, drafter: TrainedExits | None) -> str:
    """All that figures depend on, in words."""
    device = jax.devices()[0]
    shapes: list[Any] = [size for size in dataclasses.astuple(config) if isinstance(size, int)]
    if drafter is not None:
        known = config.vocab_size if drafter.vocabulary is None else len(drafter.vocabulary)
        shapes += [drafter.config, known, _short_tree(drafter).widths]
    about = (device.platform, device.device_kind, os.cpu_count(), jax.__version__, dtype, batch, length, layout)
    return " ".join(map(str, (*about, few_rows.language(), *shapes)))


def _short_tree(drafter: TrainedExits | None) -> serial.TreeShape:
    """The first levels of the largest tree that serial rounds may choose."""
    whole = max((tree.shape for tree in known_trees(drafter)), key=lambda shape: shape.rows)
    return dataclasses.replace(whole, widths=whole.widths[:LEVELS], drafted=min(whole.drafted, LEVELS))


def costs_file() -> Path:
    """Where figures are kept, a JSON object by device and shapes: $DEX_JAX_STEP_COSTS, or among the user's caches.

    What was measured beside other load stays until the file is deleted.
    """
    if named := os.environ.get("DEX_JAX_STEP_COSTS"):
        return Path(named)
    return cache_folder() / "step_costs.json"


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    known = {"rows", "round", "drafting", "tick"}
    return {key: each for key, each in kept.items() if known <= set(each) and len(each["rows"]) == len(ROWS)}


def _measure(
    config: ModelConfig, layout: Layout, dtype: Any, batch: int, length: int, drafter: TrainedExits | None
) -> dict[str, Any]:
    """Seconds of a step over all L layers for each of ROWS, and of what else StepCosts has."""
    short, layout, share = _shortened(config, layout, dtype)
    weights = jax.tree.map(lambda s: jnp.full(s.shape, 0.01, s.dtype), abstract_weights(short, layout, dtype))
    memory = cache.allocate(short, layout, batch, length, 0, dtype)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    steps = min(TOGETHER, max(1, int(MEASURED_BYTES / size)))

    def layers(weights: Any, memory: cache.Memory, token: jax.Array, position: jax.Array, among: jax.Array) -> Any:
        def step(token: jax.Array) -> jax.Array:
            hidden, _ = run_tree(merge_model(short, layout, weights), memory, token, position, among, position[:, 0])
            return (hidden[..., 0] > 0).astype(jnp.int32)

        return _again(steps, step, token)

    def final(weights: Any, hidden: jax.Array) -> Any:
        def step(hidden: jax.Array) -> jax.Array:
            best = best_column(merge_model(short, layout, weights).logits(hidden))
            return hidden.at[:, 0].set(best.astype(hidden.dtype))

        return _again(steps, step, hidden)

    programs: list[tuple[Any, tuple[Any, ...]]] = []

    def add(function: Callable[..., Any], *arguments: Any) -> None:
        programs.append((jax.jit(function).lower(*arguments).compile(), arguments))

    for rows in ROWS:
        token = jnp.zeros((batch, rows), jnp.int32)
        add(layers, weights, memory, token, token + length // 2, causal_rows(batch, rows))
        add(final, weights, jnp.ones((batch * rows, config.width), dtype))
    tree = _short_tree(drafter)
    for drafted in sorted({0, tree.drafted}):
        shape = dataclasses.replace(tree, drafted=drafted)
        add(*_rounds(short, layout, weights, batch, length, drafter, shape))
    add(*_commits(short, layout, weights, batch, dtype, tree))
    if isinstance(layout, Stacked):
        add(*_tick(short, layout, weights, memory, batch, length, steps))
    fastest = iter(_fastest(programs))
    of_rows = [(next(fastest) / share + next(fastest)) / steps for _ in ROWS]
    a_round = next(fastest) / TOGETHER
    drafting = max(0.0, next(fastest) / TOGETHER - a_round) / tree.drafted if tree.drafted else 0.0
    a_round += next(fastest) / TOGETHER / share
    tick = next(fastest) / share / steps if isinstance(layout, Stacked) else None
    return {"rows": of_rows, "round": a_round, "drafting": drafting, "tick": tick}


def _shortened(config: ModelConfig, layout: Layout, dtype: Any) -> tuple[ModelConfig, Layout, float]:
    """A model of a few layers in the same layout, and the share of a whole model's time that they take."""
    layer = sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if name.startswith("layers.0."))
    count = max(2, math.ceil(MEASURED_BYTES / (layer * dtype.itemsize)))
    if isinstance(layout, Stacked):
        stages = len(layout.depths)
        each = min(layout.stage_layers, math.ceil(count / stages))
        depths = tuple(range(each, each * stages + 1, each))
        return dataclasses.replace(config, num_layers=depths[-1]), Stacked(depths), each / layout.stage_layers
    count = min(config.num_layers, count)
    return dataclasses.replace(config, num_layers=count), layout, count / config.num_layers


def _rounds(
    config: ModelConfig,
    layout: Layout,
    weights: Any,
    batch: int,
    length: int,
    drafter: TrainedExits | None,
    shape: serial.TreeShape,
) -> tuple[Any, ...]:
    """(function, arguments) that runs TOGETHER serial rounds whose rows go through no layer."""
    model = merge_model(config, layout, weights)
    drafts, arrays = None, None
    if drafter is not None:
        drafts, arrays = drafter.config, exit_arrays(model, drafter.config, drafter.parameters, drafter.vocabulary)
    memory = cache.Memory((), (), (), (), empty_memory(drafts, batch, model.embed[...].dtype))
    capacity = 1 + TOGETHER * shape.levels
    limits = Limits(jnp.full(batch, capacity, jnp.int32), jnp.full(1, NO_TOKEN, jnp.int32))

    def function(
        weights: Any, memory: cache.Memory, arrays: ExitArrays | None, prompt: jax.Array, limits: Limits
    ) -> Any:
        model = merge_model(config, layout, weights)
        network = serial.TreeNetwork(
            vocab_size=config.vocab_size,
            run=lambda memory, token, *where: (model.embed_tokens(jnp.maximum(token, 0)), ()),
            commit=lambda memory, fresh, path: memory._replace(
                exits=commit_drafts(model, drafts, arrays, memory.exits, path)
            ),
            final=lambda hidden: jnp.zeros((hidden.shape[0], 2)),
            drafter=None if drafts is None or arrays is None else tree_drafter(model, drafts, arrays, shape.rows),
        )
        first, position = prompt[:, 0], jnp.full(batch, length // 2, jnp.int32)
        sizes: dict[str, Any] = {"shape": shape, "length": length, "capacity": capacity, "limits": limits}
        state = serial.init(network, memory, prompt, first, position, **sizes)
        return serial.run(network, state, limits, shape=shape, until_tick=jnp.int32(TOGETHER)).record

    return function, weights, memory, arrays, jnp.zeros((batch, length // 2), jnp.int32), limits


def _commits(
    config: ModelConfig, layout: Layout, weights: Any, batch: int, dtype: Any, shape: serial.TreeShape
) -> tuple[Any, ...]:
    """(function, arguments) that commits the longest paths of TOGETHER rounds to the layers' caches."""
    length = TOGETHER + shape.levels  # of the caches: how long they are makes no difference
    memory = cache.allocate(config, layout, batch, length, 0, dtype)
    row = jnp.broadcast_to(jnp.arange(shape.levels), (batch, shape.levels))

    def function(weights: Any, memory: cache.Memory, row: jax.Array) -> Any:
        model = merge_model(config, layout, weights)
        leaf = (config.num_layers, batch, config.num_kv_heads, shape.rows, config.head_dim)

        def one_more(start: jax.Array, memory: cache.Memory) -> cache.Memory:
            fresh = jnp.broadcast_to(start.astype(dtype), leaf)
            return commit_rows(model, memory, (fresh, fresh), row, jnp.broadcast_to(start, batch), start)

        return jax.lax.fori_loop(0, TOGETHER, one_more, memory)

    return function, weights, memory, row


def _again(steps: int, step: Callable[[Any], Any], start: Any) -> Any:
    """`steps` of them, each on what the one before has left."""
    return step(start) if steps == 1 else jax.lax.fori_loop(0, steps, lambda _, carry: step(carry), start)


def _tick(
    config: ModelConfig, layout: Stacked, weights: Any, memory: cache.Memory, batch: int, length: int, steps: int
) -> tuple[Any, ...]:
    """(function, arguments) that runs all stages `steps` times, every row live."""
    stages = len(layout.depths)
    rows = default_rows(stages)
    memory = cache.with_lattice(memory, config, layout, stages * rows)
    shape = (stages, batch, rows)
    view = StageView(
        ring=jnp.arange(stages, dtype=jnp.int32),
        token=jnp.zeros(shape, jnp.int32),
        position=jnp.full(shape, length // 2, jnp.int32),
        live=jnp.ones(shape, bool),
        ancestors=jnp.zeros((*shape, stages * rows), bool),
        parent=jnp.full(shape, NO_NODE, jnp.int32),
        prefix=jnp.full(batch, length // 2, jnp.int32),
    )
    hidden = jnp.ones((*shape, config.width), jax.tree.leaves(memory.keys)[0].dtype)

    def function(weights: Any, memory: cache.Memory, hidden: jax.Array, view: StageView) -> Any:
        network = transformer_network(merge_model(config, layout, weights), layout.depths, None)
        return _again(steps, lambda carry: network.advance(carry[1], carry[0], view), (hidden, memory))

    return function, weights, memory, hidden, view


def _fastest(programs: list[tuple[Any, tuple[Any, ...]]]) -> list[float]:
    """Seconds of each program's fastest run."""
    fastest = [float("inf")] * len(programs)
    end = time.perf_counter() + SECONDS
    for repeat in range(REPEATS):
        for number, (program, arguments) in enumerate(programs):
            begin = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if repeat:  # the first run of a program touches memory that is new
                fastest[number] = min(fastest[number], time.perf_counter() - begin)
        if repeat > 2 and time.perf_counter() > end:
            break
    return fastest
