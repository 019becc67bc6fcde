"""The parts that the command-line programs share: choices and types of flags, and the names of programs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
"""The choices of --dtype: those of language_model.DTYPES, which would import JAX."""

WEIGHTS = ("stored", "int8", "dense")
"""The choices of --weights: those of language_model.WEIGHTS."""

WEIGHTS_HELP = """stored: blocks of a .gguf file stay packed, the same numbers as dense ones; int8: 8 bits each, another
model than the checkpoint; dense: in --dtype (stored on CPUs where a C++ compiler is, else dense)"""

INSTALLED = {"decode.py": "dex-decode", "train_exits.py": "dex-train-exits"}
"""The command that the package installs for each script of a clone."""

DEFAULT_MODEL = "smollm2-135m"

Add = Callable[..., Any]
"""`add_argument` of a parser or of a group."""


def program(script: str) -> str:
    """Return the name of a program: its script, or its installed command where an installed command is running."""
    return INSTALLED[script] if Path(sys.argv[0]).stem in INSTALLED.values() else script


def add_model(add: Add) -> None:
    """Add --model, --dtype and --weights."""
    add("--model", default=DEFAULT_MODEL, help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--dtype", choices=DTYPES, help="float32 on CPUs, bfloat16 on GPUs and TPUs unless given")
    add("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """Return the parser of a flag that takes a whole number from `lowest` to `highest`."""

    def read(text: str) -> int:
        with_digits = text.removeprefix("-").isdecimal() and len(text) < 30
        if not with_digits or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} to {highest}")
        return int(text)

    return read


def depths(text: str) -> tuple[int, ...]:
    """Parse whole numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 6,12,30") from None
