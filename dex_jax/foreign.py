"""Read what others wrote, files and metadata, through types with bounds; what goes wrong becomes one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec

from dex_jax.errors import DexError

T = TypeVar("T")


@contextmanager
def reading(source: object, advice: str = "get it again") -> Iterator[None]:
    """While a foreign thing, `source`, is read: all that it raises but Ctrl-C becomes a DexError, with `advice`."""
    try:
        yield
    except DexError as error:
        if str(source) in str(error):
            raise
        raise DexError(f"{source}: {error}") from error
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).partition(" - at `$")
        at = f" at {place.strip('.`')}" if place else ""
        raise DexError(f"{source} is not as it should be{at} ({wrong.replace('`', '')}): {advice}.") from error
    except OSError as error:
        raise DexError(f"{source} cannot be read ({error.strerror or reason(error)}).") from error
    except BaseException as error:
        # A panic of a library written in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DexError(f"{source} is damaged, or of a kind that is not known ({reason(error)}): {advice}.") from error


def reason(error: BaseException) -> str:
    """Return what an error of another library says, on one line of at most 300 characters."""
    said = " ".join(str(error).split())
    named = type(error).__name__ if not said or isinstance(error, KeyError) else ""
    return f"{named} {said}".strip()[:300]


def typed(value: Any, kind: type[T], source: object, advice: str = "get it again") -> T:
    """`value`, of dictionaries, lists and scalars, as a `kind`, a msgspec.Struct for one; it passes over unknown keys.

    A DexError names `source` and the key that is missing, of another type or out of bounds.
    """
    with reading(source, advice):
        return msgspec.convert(value, kind)


def check_fields(settings: Any) -> None:
    """Checks each field of a dataclass against its type and bounds; a DexError names the first that will not do."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        typed(value, kind, f"{name} = {value!r}", "give another value")


def parsed(text: str | bytes, kind: type[T], source: object, advice: str = "get it again") -> T:
    """JSON as a `kind`, see `typed`; a DexError too if it is no JSON."""
    # Not by msgspec: Python programs write NaN and Infinity, which may stand where nobody looks.
    with reading(source, advice):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DexError(f"{source} is no JSON ({reason(error)}): {advice}.") from error
    return typed(value, kind, source, advice)


def refuse(source: object, *reasons: tuple[object, str]) -> None:
    """A DexError where one of the reasons, (whether it holds, what it says of `source`), holds; the first is told."""
    for holds, said in reasons:
        if holds:
            raise DexError(f"{source} {said}.")


def local_path(path: str | os.PathLike) -> Path:
    """A path with ~ and ~user put in; a DexError if there is no such user, or no home directory."""
    with reading(path, "write the whole path"):
        return Path(path).expanduser()
