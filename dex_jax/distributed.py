"""Runs on many hosts: one process on each, all with the same program over the devices of all of them.

Start it on every host with --distributed, or call `join()` before anything else of JAX. JAX finds the other processes
itself under Slurm, Open MPI, Kubernetes and on Cloud TPUs; elsewhere JAX_COORDINATOR_ADDRESS (host:port of process 0),
JAX_NUM_PROCESSES and JAX_PROCESS_ID say where they are.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dex_jax.errors import DexError
from dex_jax.interrupts import BAD_INPUT, end_process

SILENCE_SECONDS = 3
"""The time between two signs of life on a connection; after five without an answer it counts as closed."""

GOODBYE = b"."
"""The byte that a process sends to the others as it ends by itself."""


def join() -> None:
    """Join the other processes of this run. When one of them dies, the others name it on stderr and end at once.

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
    try:
        jax.distributed.initialize(**given)
    except (ValueError, RuntimeError) as error:
        raise DexError(
            f"cannot join the other processes ({error}): set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID on every host"
        ) from error
    if jax.process_count() > 1:
        _watch()


def _watch() -> None:
    """Connect every process to process 0, so that the operating system tells at once when one is gone."""
    names, password = _everywhere(name()), _everywhere(secrets.token_hex(16))
    peers: dict[socket.socket, str] = {}
    if is_first():
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=len(names), dualstack_ipv6=both) as server:
            _everywhere(json.dumps([server.getsockname()[1], *_addresses()]))
            while len(peers) < len(names) - 1:
                peer, _ = server.accept()
                message = peer.recv(1000).decode()
                if message in password[1:]:
                    peers[peer] = names[password.index(message)]
    else:
        port, *hosts = json.loads(_everywhere("")[0])
        peers[_connected(hosts, port)] = names[0]
        _send(list(peers), password[jax.process_index()].encode())
    for peer in peers:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("IDLE", SILENCE_SECONDS), ("INTVL", SILENCE_SECONDS), ("CNT", 4)):
            if hasattr(socket, f"TCP_KEEP{option}"):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{option}"), value)
    threading.Thread(target=_end_with_others, args=(peers,), daemon=True, name="other processes").start()
    atexit.register(_send, list(peers), GOODBYE)


def _end_with_others(peers: dict[socket.socket, str]) -> None:
    """Wait until a peer is gone without GOODBYE, or process 0 says which is; tell the others, and end this process."""
    waiting = selectors.DefaultSelector()
    for peer in peers:
        waiting.register(peer, selectors.EVENT_READ)
    while waiting.get_map():
        for key, _ in waiting.select():
            silent: Any = key.fileobj
            try:
                message = silent.recv(1000)
            except OSError:
                message = b""
            if message == GOODBYE:
                waiting.unregister(silent)
                continue
            lost = message.decode() or peers[silent]
            _send([other for other in peers if other is not silent], lost.encode())
            end_process(f"error: {lost} no longer answers: start all processes again", BAD_INPUT)


def _send(peers: list[socket.socket], message: bytes) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):
            peer.sendall(message)


def _addresses() -> list[str]:
    """Return the names and addresses by which other hosts may reach this one."""
    found = [os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0], socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_route:
        any_route.connect(("192.0.2.1", 9))  # nothing is sent: it only chooses the address of this host
        found.append(any_route.getsockname()[0])
    return [each for each in found if each]


def _connected(hosts: list[str], port: int) -> socket.socket:
    for host in hosts:
        with contextlib.suppress(OSError):
            peer = socket.create_connection((host.strip("[]"), port), timeout=SILENCE_SECONDS)
            peer.settimeout(None)
            return peer
    raise DexError(f"nobody answers at port {port} of {' or '.join(hosts)}: open the hosts' ports to one another")


def _everywhere(text: str) -> list[str]:
    """Return the texts of all processes, in their order; blanks at their ends are lost."""
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.int32(len(data))).max())
    rows = multihost_utils.process_allgather(np.pad(data, (0, size - len(data)), constant_values=ord(" ")))
    return [row.astype(np.uint8).tobytes().decode().rstrip() for row in rows]


def await_end() -> None:
    """Give the thread that watches the others time to end this process, after an exchange has failed."""
    if jax.process_count() > 1:
        time.sleep(5 * SILENCE_SECONDS)


def keep_stdout() -> None:
    """Leave stdout to Python: what C++ prints there, as Gloo does its ranks, goes to stderr from now on."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)


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
    message = json.loads(_everywhere(json.dumps(message))[0])
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
