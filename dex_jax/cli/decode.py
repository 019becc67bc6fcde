"""The decode.py program."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import gc
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dex_jax.cli.arguments import check_flags, method_of, options_of, parser, prompts_of
from dex_jax.decoding.request import AR, Dex
from dex_jax.interrupts import INTERRUPTED, OK, exit_code, gently
from dex_jax.progress import notify, phases

if TYPE_CHECKING:
    from dex_jax.decoding.check import Check
    from dex_jax.decoding.output import Output
    from dex_jax.io.prompts import Prompt
    from dex_jax.language_model import LanguageModel

DIFFERENT = 1
"""The exit code when --check finds other tokens than AR's."""


def main(argv: list[str] | None = None) -> int:
    """Run decode.py with command-line arguments and return the exit code."""
    args = parser().parse_args(argv)
    return exit_code(lambda: _run(args), stopped="")


def _run(args: argparse.Namespace) -> int:
    check_flags(args)
    # Errors in prompts are found before JAX is imported, which takes seconds.
    prompts = [] if args.distributed or args.dry_run else prompts_of(args)
    with phases() as display:
        notify("importing JAX")
        method = method_of(args)
        if args.dry_run:
            from dex_jax.cli.devices import dry_run

            return dry_run(args, method)
        if args.distributed:
            from dex_jax.distributed import from_first, join, keep_stdout

            keep_stdout()
            join()
            prompts = from_first(lambda: prompts_of(args))
        notify("opening the model")

        from dex_jax.cli.devices import batches_of, layout_of
        from dex_jax.decoding.dex.drafters import draft_model
        from dex_jax.decoding.generate import precompile
        from dex_jax.decoding.plan import opened
        from dex_jax.language_model import outline

        # Imported objects stay: if the collector went through them while programs compile, it would take half a second.
        gc.freeze()
        args.exits = opened(args.exits)
        model = outline(args.model, args.dtype, *layout_of(args, method), args.weights)
        options = options_of(args)
        if args.draft_model is not None:
            small = outline(args.draft_model, args.dtype, weights=args.weights)
            draft_model(model, small)  # before its weights are read
            options["draft_model"] = small.load(display.part)
        batches = batches_of(prompts, args)
        compile_seconds = sum(precompile(model, batch, method=method, **options) for batch in batches)
        lm = model.load(display.part)
    codes, told = [], 0
    for batch in batches:
        codes.append(_answer(lm, batch, told, method, args, options, compile_seconds))
        compile_seconds, told = 0.0, told + len(batch)
        if codes[-1] == INTERRUPTED:
            break
    if args.player is not None and codes[-1] != INTERRUPTED:
        _play(lm, prompts[0], method, args, options)
    return max(codes)


def _play(
    lm: LanguageModel, prompt: Prompt, method: AR | Dex, args: argparse.Namespace, options: dict[str, Any]
) -> None:
    """Decode the prompt once more, tick by tick, and write the page that plays it.

    Where no method was requested, one explorer with drafts ran; five without drafts are played, as they show more.
    """
    from dex_jax.decoding.trace import trace
    from dex_jax.plot import player

    with phases():
        notify(f"tracing a decode for {args.player}")
        kept = {name: value for name, value in options.items() if name not in ("num_samples", "stop")}
        asked = method != Dex() or args.exits != "default" or args.draft_model is not None
        page = player(trace(lm, prompt, method=method if asked else None, **kept))
    page.save(args.player)
    print(f"{args.player} plays the decode: open it in a browser", file=sys.stderr)


def _answer(
    lm: LanguageModel,
    prompts: list[Prompt],
    told: int,
    method: AR | Dex,
    args: argparse.Namespace,
    options: dict[str, Any],
    compile_seconds: float,
) -> int:
    """Decode and print one batch, after `told` prompts of earlier ones, and return the exit code."""
    options = options | {"seed": options["seed"] + told * args.num_samples}
    with phases():
        updates = _stream(lm, prompts, method, args.json, options)
        output = next(updates)
    output, interrupted = _follow(lm, output, updates, prompts, told, args)
    checks = None
    if args.check and not interrupted:
        with phases():
            notify("decoding with plain AR, to compare")
            checks = _check(lm, output, prompts, args, options)
    stats = dataclasses.replace(output.stats, compile_seconds=output.stats.compile_seconds + compile_seconds)
    _finish(dataclasses.replace(output, stats=stats), prompts, checks, args)
    if interrupted:
        return INTERRUPTED
    return DIFFERENT if checks and not all(check.is_tie(stats.dtype) for check in checks) else OK


def _stream(
    lm: LanguageModel, prompts: list[Prompt], method: AR | Dex, at_once: bool, options: dict[str, Any]
) -> Iterator[Output]:
    from dex_jax.decoding.generate import TICKS_PER_CALL, stream

    return stream(lm, prompts, method=method, ticks_per_update=TICKS_PER_CALL if at_once else None, **options)


def _follow(
    lm: LanguageModel,
    output: Output,
    updates: Iterator[Output],
    prompts: list[Prompt],
    told: int,
    args: argparse.Namespace,
) -> tuple[Output, bool]:
    """Print text until the stream ends or the user interrupts it; return (last output, whether interrupted)."""
    from dex_jax.cli.display import TextPrinter

    headings = [_heading(prompt) for prompt in _repeated(prompts, args)]
    silent = args.json or not _speaks(args)
    printer = None if silent else TextPrinter(lm.tokenizer, headings, args.color_depth, told * args.num_samples)
    with gently() as stopped:
        while True:
            if printer is not None:
                printer.update(output, stops=bool(args.stop))
            following = None if stopped() else next(updates, None)
            if following is None:
                break
            output = following
    interrupted = not output.finished.all()
    if interrupted and printer is not None:
        printer.close()
    return output, interrupted


def _check(
    lm: LanguageModel, output: Output, prompts: list[Prompt], args: argparse.Namespace, options: dict[str, Any]
) -> list[Check]:
    from dex_jax.decoding.check import compare

    (reference,) = collections.deque(_stream(lm, prompts, AR(), args.json, options), maxlen=1)
    return compare(lm, output, reference, args.temperature, args.top_k, args.top_p)


def _finish(output: Output, prompts: list[Prompt], checks: list[Check] | None, args: argparse.Namespace) -> None:
    from dex_jax.cli.display import show
    from dex_jax.cli.records import json_record

    if not _speaks(args):
        return
    if not args.json:
        show(output, checks, colors=args.color_depth)
        return
    for row, prompt in enumerate(_repeated(prompts, args)):
        seed = None if output.seeds is None else output.seeds[row]
        check = None if checks is None else checks[row]
        print(json.dumps(json_record(row, output, prompt, seed, check), ensure_ascii=False), flush=True)


def _speaks(args: argparse.Namespace) -> bool:
    """Return whether this process writes the results: the only one, or the first of several."""
    if not args.distributed:
        return True
    from dex_jax.distributed import is_first

    return is_first()


def _repeated(prompts: list[Prompt], args: argparse.Namespace) -> list[Prompt]:
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def _heading(prompt: Prompt) -> str:
    last = prompt if isinstance(prompt, str) else prompt[-1]
    text = str(last.get("content", "")) if isinstance(last, dict) else str(last)
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."
