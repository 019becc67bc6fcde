"""Two network namespaces on one machine, joined by a line whose messages take as long as one likes, each way.

Needs Linux with namespaces and tun devices, and root or user namespaces; no netem in the kernel. Whoever opens the line
must be in a namespace of its own, so that nothing of the machine's network is touched: run it under `alone()`.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import platform
import select
import shutil
import struct
import subprocess
import threading
import time

from dex_jax.errors import DexError

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
MTU = 65000
"""Bytes of a packet: loopback's are as large, so that a message is as few of them."""

PATIENCE = 10.0
"""Seconds until a process must have its end of the line."""

ADDRESSES = ("10.99.0.1", "10.99.0.2")
"""Of the two ends, and their host names: libraries that look for their own address ask for that of their host."""


def alone() -> list[str]:
    """A prefix that runs a command as root of network namespaces of its own.

    Raises:
      DexError: the machine has none of this.
    """
    if platform.system() != "Linux" or not all(map(shutil.which, ("unshare", "ip"))):
        raise DexError("namespaces and the programs unshare and ip of Linux are needed")
    prefix = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--net"]
    tried = subprocess.run(
        [*prefix, "ip", "tuntap", "add", "dev", "dex", "mode", "tun"], capture_output=True, text=True
    )
    if tried.returncode:
        raise DexError((tried.stderr.strip() or "no namespace with a tun device can be made").splitlines()[-1])
    return prefix


class DelayedLink:
    """The line, as a context; packets go through a thread of this process.

    Args:
      seconds: that each packet takes longer, either way.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._ends = [_tun(f"dex{number}") for number in range(2)]
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def prefix(self, number: int) -> list[str]:
        """What a command is run by to be at that end, 0 or 1; it waits there for `attach`."""
        device, address = f"dex{number}", ADDRESSES[number]
        script = (
            f"until ip addr add {address}/24 dev {device} 2>/dev/null; do sleep 0.02; done; ip link set lo up; "
            f'ip link set {device} mtu {MTU} up; hostname {address}; exec "$@"'
        )
        return ["unshare", "--net", "--uts", "sh", "-c", script, "sh"]

    def attach(self, number: int, pid: int) -> None:
        """Gives a process that was started with `prefix` its end.

        Raises:
          DexError: it has not made its namespace in time.
        """
        deadline = time.monotonic() + PATIENCE
        while os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            if time.monotonic() > deadline:
                raise DexError(f"process {pid} has made no network namespace within {PATIENCE:.0f} s")
            time.sleep(0.02)
        subprocess.run(["ip", "link", "set", f"dex{number}", "netns", str(pid)], check=True)

    def __enter__(self) -> DelayedLink:
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._stopped, b"x")
        self._thread.join()
        for descriptor in (*self._ends, self._stop, self._stopped):
            os.close(descriptor)

    def _carry(self) -> None:
        # All wait equally long, so that they leave in the order in which they came.
        waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        while True:
            left = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select([*self._ends, self._stop], [], [], left)
            if self._stop in ready:
                return
            for end in ready:
                try:
                    packet = os.read(end, MTU + 64)
                except OSError:  # its process has ended, and the device with the namespace
                    return
                waiting.append((time.monotonic() + self.seconds, other[end], packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, end, packet = waiting.popleft()
                with contextlib.suppress(OSError):  # an end that is not up, or gone with its process
                    os.write(end, packet)


def _tun(name: str) -> int:
    """A new device of that name; its packets are read from and written to the descriptor."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor
