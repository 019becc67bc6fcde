"""What the planner knows of machines: a table from public data sheets, and files that `calibrate` writes.

A table's figures are peaks; `reached` is the share of them that is counted on, an assumption. A calibrated file holds
times that were measured with this library's own programs, and nothing is taken off them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dex_jax.errors import DexError
from dex_jax.io.whole_files import write_whole

USABLE = 0.92
"""Share of a device's memory that weights and caches may take."""

REACHED_BANDWIDTH = 0.8
"""Assumption: share of the published memory bandwidth that reading weights gets."""

REACHED_FLOPS = 0.6
"""Assumption: share of the published arithmetic peak that products of a few rows get."""

Curve = tuple[tuple[float, float], ...]
"""(rows, seconds per byte) at ascending row counts."""


@dataclasses.dataclass(frozen=True)
class Link:
    """How two devices exchange data."""

    name: str  # of the link
    latency: float  # seconds that a small message takes, from program to program
    bandwidth: float  # bytes a second, one way


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `calibrate` measured with the library's own programs, instead of peaks; seconds per byte, by rows."""

    # "unrolled", the layout -> time of a layer's products by rows of one stage, per byte of its weights, fixed costs
    # taken off
    layer: dict[str, Curve]
    cache: Curve  # time of a layer's attention by rows of one sequence, per byte of keys and values
    head: Curve  # time of the final norm, unembedding and choice, per byte of the unembedding
    exits: Curve  # time of asking the exits (mask, choice and probability included), per byte of the draft unembedding
    layer_seconds: dict[str, float]  # the layout -> fixed cost of a layer, whatever its width
    tick_seconds: float  # fixed cost of a tick beside its layers and heads
    drafts_seconds: float = 0.0  # what exit 0 adds to that beside the drafter: to look up, grow and sort cohorts


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or the cores that one process has."""

    name: str  # of the device
    flops: float  # operations a second at peak, in the dtype it is meant to be used with
    bandwidth: float  # bytes a second from memory, at peak
    memory: float  # bytes
    kernel_seconds: float  # fixed cost of each kernel of a compiled program
    price: float | None = None  # US dollars an hour, an assumption; None when there is none
    itemsize: int = 2  # bytes of a number of weights and caches
    reached_bandwidth: float = REACHED_BANDWIDTH  # share of the peak that is counted on
    reached_flops: float = REACHED_FLOPS  # share of the peak that is counted on
    measured: Measured | None = None  # None for a table's entry


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices of one kind and how they are connected."""

    device: Device  # each of them
    count: int  # how many
    hosts: int  # on how many hosts (of TPUs: slices) they sit, equally many on each
    link: Link  # between devices of a host
    network: Link  # between hosts

    @property
    def per_host(self) -> int:
        """Devices of a host."""
        return self.count // self.hosts

    @property
    def name(self) -> str:
        """For people."""
        where = f"{self.count} x {self.device.name}, {self.link.name}"
        return where if self.hosts == 1 else f"{where} within each of {self.hosts} hosts, {self.network.name} between"

    def between(self, devices: int) -> Link:
        """The slowest link within a group of neighbouring devices."""
        return self.link if devices <= self.per_host else self.network


# Bandwidths are published; latencies, from one program to the next, are round assumptions.
LINKS = {
    # NVLink: H100 data sheet (fourth generation, 900 GB/s both ways), A100 data sheet (third, 600 GB/s both ways).
    "nvlink4": Link("nvlink4", 2e-6, 450e9),
    "nvlink3": Link("nvlink3", 2e-6, 300e9),
    # ICI: one link one way. Cloud TPU documentation gives both ways of all of a chip's links: v5e 400 GB/s and v6e
    # 800 GB/s over 4 links, v5p 4,800 Gb/s over 6.
    "ici-v5e": Link("ici-v5e", 1e-6, 50e9),
    "ici-v5p": Link("ici-v5p", 1e-6, 50e9),
    "ici-v6e": Link("ici-v6e", 1e-6, 100e9),
    # PCI Express base specifications, 16 lanes, one way, encoding taken off.
    "pcie3": Link("pcie3", 8e-6, 15.8e9),
    "pcie4": Link("pcie4", 8e-6, 31.5e9),
    "pcie5": Link("pcie5", 8e-6, 63e9),
    # A data-centre network over TCP with two 100 Gb/s cards a host (Cloud TPU v5e documentation), and InfiniBand NDR
    # (400 Gb/s a port, ConnectX-7 data sheet).
    "dcn": Link("dcn", 40e-6, 25e9),
    "infiniband": Link("infiniband", 5e-6, 50e9),
    # Two processes of one machine over TCP.
    "loopback": Link("loopback", 60e-6, 2e9),
}

# Peaks: dense bfloat16 (float16 on T4). Kernel latencies are assumptions: what a small kernel takes in a captured graph
# on a GPU, or within one TPU program. Prices are round public on-demand list prices for one device, to be replaced by
# one's own (,price=X).
DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5 column: 989 TFLOPS dense bfloat16, 3.35 TB/s, 80 GB.
    "h100": (Device("h100", 989e12, 3.35e12, 80e9, 3e-6, 4.0), 8, "nvlink4", "infiniband"),
    # NVIDIA H200 Tensor Core GPU data sheet: as H100, 4.8 TB/s, 141 GB.
    "h200": (Device("h200", 989e12, 4.8e12, 141e9, 3e-6, 5.0), 8, "nvlink4", "infiniband"),
    # NVIDIA A100 80GB data sheet, SXM: 312 TFLOPS, 2,039 GB/s, 80 GB.
    "a100": (Device("a100", 312e12, 2.039e12, 80e9, 4e-6, 3.0), 8, "nvlink3", "infiniband"),
    # NVIDIA A100 40GB data sheet, SXM: 1,555 GB/s, 40 GB.
    "a100-40": (Device("a100-40", 312e12, 1.555e12, 40e9, 4e-6, 2.0), 8, "nvlink3", "infiniband"),
    # NVIDIA T4 data sheet: 65 TFLOPS float16, 320 GB/s ("320+" there), 16 GB, PCI Express 3 x16.
    "t4": (Device("t4", 65e12, 320e9, 16e9, 5e-6, 0.35), 4, "pcie3", "dcn"),
    # NVIDIA L4 data sheet: 121 TFLOPS without sparsity, 300 GB/s, 24 GB, PCI Express 4 x16.
    "l4": (Device("l4", 121e12, 300e9, 24e9, 4e-6, 0.7), 8, "pcie4", "dcn"),
    # Google Cloud TPU documentation, pages "TPU v5e", "TPU v5p" and "TPU v6e".
    # ICI joins the hosts of a slice: what counts as a host here is a slice, of up to 256 chips (a v5p's may be larger).
    "v5e": (Device("v5e", 197e12, 819e9, 16e9, 1e-6, 1.2), 256, "ici-v5e", "dcn"),
    "v5p": (Device("v5p", 459e12, 2.765e12, 95e9, 1e-6, 4.2), 256, "ici-v5p", "dcn"),
    "v6e": (Device("v6e", 918e12, 1.638e12, 32e9, 1e-6, 2.7), 256, "ici-v6e", "dcn"),
    # Two cores of an AMD EPYC (Zen 4) in float32: 36 GB/s streaming, as measured for the project, and 2 cores x 3 GHz
    # x 32 operations for the peak. Replace it by what `calibrate` writes.
    "cpu": (Device("cpu", 192e9, 36e9, 16e9, 5e-6, None, itemsize=4), 2, "loopback", "loopback"),
}


KINDS = {
    **{"H100": "h100", "H200": "h200", "A100-SXM4-40GB": "a100-40", "A100-PCIE-40GB": "a100-40", "A100": "a100"},
    **{"T4": "t4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"},
}
"""What JAX's `device_kind` has in it -> key of DEVICES, the longer names first."""


def platform_of(name: str) -> str:
    """What JAX calls the platform of a key of DEVICES: "cpu", "gpu" or "tpu"."""
    tpus = {known for kind, known in KINDS.items() if kind.startswith("TPU")}
    return "tpu" if name in tpus else "cpu" if name == "cpu" else "gpu"


def published(kind: str) -> Device | None:
    """The device that JAX calls so, from DEVICES; None for one that is not there."""
    return next((DEVICES[name][0] for part, name in KINDS.items() if part in kind), None)


def hardware(text: str) -> Hardware:
    """Hardware from a name such as "h100", "h100x8" or "v5ex16,hosts=4,network=dcn", or from a file of `calibrate`.

    `text` is a key of DEVICES with how many, or the path of a .json file; then, each after a comma, count=N, hosts=N,
    link=NAME, network=NAME (keys of LINKS) or price=DOLLARS. A DexError where it is none of these.
    """
    first, *rest = text.split(",")
    options = {key: value for key, _, value in (part.partition("=") for part in rest)}
    for part, (key, value) in zip(rest, options.items(), strict=False):
        if key not in ("count", "hosts", "link", "network", "price") or not value:
            raise DexError(f"--hardware {text}: {part!r} is none of count=N, hosts=N, link=NAME, network=NAME, price=X")
        if key in ("link", "network") and value not in LINKS:
            raise DexError(f"--hardware {text}: there is no link {value!r}, choose one of {', '.join(LINKS)}")
    if first.endswith(".json"):
        found = read_hardware(first)
        per_host = found.per_host
    else:
        name, _, number = first.partition("x")
        if name not in DEVICES or (number and not number.isdigit()):
            raise DexError(
                f"--hardware {first!r} is unknown: write NAME or NAMExCOUNT with one of {', '.join(DEVICES)}, or the "
                "path of a .json file that calibrate wrote"
            )
        device, per_host, link, network = DEVICES[name]
        count = _number(number or 1, "count")
        found = Hardware(device, count, -(-count // per_host), LINKS[link], LINKS[network])
    count, hosts = found.count, found.hosts
    if "count" in options:
        count = _number(options["count"], "count")
        hosts = -(-count // per_host)
    hosts = _number(options.get("hosts", hosts), "hosts")
    if count % hosts:
        raise DexError(f"--hardware {text}: {count} devices do not spread evenly over {hosts} hosts")
    links = {key: LINKS[options[key]] for key in ("link", "network") if key in options}
    device = found.device
    if "price" in options:
        try:
            device = dataclasses.replace(device, price=float(options["price"]))
        except ValueError:
            raise DexError(f"--hardware {text}: the price {options['price']!r} is no number") from None
    return dataclasses.replace(found, device=device, count=count, hosts=hosts, **links)


def write_hardware(path: str | Path, found: Hardware) -> None:
    """Writes a file that `hardware` reads; a DexError if it cannot be written."""
    write_whole(path, json.dumps(dataclasses.asdict(found), indent=1) + "\n")


def read_hardware(path: str | Path) -> Hardware:
    """Reads a file of `write_hardware`; a DexError: no such file, or another content."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Hardware)
    except (OSError, ValueError, RecursionError) as error:
        raise DexError(
            f"{path} cannot be read as hardware ({error}): let python -m dex_jax.cli.calibrate write it"
        ) from error


def interpolate(curve: Curve, rows: float) -> float:
    """Seconds per byte at a row count: linear between measured counts, beyond the last as its slope goes on.

    Below the first count the first value holds. Values that fall as rows grow are taken as noise and raised to the
    largest before, so that fewer rows never cost more.
    """
    at = np.asarray([point[0] for point in curve], float)
    value = np.maximum.accumulate(np.asarray([point[1] for point in curve], float))
    if rows > at[-1] and len(at) > 1:
        return float(value[-1] + (rows - at[-1]) * (value[-1] - value[-2]) / (at[-1] - at[-2]))
    return float(np.interp(rows, at, value))


def _number(value: Any, what: str) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise DexError(f"--hardware needs a whole {what} of at least 1, not {value}")
    return number
