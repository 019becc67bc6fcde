"""JAX's own cache of compiled programs: a second process reads what the first has compiled."""

from __future__ import annotations

import os

import jax

from dex_jax.io.whole_files import cache_folder


def keep_programs() -> None:
    """Let JAX keep all that it compiles in the user's cache folder, unless the user has set where, or not to."""
    if jax.config.values["jax_compilation_cache_dir"] is None and jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # For each program that it reads XLA writes pages of errors on CPUs with AVX-512, where nothing is wrong (jax issue
    # 38445). What fails raises an exception all the same. "NOTSET" sets Python's loggers back and leaves XLA's alone.
    by_jax = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1"
    if by_jax and jax.config.values["jax_logging_level"] == "NOTSET":
        jax.config.update("jax_logging_level", "CRITICAL")
        jax.config.update("jax_logging_level", "NOTSET")
