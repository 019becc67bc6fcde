"""`python -m studies.templates`: do gains hold across prompt templates?

Every item is asked in every template. Answers come from AR in large batches; what DEX and LayerSkip count on them is
teacher-forced, and their loops run on a random share and must agree. LayerSkip's setting is chosen on other items than
those reported. The folder holds results.jsonl, summary.md and a plot; the same command goes on where it was stopped,
and `python -m studies.templates.report DIR` computes all figures anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dex_jax import language_model
from dex_jax.cli.common import remember_compilations
from dex_jax.errors import DexError
from studies.bench.results import writing
from studies.flags import run_study, tell
from studies.templates import report
from studies.templates.plan import Settings, choose_cases, plan_of, read, study_of
from studies.templates.runs import TemplateStudy, answers_in


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where a loop does not agree with what was counted, 2 for bad input."""
    return run_study(argv, "studies.templates", __doc__, Settings, run)


def run(settings: Settings) -> int:
    """Measures and writes, as the settings say; the exit code."""
    asked = read(settings)
    remember_compilations()
    lm = language_model.load(settings.model, settings.dtype)
    if settings.second_dtype == str(lm.dtype):
        raise DexError(f"--second-dtype {settings.second_dtype} is the study's own: name another one, or leave it out")
    cases, left_out = choose_cases(lm, asked, settings)
    plan = plan_of(lm, settings)
    with writing(settings.output, study_of(lm, settings, plan, cases, left_out)) as (results, display):
        wrong = TemplateStudy(lm, results, cases, plan, display).run()
        if settings.second_dtype is not None:
            del lm
            first = set()
            for task in settings.tasks:
                ids = dict.fromkeys(case.item.id for case in cases if (case.split, case.item.task) == ("report", task))
                first |= set(list(ids)[: settings.second_items])
            other = language_model.load(settings.model, settings.second_dtype)
            answers_in(other, results, [case for case in cases if case.item.id in first], plan, display)
    return tell(report.write(settings.output, plots=not settings.no_plots), wrong)


if __name__ == "__main__":
    sys.exit(main())
