"""One training of exits from its configuration to the exported file.

A run's folder holds checkpoints, metrics.jsonl, the draft vocabulary, the held-out answers and, at the end,
exits.safetensors: everything that the same command needs to go on after a kill.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dex_jax.config import ExitsConfig
from dex_jax.decoding.forced import Text
from dex_jax.errors import DexError
from dex_jax.io.exits_file import FILE_NAME, TrainedExits, save_exits
from dex_jax.io.whole_files import write_json
from dex_jax.language_model import LanguageModel
from dex_jax.nn.exits import select_exits
from dex_jax.nn.sharding import device_name
from dex_jax.training.checkpoints import Checkpoints
from dex_jax.training.config import TrainConfig
from dex_jax.training.distillation import Distillation, DistillationOptions, check_fit, draft_vocabulary, history_for
from dex_jax.training.figures import grouped_figures, tables
from dex_jax.training.items import Item
from dex_jax.training.journal import read_journal
from dex_jax.training.sources import Mixture, SourceOptions, open_mixture
from dex_jax.training.stream import Stream
from dex_jax.training.trainer import Trained, train

Tell = Callable[[str], None]

HELD_OUT, VOCABULARY = "held_out.json", "draft_vocabulary.json"


@dataclasses.dataclass(frozen=True)
class ExitTraining:
    """What `train_exits.py` reads from a configuration file, as its `config`.

    Attributes:
      model: as `dex_jax.load` takes it.
      exits: shapes of the heads; the width and the epsilon are the model's, whatever stands there.
      data: sources as `training.sources.open_mixture` reads them.
      sources: how items are made of them; `length` is the longest item.
      chunk: n, tokens of each row between two updates.
      options: how exits learn.
      draft_tokens: how many tokens the draft vocabulary is counted on.
      evaluation_texts: held-out answers per source that figures are taken from.
      evaluation_tokens: of each of them.
      train: optimizer, batch (rows), length, checkpoints.
      first: a training of the same heads that comes before this one, in the folder "first" within this one's; this one
        starts from its exits. A smaller draft vocabulary there makes most of the training cheaper.
    """

    exits: ExitsConfig
    train: TrainConfig
    model: str = "smollm2-135m"
    data: tuple[str, ...] = ("self",)
    sources: SourceOptions = dataclasses.field(default_factory=lambda: SourceOptions(length=256))
    chunk: int = 8
    options: DistillationOptions = dataclasses.field(default_factory=DistillationOptions)
    draft_tokens: int = 20_000
    evaluation_texts: int = 8
    evaluation_tokens: int = 64
    first: ExitTraining | None = None

    def __post_init__(self) -> None:
        if self.first is not None and (changed := _differences(self.first.exits, self.exits)):
            raise DexError(f"a training cannot go on from the first one: {'; '.join(changed)}")


def train_exits(
    config: ExitTraining,
    lm: LanguageModel,
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    initial: TrainedExits | None = None,
    tell: Tell = print,
) -> TrainedExits:
    """Trains exits, or goes on where the folder has got to, and writes exits.safetensors there.

    Args:
      config: what and how.
      lm: the model, loaded.
      folder: of the run.
      mesh: see `training.trainer.train`.
      initial: exits to start from, of the same shapes. The size of the draft vocabulary may be another, and they may
        stand at further depths, whose heads are left out.
      tell: called with lines that users should see.

    Raises:
      DexError: data, exits or folder that do not fit.
    """
    folder = Path(folder)
    if config.first is not None:
        tell("first training")
        initial = train_exits(config.first, lm, folder / "first", mesh=mesh, initial=initial, tell=tell)
        tell("next training")
    shapes = dataclasses.replace(config.exits, width=lm.config.width, norm_eps=lm.config.norm_eps)
    if shapes.depths[-1] >= lm.config.num_layers:
        raise DexError(f"exit depths must lie below the model's {lm.config.num_layers} layers, not {shapes.depths}")
    check_fit(lm, shapes, config.options)
    initial = _start(initial, shapes, lm, tell)
    mixture = open_mixture(config.data, lm, config.sources, tell)
    stream = Stream(
        lm,
        mixture.item,
        batch=config.train.batch,
        steps=config.chunk,
        history=history_for(shapes),
        length=config.sources.length,
        depths=shapes.depths,
        seed=config.train.seed,
        mesh=mesh,
    )
    forget_unstarted(folder, config.train.keep)
    given, vocabulary = None if initial is None else initial.vocabulary, None
    if given is not None and len(given) == shapes.draft_size:
        write_json(folder / VOCABULARY, given.tolist())
    if shapes.draft_size is not None:
        vocabulary = kept_vocabulary(lm, stream, shapes.draft_size, config.draft_tokens, folder, tell)
    groups = held_out_texts(config, stream, mixture, folder, tell)

    def evaluate(exits: TrainedExits) -> dict[str, Any]:
        figures = grouped_figures(lm, exits, groups)
        last = [*figures][-1]
        tell(tables({last: figures[last]}))
        return {"groups": {name: each.to_json() for name, each in figures.items()}}

    evaluates = evaluate if groups else None
    task = Distillation(lm, shapes, vocabulary, stream, mixture.fingerprint(), config.options, evaluates, initial)
    begin = time.perf_counter()
    trained = train(task, config.train, folder, mesh=mesh)
    exits = task.trained(trained.params, _about(config, initial, trained, folder, time.perf_counter() - begin))
    save_exits(folder / FILE_NAME, exits)
    return dataclasses.replace(exits, source=str(folder))


def held_out_texts(
    config: ExitTraining, stream: Stream, mixture: Mixture, folder: Path, tell: Tell
) -> dict[str, list[Text]]:
    """Prompts never trained on with the model's greedy answers, by source; made once and kept in the folder.

    The stream of the training makes them, as another one would be another program.
    """
    file = folder / HELD_OUT
    if file.is_file():
        return {name: [(p, a) for p, a in texts] for name, texts in json.loads(file.read_text()).items()}
    tell("answering held-out prompts")
    groups: dict[str, list[Text]] = {}
    for name, items in mixture.held_out.items():
        greedy = [_greedy(item, config.evaluation_tokens) for item in items[: config.evaluation_texts]]
        # Not the seed of the training: what a model writes itself is held out by being sampled otherwise.
        tokens = stream.read(greedy, config.train.seed + 1_000_003)
        texts = [_split(item, found) for item, found in zip(greedy, tokens, strict=True)]
        # An answer that is nothing but an EOS says nothing about exits.
        if answered := [(prompt, answer) for prompt, answer in texts if answer]:
            groups[name] = answered
    write_json(file, groups)
    return groups


def _greedy(item: Item, limit: int) -> Item:
    """The item with its last answer greedy and not longer than `limit`."""
    last = item.turns[-1]
    return Item((*item.turns[:-1], dataclasses.replace(last, limit=min(limit, last.limit), temperature=0.0)))


def _split(item: Item, tokens: list[int]) -> Text:
    """(prompt, answer) of an item; a text that is given is all answer but its first token."""
    forced = item.turns[-1].forced
    if item.turns[-1].limit == 0:
        end = 1
    elif len(item.turns) == 1:
        end = len(forced)
    else:
        starts = range(len(tokens) - len(forced), -1, -1)
        end = next(start for start in starts if tuple(tokens[start : start + len(forced)]) == forced) + len(forced)
    return tokens[:end], tokens[end:]


def forget_unstarted(folder: Path, keep: int) -> None:
    """Removes what a run has written before its first checkpoint: nothing tells its model and its data from others'."""
    # The lock: what another process trains with must not go.
    with Checkpoints(folder, keep) as checkpoints:
        if checkpoints.newest is None:
            for name in (VOCABULARY, HELD_OUT):
                (folder / name).unlink(missing_ok=True)


def kept_vocabulary(lm: LanguageModel, stream: Stream, size: int, tokens: int, folder: Path, tell: Tell) -> np.ndarray:
    """`draft_vocabulary`, [V'] int32, counted once and kept in the folder."""
    file = folder / VOCABULARY
    if not file.is_file():
        tell(f"counting the draft vocabulary on {tokens} tokens")
        write_json(file, draft_vocabulary(lm, stream, size, tokens).tolist())
    return np.asarray(json.loads(file.read_text()), np.int32)


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
    """What keeps heads of one configuration from going on as those of another."""
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
