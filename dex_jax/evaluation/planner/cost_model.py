"""How long a tick and its rivals take: a roofline with named assumptions.

Every product of R rows with a kernel takes the larger of the time to read the kernel and the time of its arithmetic;
attention likewise with its keys and values; every kernel of a program has a fixed cost on top; devices exchange data
between products, never during them. All steps are steps of a whole batch.

Assumptions that are no figures of a machine:

- KERNELS_A_LAYER and its like: how many kernels a compiled program runs.
- LOGIT_PASSES: how often logits are read or written on their way to a token.
- An all-reduce takes 2 log2(n) messages and sends 2 (n - 1) / n of its bytes, an all-gather half of both; over several
  hosts it is done within each of them and then between them.
- A tick on a mesh runs one stage a device; the tick takes as long as the stage with most rows in use. Exits are asked
  before the commit is known, all stages' and the final layer's heads at the same time, as decoding/mesh/stage.py does.
- Embedding and unembedding (or its draft slice) are on every stage; a tensor axis splits the embedding and unembedding
  and gathers logits, and splits trained exits' products as it splits those of the layers.
- Exits or a drafter that read the position before get their parents' features from all stages: an all-gather of all
  nodes' features.
- Every device drafts for itself, after the tick's exchange: a drafter step a level, for HEADS rows at most.
- A tree goes through a pipeline's stages one after the other, then all devices hear its states and ask the final layer.
- Rows are free until arithmetic takes longer than reading; a calibrated machine has measured row costs instead.
- LayerSkip's drafts are right independently of one another. Runs of right drafts are longer than that in truth, so with
  two drafted tokens or more it is underrated.

Letters: B sequences, W rows a stage, K stages, T devices of a tensor axis, S positions that are attended to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dex_jax.decoding.dex.drafts import HEADS
from dex_jax.decoding.dex.proposals import HEAD_BLOCK
from dex_jax.evaluation.planner.ead_profile import Ticks
from dex_jax.evaluation.planner.workload import ExitWork, Work
from dex_jax.hardware import Hardware, Link, interpolate

KERNELS_A_LAYER = 10
"""Assumption: two norms, four products, rotation, scores, softmax, weighted values; element-wise work is fused."""

KERNELS_A_HEAD = 4
"""Assumption: norm, unembedding, two passes of a choice."""

KERNELS_OF_EXITS = 12
"""Assumption: maps, gathering, unembedding, mask, choice, probability."""

KERNELS_OF_LATTICE = 200
"""Assumption: bookkeeping of a tick beside layers and heads. A tick compiled for TPU v5e has some 370 kernels with four
layers a stage (results/planner.md), of which its layers, compiled for one row and for all, are about a hundred."""

DRAFTER_BYTES = 2
"""A drafter's numbers have so many bytes at most: it only proposes tokens (`nn.few_rows.kept_dtype`)."""

KERNELS_OF_DRAFTS = 250
"""Assumption: what exit 0 adds to that beside the drafter, to look up the text, grow, sort and follow a cohort. A tick
compiled for CPUs has 61 kernels more with drafts and runs 27 for each of seven levels."""

LOGIT_PASSES = 4
"""Assumption: logits are written once and read for mask, maximum and sum."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Seconds of one step, by what takes them."""

    layers: float = 0.0  # weights, caches and arithmetic of one row a sequence
    width: float = 0.0  # what the further rows of a stage take on top
    head: float = 0.0  # final norm and unembedding, as often as they run
    exits: float = 0.0  # exit heads
    drafts: float = 0.0  # the drafter, a step a level
    communication: float = 0.0  # between devices
    fixed: float = 0.0  # kernels, whatever their size

    @property
    def total(self) -> float:
        """The step."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def times(self, factor: float) -> Parts:
        """As many steps."""
        return Parts(*(factor * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decoded on what.

    Attributes:
      work: of the model.
      exits: of its exits.
      hardware: all of it, though a method may use less.
      batch: B.
      context: S, for caches of fixed length their length.
      drafter: exit 0; None where the text alone drafts.
      packed: bytes of a number of the model's kernels where these are packed; None is the device's itemsize.
    """

    work: Work
    exits: ExitWork
    hardware: Hardware
    batch: int = 1
    context: int = 1024
    drafter: ExitWork | None = None
    packed: float | None = None

    @property
    def kernel_bytes(self) -> float:
        """Of a number of the model's kernels."""
        return self.hardware.device.itemsize if self.packed is None else self.packed


def tick(s: Setting, ticks: Ticks, tensor: int = 1) -> Parts:
    """One tick on a mesh of K stages x T devices; with K = 1 that of one explorer."""
    depths, rows, stages = ticks.depths, ticks.rows, len(ticks.depths)
    if stages == 1:
        return ar_step(s, tensor, ticks)
    device, slots = s.hardware.device, stages * rows
    longest = _longest(depths)
    found = _wide(s, longest, rows, tensor, slots)
    used = s.batch * rows
    logits, gathered = _exit_logits(s, used, tensor)
    final = _head(s, _final_rows(s, ticks), tensor)
    commits = 1 - (1 - ticks.commits) ** s.batch
    # Exits and the final layer are asked at the same time, on different devices; or the final layer while the others
    # still run their layers, where the last stage has fewer of them (`decoding.mesh.stage.final_first`).
    asked = _exit_features(s, used) + logits
    spare = (longest - (depths[-1] - depths[-2])) / longest * found.total
    exits = asked + _committed(s)
    waits = min(final.head - asked, final.head - spare) if s.exits.previous else final.head - asked - spare
    head = Parts(head=commits * max(0.0, waits), fixed=commits * final.fixed)
    numbers = used * s.work.width * device.itemsize
    moved = permute(s.hardware.between(stages * tensor), numbers)
    # A token and a score of every node, and the token that is committed.
    moved += all_gather(s.hardware, 8 * stages * used, stages, tensor)
    if s.exits.previous or (ticks.levels is not None and s.drafter is not None and s.drafter.previous):
        moved += all_gather(s.hardware, stages * numbers, stages, tensor)
    moved += all_reduce(s.hardware, numbers, tensor) + gathered
    fixed = KERNELS_OF_EXITS * device.kernel_seconds + _tick_seconds(s)
    return found + head + _drafts(s, ticks) + Parts(exits=exits, communication=moved, fixed=fixed)


def tick_on_one_device(s: Setting, ticks: Ticks) -> Parts:
    """One tick of all stages on one device, side by side.

    Every stage runs all of its rows; that the loop skips stages without a live row is not counted on.
    """
    rows, stages = ticks.rows, len(ticks.depths)
    if stages == 1:
        return ar_step(s, trees=ticks)
    found, slots = Parts(), stages * rows
    for length in np.diff((0, *ticks.depths)).tolist():
        found += _wide(s, length, rows, 1, slots)
    commits = 1 - (1 - ticks.commits) ** s.batch
    found += _head(s, _final_rows(s, ticks), 1).times(commits)
    block = min(rows, HEAD_BLOCK)
    calls = math.ceil((stages - 1) * rows / block)
    exits = (stages - 1) * _product(s, s.exits.own, s.batch * rows, 1)
    exits += _product(s, s.exits.shared, (stages - 1) * s.batch * rows, 1) + _committed(s)
    exits += calls * _logits(s, s.exits.columns, s.batch * block, 1, "exits")
    fixed = KERNELS_OF_EXITS * s.hardware.device.kernel_seconds * calls
    return found + _drafts(s, ticks) + Parts(exits=exits, fixed=fixed + _tick_seconds(s))


def ar_step(s: Setting, tensor: int = 1, trees: Ticks | None = None) -> Parts:
    """One AR step, or one explorer's tick, on one device, or with every layer split over T devices."""
    trees = None if trees is None or trees.levels is None else trees
    return _through(s, s.work.layers, tensor, trees) + _ends(s, tensor, trees)


def pipelined_step(s: Setting, stages: int, tensor: int = 1, trees: Ticks | None = None) -> Parts:
    """An AR step, or one explorer's tick, over a pipeline of K stages x T devices, the batch cut as is fastest.

    This library's own pipeline cuts nothing. With m parts in flight a step takes what one part needs from the first
    stage to the last, or m times the slowest stage, if that is longer.
    """
    widest = -(-s.work.layers // stages)
    steps = []
    for parts in range(1, min(s.batch, stages) + 1):
        part = dataclasses.replace(s, batch=-(-s.batch // parts))
        numbers = part.batch * (1 if trees is None else trees.rows) * s.work.width * s.hardware.device.itemsize
        moved = permute(s.hardware.between(stages * tensor), numbers) * (stages > 1)
        # What all devices hear in the end: AR's token is no more than a message, a tree's states are summed.
        told = moved if trees is None else 2 * all_gather(s.hardware, numbers, stages, tensor)
        ends = _ends(part, tensor, trees)
        through = _through(part, s.work.layers, tensor, trees) + ends
        through += Parts(communication=(stages - 1) * moved + told)
        slowest = _through(part, widest, tensor, trees) + ends + Parts(communication=max(moved, told))
        steps.append(through if through.total >= parts * slowest.total else slowest.times(parts))
    return min(steps, key=lambda step: step.total)


def layerskip_round(s: Setting, depth: int, drafted: int, tensor: int = 1) -> Parts:
    """One round of self-speculation: `drafted` tokens through `depth` layers one by one, all verified at once.

    The early layers' keys, values and states of drafted tokens are kept, as LayerSkip does. Drafts come from an exit of
    the setting's kind.
    """
    one = _layers(s, depth, 1, tensor, 0)
    logits, gathered = _exit_logits(s, s.batch, tensor)
    exits = _exit_features(s, s.batch) + logits
    fixed = KERNELS_OF_EXITS * s.hardware.device.kernel_seconds
    draft = (one + Parts(exits=exits, communication=gathered, fixed=fixed)).times(drafted) + one
    rest = _layers(s, s.work.layers - depth, drafted + 1, tensor, 0)
    return draft + rest + _head(s, s.batch * (drafted + 1), tensor)


def layerskip_tokens(agreement: float, drafted: int) -> float:
    """Tokens a round if every drafted one is right with probability `agreement`, whatever came before."""
    return sum(agreement**i for i in range(drafted + 1))


def bytes_per_device(
    s: Setting,
    stages: int = 1,
    tensor: int = 1,
    *,
    slots: float = 0,
    exits: int = 0,
    drafts: bool = False,
    depths: Sequence[int] = (),
) -> float:
    """Weights and caches on the fullest device of a mesh: its stage, embedding, unembedding, exits and drafter.

    `slots` are those of a lattice, K W, and `exits` how many the device has; without `depths` stages are even.
    """
    layers = _longest(depths) if depths else -(-s.work.layers // stages)
    size = s.hardware.device.itemsize
    kernels = s.kernel_bytes * (layers * s.work.layer + s.work.embeddings)
    numbers = layers * s.batch * (s.context + slots) * s.work.cached
    for heads, count in ((s.exits, exits), (s.drafter, int(drafts))):
        if heads is not None and count:
            copied = heads.columns * s.work.width if heads.columns < s.work.vocabulary else 0
            numbers += count * heads.own + heads.shared + copied
    return float((kernels + size * numbers) / tensor)


def permute(link: Link, size: float) -> float:
    """Seconds until `size` bytes have reached the next device."""
    return link.latency + size / link.bandwidth


def all_reduce(hardware: Hardware, size: float, devices: int) -> float:
    """Seconds of an all-reduce of `size` bytes over neighbouring devices; see the assumptions above."""
    return 2 * all_gather(hardware, size, devices)


def all_gather(hardware: Hardware, size: float, devices: int, spacing: int = 1) -> float:
    """Seconds of an all-gather whose result has `size` bytes, over devices that are `spacing` apart."""
    inside = min(devices, max(1, hardware.per_host // spacing))
    across = -(-devices // inside)
    return _gather(hardware.link, size, inside) + _gather(hardware.network, size, across)


def _gather(link: Link, size: float, devices: int) -> float:
    if devices == 1:
        return 0.0
    return math.ceil(math.log2(devices)) * link.latency + (devices - 1) / devices * size / link.bandwidth


def _through(s: Setting, layers: int, tensor: int, trees: Ticks | None) -> Parts:
    """Some layers with AR's one row of each sequence, or with all rows of a tree."""
    return _layers(s, layers, 1, tensor, 0) if trees is None else _wide(s, layers, trees.rows, tensor, trees.rows)


def _wide(s: Setting, layers: int, rows: float, tensor: int, slots: float) -> Parts:
    """Some layers, what further rows take on top apart."""
    one = _layers(s, layers, 1, tensor, slots)
    return one + Parts(width=_layers(s, layers, rows, tensor, slots).total - one.total)


def _ends(s: Setting, tensor: int, trees: Ticks | None) -> Parts:
    """What follows the last layer: the final layer's tokens, and with trees the bookkeeping and the next drafts."""
    if trees is None:
        return _head(s, s.batch, tensor)
    return _head(s, _final_rows(s, trees), tensor) + _drafts(s, trees) + Parts(fixed=_tick_seconds(s))


def _final_rows(s: Setting, ticks: Ticks) -> float:
    """Rows that the final layer is asked about: roots, or with drafts all nodes of their cohorts."""
    return s.batch * (1 if ticks.levels is None else ticks.rows)


def _drafts(s: Setting, ticks: Ticks) -> Parts:
    """What exit 0 adds to a tick: to look up and grow cohorts, and a drafter step a level."""
    if ticks.levels is None:
        return Parts()
    device, rows = s.hardware.device, s.batch * min(ticks.rows, HEADS)
    measured = device.measured
    found = Parts(fixed=measured.drafts_seconds if measured else KERNELS_OF_DRAFTS * device.kernel_seconds)
    if s.drafter is None:
        return found
    kept = dataclasses.replace(device, itemsize=min(device.itemsize, DRAFTER_BYTES))
    kept_s = dataclasses.replace(s, hardware=dataclasses.replace(s.hardware, device=kept))
    one = _product(kept_s, s.drafter.own, rows, 1) + _logits(kept_s, s.drafter.columns, rows, 1, "exits")
    step = Parts(drafts=one, fixed=KERNELS_OF_EXITS * device.kernel_seconds)
    return found + step.times(ticks.levels)


def _layers(s: Setting, layers: int, rows: float, tensor: int, slots: float) -> Parts:
    """Some layers with `rows` rows of each sequence, `slots` of a lattice beside the context."""
    device = s.hardware.device
    used, size = s.batch * rows, device.itemsize
    products = _product(s, s.work.layer, used, tensor, s.kernel_bytes)
    numbers = s.batch * (s.context + slots) * s.work.cached
    if device.measured is not None:
        attention = size * numbers / tensor * interpolate(device.measured.cache, rows)
        fixed = device.measured.layer_seconds["unrolled"]
    else:
        operations = 4 * used * s.work.attention * (s.context + slots)
        attention = _roofline(s, size * numbers / tensor, operations / tensor)
        fixed = KERNELS_A_LAYER * device.kernel_seconds
    reduced = 2 * all_reduce(s.hardware, used * s.work.width * size, tensor) if tensor > 1 else 0.0
    return Parts(layers=layers * (products + attention), communication=layers * reduced, fixed=layers * fixed)


def _head(s: Setting, rows: float, tensor: int) -> Parts:
    """Embedding, final norm, unembedding and choice for some rows; a tensor axis gathers logits."""
    shared = all_gather(s.hardware, 4 * rows * s.work.vocabulary, tensor)
    shared += all_reduce(s.hardware, rows * s.work.width * s.hardware.device.itemsize, tensor)
    fixed = 0.0 if s.hardware.device.measured else KERNELS_A_HEAD * s.hardware.device.kernel_seconds
    return Parts(head=_logits(s, s.work.vocabulary, rows, tensor, "head"), communication=shared, fixed=fixed)


def _exit_features(s: Setting, rows: float) -> float:
    """What one exit makes of some rows, short of logits."""
    return _product(s, s.exits.own + s.exits.shared, rows, 1)


def _exit_logits(s: Setting, rows: float, tensor: int) -> tuple[float, float]:
    """Seconds of (some rows' logits by one exit, the gather of them where a tensor axis splits the unembedding)."""
    split = tensor if s.exits.columns == s.work.vocabulary else 1
    return _logits(s, s.exits.columns, rows, split, "exits"), all_gather(s.hardware, 4 * rows * s.exits.columns, split)


def _committed(s: Setting) -> float:
    """Exits that read the position before take in the roots that have finished, in every tick."""
    return _product(s, s.exits.committed, s.batch, 1)


def _logits(s: Setting, columns: int, rows: float, tensor: int, curve: str) -> float:
    """An unembedding of some columns, with what makes tokens of its logits."""
    device = s.hardware.device
    if device.measured is not None:
        return device.itemsize * columns * s.work.width / tensor * interpolate(getattr(device.measured, curve), rows)
    passes = LOGIT_PASSES * 4 * rows * columns / tensor
    size = s.kernel_bytes if curve == "head" else device.itemsize
    return _product(s, columns * s.work.width, rows, tensor, size) + _roofline(s, passes, 0.0)


def _product(s: Setting, parameters: float, rows: float, tensor: int, size: float | None = None) -> float:
    """Rows times kernels of so many parameters, of `size` bytes each; None is the device's itemsize."""
    device = s.hardware.device
    size = (device.itemsize if size is None else size) * parameters / tensor
    if device.measured is not None:
        return size * interpolate(device.measured.layer["unrolled"], rows)
    return _roofline(s, size, 2 * rows * parameters / tensor)


def _roofline(s: Setting, size: float, operations: float) -> float:
    device = s.hardware.device
    return max(size / (device.reached_bandwidth * device.bandwidth), operations / (device.reached_flops * device.flops))


def _tick_seconds(s: Setting) -> float:
    device = s.hardware.device
    return device.measured.tick_seconds if device.measured else KERNELS_OF_LATTICE * device.kernel_seconds


def _longest(depths: Sequence[int]) -> int:
    return int(max(np.diff((0, *depths))))
