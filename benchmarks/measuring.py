"""The parts that the benchmarks share: flags, prompts, measures in turns, quartiles, the machine, saved figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dex_jax.errors import DexError
from dex_jax.interrupts import exit_code
from dex_jax.io.whole_files import write_json

HELP = {
    "data": "files of prompts",
    "prompts": "prompts of each file, evenly spread",
    "rounds": "measurements of each, in turns",
    "max_new_tokens": "tokens of each answer",
    "exits": "default, shared, or a folder or file of exits",
}


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with --model, --output, and those flags of HELP that have a default here."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--output", help="keep figures in OUTPUT.json and tables in OUTPUT.md")
    for name, default in defaults.items():
        kind: dict[str, Any] = {"nargs": "+", "default": []} if name == "data" else {"type": type(default)}
        parser.add_argument(
            f"--{name.replace('_', '-')}", **{"default": default} | kind, help=f"{HELP[name]} (%(default)s)"
        )
    return parser


def main(run: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> NoReturn:
    """Run a benchmark with command-line arguments, and exit."""
    args = parser.parse_args()
    sys.exit(exit_code(lambda: run(args) or 0, "Stopped. The same command goes on from here."))


def read_ids(lm: Any, files: Sequence[str], count: int) -> dict[str, list[int]]:
    """Return token ids by the name of their prompt: `count` prompts of each file, at even distances."""
    from dex_jax.prompt_files import read_prompts

    found: dict[str, list[int]] = {}
    chat = lm.tokenizer.has_chat_template
    for path in files:
        prompts = read_prompts(path)
        for at in sorted({each * len(prompts) // count for each in range(count)}):
            found[f"{Path(path).name.split('.')[0]} {at + 1}"] = lm.encode(prompts[at], chat=chat)
    return found


def in_turns(measures: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Return the median of each measure; every round takes all of them, so that they see the same machine.

    A first round, which compiles, is thrown away. Every other round goes backwards: no measure always follows the same.
    """
    found: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(-1, rounds):
        for name in list(measures)[:: 1 if number % 2 == 0 else -1]:
            value = measures[name]()
            if number >= 0:
                found[name].append(value)
    return {name: np.median(values, axis=0).tolist() for name, values in found.items()}


def quartiles(values: Iterable[float], digits: int = 2) -> str:
    """Format the median and the quartiles as "1.52 (1.31 - 1.79)"."""
    low, middle, high = np.percentile(list(values), [25, 50, 75])
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def machine(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the settings and the machine: device, processor, cores, versions, language of few-row products."""
    import jax

    from dex_jax.nn import few_rows

    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    about = {"device": jax.devices()[0].device_kind, "processor": processor or platform.processor()}
    about |= {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
    about |= {"jax": jax.__version__, "python": platform.python_version(), "few_rows": few_rows.language()}
    settings = {name: value for name, value in vars(args).items() if name != "output" and not name.endswith("_python")}
    for name in settings.keys() & {"model", "text"}:
        settings[name] = Path(settings[name]).name
    settings |= {"data": [Path(path).name for path in settings.get("data", ())]}
    return about | settings | more


class Figures:
    """The figures by name in OUTPUT.json, written as they come, so that a stopped benchmark goes on.

    `about` holds the settings and the machine. Raise DexError where the file holds figures of others.
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

    def each(self, wanted: Mapping[str, Any], measure: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the figures of what is wanted by name, measured unless they are there; print new ones on stderr."""
        for name, given in wanted.items():
            if name not in self.runs:
                self.runs[name] = measure(given)
                print(name, json.dumps(self.runs[name]), file=sys.stderr, flush=True)
                if self.output is not None:
                    write_json(f"{self.output}.json", {"about": self.about, "runs": self.runs})
        return {name: self.runs[name] for name in wanted}

    def publish(self, *parts: str) -> None:
        """Print a page of these parts and write it to OUTPUT.md."""
        about = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.about.items() if value)
        text = "\n\n".join([*parts, f"{about}."]) + "\n"
        print(text)
        if self.output is not None:
            Path(f"{self.output}.md").write_text(text, encoding="utf-8")
