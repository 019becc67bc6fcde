"""Programs that XLA compiles from shapes alone for devices that are not here, and the bytes that their loops move."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dex_jax.nn.products import ASSUMED, CompileTarget

AMOUNTS = "core_count fpus_per_core threads_per_core_limit clock_rate_ghz l2_cache_size memory_bandwidth"
AMOUNTS = f"{AMOUNTS} shared_memory_per_core shared_memory_per_block_optin".split()
GPUS = {  # compute capability, then AMOUNTS from data sheets
    "t4": (7.5, 40, 64, 1024, 1.59, 4194304, 320000000000, 65536, 65536),
    "l4": (8.9, 58, 128, 1536, 2.04, 50331648, 300000000000, 102400, 101376),
    "h100": (9.0, 132, 128, 2048, 1.98, 52428800, 3350000000000, 233472, 232448),
}
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
WRITES = {"dynamic-update-slice", "scatter"}
PICKS = {"gather", "dynamic-slice", "slice"}


@contextlib.contextmanager
def assumed(name):
    """Trace for one of GPUS, or else for a TPU, within this context."""
    gpu, mesh = GPUS.get(name), contextlib.nullcontext()
    if gpu is not None:  # jax 0.12 asks for this device when it lowers kernels for Triton
        known = {field.name for field in dataclasses.fields(AbstractDevice)}
        about = {"device_kind": f"NVIDIA {name.upper()}", "num_cores": gpu[1], "platform": "gpu"}
        device = AbstractDevice(**{key: value for key, value in about.items() if key in known})
        mesh = jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device))
    before = ASSUMED.set(CompileTarget("tpu") if gpu is None else CompileTarget("gpu", gpu[0]))
    jax.clear_caches()  # what was traced for one device is wrong for another
    try:
        with mesh:
            yield
    finally:
        ASSUMED.reset(before)
        jax.clear_caches()


def devices_of(name):
    """Return one of GPUS, which a plugin of JAX compiles for, or four chips of "v5e", which libtpu compiles for."""
    if name not in GPUS:
        # Without these variables libtpu looks for a metadata server, and lets no other process compile.
        about = {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"}
        os.environ.update(about | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
        return topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:2x2").devices
    capability, *amounts = GPUS[name]
    about = " ".join(f"{field}: {amount}" for field, amount in zip(AMOUNTS, amounts, strict=True))
    newest = "feature_extension: ACCELERATED_FEATURES" if capability >= 9 else ""
    configuration = f"""gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 {about}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536
        registers_per_block_limit: 65536 shared_memory_per_block: 49152 device_memory_size: 15840000000
        cuda_compute_capability {{ major: {int(capability)} minor: {round(capability % 1 * 10)} {newest} }} }}
        platform_name: "CUDA" device_description_str: "{name}" runtime_version {{ major: 12 minor: 9 patch: 1 }}
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}"""
    options = {"topology_name": "", "target_config": configuration, "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", **options).devices


class Array(NamedTuple):
    dims: tuple[int, ...]
    nbytes: int
    on_chip: bool  # in a TPU's own memory beside the main one


class Instruction(NamedTuple):
    operation: str
    results: list[Array]
    operands: list[str]
    calls: list[str]  # names of computations; those of a loop are its condition and its body
    nbytes: int  # of results in the main memory
    line: str


def array_of(kind, dims, layout):
    dims = tuple(map(int, re.findall(r"\d+", dims)))
    return Array(dims, math.prod(dims) * int(re.sub(r"\D", "", kind.replace("pred", "8")) or 0) // 8, "S(" in layout)


class Hlo:
    """An optimised program as `as_text` prints it: `computations` by name, each with its instructions by name."""

    def __init__(self, text):
        self.computations, entry = {}, {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{\s*$", line):
                here = self.computations[header[2]] = {}
                entry = here if header[1] else entry
            elif found := re.match(r"\s+(?:ROOT )?%?(\S+) = (.*?)\s([a-z][\w\-]*)\((.*?)\)(?:, |$)(.*)", line):
                name, result, operation, operands, rest = found.groups()
                results = [array_of(*each) for each in re.findall(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?", result)]
                calls = re.findall(r"(?:condition|body|calls|_computation)=%?([\w.\-]+)", rest)
                calls += re.findall(r"[\w.\-]+", "".join(re.findall(r"branch_computations=\{(.*?)\}", rest)))
                size = sum(each.nbytes for each in results if not each.on_chip)
                here[name] = Instruction(
                    operation, results, re.findall(r"%([\w.\-]+)", operands), calls, size, line.strip()
                )
        loops = [each for each in entry.values() if each.operation == "while"]
        self.loop = max(loops, key=lambda each: each.nbytes).calls[1] if loops else None

    def made(self, computation):
        """Yield (array, line) of each array made in the main memory, but for those that are written in part, in place.

        A TPU may keep a cache in its own memory while rows are written into it, and put it back: `moved` counts that.
        """
        for each in self.computations[computation].values():
            if each.operation == "copy-start" and each.results[1].on_chip:
                continue
            inside = self.computations[each.calls[0]].values() if each.operation == "fusion" else [each]
            written = {array.dims for one in inside if one.operation in WRITES for array in one.results}
            results = each.results[each.operation == "slice-start" :][
                : 1 if each.operation.endswith("-start") else None
            ]
            if not (each.operation in NOTHING or each.operation.endswith("-done") or "operand_aliasing" in each.line):
                yield from ((x, each.line) for x in results if not x.on_chip and x.dims not in written)
            for name in each.calls if each.operation != "fusion" else ():
                yield from self.made(name)

    def moved(self, computation):
        """Return the bytes of the main memory that a computation may read and write.

        A conditional counts its dearest branch, a write in place the written part, a gather the picked rows.
        """
        known, total = self.computations[computation], 0
        for each in known.values():
            if each.calls and each.operation != "fusion":
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.line)
                inner = [self.moved(name) for name in each.calls]
                total += max(inner) if each.operation == "conditional" else sum(inner) * int(turns[1] if turns else 1)
            elif each.operation.endswith("-start"):
                total += each.results[each.operation == "slice-start"].nbytes
            elif each.operation == "dynamic-update-slice":
                total += 2 * known[each.operands[1]].nbytes
            elif each.operation not in NOTHING and not each.operation.endswith("-done"):
                total += self._touched(each, known)
        return total

    def _touched(self, each, known):
        """Return the bytes that one instruction reads and writes."""
        operands = [known[name] for name in each.operands]
        if "operand_aliasing" in each.line:
            in_place = {array.dims for array in each.results}
            return sum(one.nbytes for one in operands if in_place.isdisjoint(array.dims for array in one.results))
        if each.operation != "fusion":
            workspace = each.results[-1].nbytes if "__cublas" in each.line else 0
            return each.nbytes - workspace + sum(one.nbytes for one in operands)
        inside, total = self.computations[each.calls[0]], each.nbytes
        for name, one in inside.items():
            if one.operation != "parameter":
                continue
            users = [user for user in inside.values() if name in user.operands]
            picked = [user for user in users if user.operation in PICKS and user.operands[0] == name]
            written = [
                inside[user.operands[1]] for user in users if user.operation in WRITES and user.operands[0] == name
            ]
            if users and len(picked) + len(written) == len(users):
                # The part that a write in place leaves as it is counts neither as read nor as a result.
                total += sum(x.nbytes for x in picked) + sum(2 * x.nbytes - one.nbytes for x in written)
            else:
                total += one.nbytes
        return total
