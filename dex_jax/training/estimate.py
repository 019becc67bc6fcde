"""What training exits will take, from shapes alone: memory, arithmetic and time.

Sizes are bytes, a GB is 1e9 bytes; a product of p parameters with a row is 2 p operations.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax import cache
from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.footprint import device_memory
from dex_jax.hardware import DEVICES, USABLE
from dex_jax.nn.exits import exit_parameters
from dex_jax.nn.transformer import Unrolled
from dex_jax.nn.weights import abstract_weights
from dex_jax.progress import duration
from dex_jax.sharding import nbytes
from dex_jax.training.distillation import history_for
from dex_jax.training.losses import BLOCK

REACHED = 0.4
"""Share of a device's published peaks, of arithmetic and of bandwidth, that is counted on."""

REACHED_OF_MEASURED = 0.6
"""The same share of what was measured with the large products that go fastest."""

FROZEN_INPUTS = ("map", "map_down", "context.enter")
"""Kernels that read what the frozen model gives: their inputs get no gradient, a third of the usual arithmetic."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run computes with, all of its devices together."""

    name: str
    flops: float  # operations a second at its peak, in the dtype of the model
    bandwidth: float  # bytes a second from its memory, at its peak
    memory: float | None  # bytes, None when unknown
    reached: float = REACHED  # share of these peaks that is counted on


def _published(name: str, device: str, devices: int = 1) -> Machine:
    """So many devices of the planner's table."""
    peak = DEVICES[device][0]
    return Machine(name, devices * peak.flops, devices * peak.bandwidth, devices * peak.memory)


MACHINES = {
    "a100": _published("one A100 (80 GB)", "a100"),
    "v5e-8": _published("TPU v5e, 8 chips", "v5e", 8),
    "t4": _published("one T4", "t4"),
    "h100": _published("one H100 (80 GB)", "h100"),
}
"""For --machine."""


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """An estimate."""

    model_bytes: int  # weights of the frozen model and its rows of the draft vocabulary
    cache_bytes: int  # keys and values of the rows
    exits_bytes: int  # parameters in float32, their gradient and two moments
    activation_bytes: int  # one chunk's states and features with their gradients, and one block of logits
    tokens: int  # row-steps of the whole run
    # of the whole run, without compilation and evaluation
    model_seconds: float
    exits_seconds: float

    @property
    def total_bytes(self) -> int:
        """All memory together, on all devices."""
        return self.model_bytes + self.cache_bytes + self.exits_bytes + self.activation_bytes

    def fits(self, machine: Machine) -> bool | None:
        """Whether a machine's memory holds it, spread evenly over its devices; None when its size is unknown."""
        return None if machine.memory is None else self.total_bytes <= USABLE * machine.memory

    def sentence(self, machine: Machine) -> str:
        """One line for people."""
        memory = f"{gigabytes(self.total_bytes)} GB"
        if machine.memory is not None:
            fits = "fits" if self.fits(machine) else "does not fit"
            memory += f" of {gigabytes(machine.memory)} GB ({fits})"
        parts = ("model", self.model_bytes), ("caches", self.cache_bytes), ("exits", self.exits_bytes)
        listed = [f"{name} {gigabytes(size)}" for name, size in (*parts, ("activations", self.activation_bytes))]
        time = duration(self.model_seconds + self.exits_seconds)
        return f"estimate: {time} for {self.tokens:,} tokens on {machine.name}, {memory}: {', '.join(listed)}"


def training_cost(
    model: ModelConfig,
    exits: ExitsConfig,
    machine: Machine,
    *,
    batch: int,
    chunk: int,
    length: int,
    steps: int,
    dtype: jnp.dtype,
    copies: int = 1,
    draft_steps: int = 1,
) -> TrainingCost:
    """Estimates a run of `steps` updates of `batch` x `chunk` tokens, of items of `length` tokens at most.

    `copies` is how many there are of weights and exits, the size of a mesh's axis "data"; `draft_steps` those of a
    drafter.
    """
    dtype = jnp.dtype(dtype)
    exits = dataclasses.replace(exits, width=model.width)
    weights = nbytes(abstract_weights(model, Unrolled(), dtype))
    columns = model.vocab_size if exits.draft_size is None else exits.draft_size
    draft = 0 if exits.draft_size is None else columns * model.width * dtype.itemsize
    caches = nbytes(cache.shapes(model, Unrolled(), batch, length, 0, dtype))
    parameters = parameter_count(exits)
    tokens = batch * chunk
    states = len(exits.depths) * draft_steps * tokens * model.width
    block = min(BLOCK, tokens)
    # States and features in the model's dtype; what lies between, and all gradients, counted as six arrays of float32.
    activations = states * (2 * dtype.itemsize + 6 * 4) + block * (model.vocab_size + 4 * columns) * 4
    flops, bandwidth = machine.flops * machine.reached, machine.bandwidth * machine.reached
    read = copies * weights + caches
    step = max(batch * model_flops_per_token(model, length) / flops, read / bandwidth)
    # The optimizer reads and writes parameters and two moments, and reads the gradient.
    exits_flops = tokens * exits_flops_per_token(model, exits, chunk, draft_steps)
    learn = max(exits_flops / flops, copies * 7 * 4 * parameters / bandwidth)
    return TrainingCost(
        model_bytes=copies * (weights + draft),
        cache_bytes=caches,
        exits_bytes=copies * 16 * parameters,
        activation_bytes=activations,
        tokens=steps * tokens,
        model_seconds=steps * chunk * step,
        exits_seconds=steps * learn,
    )


def model_flops_per_token(model: ModelConfig, length: int) -> float:
    """Operations that run one token through all layers and the unembedding, over a cache of `length` positions."""
    weights = abstract_weights(model, Unrolled(), jnp.dtype(jnp.float32))
    looked_up = 0 if model.tied else model.vocab_size * model.width
    products = sum(leaf.size for leaf in jax.tree.leaves(weights)) - looked_up
    return 2 * products + 2 * 2 * model.num_layers * model.num_heads * model.head_dim * length


def exits_flops_per_token(model: ModelConfig, exits: ExitsConfig, chunk: int, draft_steps: int = 1) -> float:
    """Operations that learn from one token: targets, logits and their gradient, maps forwards and backwards."""
    columns = model.vocab_size if exits.draft_size is None else exits.draft_size
    # Logits are made once for the targets and once for each exit, whose gradient is made along with them.
    count = len(exits.depths) * draft_steps
    total = 2.0 * model.vocab_size * model.width + count * 4 * columns * model.width
    for name, (shape, _) in exit_parameters(exits).items():
        total += _rows(name, exits, chunk, draft_steps) * (4 if name in FROZEN_INPUTS else 6) * np.prod(shape)
    return float(total)


def parameter_count(exits: ExitsConfig) -> int:
    """Numbers that are trained."""
    return sum(int(np.prod(shape)) for shape, _ in exit_parameters(exits).values())


def this_machine(dtype: jnp.dtype, devices: int = 1) -> Machine:
    """Some devices of the machine that runs this; the speed of one is measured, which takes about a second."""
    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    product = jax.jit(jnp.matmul)
    size = 1024 if cpu else 8192
    flops = size**3 * _runs_per_second(product, jnp.ones((size // 2, size), dtype), jnp.ones((size, size), dtype))
    # Larger than any cache of a processor; a product with one row reads it once, as decoding reads weights.
    large = jnp.ones((4 * size if cpu else 2 * size,) * 2, dtype)
    bandwidth = large.nbytes * _runs_per_second(product, jnp.ones((1, large.shape[0]), dtype), large)
    memory = device_memory(device)
    # Devices of a CPU share its cores and its memory.
    times = 1 if cpu else devices
    name = device.device_kind if devices == 1 else f"{devices} x {device.device_kind}"
    total = None if memory is None else times * memory
    return Machine(name, times * flops, times * bandwidth, total, REACHED_OF_MEASURED)


def gigabytes(size: float) -> str:
    """A size in GB with the digits that matter, as "16.1" or "0.03"."""
    number = size / 1e9
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _rows(name: str, exits: ExitsConfig, chunk: int, draft_steps: int) -> float:
    """How many rows a kernel reads for each token that is learnt from."""
    if not name.startswith("context."):
        return draft_steps
    # The context layer runs on true and on estimated features, and makes keys of its history anew in each chunk.
    own, before = 2, (history_for(exits) - 1 + chunk) / chunk
    return own + before if name.endswith((".enter", ".qkv")) else own


def _runs_per_second(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    function(*arguments).block_until_ready()
    begin, runs = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.3:
        function(*arguments).block_until_ready()
        runs += 1
    return runs / (time.perf_counter() - begin)
