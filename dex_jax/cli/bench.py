"""`python -m dex_jax.cli.bench`: methods against one another on tasks, into a folder that a person can read.

Counts come from batches, seconds from one sequence at a time with methods taking turns (A B B A). The settings of
static rivals are chosen on other prompts than those reported. The folder holds results.jsonl (one line a run),
summary.md and plots; the same command goes on where it was stopped. docs/howto_compare.md says what is measured how.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dex_jax.cli.common import add_model, depths, names, remember_compilations
from dex_jax.errors import DexError, exit_code
from dex_jax.progress import phases

if TYPE_CHECKING:
    from dex_jax.evaluation.bench.bench import Case
    from dex_jax.language_model import LanguageModel

METHODS = "ar, dex, dex_serial, dex_auto, dex_no_decs, dex_single_exit, layerskip, adadecode, del, oracle"
"""As of evaluation.bench.contenders, which would import JAX."""

DEFAULT_METHODS = "ar,dex,layerskip,adadecode,del"
DEFAULT_TIMED = "ar,dex_serial,layerskip"
DEFAULT_TASKS = "gsm8k,humaneval,spec_bench"


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    p = argparse.ArgumentParser(prog="python -m dex_jax.cli.bench", description=__doc__.splitlines()[0])
    add = p.add_argument_group("what runs").add_argument
    add_model(add)
    add("--exits", default="default", help='folder, file, "default" or "shared" (%(default)s)')
    add("--drafter", default="default", help='of serial rounds: folder, file, "default" or "shared" (%(default)s)')
    add(
        "--methods",
        type=_methods,
        default=names(DEFAULT_METHODS),
        metavar="NAME,...",
        help=f"methods to count, of {METHODS} ({DEFAULT_METHODS})",
    )
    add(
        "--timed",
        type=_methods,
        default=names(DEFAULT_TIMED),
        metavar="NAME,...",
        help=f"methods whose seconds are measured, or none ({DEFAULT_TIMED})",
    )
    add("--explorers", type=int, default=5, metavar="K", help="of DEX and AdaDecode (%(default)s)")
    add("--by-explorers", type=depths, default=(), metavar="K,...", help="also count DEX with these K (none)")
    add = p.add_argument_group("on what").add_argument
    add(
        "--tasks",
        type=names,
        default=names(DEFAULT_TASKS),
        metavar="NAME,...",
        help=f"of gsm8k, humaneval, spec_bench, xsum, mt_bench, hellaswag, mmlu, prompts:FILE ({DEFAULT_TASKS})",
    )
    add("--data", metavar="DIR", help="folder with a folder for each task; without it tasks come from the hub")
    add("--prompts", type=int, default=20, metavar="N", help="of each task, evenly spread (%(default)s)")
    add("--tune-prompts", type=int, default=4, metavar="N", help="further ones to choose settings on (%(default)s)")
    add("--longest-prompt", type=int, default=1024, metavar="N", help="longer ones, in tokens, are left out")
    add("--no-chat", action="store_true", help="use prompts as they are, without the chat template")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of each answer (%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    add("--seed", type=int, default=0, help="of sampling; each prompt has its own (%(default)s)")
    add = p.add_argument_group("how").add_argument
    add("--batch", type=int, default=8, metavar="B", help="sequences at a time where only counts matter (%(default)s)")
    add("--rounds", type=int, default=2, metavar="R", help="timed runs of every method and prompt; 2 is A B B A")
    add(
        "--exit-depths", type=depths, default=(), metavar="D,...", help="of the sweeps (up to four among the shallower)"
    )
    add("--draft-lengths", type=depths, default=(1, 2, 3, 5), metavar="G,...", help="LayerSkip's sweep (1,2,3,5)")
    add("--thresholds", type=_shares, default=(0.2, 0.4, 0.6), metavar="P,...", help="AdaDecode's (0.2,0.4,0.6)")
    add("--timed-settings", type=int, default=3, metavar="N", help="best counted settings that are also timed")
    add("--output", required=True, metavar="DIR", help="folder of the results")
    add("--no-plots", action="store_true", help="no PNG files, and no need of matplotlib")
    return p


def _methods(text: str) -> tuple[str, ...]:
    # decode.py spells them with hyphens.
    return names(text.replace("-", "_"))


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where tokens are not AR's, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args), "Stopped. The same command goes on from here.")


def run(args: argparse.Namespace) -> int:
    """Measures and writes, as the flags say; the exit code."""
    from dex_jax.evaluation.bench import report
    from dex_jax.evaluation.bench.bench import Bench
    from dex_jax.evaluation.bench.contenders import check_names
    from dex_jax.evaluation.bench.plan import Plan, Settings
    from dex_jax.evaluation.bench.results import Results
    from dex_jax.evaluation.bench.tasks import read_task
    from dex_jax.language_model import load
    from dex_jax.progress import Display

    check(args)
    check_names((*args.methods, *args.timed))
    asked = {task: read_task(task, args.data) for task in args.tasks}
    called = [items[0].task for items in asked.values()]
    if len(set(called)) < len(called):
        raise DexError(f"two of the tasks are called {max(called, key=called.count)}: give their files other names")
    remember_compilations()
    with phases():
        lm = load(args.model, args.dtype)
    cases, left_out = choose_cases(lm, asked, args)
    display = Display()
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    plan = Plan(lm, settings, display)
    results = Results(args.output, study_of(lm, args, cases, left_out) | plan.about())
    try:
        bench = Bench(lm, results, cases, plan, display)
        bench.count()
        bench.time()
    finally:
        display.close()
        results.close()
    files = report.write(args.output, plots=not args.no_plots)
    print((results.folder / report.SUMMARY).read_text(encoding="utf-8"))
    print("written: " + ", ".join(str(file) for file in files), file=sys.stderr)
    wrong = report.mismatches(results.runs)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> None:
    """Refuses flags that make no sense.

    Raises:
      DexError: naming the first of them.
    """
    for name in ("explorers", "prompts", "longest_prompt", "max_new_tokens", "batch", "timed_settings"):
        if getattr(args, name) < 1:
            raise DexError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    for name in ("rounds", "tune_prompts"):
        if getattr(args, name) < 0:
            raise DexError(f"--{name.replace('_', '-')} must be at least 0, not {getattr(args, name)}")
    if args.max_new_tokens < 2:
        raise DexError("--max-new-tokens must be at least 2: the first token comes of the prompt alone")
    if not args.tasks or not args.methods:
        raise DexError("--tasks and --methods must each name at least one")
    from dex_jax.evaluation.bench.contenders import SWEPT

    for name in (*args.methods, *args.timed):
        if name in SWEPT and args.tune_prompts < 1:
            raise DexError(f"the setting of {name} is chosen on tuning prompts: --tune-prompts must be at least 1")


def choose_cases(
    lm: LanguageModel, asked: dict[str, list[Any]], args: argparse.Namespace
) -> tuple[list[Case], dict[str, int]]:
    """(prompts to report and to tune on, as token ids; how many of each task were too long)."""
    from dex_jax.evaluation.bench.bench import Case
    from dex_jax.evaluation.bench.contenders import SWEPT
    from dex_jax.evaluation.bench.tasks import spread

    longest = min(args.longest_prompt, lm.config.context - args.max_new_tokens)
    tuned = args.tune_prompts if any(name in SWEPT for name in (*args.methods, *args.timed)) else 0
    cases: list[Case] = []
    left_out: dict[str, int] = {}
    for items in asked.values():
        task = items[0].task
        ids: dict[int, tuple[int, ...]] = {}
        dropped: list[int] = []
        for split, wanted in (("report", args.prompts), ("tune", tuned)):
            chosen: list[int] = []
            # What is too long is replaced by others, as evenly spread as they come.
            while len(chosen) < wanted:
                fresh = spread(len(items), wanted - len(chosen), (*ids, *dropped))
                if not fresh:
                    break
                for at in fresh:
                    tokens = tuple(lm.encode(items[at].prompt, chat=not args.no_chat))
                    (chosen if len(tokens) <= longest else dropped).append(at)
                    if len(tokens) <= longest:
                        ids[at] = tokens
            if not chosen and wanted:
                raise DexError(
                    f"task {task} has {len(items)} prompts, none left for split {split}: lower --prompts or raise "
                    "--longest-prompt"
                )
            cases += [
                Case(task, items[at].id, ids[at], split, args.seed + len(cases) + number)
                for number, at in enumerate(sorted(chosen))
            ]
        left_out[task] = len(dropped)
    return cases, left_out


def study_of(
    lm: LanguageModel, args: argparse.Namespace, cases: list[Case], left_out: dict[str, int]
) -> dict[str, Any]:
    """The settings that all lines of a folder share. Methods, rounds and sweeps may grow."""
    import hashlib

    fields = ("model", "exits", "drafter", "explorers", "max_new_tokens", "temperature", "seed", "prompts")
    flat = repr([(case.task, case.id, case.ids, case.split, case.seed) for case in cases])
    return {name: getattr(args, name) for name in fields} | {
        "tune_prompts": args.tune_prompts,
        "longest_prompt": args.longest_prompt,
        "chat": not args.no_chat,
        "benchmark": "bench",
        "fingerprint": lm.fingerprint,
        "layers": lm.config.num_layers,
        "dtype": str(lm.dtype),
        "tasks": list(dict.fromkeys(case.task for case in cases)),
        "too_long": left_out,
        "prompt_digest": hashlib.sha256(flat.encode()).hexdigest()[:16],
    }


if __name__ == "__main__":
    sys.exit(main())
