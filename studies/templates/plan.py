"""What a template study is asked for, and what follows: items in templates, exits and grids, how answers are graded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
from msgspec import Meta

from dex_jax.cli.common import depths
from dex_jax.decoding.methods import FULL_ROWS_LIMIT, Dex
from dex_jax.decoding.resolve import resolve
from dex_jax.errors import DexError
from dex_jax.foreign import check_fields
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from studies.bench.contenders import swept_depths
from studies.bench.results import about_exits, about_model
from studies.bench.tasks import choose, rows_of
from studies.flags import Count, NotNegative, Several, dtype_flag, flag, model_flag, names
from studies.templates.answers import parse_choice
from studies.templates.forced_runs import exits_at
from studies.templates.formats import (
    DESCRIPTORS,
    Template,
    built_in,
    choose_examples,
    read_templates,
    render,
    sample_formats,
    shown_options,
)
from studies.templates.items import Item, read_items

METHODS = ("ar", "dex", "layerskip")
Method = Literal["ar", "dex", "layerskip"]
Task = Literal["hellaswag", "mmlu"]
Tasks = Annotated[tuple[Task, ...], Meta(min_length=1)]
Lengths = Annotated[tuple[Count, ...], Meta(min_length=1)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a study is asked for: each field is a flag, described in its help.

    Raises:
      DexError: naming the first that makes no sense.
    """

    output: str
    model: str = model_flag()
    dtype: str | None = dtype_flag()
    exits: str = flag("default", 'folder, file, "default" or "shared"')
    methods: tuple[Method, ...] = flag(METHODS, "of ar,dex,layerskip", type=names, metavar="NAME,...")
    explorers: Annotated[int, Meta(ge=2, le=FULL_ROWS_LIMIT)] = flag(5, "of DEX, with rows that never prune")
    exit_depths: tuple[int, ...] | None = flag(None, "LayerSkip's sweep (up to four among the shallower)", type=depths)
    draft_lengths: Lengths = flag((1, 2, 3, 4, 6), "LayerSkip's sweep", type=depths, metavar="G,...")
    tasks: Tasks = flag(tuple(DESCRIPTORS), "of hellaswag,mmlu", type=names, metavar="NAME,...")
    data: str | None = flag(None, "folder with a folder for each task; without it tasks come from the hub", type=str)
    items: Count = flag(100, "of each task, evenly spread")
    tune_items: NotNegative = flag(6, "further ones to choose settings on")
    templates: str | None = flag(None, "FILE[:NAME]: promptsource YAML, FLAN or plain JSON, not the twelve", type=str)
    formats: NotNegative = flag(0, "formats of the FormatSpread grammar instead")
    seed: int = flag(0, "of formats, examples and of where the loops run")
    longest_prompt: Count = flag(512, "items longer in any template are left out")
    max_new_tokens: Several = flag(48, "of each answer")
    batch: Count = flag(64, "answers at a time")
    loop_share: Annotated[float, Meta(ge=0, le=1)] = flag(0.05, "share of answers on which the loops themselves run")
    second_dtype: str | None = dtype_flag("also answer in this dtype (slow on CPUs)")
    second_items: Count = flag(100, "items of each task for that")
    no_plots: bool = flag(False, "no PNG files, and no need of matplotlib")

    def __post_init__(self) -> None:
        check_fields(self, flags=True)
        if "ar" not in self.methods:
            raise DexError("--methods needs ar: all answers are its, and all are compared with it")
        if self.formats and self.templates:
            raise DexError("choose one of --formats and --templates")
        if "layerskip" in self.methods and self.tune_items < 1:
            raise DexError("--tune-items must be at least 1: LayerSkip's setting is chosen on them")


class Case(NamedTuple):
    """One item in one template.

    Attributes:
      item, template: what is asked and how.
      ids: token ids of the prompt.
      split: "report", or "tune" for items on which LayerSkip's setting is chosen.
    """

    item: Item
    template: Template
    ids: tuple[int, ...]
    split: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study runs.

    Attributes:
      settings: what is asked for.
      exits: of all depths that are asked; exits_source: where they are from.
      depths: DEX's grid.
      exit_depths: of LayerSkip's sweep.
    """

    settings: Settings
    exits: TrainedExits
    exits_source: str
    depths: tuple[int, ...]
    exit_depths: tuple[int, ...]


def read(s: Settings) -> dict[str, tuple[list[Item], list[Template]]]:
    """The items and templates of each task. DexError: no or bad data or templates."""

    def templates(task: str) -> list[Template]:
        if s.formats:
            return sample_formats(task, s.formats, s.seed)
        return built_in(task) if s.templates is None else read_templates(s.templates, task)

    return {task: (read_items(task, rows_of(task, s.data)), templates(task)) for task in s.tasks}


def choose_cases(
    lm: LanguageModel, asked: dict[str, tuple[list[Item], list[Template]]], s: Settings
) -> tuple[list[Case], dict[str, int]]:
    """(every chosen item in every template; how many items of each task were too long in some template).

    Raises:
      DexError: too few items that fit.
    """
    longest = min(s.longest_prompt, lm.config.context - s.max_new_tokens)
    wanted = {"report": s.items, "tune": s.tune_items if "layerskip" in s.methods else 0}
    cases: list[Case] = []
    left_out: dict[str, int] = {}
    for task, (pool, templates) in asked.items():
        # Examples are the shorter half of the items, so that a prompt with some of them stays a prompt.
        by_length = sorted(pool, key=lambda item: (len(item.question) + sum(map(len, item.options)), item.id))
        examples = by_length[: max(3, len(pool) // 2)]

        def short(
            at: int, pool: list[Item] = pool, templates: list[Template] = templates, examples: list[Item] = examples
        ) -> list[tuple[int, ...]] | None:
            texts = [render(each, pool[at], choose_examples(each, pool[at], examples, s.seed)) for each in templates]
            ids = [tuple(lm.encode(text, chat=t.chat)) for text, t in zip(texts, templates, strict=True)]
            return ids if max(map(len, ids)) <= longest else None

        chosen, left_out[task] = choose(len(pool), wanted, short)
        for split, own in chosen.items():
            if len(own) < wanted[split]:
                raise DexError(
                    f"task {task} has {len(pool)} items, {left_out[task]} of them too long, and {len(own)} are left "
                    f"where {wanted[split]} are asked for split {split}: lower --items or --tune-items, or raise "
                    "--longest-prompt"
                )
            for at, ids in own.items():
                cases += [Case(pool[at], *each, split) for each in zip(templates, ids, strict=True)]
    return cases, left_out


def plan_of(lm: LanguageModel, s: Settings) -> Plan:
    """What to run, with the exits of every depth that is asked.

    Raises:
      DexError: exits that do not fit, or depths that they do not have.
    """
    layers = lm.config.num_layers
    resolved = resolve(Dex(explorers=s.explorers, draft=False), s.exits, lm.config, lm.fingerprint)
    resolved.say(lm.fingerprint)
    grid = resolved.schedule.depths
    swept = s.exit_depths
    if swept is None:
        swept = swept_depths(s.exits, lm.config, lm.fingerprint) if "layerskip" in s.methods else ()
    if any(not 0 < depth < layers for depth in swept):
        raise DexError(f"--exit-depths must lie between 1 and {layers - 1}, not {','.join(map(str, swept))}")
    every = tuple(sorted({*grid[:-1], *swept}))
    exits, source = exits_at(lm, s.exits if resolved.exits is not None else "shared", every)
    return Plan(s, exits, source, grid, tuple(swept))


def study_of(
    lm: LanguageModel, s: Settings, plan: Plan, cases: Sequence[Case], left_out: dict[str, int]
) -> dict[str, Any]:
    """The settings that all lines of a folder share."""
    names = ("model", "exits", "explorers", "max_new_tokens", "items", "tune_items", "formats", "seed", "loop_share")
    return {name: getattr(s, name) for name in names} | {
        "benchmark": "templates",
        "exits_used": about_exits(None if plan.exits_source == "shared" else plan.exits),
        "methods": list(s.methods),
        "tasks": list(s.tasks),
        "templates": None if s.templates is None else s.templates.rpartition("/")[2],
        "longest_prompt": s.longest_prompt,
        "too_long": left_out,
        "exit_depths": list(plan.exit_depths),
        "draft_lengths": list(s.draft_lengths),
        "parameters": sum(int(leaf.size) for leaf in jax.tree.leaves(lm.weights)),
        **about_model(lm, [(case.item.id, case.template.name, case.ids, case.split) for case in cases]),
    }


def grade(lm: LanguageModel, case: Case, tokens: Sequence[int]) -> dict[str, Any]:
    """parsed, correct and chance of an answer."""
    text = "" if lm.tokenizer is None else lm.tokenizer.decode([t for t in tokens if t not in lm.eos_ids])
    template, item = case.template, case.item
    labels = tuple("ABCDEFGHIJ"[: len(item.options)]) if template.jinja else template.labels(item)
    found = parse_choice(text, labels, shown_options(template, item))
    return {"parsed": found is not None, "correct": found == item.answer, "chance": item.chance}
