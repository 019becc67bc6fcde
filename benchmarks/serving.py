"""What processes share that answer lines on stdin with lines on stdout.

They run in Pythons of their own, so only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def arguments(doc: str, **serve: Any) -> argparse.Namespace:
    """Reads --threads and --serve, whose kind `serve` tells add_argument; the first line of `doc` is shown."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--threads", type=int, default=cores, help="(all cores there are, %(default)s)")
    parser.add_argument("--serve", required=True, help="answer lines on stdin with lines", **serve)
    return parser.parse_args()


def serve(about: dict[str, Any], answer: Callable[..., dict[str, Any]]) -> None:
    """Says what answers, then one JSON line for each line {"new_tokens": N, "ids": [..]}: answer(new_tokens=, ids=)."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        try:
            found = answer(**json.loads(line))
        except (ValueError, TypeError) as error:
            found = {"error": f"{line.strip()[:80]}: {error}"}
        print(json.dumps(found), flush=True)
