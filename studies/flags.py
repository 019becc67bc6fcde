"""The flags of a program, made of the fields of its settings."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from dex_jax.language_model import DTYPES


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


def names(text: str) -> tuple[str, ...]:
    """A list of different names with commas between; "none" for no name."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    return () if found == ("none",) else tuple(dict.fromkeys(found))
