"""What the programs of studies share: flags made of the fields of their settings, and what they say at the end."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from dex_jax.errors import exit_code
from dex_jax.language_model import DTYPES

Count = Annotated[int, Meta(ge=1)]
Several = Annotated[int, Meta(ge=2)]
NotNegative = Annotated[int, Meta(ge=0)]


def flag(default: Any, help: str, **how: Any) -> Any:
    """A field that is a flag of its name; `how` it is parsed, by its default unless said."""
    kind = {"action": "store_true"} if default is False else {"type": type(default)}
    return dataclasses.field(default=default, metadata={"help": help} | kind | how)


def model_flag() -> Any:
    """The field of --model."""
    return flag("smollm2-135m", "alias, Hugging Face directory, hub id or .gguf file")


def dtype_flag(help: str = "float32 on CPUs, bfloat16 on GPUs and TPUs unless given") -> Any:
    """The field of a flag that names a dtype, None unless given."""
    return flag(None, help, type=str, choices=DTYPES)


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Adds a flag for each field of the dataclass `settings`, and a required --output for a field of that name."""
    for field in dataclasses.fields(settings):
        name = f"--{field.name.replace('_', '-')}"
        if field.name == "output":
            parser.add_argument(name, required=True, metavar="DIR", help="folder of the results")
            continue
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        how = dict(field.metadata)
        how["help"] += "" if default in (None, False, "") else f" ({default})"
        parser.add_argument(name, default=field.default, **how)


def run_study(argv: Sequence[str] | None, package: str, about: str, settings: type, run: Callable[[Any], int]) -> int:
    """Runs `python -m package`, whose flags are the fields of its settings; the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=about.splitlines()[0])
    add_flags(parser, settings)
    given = vars(parser.parse_args(argv))
    return exit_code(lambda: run(settings(**given)), "Stopped. The same command goes on from here.")


def run_report(argv: Sequence[str] | None, package: str, about: str, run: Callable[[str, bool], int]) -> int:
    """Runs `python -m package FOLDER`, told the folder and whether to draw; the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=about.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="of the results")
    parser.add_argument("--no-plots", action="store_true", help="no PNG files, and no need of matplotlib")
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args.folder, not args.no_plots))


def tell(files: Sequence[Path], wrong: Sequence[str]) -> int:
    """Prints a summary, and says on stderr what was written and what is wrong; the exit code, 1 if anything is."""
    print(files[0].read_text(encoding="utf-8"))
    print("written: " + ", ".join(map(str, files)), file=sys.stderr)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return 1 if wrong else 0


def names(text: str) -> tuple[str, ...]:
    """A list of different names with commas between; "none" for no name."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    return () if found == ("none",) else tuple(dict.fromkeys(found))
