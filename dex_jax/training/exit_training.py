"""One training of exits from its configuration to the exported file.

A run's folder holds its texts, metrics.jsonl, checkpoints, with which the same command goes on after a kill, and
exits.safetensors, the exits of the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dex_jax.config import ExitsConfig
from dex_jax.decoding.forced import PromptAndAnswer
from dex_jax.errors import DexError
from dex_jax.io.exits_file import FILE_NAME, TrainedExits, save_exits
from dex_jax.io.whole_files import write_json
from dex_jax.language_model import LanguageModel
from dex_jax.nn.exits import select_exits
from dex_jax.nn.sharding import device_name
from dex_jax.progress import Display, Standing
from dex_jax.training.answers import Answers, Text, write_texts
from dex_jax.training.config import TrainConfig
from dex_jax.training.distillation import Distillation, DistillationOptions, check_fit, draft_vocabulary
from dex_jax.training.figures import grouped_figures, tables
from dex_jax.training.items import Item
from dex_jax.training.journal import read_journal
from dex_jax.training.packing import Epochs
from dex_jax.training.sources import Mixture, SourceOptions, open_mixture
from dex_jax.training.trainer import Trained, train

Tell = Callable[[str], None]
Groups = dict[str, list[PromptAndAnswer]]

HELD_OUT, TOKENS = "held_out.json", "tokens.json"


@dataclasses.dataclass(frozen=True)
class ExitTraining:
    """The settings that `train_exits.py` reads from a configuration file, as its `config`.

    Attributes:
      model: as `dex_jax.load` takes it.
      exits: shapes of the heads; the width and the epsilon are always the model's.
      data: sources as `training.sources.open_mixture` reads them.
      sources: how items are made of them; `length` is the longest item, and a row's tokens.
      tokens: number of tokens in all texts, prompts among them, which are read again while there are steps; None for
        so many that each is read once.
      options: how exits learn.
      evaluation_texts: number of held-out answers of each source that exits are measured on.
      evaluation_tokens: the most tokens of each of them.
      train: the optimizer, the batch, the length of the training and its checkpoints.
    """

    exits: ExitsConfig
    train: TrainConfig
    model: str = "smollm2-135m"
    data: tuple[str, ...] = ("self",)
    sources: SourceOptions = dataclasses.field(default_factory=lambda: SourceOptions(length=256))
    tokens: int | None = None
    options: DistillationOptions = dataclasses.field(default_factory=DistillationOptions)
    evaluation_texts: int = 8
    evaluation_tokens: int = 64


def train_exits(
    config: ExitTraining,
    lm: LanguageModel,
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    initial: TrainedExits | None = None,
    answers: str | Path | None = None,
    tell: Tell = print,
) -> TrainedExits:
    """Train exits, or resume the training in the folder, and write exits.safetensors there.

    Args:
      config: the settings.
      lm: the model with the weights that it will run with, packed ones too.
      folder: of the run.
      mesh: see `training.trainer.train`.
      initial: exits to start from, of the same shapes. The size of the draft vocabulary may be another, and they may
        have heads at further depths, which are left out.
      answers: the folder of the texts, which several runs and processes may share; None for one in `folder`.
      tell: called with lines that users should see.

    Raises:
      DexError: data, exits or folder do not fit.
    """
    folder = Path(folder)
    shapes = dataclasses.replace(config.exits, width=lm.config.width, norm_eps=lm.config.norm_eps)
    if shapes.depths[-1] >= lm.config.num_layers:
        raise DexError(f"exit depths must lie below the model's {lm.config.num_layers} layers, not {shapes.depths}")
    check_fit(shapes, config.options)
    initial = _start(initial, shapes, lm, tell)
    mixture = open_mixture(config.data, lm, config.sources, tell)
    made = texts_of(config, lm, mixture, folder, answers)
    vocabulary = None if initial is None else initial.vocabulary
    if shapes.draft_size is None:
        vocabulary = None
    elif vocabulary is None or len(vocabulary) != shapes.draft_size:
        vocabulary = draft_vocabulary(lm, made.texts, shapes.draft_size)
    groups = held_out_texts(config, lm, mixture, made.folder / HELD_OUT, tell)

    def evaluate(exits: TrainedExits) -> dict[str, Any]:
        figures = grouped_figures(lm, exits, groups)
        last = [*figures][-1]
        tell(tables({last: figures[last]}))
        return {"groups": {name: each.to_json() for name, each in figures.items()}}

    evaluates = evaluate if groups else None
    task = Distillation(lm, shapes, vocabulary, made.rows, made.about, config.options, evaluates, initial)
    started = time.perf_counter()

    def save(trained: Trained) -> TrainedExits:
        about = _about(config, initial, trained, folder, time.perf_counter() - started)
        exits = task.trained(trained.params, about)
        save_exits(folder / FILE_NAME, exits)
        return exits

    # Saved once more at the end: a kill may have come between the last checkpoint and its file.
    exits = save(train(task, config.train, folder, mesh=mesh, saved=save))
    return dataclasses.replace(exits, source=str(folder))


class Made(NamedTuple):
    """The texts of a training."""

    texts: list[Text]
    rows: Epochs
    about: dict[str, Any]  # plain JSON, names them
    folder: Path


def texts_of(
    config: ExitTraining, lm: LanguageModel, mixture: Mixture, folder: Path, answers: str | Path | None
) -> Made:
    """Return the texts of a training, with config.tokens tokens in all, or so many that each is read once."""
    length, train = config.sources.length, config.train
    tokens, first = config.tokens, folder / TOKENS
    if tokens is None:
        # A run that goes on for more steps reads the same texts in the same order.
        tokens = json.loads(first.read_text()) if first.is_file() else train.steps * train.batch * length
        write_json(first, tokens)
    kept = answers_of(config, lm, mixture, folder, answers)
    with contextlib.closing(Display()) as display:
        started = time.perf_counter()

        def told(there: int) -> None:
            share = there / tokens
            left = (time.perf_counter() - started) * (1 - share) / share if share else None
            display(Standing(f"texts to learn from, {there} of {tokens} tokens", share, left, share >= 1))

        texts = kept.at_least(tokens, told)
    about = _texts_from(config, mixture) | {"tokens": tokens}
    return Made(texts, Epochs(texts, train.batch, length, train.seed), about, kept.folder)


def answers_of(
    config: ExitTraining,
    lm: LanguageModel,
    mixture: Mixture,
    folder: Path,
    answers: str | Path | None,
    heard: Callable[[], None] = lambda: None,
) -> Answers:
    """Open the folder of a training's texts: `answers`, or one within the run's `folder`."""
    place = folder / "answers" if answers is None else answers
    return Answers(lm, mixture.item, place, _texts_from(config, mixture), config.train.seed, heard)


def _texts_from(config: ExitTraining, mixture: Mixture) -> dict[str, Any]:
    return {"data": mixture.fingerprint(), "length": config.sources.length}


def held_out_texts(config: ExitTraining, lm: LanguageModel, mixture: Mixture, file: Path, tell: Tell) -> Groups:
    """Return prompts never trained on with the model's greedy answers, by source, which `file` holds from then on."""
    if file.is_file():
        return {name: [(p, a) for p, a in texts] for name, texts in json.loads(file.read_text()).items()}
    if config.evaluation_texts:
        tell("answering held-out prompts")
    groups: Groups = {}
    for name, items in mixture.held_out.items():
        greedy = [_greedy(item, config.evaluation_tokens) for item in items[: config.evaluation_texts]]
        # Not the seed of the training: other samples are all that holds out what a model writes itself.
        seeds = [config.train.seed + 1_000_003 + number for number in range(len(greedy))]
        texts = write_texts(lm, greedy, seeds) if greedy else []
        split = [(text.token[: text.answer].tolist(), text.token[text.answer :].tolist()) for text in texts]
        # Exits cannot be measured on an answer that is nothing but an EOS.
        if answered := [(prompt, answer) for prompt, answer in split if answer]:
            groups[name] = answered
    write_json(file, groups)
    return groups


def _greedy(item: Item, limit: int) -> Item:
    """Return the item with its last answer greedy and not longer than `limit`."""
    last = item.turns[-1]
    return Item((*item.turns[:-1], dataclasses.replace(last, limit=min(limit, last.limit), temperature=0.0)))


def _start(initial: TrainedExits | None, exits: ExitsConfig, lm: LanguageModel, tell: Tell) -> TrainedExits | None:
    if initial is None:
        return None
    if set(exits.depths) < set(initial.config.depths):
        shapes, parameters = select_exits(initial.config, initial.parameters, exits.depths)
        initial = dataclasses.replace(initial, config=shapes, parameters=parameters)
    if changed := _differences(initial.config, exits):
        raise DexError(f"training cannot start from {initial.source}: {'; '.join(changed)}")
    if initial.fingerprint != lm.fingerprint:
        tell(
            f"warning: {initial.source} was trained on the backbone {initial.fingerprint}, {lm.source} is "
            f"{lm.fingerprint}; starting from it all the same"
        )
    return initial


def _differences(there: ExitsConfig, here: ExitsConfig) -> list[str]:
    """Return the differences that keep heads of one configuration from going on as those of another."""
    before, now = dataclasses.asdict(there), dataclasses.asdict(here)
    if None not in (there.draft_size, here.draft_size):
        # No parameter's shape depends on how many tokens the vocabulary holds.
        before["draft_size"] = here.draft_size
    return [f"{name} is {before[name]} there and {now[name]} here" for name in now if before[name] != now[name]]


def _about(
    config: ExitTraining, initial: TrainedExits | None, trained: Trained, folder: Path, seconds: float
) -> dict[str, Any]:
    records = read_journal(folder)
    spent = sum(record.get("seconds", 0.0) for record in records)
    held_out = [record["groups"] for record in records if "groups" in record]
    return {
        "model": config.model,
        "data": list(config.data),
        "tokens": trained.tokens,
        "steps": trained.step,
        "minutes": round(max(spent, seconds) / 60, 1),
        "device": device_name(jax.devices()[0]),
        "held_out": held_out[-1] if held_out else {},
    } | ({} if initial is None else {"before": {k: v for k, v in initial.metadata.items() if k != "held_out"}})
