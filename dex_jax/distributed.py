"""Runs on many hosts: one process on each, all with the same program over the devices of all of them.

Start it on every host with --distributed, or call `join()` before anything else of JAX. JAX finds the other processes
itself under Slurm, Open MPI, Kubernetes and on Cloud TPUs; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from dex_jax.errors import DexError

HEARTBEAT_SECONDS = 20
"""Number of seconds without a sign of life after which a process counts as dead, and JAX ends the others too."""

ROLL_CALL_SECONDS = 5
"""Number of seconds in which the processes that are left say so, after a failed exchange."""

_NAMES, _LEFT = "dex_jax/names/", "dex_jax/left/"
_names: list[str] = []


def join() -> None:
    """Join the other processes of this run.

    Raises:
      DexError: nothing says where they are, or they do not come.
    """
    given: dict[str, Any] = {}
    for field, variable in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        if variable in os.environ:
            try:
                given[field] = int(os.environ[variable])
            except ValueError as error:
                raise DexError(f"{variable} must be a whole number, not {os.environ[variable]!r}") from error
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        given["heartbeat_timeout_seconds"] = HEARTBEAT_SECONDS
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise DexError(
            f"cannot join the other processes ({error}): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID on every host"
        ) from error
    client: Any = jax_distributed.global_state.client
    client.key_value_set(f"{_NAMES}{jax.process_index()}", name())
    _names[:] = [
        client.blocking_key_value_get(f"{_NAMES}{number}", 1000 * HEARTBEAT_SECONDS)
        for number in range(jax.process_count())
    ]


def keep_stdout() -> None:
    """Leave stdout to Python: what C++ prints there, as Gloo does its ranks, goes to stderr from now on."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)


def lost_processes() -> list[str]:
    """Return the names of the processes that no longer answer, after a failed exchange between devices.

    There are none where there is only one process. The call takes ROLL_CALL_SECONDS.
    """
    client: Any = jax_distributed.global_state.client
    if client is None or not _names:
        return []
    try:
        client.key_value_set(f"{_LEFT}{jax.process_index()}", "")
        time.sleep(ROLL_CALL_SECONDS)
        left = {int(key.removeprefix(_LEFT)) for key, _ in client.key_value_dir_get(_LEFT)}
    except jax.errors.JaxRuntimeError:
        # Process 0 keeps the list.
        return _names[:1]
    return [each for number, each in enumerate(_names) if number not in left]


def is_first() -> bool:
    """Return whether this is process 0, which reads prompts and writes the results; True where there is only one."""
    return jax.process_index() == 0


def name() -> str:
    """Return the name of this process, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"


def from_first(make: Callable[[], Any]) -> Any:
    """Return `make()` of process 0 (as JSON can hold it) in all processes; a DexError there is raised in all."""
    if jax.process_count() == 1:
        return make()
    message: dict[str, Any] = {}
    if is_first():
        try:
            message["value"] = make()
        except DexError as error:
            message["error"] = str(error)
    data = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    # Only what process 0 holds counts, and there `resize` changes nothing.
    text = np.asarray(multihost_utils.broadcast_one_to_all(np.resize(data, size)))
    message = json.loads(text.astype(np.uint8).tobytes())
    if "error" in message:
        raise DexError(message["error"])
    return message["value"]


def to_host(tree: Any) -> Any:
    """Return arrays of a mesh as NumPy arrays, whole in every process."""

    def one(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)
