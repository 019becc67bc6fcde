"""`python -m studies.bench`: methods against one another on tasks, into a folder that a person can read.

Counts come from batches, seconds from one sequence at a time with methods taking turns (A B B A). The settings of
static rivals are chosen on other prompts than those reported. The folder holds results.jsonl (one line a run),
summary.md and plots; the same command goes on where it was stopped. docs/howto_compare.md says what is measured how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dex_jax import language_model
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import DexError, exit_code
from dex_jax.language_model import LanguageModel
from dex_jax.progress import phases
from studies.bench import report
from studies.bench.bench import Bench, Case
from studies.bench.plan import Plan, Settings
from studies.bench.results import about_model, writing
from studies.bench.tasks import Asked, choose, read_task
from studies.flags import add_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where tokens are not AR's, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.bench", description=__doc__.splitlines()[0])
    add_flags(parser, Settings)
    given = vars(parser.parse_args(argv))
    return exit_code(lambda: run(Settings(**given)), "Stopped. The same command goes on from here.")


def run(settings: Settings) -> int:
    """Measures and writes, as the settings say; the exit code."""
    asked = [read_task(task, settings.data) for task in settings.tasks]
    called = [items[0].task for items in asked]
    if len(set(called)) < len(called):
        raise DexError(f"two of the tasks are called {max(called, key=called.count)}: give their files other names")
    remember_compilations()
    with phases():
        lm = language_model.load(settings.model, settings.dtype)
    cases, left_out = choose_cases(lm, asked, settings)
    plan = Plan(lm, settings)
    with writing(settings.output, study_of(lm, settings, cases, left_out) | plan.about()) as (results, display):
        bench = Bench(lm, results, cases, plan, display)
        bench.count()
        bench.time()
    return report.write_and_tell(settings.output, not settings.no_plots)


def choose_cases(
    lm: LanguageModel, asked: Sequence[Sequence[Asked]], settings: Settings
) -> tuple[list[Case], dict[str, int]]:
    """(prompts to report and to tune on, as token ids; how many of each task were too long)."""
    longest = min(settings.longest_prompt, lm.config.context - settings.max_new_tokens)
    wanted = {"report": settings.prompts, "tune": settings.tune_prompts if settings.swept else 0}
    cases: list[Case] = []
    left_out: dict[str, int] = {}
    for items in asked:
        task = items[0].task

        def short(at: int, items: Sequence[Asked] = items) -> tuple[int, ...] | None:
            ids = tuple(lm.encode(items[at].prompt, chat=not settings.no_chat))
            return ids if len(ids) <= longest else None

        chosen, left_out[task] = choose(len(items), wanted, short)
        for split, own in chosen.items():
            if not own and wanted[split]:
                raise DexError(
                    f"task {task} has {len(items)} prompts, none left for split {split}: lower --prompts or raise "
                    "--longest-prompt"
                )
            for at in sorted(own):
                cases.append(Case(task, items[at].id, own[at], split, settings.seed + len(cases)))
    return cases, left_out


def study_of(lm: LanguageModel, settings: Settings, cases: Sequence[Case], left_out: dict[str, int]) -> dict[str, Any]:
    """The settings that all lines of a folder share. Methods, rounds and sweeps may grow."""
    drawn = ("seed", "prompts", "tune_prompts", "longest_prompt")
    fields = ("model", "exits", "drafter", "explorers", "max_new_tokens", "temperature", *drawn)
    return {name: getattr(settings, name) for name in fields} | {
        "chat": not settings.no_chat,
        "benchmark": "bench",
        "tasks": list(dict.fromkeys(case.task for case in cases)),
        "too_long": left_out,
        **about_model(lm, [(case.task, case.id, case.ids, case.split, case.seed) for case in cases]),
    }


if __name__ == "__main__":
    sys.exit(main())
