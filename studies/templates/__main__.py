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
from typing import TYPE_CHECKING, Any

from dex_jax.errors import DexError, exit_code

if TYPE_CHECKING:
    from dex_jax.language_model import LanguageModel
    from studies.templates.formats import Template
    from studies.templates.items import Item
    from studies.templates.plan import Case, Plan


def parser() -> argparse.ArgumentParser:
    """The command's flags."""
    from dex_jax.cli.common import depths
    from dex_jax.language_model import DTYPES

    p = argparse.ArgumentParser(prog="python -m studies.templates", description=__doc__.splitlines()[0])
    add = p.add_argument_group("what runs").add_argument
    add("--model", default="smollm2-135m", help="alias, Hugging Face directory, hub id or .gguf file (%(default)s)")
    add("--dtype", choices=list(DTYPES), help="float32 on CPUs, bfloat16 on GPUs and TPUs unless given")
    add("--exits", default="default", help='folder, file, "default" or "shared" (%(default)s)')
    add("--methods", type=_names, default=_names("ar,dex,layerskip"), metavar="NAME,...", help="ar,dex,layerskip")
    add("--explorers", type=int, default=5, metavar="K", help="of DEX, with rows that never prune (%(default)s)")
    add("--exit-depths", type=depths, metavar="D,...", help="LayerSkip's sweep (up to four among the shallower)")
    add("--draft-lengths", type=depths, default=(1, 2, 3, 4, 6), metavar="G,...", help="LayerSkip's sweep (1,2,3,4,6)")
    add = p.add_argument_group("on what").add_argument
    add("--tasks", type=_names, default=_names("hellaswag,mmlu"), metavar="NAME,...", help="hellaswag,mmlu")
    add("--data", metavar="DIR", help="folder with a folder for each task; without it tasks come from the hub")
    add("--items", type=int, default=100, metavar="N", help="of each task, evenly spread (%(default)s)")
    add("--tune-items", type=int, default=6, metavar="N", help="further ones to choose settings on (%(default)s)")
    add("--templates", metavar="FILE[:NAME]", help="others than the twelve: promptsource YAML, FLAN or plain JSON")
    add("--formats", type=int, default=0, metavar="N", help="N formats of the FormatSpread grammar instead (0)")
    add("--seed", type=int, default=0, help="of formats, examples and of where the loops run (%(default)s)")
    add("--longest-prompt", type=int, default=512, metavar="N", help="items longer in any template are left out")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="of each answer (%(default)s)")
    add = p.add_argument_group("how").add_argument
    add("--batch", type=int, default=64, metavar="B", help="answers at a time (%(default)s)")
    add(
        "--loop-share", type=float, default=0.05, metavar="P", help="of answers, for the loops themselves (%(default)s)"
    )
    add("--second-dtype", choices=list(DTYPES), help="also answer in this dtype, to compare quality (slow on CPUs)")
    add("--second-items", type=int, default=100, metavar="N", help="items of each task for that (%(default)s)")
    add("--output", required=True, metavar="DIR", help="folder of the results")
    add("--no-plots", action="store_true", help="no PNG files, and no need of matplotlib")
    return p


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where a loop does not agree with what was counted, 2 for bad input."""
    args = parser().parse_args(argv)
    return exit_code(lambda: run(args), "Stopped. The same command goes on from here.")


def run(args: argparse.Namespace) -> int:
    """Measures and writes, as the flags say; the exit code."""
    from dex_jax.cli.common import remember_compilations
    from dex_jax.evaluation.bench.results import Results
    from dex_jax.language_model import load
    from dex_jax.progress import Display
    from studies.templates import report as template_report
    from studies.templates.plan import check_methods
    from studies.templates.runs import TemplateStudy, answers_in

    check(args)
    check_methods(args.methods)
    items = {task: items_of(task, args.data) for task in args.tasks}
    templates = {task: templates_of(task, args) for task in args.tasks}
    remember_compilations()
    lm = load(args.model, args.dtype)
    if args.second_dtype == str(lm.dtype):
        raise DexError(f"--second-dtype {args.second_dtype} is the study's own: name another one, or leave it out")
    cases, left_out = choose_cases(lm, items, templates, args)
    plan = plan_of(lm, args)
    results = Results(args.output, study_of(lm, args, plan, cases, left_out))
    display = Display()
    try:
        wrong = TemplateStudy(lm, results, cases, plan, display).run()
        if args.second_dtype is not None:
            few = {name for task in args.tasks for name in _first(cases, task, args.second_items)}
            del lm
            other = load(args.model, args.second_dtype)
            answers_in(other, results, [case for case in cases if case.item.id in few], plan, display)
    finally:
        display.close()
        results.close()
    files = template_report.write(args.output, plots=not args.no_plots)
    print((results.folder / template_report.SUMMARY).read_text(encoding="utf-8"))
    print("written: " + ", ".join(map(str, files)), file=sys.stderr)
    for each in wrong:
        print(f"error: {each}", file=sys.stderr)
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> None:
    """Refuses flags that make no sense.

    Raises:
      DexError: naming the first of them.
    """
    from dex_jax.decoding.methods import FULL_ROWS_LIMIT

    for name in ("items", "longest_prompt", "batch", "second_items"):
        if getattr(args, name) < 1:
            raise DexError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.max_new_tokens < 2:
        raise DexError("--max-new-tokens must be at least 2: the first token comes of the prompt alone")
    if args.explorers < 2:
        raise DexError("--explorers must be at least 2: with one no exit stands below the last layer")
    if not args.draft_lengths or min(args.draft_lengths) < 1:
        raise DexError("--draft-lengths must be at least 1 each")
    if args.explorers > FULL_ROWS_LIMIT:
        raise DexError(
            f"--explorers must be at most {FULL_ROWS_LIMIT}: with more, rows that never prune are too many, and with "
            "fewer rows counts do not follow from teacher forcing"
        )
    if not 0 <= args.loop_share <= 1:
        raise DexError(f"--loop-share is a share of the answers, from 0 to 1, not {args.loop_share}")
    if args.formats < 0 or (args.formats and args.templates is not None):
        raise DexError("--formats must be at least 1, and --templates not given: choose one of them")
    if "layerskip" in args.methods and args.tune_items < 1:
        raise DexError("LayerSkip's setting is chosen on further items: --tune-items must be at least 1")
    if not args.tasks:
        raise DexError("--tasks must name at least one")


def items_of(task: str, data: str | None) -> list[Item]:
    """The items of a task with options, from files or the hub.

    Raises:
      DexError: a task without options, no or bad data.
    """
    from dex_jax.evaluation.bench.tasks import rows_of
    from studies.templates.formats import DESCRIPTORS
    from studies.templates.items import read_items

    if task not in DESCRIPTORS:
        raise DexError(f"unknown task {task!r}: templates are for {', '.join(DESCRIPTORS)}")
    return read_items(task, rows_of(task, data))


def templates_of(task: str, args: argparse.Namespace) -> list[Template]:
    """The templates that the flags ask for."""
    from studies.templates.formats import built_in, read_templates, sample_formats

    if args.formats:
        return sample_formats(task, args.formats, args.seed)
    return built_in(task) if args.templates is None else read_templates(args.templates, task)


def choose_cases(
    lm: LanguageModel, items: dict[str, list[Item]], templates: dict[str, list[Template]], args: argparse.Namespace
) -> tuple[list[Case], dict[str, int]]:
    """(every chosen item in every template; how many items of each task were too long in some template)."""
    from dex_jax.evaluation.bench.tasks import spread
    from studies.templates.formats import choose_examples, render
    from studies.templates.plan import Case

    longest = min(args.longest_prompt, lm.config.context - args.max_new_tokens)
    cases: list[Case] = []
    left_out: dict[str, int] = {}
    for task, pool in items.items():
        # Examples are the shorter half of the items, so that a prompt with some of them stays a prompt.
        by_length = sorted(pool, key=lambda item: (len(item.question) + sum(map(len, item.options)), item.id))
        examples = by_length[: max(3, len(pool) // 2)]
        taken: list[int] = []
        left_out[task] = 0
        for split, wanted in (("report", args.items), ("tune", args.tune_items if "layerskip" in args.methods else 0)):
            count = 0
            while count < wanted:
                fresh = spread(len(pool), wanted - count, taken)
                if not fresh:
                    break
                for at in fresh:
                    taken.append(at)
                    item = pool[at]
                    own: list[Case] = []
                    for template in templates[task]:
                        text = render(template, item, choose_examples(template, item, examples, args.seed))
                        own.append(Case(item, template, tuple(lm.encode(text, chat=template.chat)), split))
                    fits = max(len(case.ids) for case in own) <= longest
                    cases += own if fits else []
                    count += fits
                    left_out[task] += not fits
            if count < wanted:
                raise DexError(
                    f"task {task} has {len(pool)} items, {left_out[task]} of them too long, and {count} are left where "
                    f"{wanted} are asked for split {split}: lower --items or --tune-items, or raise --longest-prompt"
                )
    return cases, left_out


def plan_of(lm: LanguageModel, args: argparse.Namespace) -> Plan:
    """What to run, with the exits of every depth that is asked.

    Raises:
      DexError: exits that do not fit, or depths that they do not have.
    """
    from dex_jax.decoding.exits import resolve_method
    from dex_jax.decoding.methods import Dex
    from dex_jax.evaluation.bench.contenders import swept_depths
    from dex_jax.evaluation.bench.forced_runs import exits_at
    from studies.templates.plan import Plan

    layers = lm.config.num_layers
    resolved = resolve_method(Dex(explorers=args.explorers), args.exits, lm.config, lm.fingerprint)
    resolved.say()
    grid = resolved.schedule.depths
    swept = args.exit_depths
    if swept is None:
        swept = swept_depths(args.exits, lm.config, lm.fingerprint) if "layerskip" in args.methods else ()
    if any(not 0 < depth < layers for depth in swept):
        raise DexError(f"--exit-depths must lie between 1 and {layers - 1}, not {','.join(map(str, swept))}")
    depths = tuple(sorted({*grid[:-1], *swept}))
    exits, source = exits_at(lm, args.exits if resolved.trained is not None else "shared", depths)
    return Plan(
        methods=args.methods,
        model=args.model,
        exits=exits,
        exits_source=source,
        depths=grid,
        exit_depths=tuple(swept),
        draft_lengths=tuple(args.draft_lengths),
        max_new_tokens=args.max_new_tokens,
        batch=args.batch,
        loop_share=args.loop_share,
        seed=args.seed,
    )


def study_of(
    lm: LanguageModel, args: argparse.Namespace, plan: Plan, cases: Sequence[Case], left_out: dict[str, int]
) -> dict[str, Any]:
    """The settings that all lines of a folder share."""
    import hashlib

    from dex_jax.evaluation.bench.results import about_exits

    names = ("model", "exits", "explorers", "max_new_tokens", "items", "tune_items", "formats", "seed", "loop_share")
    flat = repr([(case.item.id, case.template.name, case.ids, case.split) for case in cases])
    return {name: getattr(args, name) for name in names} | {
        "benchmark": "templates",
        "exits_used": about_exits(None if plan.exits_source == "shared" else plan.exits),
        "methods": list(args.methods),
        "tasks": list(args.tasks),
        "templates": None if args.templates is None else args.templates.rpartition("/")[2],
        "longest_prompt": args.longest_prompt,
        "too_long": left_out,
        "exit_depths": list(plan.exit_depths),
        "draft_lengths": list(plan.draft_lengths),
        "fingerprint": lm.fingerprint,
        "layers": lm.config.num_layers,
        "parameters": sum(int(leaf.size) for leaf in _leaves(lm.weights)),
        "dtype": str(lm.dtype),
        "prompt_digest": hashlib.sha256(flat.encode()).hexdigest()[:16],
    }


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def _first(cases: Sequence[Case], task: str, count: int) -> list[str]:
    ids = dict.fromkeys(case.item.id for case in cases if case.split == "report" and case.item.task == task)
    return list(ids)[:count]


if __name__ == "__main__":
    sys.exit(main())
