"""Devices to compile for that are not here: their compilers run on any machine.

NVIDIA GPUs need jax-cuda12-plugin and jax-cuda12-pjrt of JAX's own version, and cuDNN, without what these depend on;
TPUs libtpu.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from dex_jax.decoding.footprint import SessionShapes
from dex_jax.decoding.program import Program
from dex_jax.decoding.session import PREFILL, RUN, START, Session
from dex_jax.decoding.spec import Spec
from dex_jax.errors import DexError
from dex_jax.nn.products import ASSUMED, Device


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA asks about an NVIDIA GPU; of its data sheet and the CUDA programming guide's table of capabilities."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    float32_units: int  # of each
    clock: float  # GHz
    bandwidth: float  # bytes a second
    memory: int  # bytes
    second_cache: int  # bytes
    shared: int  # bytes of each core
    shared_by_block: int  # ... that one block may ask for
    threads: int  # of each core

    @property
    def configuration(self) -> str:
        """A `stream_executor.GpuTargetConfigProto` in text form."""
        major, minor = self.capability
        features = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        blocks = "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads} {blocks}
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared_by_block}
              core_count: {self.cores} fpus_per_core: {self.float32_units} clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.second_cache}
              device_memory_size: {self.memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
            }}
            platform_name: "CUDA" device_description_str: "{self.name}"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }} runtime_version {{ major: 12 minor: 9 patch: 1 }}"""


KIB, MIB = 2**10, 2**20
GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 1.59, 320e9, 15_840_000_000, 4 * MIB, 64 * KIB, 64 * KIB, 1024),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 2.04, 300e9, 24_150_000_000, 48 * MIB, 100 * KIB, 99 * KIB, 1536),
    "a100-40": Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 1.41, 1.555e12, 42_400_000_000, 40 * MIB, 164 * KIB, 163 * KIB, 2048
    ),
    "a100": Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 2.039e12, 85_000_000_000, 40 * MIB, 164 * KIB, 163 * KIB, 2048
    ),
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 3.35e12, 84_900_000_000, 50 * MIB, 228 * KIB, 227 * KIB, 2048
    ),
}
TPUS = {"v5e": ("v5litepod-4", "v5e:2x2"), "v6e": ("v6e-4", "v6e:2x2")}
"""Name -> (what libtpu calls four chips of it, their topology)."""

TARGETS = (*GPUS, *TPUS)


@contextlib.contextmanager
def target(name: str) -> Iterator[list[jax.Device]]:
    """Devices of one of TARGETS, one GPU or four TPU chips, to compile for within the block.

    Raises:
      DexError: another name, or its compiler is not installed.

    Examples:
      >>> with target("h100") as devices:   # doctest: +SKIP
      ...     compiled = lower("run", shapes, spec, devices[0]).compile()
    """
    if name not in TARGETS:
        raise DexError(f"there is no compiler for {name!r}: choose one of {', '.join(TARGETS)}")
    if name in TPUS:
        kind, topology = TPUS[name]
        # Without these libtpu looks for a metadata server, and complains that there is none; workers compile side by
        # side.
        about = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": kind, "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ.update(about | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
        options = {"platform": "tpu", "topology_name": topology}
        install = "libtpu"
    else:
        config = GPUS[name].configuration
        options = {"platform": "cuda", "topology_name": "", "target_config": config, "topology": "1x1x1"}
        install = " ".join(f"jax-cuda12-{part}=={jax.__version__}" for part in ("plugin", "pjrt"))
        install += " nvidia-cudnn-cu12"
    try:
        devices = topologies.get_topology_desc(**options).devices
    except Exception as error:  # each compiler has errors of its own
        raise DexError(f"nothing here compiles for {name}: pip install --no-deps {install} ({error})") from error
    with assumed(GPUS.get(name)):
        yield devices


@contextlib.contextmanager
def assumed(gpu: Gpu | None) -> Iterator[None]:
    """Within the block what is traced is for a GPU that is not at hand, or for a TPU."""
    before = ASSUMED.set(Device("tpu") if gpu is None else Device("gpu", float(".".join(map(str, gpu.capability)))))
    jax.clear_caches()  # what was traced for one device is not for another
    try:
        with contextlib.nullcontext() if gpu is None else jax.sharding.use_abstract_mesh(_mesh_of(gpu)):
            yield
    finally:
        ASSUMED.reset(before)
        jax.clear_caches()


def _mesh_of(gpu: Gpu) -> AbstractMesh:
    """What jax 0.12 asks about a GPU when it lowers kernels for Triton."""
    about: dict[str, Any] = {"device_kind": gpu.name, "num_cores": gpu.cores, "platform": "gpu"}
    asked = {field.name for field in dataclasses.fields(AbstractDevice)}  # jax 0.7 has no platform
    device = AbstractDevice(**{name: each for name, each in about.items() if name in asked})
    return AbstractMesh((1,), ("here",), axis_types=(AxisType.Auto,), abstract_device=device)


def lower(name: str, shapes: SessionShapes, spec: Spec, device: jax.Device, chunk: int = 512, capacity=64) -> Any:
    """One of the programs of decoding, lowered for a device, to be compiled.

    Args:
      name: "prefill", of `chunk` tokens, "start", with room for `capacity` new tokens, or "run".
      shapes: as `session_shapes` gives them.
      spec: what they were made for.
      device: within a `target`, or one at hand.
    """
    programs: dict[str, Any] = {
        "prefill": (PREFILL, shapes.of_prefill(chunk), {}),
        "start": (START, shapes.of_start, {"capacity": capacity}),
        "run": (RUN, shapes.of_run, {}),
    }
    program, arguments, statics = programs[name]
    return program.jitted.lower(*_placed(arguments, device), spec=spec, **statics)


def temporaries(session: Session, device: jax.Device) -> int:
    """Bytes of the most that a program of a session holds beside its arguments, on a device of a `target`.

    Raises:
      DexError: a program that the compiler refuses: without cuDNN, say, or as the device's memory cannot hold it.
    """
    most = [0]

    def compiled(program: Program, *arguments: Any, **statics: Any) -> Any:
        found = program.jitted.lower(*_placed(arguments, device), **statics).compile()
        most.append(found.memory_analysis().temp_size_in_bytes)
        return found

    try:
        session.compile_by(compiled)
    except RuntimeError as error:  # what compilers raise
        raise DexError(f"the compiler refuses a program: {str(error).strip().splitlines()[0]}") from error
    return max(most)


def _placed(arguments: Any, device: jax.Device) -> Any:
    here = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments)
