"""The decode.py program."""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from dex_jax.cli.arguments import method_of, parser, prompts_of
from dex_jax.cli.dry_run import dry_run
from dex_jax.decoding.methods import AR, Method
from dex_jax.decoding.output import Output
from dex_jax.distributed import from_first, is_first, join
from dex_jax.errors import INTERRUPTED, OK, exit_code
from dex_jax.io.whole_files import cache_folder
from dex_jax.language_model import LanguageModel, Outline
from dex_jax.prompts import Prompt

DIFFERENT = 1
"""Exit code when --check finds other tokens than AR's."""


def main(argv: list[str] | None = None) -> int:
    """Runs decode.py with command-line arguments; returns the exit code."""
    args = parser().parse_args(argv)
    return exit_code(lambda: _run(args), stopped="")


def _run(args: argparse.Namespace) -> int:
    method = method_of(args)
    if args.dry_run:
        return dry_run(args, method)
    if args.distributed:
        join()
    prompts = from_first(lambda: prompts_of(args)) if args.distributed else prompts_of(args)
    remember_compilations()
    with _progress() as (on_tensor, status):
        model = _outline(args, method)
        status("compiling")
        compile_seconds = _precompile(model, prompts, method, args)
        status("loading")
        lm = model.load(on_tensor)
        status("reading the prompt")
        updates = _stream(lm, prompts, method, args)
        output = next(updates)
    output, interrupted = _follow(lm, output, updates, prompts, args)
    checks = None
    if args.check and not interrupted:
        checks = _check(lm, output, prompts, args)
    stats = dataclasses.replace(output.stats, compile_seconds=output.stats.compile_seconds + compile_seconds)
    _finish(dataclasses.replace(output, stats=stats), prompts, checks, args)
    if interrupted:
        return INTERRUPTED
    return DIFFERENT if checks and not all(check.is_tie(stats.dtype) for check in checks) else OK


def _outline(args: argparse.Namespace, method: Method) -> Outline:
    from dex_jax.cli.devices import layout_of
    from dex_jax.language_model import outline

    layout, mesh = layout_of(args, method)
    return outline(args.model, args.dtype, layout, mesh)


def _precompile(model: Outline, prompts: list[Prompt], method: Method, args: argparse.Namespace) -> float:
    from dex_jax.decoding.generate import precompile

    return precompile(model, prompts, method=method, **_options(args))


def _stream(lm: LanguageModel, prompts: list[Prompt], method: Method, args: argparse.Namespace) -> Iterator[Output]:
    from dex_jax.decoding.generate import TICKS_PER_CALL, stream

    ticks = TICKS_PER_CALL if args.json else 4
    return stream(lm, prompts, method=method, ticks_per_update=ticks, **_options(args))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "exits", "temperature", "top_k", "top_p", "seed", "num_samples", "stop")
    return {name: getattr(args, name) for name in names} | {"chat": not args.no_chat}


def _follow(
    lm: LanguageModel, output: Output, updates: Iterator[Output], prompts: list[Prompt], args: argparse.Namespace
) -> tuple[Output, bool]:
    """Prints text until the stream ends or the user interrupts it: (last output, whether interrupted)."""
    from dex_jax.cli.display import TextPrinter

    headings = [_heading(prompt) for prompt in _repeated(prompts, args)]
    silent = args.json or not _speaks(args)
    printer = None if silent else TextPrinter(lm.tokenizer, headings, args.color_depth)
    try:
        while True:
            if printer is not None:
                printer.update(output, stops=bool(args.stop))
            following = next(updates, None)
            if following is None:
                return output, False
            output = following
    except KeyboardInterrupt:
        if printer is not None:
            printer.close()
        return output, True


def _check(lm: LanguageModel, output: Output, prompts: list[Prompt], args: argparse.Namespace) -> list[Any]:
    from dex_jax.evaluation.check import compare

    (reference,) = collections.deque(_stream(lm, prompts, AR(), args), maxlen=1)
    return compare(lm, output, reference, args.temperature, args.top_k, args.top_p)


def _finish(output: Output, prompts: list[Prompt], checks: list[Any] | None, args: argparse.Namespace) -> None:
    from dex_jax.cli.display import summary
    from dex_jax.cli.records import json_record

    if not _speaks(args):
        return
    if not args.json:
        print("\n" + summary(output, checks), file=sys.stderr)
        return
    for row, prompt in enumerate(_repeated(prompts, args)):
        seed = None if output.seeds is None else output.seeds[row]
        check = None if checks is None else checks[row]
        print(json.dumps(json_record(row, output, prompt, seed, check), ensure_ascii=False), flush=True)


def _speaks(args: argparse.Namespace) -> bool:
    """Whether this process writes what comes of the prompts: the first of several does."""
    return not args.distributed or is_first()


def _repeated(prompts: list[Prompt], args: argparse.Namespace) -> list[Prompt]:
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def _heading(prompt: Prompt) -> str:
    last = prompt if isinstance(prompt, str) else prompt[-1]
    text = str(last.get("content", "")) if isinstance(last, dict) else str(last)
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:97] + "..."


def remember_compilations() -> None:
    """Keeps compiled programs on disk between runs, unless the user has chosen a place or switched it off."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[[int, int], None], Callable[[str], None]]]:
    """A bar on stderr for loading and compiling, on a terminal only: (on_tensor, status)."""
    if not sys.stderr.isatty():
        yield (lambda done, total: None), (lambda phase: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def on_tensor(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        def status(phase: str) -> None:
            bar.update(task, description=phase, completed=0, total=None)

        yield on_tensor, status
