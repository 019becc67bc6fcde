"""Flags made of the fields of a study's settings."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Annotated, Any

from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Several = Annotated[int, Meta(ge=2)]
NotNegative = Annotated[int, Meta(ge=0)]


def flag(default: Any, help: str, **how: Any) -> Any:
    """A field that is a flag of its name; `how` it is parsed, by its default unless said."""
    kind = {"action": "store_true"} if default is False else {"type": type(default)}
    return dataclasses.field(default=default, metadata={"help": help} | kind | how)


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
