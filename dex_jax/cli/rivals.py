"""Flags of decode.py for the methods that DEX is compared with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dex_jax.decoding.adadecode import AdaDecode
from dex_jax.decoding.dynamic_exit import DEL
from dex_jax.decoding.layerskip import LayerSkip
from dex_jax.decoding.methods import Method
from dex_jax.decoding.oracle import Oracle
from dex_jax.decoding.single_exit import DexSingleExit
from dex_jax.errors import DexError

RIVALS: dict[str, tuple[Callable[..., Method], dict[str, str]]] = {
    "layerskip": (LayerSkip, {"exit_depth": "exit", "draft_length": "draft_length"}),
    "adadecode": (
        AdaDecode,
        {"explorers": "explorers", "depths": "depths", "threshold": "threshold", "draft_length": "draft_length"},
    ),
    "del": (DEL, {"explorers": "explorers", "depths": "depths", "draft_length": "draft_length"}),
    "dex-single-exit": (DexSingleExit, {"explorers": "explorers", "depths": "depths"}),
    "oracle": (Oracle, {"explorers": "explorers", "depths": "depths"}),
}
"""Name -> (method, flag -> field)."""

METHOD_HELP = """dex; ar: all layers for every token; layerskip: drafts at one exit; adadecode: every token exits
where an exit is sure; del: layerskip that chooses exit and draft length; dex-single-exit: DEX whose first exit alone
proposes; oracle: no decoder but a bound without DECS (%(default)s)"""


def add_rival_flags(add: Callable[..., Any]) -> None:
    """Adds the flags that only rivals have; `add` is a parser's or a group's add_argument."""
    add("--exit-depth", type=int, metavar="D", help="layerskip: layers that draft (12)")
    add(
        "--draft-length",
        type=int,
        metavar="G",
        help="layerskip: tokens drafted a round (4); adadecode, del: at most (8)",
    )
    add("--threshold", type=float, metavar="P", help="adadecode: how sure an exit must be (0.75)")


def rival_of(args: argparse.Namespace) -> Method | None:
    """The rival that --method names, None for dex and ar.

    Raises:
      DexError: flags that the method does not have.
    """
    make, fields = RIVALS.get(args.method, (None, {}))
    alien = [] if make is None else [name for name in ("explorers", "depths") if name not in fields]
    alien += [name for name in ("exit_depth", "draft_length", "threshold") if name not in fields]
    given = [name for name in alien if getattr(args, name) is not None]
    if make is not None:
        given += [name for name, usual in (("rows", None), ("schedule", "auto")) if getattr(args, name) != usual]
        given += ["no_decs"] if args.no_decs else []
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise DexError(f"{flag} means nothing with --method {args.method}: leave one of them out")
    if make is None:
        return None
    set_flags = {field: getattr(args, name) for name, field in fields.items() if getattr(args, name) is not None}
    return make(**set_flags)
