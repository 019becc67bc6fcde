"""`python -m dex_jax.cli.calibrate`: measures the device at hand for the planner, with this library's programs.

    python -m dex_jax.cli.calibrate --model smollm2-135m --output cpu.json

Nothing else should run meanwhile. --together N starts N processes that measure at the same time, each on its share of
the cores, as N processes of a mesh would run: cores that share memory are slower together than alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dex_jax.cli.common import add_model
from dex_jax.errors import DexError, exit_code
from dex_jax.hardware import read_hardware, write_hardware

ROWS, LONG = (1, 2, 4, 8, 16, 32), 2048

PATIENCE = 600.0
"""Seconds that processes wait for one another."""


class Meeting:
    """Processes that wait for one another before each measurement: none may compile while another measures.

    Args:
      folder: that all of them see.
      number: of this one, from 0.
      count: how many there are.
    """

    def __init__(self, folder: str, number: int, count: int):
        self.folder, self.number, self.count = Path(folder), number, count
        self.times = 0

    def __call__(self) -> None:
        """Returns when all have come as often.

        Raises:
          DexError: one of them does not come any more.
        """
        self.times += 1
        (self.folder / f"{self.times}.{self.number}").touch()
        begin = time.monotonic()
        while not all((self.folder / f"{self.times}.{other}").exists() for other in range(self.count)):
            if time.monotonic() - begin > PATIENCE:
                raise DexError("another of the processes has stopped: measure without --together to see why")
            time.sleep(0.001)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code, 2 for bad input."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.cli.calibrate", description=__doc__.splitlines()[0])
    add_model(p.add_argument)
    p.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="R", help="row counts (%(default)s)")
    p.add_argument("--long", type=int, default=LONG, metavar="S", help="longer cache that is measured (%(default)s)")
    p.add_argument("--memory", type=float, metavar="GB", help="of the device, which is asked unless it is given")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements of each figure (%(default)s)")
    p.add_argument("--least", type=float, default=0.05, metavar="SECONDS", help="of each measurement (%(default)s)")
    p.add_argument("--together", type=int, default=1, metavar="N", help="processes that measure at once (%(default)s)")
    p.add_argument("--meet", nargs=3, help=argparse.SUPPRESS)
    p.add_argument("--output", required=True, metavar="FILE.json", help="for plan --hardware")
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    return exit_code(lambda: _run(args, argv), "Stopped; nothing is written.")


def _run(args: argparse.Namespace, argv: list[str]) -> int:
    if args.together > 1:
        return _together(argv, args.together, args.output)
    from dex_jax.evaluation.planner.calibrate import SHORT, calibrate, summary
    from dex_jax.evaluation.planner.timed_programs import Timer
    from dex_jax.evaluation.planner.workload import config_of
    from dex_jax.language_model import resolve_dtype

    rows = sorted(set(args.rows))
    if rows[0] < 1 or rows[-1] > SHORT or args.repeats < 1 or args.least <= 0 or args.long <= SHORT:
        raise DexError(f"--rows must be 1 to {SHORT}, --repeats at least 1, --least above 0, --long above {SHORT}")
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise DexError(f"--memory must be above 0, not {args.memory:g}")
    timer = Timer(args.repeats, args.least)
    if args.meet:
        timer = timer._replace(meet=Meeting(args.meet[0], int(args.meet[1]), int(args.meet[2])))
    found = calibrate(
        config_of(args.model),
        resolve_dtype(args.dtype),
        rows=rows,
        long=args.long,
        memory=None if args.memory is None else args.memory * 1e9,
        timer=timer,
        notify=lambda line: print(line, file=sys.stderr, flush=True),
    )
    write_hardware(args.output, found)
    print(summary(found))
    return 0


def _together(argv: Sequence[str], count: int, output: str) -> int:
    """N processes on their shares of the cores; what the first one measures is written, with count = N.

    Raises:
      DexError: fewer cores than processes, a system that cannot pin them, or a process that fails.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise DexError("--together needs a system that pins processes to cores, such as Linux: leave it out")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        raise DexError(f"--together {count} needs as many cores, and there are {len(cores)}: ask for fewer")
    size = len(cores) // count
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / f"{i}.json") for i in range(count)]
        started = []
        for i, file in enumerate(files):
            share = set(cores[i * size : (i + 1) * size])
            command = [
                sys.executable,
                "-m",
                "dex_jax.cli.calibrate",
                *argv,
                "--together",
                "1",
                "--output",
                file,
            ]
            command += ["--meet", folder, str(i), str(count)]
            # Children inherit the affinity of the moment they are started in.
            os.sched_setaffinity(0, share)
            quiet: dict[str, Any] = {} if i == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            started.append(subprocess.Popen(command, **quiet))
        os.sched_setaffinity(0, set(cores))
        ended = [process.wait() for process in started]  # all of them, before their folder goes
        if any(ended):
            raise DexError("one of the processes has failed: measure without --together to see why")
        write_hardware(output, dataclasses.replace(read_hardware(files[0]), count=count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
