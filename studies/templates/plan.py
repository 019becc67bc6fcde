"""What a template study is asked to run: items in templates, methods, and how an answer is graded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from studies.templates.answers import parse_choice
from studies.templates.formats import Template, shown_options
from studies.templates.items import Item

METHODS = ("ar", "dex", "layerskip")


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
      methods: of METHODS.
      model: as it is loaded, for the record.
      exits: of all depths that are asked; exits_source: where they are from.
      depths: DEX's grid.
      exit_depths, draft_lengths: LayerSkip's sweep.
      max_new_tokens: of each answer.
      batch: prompts at a time.
      loop_share: of the answers, on which the loops themselves run too.
      seed: of that choice.
    """

    methods: tuple[str, ...]
    model: str
    exits: TrainedExits
    exits_source: str
    depths: tuple[int, ...]
    exit_depths: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    max_new_tokens: int
    batch: int
    loop_share: float
    seed: int


def check_methods(methods: Sequence[str]) -> None:
    """Refuses methods that the study cannot count.

    Raises:
      DexError: an unknown one, or AR missing.
    """
    for name in methods:
        if name not in METHODS:
            raise DexError(
                f"the template study counts {', '.join(METHODS)}, not {name!r}: other methods run in "
                "python -m dex_jax.cli.bench"
            )
    if "ar" not in methods:
        raise DexError("--methods needs ar: all answers are its, and all others are compared with it")


def grade(lm: LanguageModel, case: Case, tokens: Sequence[int]) -> dict[str, Any]:
    """parsed, correct and chance of an answer."""
    text = "" if lm.tokenizer is None else lm.tokenizer.decode([t for t in tokens if t not in lm.eos_ids])
    template, item = case.template, case.item
    labels = tuple("ABCDEFGHIJ"[: len(item.options)]) if template.jinja else template.labels(item)
    found = parse_choice(text, labels, shown_options(template, item))
    return {"parsed": found is not None, "correct": found == item.answer, "chance": item.chance}
