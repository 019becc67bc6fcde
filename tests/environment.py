"""The environment variables of tests; conftest.py imports this before JAX, and processes of tests inherit them."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Tests run on the CPU everywhere, unless somebody requests an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests mostly spend time on compiling, and small models need no fast code. An empty XLA_FLAGS compiles as usual.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# Two workers keep two cores busy: to compile parts of a program side by side would only cost more in all.
QUICK.append("--xla_cpu_parallel_codegen_split_count=1")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # The level alone leaves LLVM's passes on, a third of the compile time: this skips all that can be skipped.
    QUICK.append("--xla_backend_extra_options=-opt-bisect-limit=0,-opt-bisect-verbose=false")
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # later ones do not know the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

LARGEST_CACHE = 10**9
"""Number of bytes of compiled programs beyond which their folder is emptied."""

if "DEX_JAX_TICK_COSTS" not in os.environ:  # workers inherit the folder of the main process
    folder = tempfile.mkdtemp(prefix="dex_jax_tests_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Tests measure costs two at a time, which would mislead the user's own runs.
    os.environ["DEX_JAX_TICK_COSTS"] = os.path.join(folder, "tick_costs.json")
    # A program that one process has compiled is not compiled again by another, or in the next run.
    compiled = Path(__file__).parents[1] / ".pytest_cache" / "compiled"
    with contextlib.suppress(FileNotFoundError):  # another run of these tests may write or empty the folder just now
        if sum(file.stat().st_size for file in compiled.glob("*")) > LARGEST_CACHE:
            shutil.rmtree(compiled, ignore_errors=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def flags_for_devices(count: int) -> str:
    """Return XLA_FLAGS for a process that counts the CPU as `count` devices, and else compiles as this one does."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}".strip()
