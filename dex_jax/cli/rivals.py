"""Flags of decode.py for the methods that DEX is compared with."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import dex_jax
from dex_jax.cli.common import Add, whole
from dex_jax.errors import DexError

if TYPE_CHECKING:
    from dex_jax.decoding.methods import Method

RIVALS: dict[str, tuple[str, dict[str, str]]] = {
    "layerskip": ("LayerSkip", {"exit_depth": "exit", "draft_length": "draft_length"}),
    "adadecode": (
        "AdaDecode",
        {"explorers": "explorers", "depths": "depths", "threshold": "threshold", "draft_length": "draft_length"},
    ),
    "del": ("DEL", {"explorers": "explorers", "depths": "depths", "draft_length": "draft_length"}),
    "dex-single-exit": ("DexSingleExit", {"explorers": "explorers", "depths": "depths"}),
    "oracle": ("Oracle", {"explorers": "explorers", "depths": "depths"}),
}
"""Name -> (the method's name in dex_jax, flag -> field)."""

METHOD_HELP = """dex; ar: all layers for every token; layerskip: drafts at one exit; adadecode: every token exits
where an exit is sure; del: layerskip that chooses exit and draft length; dex-single-exit: DEX whose first exit alone
proposes; oracle: no decoder but a bound without DECS (%(default)s)"""


def add_rival_flags(add: Add) -> None:
    """Adds the flags that only rivals have."""
    add("--exit-depth", type=whole(1, 10_000), metavar="D", help="layerskip: layers that draft (12)")
    add(
        "--draft-length",
        type=whole(1, 1024),
        metavar="G",
        help="layerskip: tokens drafted a round (4); adadecode, del: at most (8)",
    )
    add("--threshold", type=float, metavar="P", help="adadecode: how sure an exit must be (0.75)")


def check_rival_flags(args: argparse.Namespace) -> None:
    """Whether --method has the flags that are given, of those that not all methods have.

    Raises:
      DexError: it has not.
    """
    rival, (_, fields) = args.method in RIVALS, RIVALS.get(args.method, ("", {}))
    alien = [name for name in ("explorers", "depths") if rival and name not in fields]
    alien += [name for name in ("exit_depth", "draft_length", "threshold") if name not in fields]
    given = [name for name in alien if getattr(args, name) is not None]
    if rival:
        given += [name for name, usual in (("rows", None), ("no_draft", False)) if getattr(args, name) != usual]
        given += ["no_decs"] if args.no_decs else []
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise DexError(f"{flag} means nothing with --method {args.method}: leave one of them out")


def rival_of(args: argparse.Namespace) -> Method | None:
    """The rival that --method names, None for dex and ar."""
    if args.method not in RIVALS:
        return None
    name, fields = RIVALS[args.method]
    set_flags = {field: getattr(args, flag) for flag, field in fields.items() if getattr(args, flag) is not None}
    return getattr(dex_jax, name)(**set_flags)
