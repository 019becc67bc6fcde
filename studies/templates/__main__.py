"""`python -m studies.templates`: do gains hold across prompt templates?

Every item is asked in every template. Answers come from AR in large batches; what DEX and LayerSkip count on them is
teacher-forced, and their loops run on a random share and must agree. LayerSkip's setting is chosen on other items than
those reported. The folder holds results.jsonl, summary.md and a plot; the same command goes on where it was stopped,
and `python -m studies.templates.report DIR` computes all figures anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dex_jax import language_model
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import DexError, exit_code
from dex_jax.progress import Display
from studies.bench.results import Results
from studies.flags import add_flags
from studies.templates import report
from studies.templates.plan import Settings, choose_cases, plan_of, read, study_of
from studies.templates.runs import TemplateStudy, answers_in


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where a loop does not agree with what was counted, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m studies.templates", description=__doc__.splitlines()[0])
    add_flags(parser, Settings)
    parser.add_argument("--no-plots", action="store_true", help="no PNG files, and no need of matplotlib")
    given = vars(parser.parse_args(argv))
    plots = not given.pop("no_plots")
    return exit_code(lambda: run(Settings(**given), plots), "Stopped. The same command goes on from here.")


def run(settings: Settings, plots: bool = True) -> int:
    """Measures and writes, as the settings say; the exit code."""
    asked = read(settings)
    remember_compilations()
    lm = language_model.load(settings.model, settings.dtype)
    if settings.second_dtype == str(lm.dtype):
        raise DexError(f"--second-dtype {settings.second_dtype} is the study's own: name another one, or leave it out")
    cases, left_out = choose_cases(lm, asked, settings)
    plan = plan_of(lm, settings)
    results = Results(settings.output, study_of(lm, settings, plan, cases, left_out))
    display = Display()
    try:
        wrong = TemplateStudy(lm, results, cases, plan, display).run()
        if settings.second_dtype is not None:
            del lm
            first = set()
            for task in settings.tasks:
                ids = dict.fromkeys(case.item.id for case in cases if (case.split, case.item.task) == ("report", task))
                first |= set(list(ids)[: settings.second_items])
            other = language_model.load(settings.model, settings.second_dtype)
            answers_in(other, results, [case for case in cases if case.item.id in first], plan, display)
    finally:
        display.close()
        results.close()
    files = report.write(settings.output, plots=plots)
    print((results.folder / report.SUMMARY).read_text(encoding="utf-8"))
    print("written: " + ", ".join(map(str, files)), file=sys.stderr)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
