"""The reading of files and metadata that others wrote, through types with bounds; errors become one sentence."""

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
    """Turn all that reading a foreign `source` raises, but Ctrl-C, into a DexError with `advice`."""
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
    """Return `value`, of dictionaries, lists and scalars, as a `kind`, such as a msgspec.Struct; ignore unknown keys.

    Raise DexError, which names `source` and the key, where one is missing, of another type or out of bounds.
    """
    with reading(source, advice):
        return msgspec.convert(value, kind)


def check_fields(settings: Any) -> None:
    """Check each field of a dataclass against its type and bounds; raise DexError for the first that will not do."""
    for name, kind in get_type_hints(type(settings), include_extras=True).items():
        value = getattr(settings, name)
        typed(value, kind, f"{name} = {value!r}", "give another value")


def parsed(text: str | bytes, kind: type[T], source: object, advice: str = "get it again") -> T:
    """Parse JSON as a `kind`, see `typed`; raise DexError too if it is no JSON."""
    # msgspec's parser refuses NaN and Infinity, which Python programs write, perhaps where nobody looks.
    with reading(source, advice):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DexError(f"{source} is no JSON ({reason(error)}): {advice}.") from error
    return typed(value, kind, source, advice)


def refuse(source: object, *reasons: tuple[object, str]) -> None:
    """Raise DexError for the first of the reasons, (condition, what it says of `source`), with a true condition."""
    for holds, said in reasons:
        if holds:
            raise DexError(f"{source} {said}.")


def local_path(path: str | os.PathLike) -> Path:
    """Expand ~ and ~user in a path; raise DexError if there is no such user, or no home directory."""
    with reading(path, "write the whole path"):
        return Path(path).expanduser()
