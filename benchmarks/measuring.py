"""What the benchmarks share: flags, prompts, measures in turns, quartiles, the machine, and figures that are kept."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.cli.common import WEIGHTS
from dex_jax.errors import DexError
from dex_jax.io.whole_files import write_json


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with --model, --output, and of the flags below those that have a default here.

    Args:
      doc: the benchmark's docstring, whose first line is shown.
      defaults: of `data`, `prompts`, `rounds`, `max_new_tokens`, `weights`, `exits`, `llama_python` and
        `transformers_python`.
    """
    shared: dict[str, dict[str, Any]] = {
        "data": {"nargs": "+", "metavar": "FILE", "help": "prompts, one file or more"},
        "prompts": {"type": int, "metavar": "N", "help": "of each file, evenly spread (%(default)s)"},
        "rounds": {"type": int, "metavar": "N", "help": "measurements of each, in turns (%(default)s)"},
        "max_new_tokens": {"type": int, "metavar": "N", "help": "of each answer (%(default)s)"},
        "weights": {"choices": WEIGHTS, "help": "what weights are kept as: as dex_jax.load chooses unless given"},
        "exits": {"help": "default, shared, or a folder or file of exits (%(default)s)"},
        "llama_python": {"metavar": "PYTHON", "help": "compare with this Python's llama-cpp-python"},
        "transformers_python": {"metavar": "PYTHON", "help": "compare with this Python's transformers on torch"},
    }
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, required=name == "data", **shared[name])
    parser.add_argument("--output", help="keep figures in OUTPUT.json and tables in OUTPUT.md")
    return parser


def read_ids(lm: Any, files: Sequence[str], count: int) -> dict[str, list[int]]:
    """Name of a prompt -> its token ids: `count` prompts evenly spread over each file."""
    from dex_jax.prompt_files import read_prompts

    found, chat = {}, lm.tokenizer.has_chat_template
    for path in files:
        prompts = read_prompts(path)
        chosen = range(len(prompts)) if count >= len(prompts) else [at * len(prompts) // count for at in range(count)]
        name = Path(path).name.split(".")[0]
        found |= {f"{name} {at + 1}": lm.encode(prompts[at], chat=chat) for at in chosen}
    return found


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measure gives, one after the other in every round, so that all see the same machine.

    Args:
      measures: name -> what measures once, in seconds.
      rounds: how many values of each are kept; a first round, which compiles, is thrown away.
    """
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(-1, rounds):
        # Every other round goes backwards: nobody always follows the same neighbour.
        for name in list(measures)[:: 1 if number % 2 == 0 else -1]:
            value = measures[name]()
            if number >= 0:
                found[name].append(value)
    return found


def quartiles(values: Iterable[float], digits: int = 2) -> str:
    """The median and the quartiles, as "1.52 (1.31 - 1.79)"."""
    low, middle, high = np.percentile(list(values), [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def machine(**more: Any) -> dict[str, Any]:
    """Where and with what figures are made: device, cores, processor, versions, the language of few-row products."""
    import jax

    from dex_jax.nn import few_rows

    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "few_rows": few_rows.language(),
    } | more


def machine_line(about: Mapping[str, Any]) -> str:
    """`machine` in one line of a page."""
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items() if value) + "."


class Figures:
    """Figures by name in OUTPUT.json, written as they come: a benchmark that was stopped goes on.

    Args:
      output: path without its ending; None keeps nothing.
      about: settings and machine, which must be those of a file that is there.

    Attributes:
      runs: name -> figures.

    Raises:
      DexError: the file holds figures of other settings.
    """

    def __init__(self, output: str | None, about: Mapping[str, Any]):
        self.output, self.about = output, json.loads(json.dumps(about))
        self.runs: dict[str, Any] = {}
        file = Path(f"{output}.json")
        if output is not None and file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["about"] != self.about:
                raise DexError(f"{file} holds figures of {kept['about']}: name another --output")
            self.runs = kept["runs"]

    def add(self, name: str, run: Any) -> None:
        """Keeps the figures `run`, and says them on stderr."""
        self.runs[name] = run
        print(name, json.dumps(run), file=sys.stderr, flush=True)
        if self.output is not None:
            write_json(f"{self.output}.json", {"about": self.about, "runs": self.runs})

    def publish(self, *parts: str) -> None:
        """Prints a page of these parts and writes OUTPUT.md."""
        text = "\n\n".join([*parts, machine_line(self.about)]) + "\n"
        print(text)
        if self.output is not None:
            Path(f"{self.output}.md").write_text(text, encoding="utf-8")
