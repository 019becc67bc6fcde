"""`python -m dex_jax.planner`: tokens a second of plain decoding, trees and explorers on a machine, side by side.

    python -m dex_jax.planner --model llama-2-70b --hardware h100x8
    python -m dex_jax.planner --model smollm2-135m --hardware cpux2,bandwidth=30e9 --ticks 1:8:3:1.9 --ticks 2:16:8:2.4

Nothing is loaded and nothing is run: a formula is evaluated, and nobody has validated it on GPUs or TPUs. In it, `read`
is 0.8 of a machine's bandwidth, `compute` is 0.6 of its arithmetic, `kernel` is what a kernel takes however small,
`link` is the bandwidth between devices, and a message of x bytes takes send(x) = latency + x / link. Numbers have
`size` bytes, the model's weights `packed` bytes. With R rows of each of B sequences, split over T devices:

    product(P)   max(P packed / read, 2 P R B / compute) / T, for P weights that every row meets
    layer        product(P of a layer) + max(2 B S G E size / read, 4 R B S H E / compute) / T + 10 kernel
    head         product(V D) + 4 kernel
    exit         product(V' D + 3 D^2) + 12 kernel, with T = 1, weights of `size`, and V' = 16,384 draft tokens
    draft        450 kernel and, for each drafted level, product(V' D + 16 D^2) + 12 kernel, with T = 1, weights of
                 2 bytes and R at most 8
    gather(x)    log2(N) latency + (N - 1) / N x / link, among N devices that get x bytes together

A step takes

    AR           L layer + head, with R = 1
    trees        L layer + head + draft, and their tree's rows are R
    DEX          the layers of one device's stages, their exits or the head in the share of ticks that commit (at most
                 the tokens of a tick), whichever takes longer, and draft

and its messages: 4 gather(B R D size) a layer and gather(4 B R V) a head among T; K - 1 times send(B R D size) and in
the end, among K, 2 gather(B R D size) through a pipeline of K stages; in DEX send(B R D size) and
gather(K B R (D size + 8)) a tick.

A step of AR brings one token, one of trees as many as were counted, and a tick of K explorers their depth-side speedup
over K. --ticks gives these counts, with rows and drafted levels. The formula leaves out devices that share a memory,
batches that are cut into parts, and grids that are not even.

Letters: L layers, D width, H query heads, G key-value heads, E head width, V vocabulary, S positions attended to.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.hardware import DEVICES, USABLE, Hardware, hardware
from dex_jax.interrupts import exit_code
from dex_jax.tables import markdown

READS, COMPUTES = 0.8, 0.6
"""The assumed shares of the published bandwidth and arithmetic that products of a few rows get."""

KERNELS_A_LAYER, KERNELS_A_HEAD, KERNELS_OF_EXITS, KERNELS_OF_A_TICK = 10, 4, 12, 450
"""The assumed numbers of kernels of a compiled program; a tick's keep the lattice, and look up and grow cohorts."""

DRAFT_VOCABULARY, EXIT, DRAFTER, DRAFTED_ROWS = 16_384, 3, 16, 8
"""The sizes of the exits and the drafter shipped for SmolLM2-135M: columns, and own weights in squares of the width."""


class Ticks(NamedTuple):
    """The rows, levels and speedup of K explorers; K = 1 is a tree through all layers."""

    explorers: int  # K
    rows: int  # a stage's, or the tree's
    levels: int  # drafted one after the other in a tick
    speedup: float  # depth-side; tokens a tick for K = 1


PLAIN = Ticks(1, 1, 0, 1.0)
"""The ticks of AR."""

MEASURED = (
    *(Ticks(1, 4, 2, 1.77), Ticks(1, 8, 3, 1.96), Ticks(1, 16, 8, 2.32)),
    *(Ticks(2, 16, 8, 2.44), Ticks(5, 23, 8, 2.71), Ticks(10, 32, 8, 2.92)),
)
"""The ticks of SmolLM2-135M with the exits and the drafter that ship, on chat that neither was trained on."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The predicted speed and memory of one way of decoding.

    Attributes:
      name: for people, such as "AR", "trees" or "DEX, K = 5".
      stages, tensor: axes of the mesh.
      rows: number of rows of a stage and sequence.
      tokens: number of tokens that a step brings each sequence.
      seconds, messages: seconds of a step, and those of them in which devices exchange data.
      bytes_per_device: bytes of weights and caches on the fullest device.
      fits: whether they fit.
    """

    name: str
    stages: int
    tensor: int
    rows: int
    tokens: float
    seconds: float
    messages: float
    bytes_per_device: float
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        """The tokens a second of each sequence."""
        return self.tokens / self.seconds

    @property
    def where(self) -> str:
        """The use of the devices, in words."""
        axes = [f"stage={self.stages}"] * (self.stages > 1) + [f"tensor={self.tensor}"] * (self.tensor > 1)
        return ",".join(axes) or "one device"


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model on a machine, with a batch of B sequences of S positions; weights have `weight_bytes`, or the dtype's."""

    config: ModelConfig
    machine: Hardware
    batch: int = 1
    context: int = 1024
    weight_bytes: float | None = None

    def product(self, numbers: float, rows: float, tensor: int = 1, size: float | None = None) -> float:
        """Return the seconds of a product of rows with so many weights, `size` bytes each."""
        device = self.machine.device
        size = device.itemsize if size is None else size
        reading = numbers * size / (READS * device.bandwidth)
        return max(reading, 2 * numbers * rows * self.batch / (COMPUTES * device.flops)) / tensor

    def layer(self, rows: int, tensor: int) -> float:
        """Return the seconds of one layer."""
        c, device = self.config, self.machine.device
        cached = self.batch * self.context * 2 * c.num_kv_heads * c.head_dim * device.itemsize
        scores = 4 * rows * self.batch * self.context * c.num_heads * c.head_dim
        attention = max(cached / (READS * device.bandwidth), scores / (COMPUTES * device.flops)) / tensor
        return self.product(_of_layer(c), rows, tensor, self.weight_bytes) + attention + KERNELS_A_LAYER * device.kernel

    def head(self, rows: int, tensor: int) -> float:
        """Return the seconds of the final norm, the unembedding and the choice of a token."""
        numbers = self.config.vocab_size * self.config.width
        return self.product(numbers, rows, tensor, self.weight_bytes) + KERNELS_A_HEAD * self.machine.device.kernel

    def guess(self, rows: int, own: int, size: float) -> float:
        """Return the seconds of an exit or of a drafter's level, with `own` squares of the width as weights."""
        numbers = (min(DRAFT_VOCABULARY, self.config.vocab_size) + own * self.config.width) * self.config.width
        return self.product(numbers, rows, size=size) + KERNELS_OF_EXITS * self.machine.device.kernel

    def draft(self, ticks: Ticks) -> float:
        """Return the seconds that exit 0 adds to a tick, bookkeeping included."""
        device = self.machine.device
        level = self.guess(min(ticks.rows, DRAFTED_ROWS), DRAFTER, min(2, device.itemsize))
        return KERNELS_OF_A_TICK * device.kernel + ticks.levels * level

    def gather(self, size: float, devices: int) -> float:
        """Return the seconds until each of so many devices has all `size` bytes, if each had an equal share."""
        machine = self.machine
        share = (devices - 1) / devices * size / machine.link_bandwidth
        return math.ceil(math.log2(devices)) * machine.latency + share

    def through(self, stages: int, tensor: int, ticks: Ticks | None = None) -> Prediction:
        """Predict AR, or with `ticks` the trees of one explorer, through all layers, spread over stages x T devices."""
        c, rows = self.config, 1 if ticks is None else ticks.rows
        states = self.batch * rows * c.width * self.machine.device.itemsize
        seconds = c.num_layers * self.layer(rows, tensor) + self.head(rows, tensor)
        messages = self._split(c.num_layers, rows, tensor) + (stages - 1) * self._sent(states)
        messages += 2 * self.gather(states, stages)
        layers = math.ceil(c.num_layers / stages)
        if ticks is None:
            return self._step("AR", stages, tensor, seconds, messages, self._held(layers, tensor))
        held = self._held(layers, tensor, slots=rows, drafter=True)
        return self._step("trees", stages, tensor, seconds + self.draft(ticks), messages, held, ticks)

    def explored(self, stages: int, tensor: int, ticks: Ticks) -> Prediction:
        """Predict K explorers on stages x T devices, K / stages of them on each."""
        c, rows, explorers = self.config, ticks.rows, ticks.explorers
        own, committing = explorers // stages, min(1.0, self.batch * ticks.speedup / explorers)
        states = self.batch * rows * c.width * self.machine.device.itemsize
        layers = own * math.ceil(c.num_layers / explorers)
        exits = own * self.guess(rows, EXIT, self.machine.device.itemsize)
        seconds = layers * self.layer(rows, tensor) + self.draft(ticks)
        seconds += max(exits, committing * self.head(rows, tensor))
        messages = self._split(layers, rows, tensor) + (stages > 1) * self._sent(states)
        messages += self.gather(explorers * (states + 8 * self.batch * rows), stages)
        held = self._held(layers, tensor, slots=explorers * rows, drafter=True, exits=own)
        return self._step(f"DEX, K = {explorers}", stages, tensor, seconds, messages, held, ticks)

    def _sent(self, size: float) -> float:
        return self.machine.latency + size / self.machine.link_bandwidth

    def _split(self, layers: int, rows: int, tensor: int) -> float:
        """Return the seconds of the messages of layers and a head that are split over T devices."""
        numbers = self.batch * rows
        reduced = 4 * self.gather(numbers * self.config.width * self.machine.device.itemsize, tensor)
        return layers * reduced + self.gather(4 * numbers * self.config.vocab_size, tensor)

    def _held(self, layers: int, tensor: int, slots: int = 0, drafter: bool = False, exits: int = 0) -> float:
        """Return the bytes of so many layers, embedding, unembedding, caches with lattice slots, exits and drafter."""
        c, n = self.config, self.machine.device.itemsize
        weights = layers * _of_layer(c) + c.vocab_size * c.width * (1 if c.tied else 2)
        cached = layers * self.batch * (self.context + slots) * 2 * c.num_kv_heads * c.head_dim
        columns = min(DRAFT_VOCABULARY, c.vocab_size) if drafter else 0
        heads = (columns + (exits * EXIT + drafter * DRAFTER) * c.width) * c.width
        return (weights * (n if self.weight_bytes is None else self.weight_bytes) + cached * n) / tensor + heads * n

    def _step(
        self, name: str, stages: int, tensor: int, seconds: float, messages: float, held: float, ticks: Ticks = PLAIN
    ) -> Prediction:
        fits, tokens = held <= USABLE * self.machine.device.memory, ticks.speedup / ticks.explorers
        return Prediction(name, stages, tensor, ticks.rows, tokens, seconds + messages, messages, held, fits)


def _of_layer(config: ModelConfig) -> int:
    from dex_jax.nn.transformer import layer_parameters

    return sum(math.prod(shape) for shape, _ in layer_parameters(config).values())


def predict(s: Setting, ticks: Sequence[Ticks] = MEASURED) -> list[Prediction]:
    """Predict AR and the fastest trees on one device and on all of them, and explorers on all.

    Args:
      s: the model, the machine and the batch.
      ticks: what explorers bring. A K above L, or above the devices and no multiple of them, is left out.
    """
    layers, count = s.config.num_layers, s.machine.count
    places = dict.fromkeys([(1, 1), (1, _most_splits(s.config, count)), (min(count, layers), 1)])
    found = [s.through(*place) for place in places]
    trees = [each for each in ticks if each.explorers == 1]
    if trees:
        ways = ([s.through(*place, tree) for tree in trees] for place in places)
        found += [max(way, key=_speed) for way in ways]
    for each in (each for each in ticks if 1 < each.explorers <= layers):
        stages = min(each.explorers, count)
        if each.explorers % stages == 0:
            found.append(s.explored(stages, _most_splits(s.config, count // stages), each))
    return found


def _speed(each: Prediction) -> float:
    return each.tokens_per_second


def _most_splits(config: ModelConfig, devices: int) -> int:
    """Return T, the most of so many devices that a layer's heads can be split over."""
    both = math.gcd(config.num_heads, config.num_kv_heads)
    return max(t for t in range(1, min(devices, both) + 1) if both % t == 0)


def table(found: Sequence[Prediction]) -> str:
    """Return predictions, with AR on one device in front, as markdown and a sentence that says which is fastest."""
    rows = [
        [
            each.name,
            each.where,
            str(each.rows),
            f"{each.tokens:.2f}",
            f"{1e3 * each.seconds:.2f}",
            f"{each.messages / each.seconds:.0%}",
            f"{each.tokens_per_second:.1f}",
            f"{each.tokens_per_second / found[0].tokens_per_second:.2f}",
            f"{each.bytes_per_device / 1e9:.2f}" + ("" if each.fits else ", too much"),
        ]
        for each in found
    ]
    header = ["method", "on", "rows", "tokens a step", "ms a step", "messages", "tokens/s", "over AR", "GB a device"]
    able = [each for each in found if each.fits]
    if not able:
        sentence = "Nothing fits into the memory of these devices."
    else:
        best = max(able, key=_speed)
        sentence = f"{best.name} on {best.where} should be fastest."
        ours, others = ([each for each in able if each.name.startswith("DEX") == dex] for dex in (True, False))
        if ours and others:
            ratio = max(map(_speed, ours)) / max(map(_speed, others))
            sentence += f" The best explorers are {ratio:.2f} times as fast as the best of the others."
    return f"{markdown(header, rows)}\n\n{sentence}"


# From the config.json of each model's release: family, vocabulary, layers, width, heads, key-value heads, their width,
# width of the MLP, context.
SHAPES = {
    "llama-2-70b": ModelConfig("llama", 32000, 80, 8192, 64, 8, 128, 28672, 4096),
    "llama-3-8b": ModelConfig("llama", 128256, 32, 4096, 32, 8, 128, 14336, 8192),
    "qwen3-32b": ModelConfig("qwen3", 151936, 64, 5120, 64, 8, 128, 25600, 40960, qk_norm=True),
}
"""The shapes of models to plan for without any weights."""


def shapes_of(source: str) -> ModelConfig:
    """Return the shapes of a model: a name of SHAPES, or what `dex_jax.load` takes; raise DexError for another."""
    from dex_jax.io.opening import open_checkpoint

    if source in SHAPES:
        return SHAPES[source]
    try:
        return open_checkpoint(source).config
    except DexError as error:
        raise DexError(f"{error} To plan from shapes alone, name one of {', '.join(SHAPES)}.") from error


def read_ticks(text: str) -> Ticks:
    """Parse a value of --ticks."""
    try:
        explorers, rows, levels, speedup = text.split(":")
        found = Ticks(int(explorers), int(rows), int(levels), float(speedup))
    except ValueError:
        found = Ticks(0, 0, 0, 0.0)
    if min(found[:2]) < 1 or found.levels < 0 or not 0 < found.speedup < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not K:ROWS:LEVELS:SPEEDUP, such as 5:23:8:2.71")
    return found


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    p = argparse.ArgumentParser(
        prog="python -m dex_jax.planner",
        description=__doc__.splitlines()[0],
        epilog="docs/howto_planner.md has the formula. Exit codes: 0 done, 2 bad input.",
    )
    measured = " ".join(":".join(map(str, each)) for each in MEASURED)
    machine = f"{', '.join(DEVICES)}; then link=NAME, bandwidth=1e12 and others, each after a comma"
    add = p.add_argument
    add("--model", default="smollm2-135m", help=f"what load takes, or {', '.join(SHAPES)} (%(default)s)")
    add("--hardware", required=True, metavar="NAMExCOUNT", help=machine)
    add("--batch", type=int, default=1, metavar="B", help="sequences (%(default)s)")
    add("--context", type=int, default=1024, metavar="S", help="positions attended to (%(default)s)")
    add("--bits", type=float, help="of a weight: 4.5, say, where they are packed (as the device's numbers)")
    text = f"what K explorers bring, K = 1 for a tree; once for each (SmolLM2-135M's: {measured})"
    add("--ticks", type=read_ticks, action="append", metavar="K:ROWS:LEVELS:SPEEDUP", help=text)
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Print what the flags ask for; raise DexError for bad numbers, or names that cannot be read."""
    if min(args.batch, args.context) < 1 or not (args.bits is None or 1 <= args.bits <= 64):
        raise DexError("--batch and --context must be at least 1, --bits 1 to 64")
    machine, config = hardware(args.hardware), shapes_of(args.model)
    s = Setting(config, machine, args.batch, args.context, None if args.bits is None else args.bits / 8)
    where = f"{machine.count} x {machine.device.name} ({machine.link})"
    print(f"{args.model} on {where}, batch {s.batch}, context {s.context}")
    print(f"\n{table(predict(s, args.ticks or MEASURED))}")


if __name__ == "__main__":
    sys.exit(main())
