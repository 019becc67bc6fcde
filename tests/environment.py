"""Set up what tests run in. conftest.py imports this before JAX, and the processes that tests start inherit it."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# A test run means the same everywhere unless somebody asks for an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Compiling is most of what tests cost, and fast code is nothing to small models. An empty XLA_FLAGS compiles as usual.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# Two workers keep two cores busy: parts of a program that are compiled side by side only cost more in all.
QUICK.append("--xla_cpu_parallel_codegen_split_count=1")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # The level alone leaves LLVM's passes where they are, a third of what is spent: this skips all that can be skipped.
    QUICK.append("--xla_backend_extra_options=-opt-bisect-limit=0,-opt-bisect-verbose=false")
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know it
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

LARGEST_CACHE = 10**9
"""Bytes of compiled programs; it begins anew beyond."""

if "DEX_JAX_TICK_COSTS" not in os.environ:  # workers find the folder there is
    folder = tempfile.mkdtemp(prefix="dex_jax_tests_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # What tests measure, two at a time, is not what the user's own runs should go by.
    os.environ["DEX_JAX_TICK_COSTS"] = os.path.join(folder, "tick_costs.json")
    # What one of them has compiled, no other compiles again, nor does the next run.
    compiled = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
    if sum(file.stat().st_size for file in compiled.glob("*")) > LARGEST_CACHE:
        shutil.rmtree(compiled, ignore_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def flags_for_devices(count: int) -> str:
    """XLA_FLAGS of a process in which the CPU counts as several devices, and that else compiles as this one."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}".strip()
