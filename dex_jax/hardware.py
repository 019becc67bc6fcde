"""The figures of machines from public data sheets, which a caller may replace by others.

Bandwidths, arithmetic, memory and links are peaks as published; latencies are round assumptions, from one program to
the next.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dex_jax.errors import DexError

USABLE = 0.92
"""Share of a device's memory that weights and caches may take."""


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or the cores that one process has."""

    name: str  # of the device
    flops: float  # operations a second at peak, in the dtype it is meant to be used with
    bandwidth: float  # bytes a second from memory, at peak
    memory: float  # bytes
    kernel: float  # seconds that a kernel of a compiled program takes, however small
    per_host: int  # devices that `link` joins
    link: str  # between devices of a host, a key of LINKS
    network: str  # between hosts
    itemsize: int = 2  # bytes of a number of weights and caches


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices of one kind, all joined alike: by the slowest link that there is between any two of them."""

    device: Device  # each of them
    count: int  # how many
    link: str  # what joins them, for people
    latency: float  # seconds that a small message takes, from program to program
    link_bandwidth: float  # bytes a second, one way


# Name -> (seconds that a small message takes, bytes a second one way).
LINKS = {
    # NVLink: H100 data sheet (fourth generation, 900 GB/s both ways), A100 data sheet (third, 600 GB/s both ways).
    "nvlink4": (2e-6, 450e9),
    "nvlink3": (2e-6, 300e9),
    # ICI: one link one way. Cloud TPU documentation gives both ways of all of a chip's links: v5e 400 GB/s and v6e
    # 800 GB/s over 4 links, v5p 4,800 Gb/s over 6.
    "ici": (1e-6, 50e9),
    "ici-v6e": (1e-6, 100e9),
    # PCI Express base specifications, 16 lanes, one way, encoding taken off.
    "pcie3": (8e-6, 15.8e9),
    "pcie4": (8e-6, 31.5e9),
    "pcie5": (8e-6, 63e9),
    # A data-centre network over TCP with two 100 Gb/s cards a host (Cloud TPU v5e documentation), and InfiniBand NDR
    # (400 Gb/s a port, ConnectX-7 data sheet).
    "dcn": (40e-6, 25e9),
    "infiniband": (5e-6, 50e9),
    # Two processes of one machine over TCP.
    "loopback": (60e-6, 2e9),
}

# Peaks: dense bfloat16 (float16 on T4). Kernel latencies are assumptions: what a small kernel takes in a captured graph
# on a GPU, or within one TPU program. ICI joins the hosts of a slice, so what counts as a host is a slice.
_DEVICES = (
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5 column: 989 TFLOPS dense bfloat16, 3.35 TB/s, 80 GB.
    Device("h100", 989e12, 3.35e12, 80e9, 3e-6, 8, "nvlink4", "infiniband"),
    # NVIDIA H200 Tensor Core GPU data sheet: as H100, 4.8 TB/s, 141 GB.
    Device("h200", 989e12, 4.8e12, 141e9, 3e-6, 8, "nvlink4", "infiniband"),
    # NVIDIA A100 80GB data sheet, SXM: 312 TFLOPS, 2,039 GB/s, 80 GB; 40GB: 1,555 GB/s.
    Device("a100", 312e12, 2.039e12, 80e9, 4e-6, 8, "nvlink3", "infiniband"),
    Device("a100-40", 312e12, 1.555e12, 40e9, 4e-6, 8, "nvlink3", "infiniband"),
    # NVIDIA T4 data sheet: 65 TFLOPS float16, 320 GB/s ("320+" there), 16 GB, PCI Express 3 x16.
    Device("t4", 65e12, 320e9, 16e9, 5e-6, 4, "pcie3", "dcn"),
    # NVIDIA L4 data sheet: 121 TFLOPS without sparsity, 300 GB/s, 24 GB, PCI Express 4 x16.
    Device("l4", 121e12, 300e9, 24e9, 4e-6, 8, "pcie4", "dcn"),
    # Google Cloud TPU documentation, pages "TPU v5e", "TPU v5p" and "TPU v6e".
    Device("v5e", 197e12, 819e9, 16e9, 1e-6, 256, "ici", "dcn"),
    Device("v5p", 459e12, 2.765e12, 95e9, 1e-6, 256, "ici", "dcn"),
    Device("v6e", 918e12, 1.638e12, 32e9, 1e-6, 256, "ici-v6e", "dcn"),
    # Two cores of an AMD EPYC (Zen 4) in float32: 36 GB/s streaming, as measured for the project, and 2 cores x 3 GHz
    # x 32 operations.
    Device("cpu", 192e9, 36e9, 16e9, 5e-6, 2, "loopback", "loopback", itemsize=4),
)
DEVICES = {device.name: device for device in _DEVICES}


def platform_of(name: str) -> str:
    """Return JAX's name for the platform of a key of DEVICES: "cpu", "gpu" or "tpu"."""
    return "tpu" if name in ("v5e", "v5p", "v6e") else "cpu" if name == "cpu" else "gpu"


NUMBERS = ("flops", "bandwidth", "memory", "kernel", "latency", "link_bandwidth")
"""The fields of Device and Hardware that a caller may give."""


def hardware(text: str) -> Hardware:
    """Return the hardware that a text describes, such as "h100", "h100x8" or "v5ex16,link=dcn,memory=15e9".

    It is a key of DEVICES with a count; then, each after a comma, link=NAME of LINKS or a number for one of NUMBERS, in
    bytes, seconds and operations a second. Raise DexError where it is none of these.
    """
    first, *rest = text.split(",")
    name, _, number = first.partition("x")
    count = int(number) if number.isdecimal() and len(number) < 6 else 0 if number else 1
    if name not in DEVICES or count < 1:
        raise DexError(f"--hardware {first!r} is unknown: write NAME or NAMExCOUNT with one of {', '.join(DEVICES)}")
    device = DEVICES[name]
    link = device.link if count <= device.per_host else device.network
    given: dict[str, Any] = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key == "link" and value in LINKS:
            link = value
        elif key in NUMBERS and 0 < (found := _number(value)) < math.inf:
            given[key] = found
        else:
            options = f"link={'|'.join(LINKS)} or a number above 0 for one of {', '.join(NUMBERS)}"
            raise DexError(f"--hardware {text}: {part!r} is not {options}")
    latency, bandwidth = LINKS[link]
    joined = {"latency": given.pop("latency", latency), "link_bandwidth": given.pop("link_bandwidth", bandwidth)}
    return Hardware(dataclasses.replace(device, **given), count, link, **joined)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
