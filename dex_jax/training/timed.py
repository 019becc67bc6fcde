"""A training of so many minutes without a configuration: the choices that it makes, and the speedup that it brings.

A part of the time goes into texts, the rest into learning from them, and the last minutes into decoding prompts kept
aside. The choices are in budget.json in the run's folder, so that the same command goes on after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from dex_jax.config import ExitsConfig
from dex_jax.decoding.generate import generate
from dex_jax.decoding.program import compile_seconds
from dex_jax.decoding.request import AR
from dex_jax.errors import DexError
from dex_jax.grid import even_depths
from dex_jax.io.whole_files import write_json
from dex_jax.language_model import LanguageModel
from dex_jax.progress import Display, Standing
from dex_jax.tables import markdown
from dex_jax.training.answers import Answers, Text
from dex_jax.training.config import TrainConfig
from dex_jax.training.distillation import Distillation, DistillationOptions, draft_vocabulary
from dex_jax.training.exit_training import ExitTraining, Tell, answers_of, held_out_texts, train_exits
from dex_jax.training.packing import Epochs
from dex_jax.training.sources import SourceOptions, open_mixture
from dex_jax.training.trainer import train

BUDGET, ASIDE = "budget.json", "kept_aside.json"

DATA = ("self=0.6", "python-stdlib=0.4")
"""The sources by default, which need no download."""

STARTS = ("", "Write a Python function", "Explain", "What is", "How do I", "Solve this problem:", "Write a story")

LENGTH = 256
"""Number of tokens of a row, and of the longest text."""

EPOCHS = 2
"""Number of times that each text is trained on. It is a usual number and was not measured."""

COMPARING, LONGEST_COMPARISON = 0.1, 240.0
"""The share of the time, and the most seconds, for decoding the prompts kept aside."""

COMPILING = 3.0
"""The time reserved to compile for the comparison, in multiples of what compiling took for the texts."""

FEWEST_COMPARED = 4
"""Number of prompts that are compared however long it takes."""

STEPS = 1500
"""The batch doubles while there are more than twice as many steps as this."""

ROWS, MOST_ROWS = 4, 64
"""The smallest and the largest batch."""

LARGEST_VOCABULARY = 8192
"""The most tokens of a draft vocabulary, as many as the drafter that ships has."""

FASTER = 1.03
"""Factor by which a recommended way is faster than those that need less. Smaller differences are noise."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """The choices of a run, which are saved, as a resumed training must not choose again."""

    seconds: float = 0.0  # spent before training began, or so far
    tokens: int = 0  # of the texts; 0 while they are being written and nothing is chosen
    batch: int = 0  # rows
    draft_size: int = 0
    warmup_steps: int = 0
    checkpoint_every: int = 0  # steps, about a minute
    compiling: float = 0.0  # seconds left to compile the programs of the comparison


@dataclasses.dataclass(frozen=True)
class Way:
    """The figures of one way to decode the prompts kept aside, as medians over them."""

    name: str
    tokens_per_tick: float
    tokens_per_second: float
    over_plain: float  # times as fast as plain decoding


def train_for(
    lm: LanguageModel,
    minutes: float,
    folder: str | Path,
    *,
    explorers: int | None = None,
    data: Sequence[str] = DATA,
    given: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    answers: str | Path | None = None,
    tell: Tell = print,
) -> list[Way]:
    """Train a drafter, or exits for `explorers` explorers, in so many minutes and write exits.safetensors.

    A second call resumes the folder, for longer if it has more minutes.

    Args:
      lm: the model, loaded with the weights that it will run with.
      minutes: for all of it, compiling included.
      folder: of the run.
      explorers: K of the even grid that exits are trained for; None trains a drafter.
      data: sources, see ExitTraining.
      given: fields of TrainConfig that are not chosen here: batch, learning_rate, seed, dtype.
      mesh: see `training.trainer.train`.
      answers: see `train_exits`.
      tell: called with lines that users should see.

    Returns:
      The ways to decode prompts kept aside, plain decoding first; none for exits, as one device cannot show their
      speedup, and none where the model answers no such prompt.

    Raises:
      DexError: the minutes are not enough, or `train_exits` raises it.
    """
    folder, given, fixed = Path(folder), dict(given or {}), "batch" in (given or {})
    devices = 1 if mesh is None else mesh.size
    config = choices(lm, explorers, data, {"batch": devices * math.ceil(ROWS / devices)} | given)
    mixture = open_mixture(config.data, lm, config.sources, tell)
    budget, comparing = _budget_of(folder), 0.0 if explorers else min(COMPARING * 60 * minutes, LONGEST_COMPARISON)
    if not budget.tokens:
        with contextlib.closing(Display()) as display:
            started = time.perf_counter() - budget.seconds
            timing = _Timing(config, lm, folder / BUDGET, mesh, fixed, started, 60 * minutes, display)
            kept = answers_of(config, lm, mixture, folder, answers, timing.say)
            budget = timing.budget(kept, comparing)
        held_out_texts(config, lm, mixture, folder / ASIDE, tell)
        budget = dataclasses.replace(budget, seconds=time.perf_counter() - started)
        write_json(folder / BUDGET, dataclasses.asdict(budget))
    learning = minutes - (budget.seconds + budget.compiling + comparing) / 60
    if learning <= 0:
        raise DexError(
            f"{minutes:g} minutes leave no time to learn: texts took {budget.seconds / 60:.1f}, compiling takes "
            f"{budget.compiling / 60:.1f} and the comparison {comparing / 60:.1f}: give more, the texts are kept"
        )
    aside = held_out_texts(config, lm, mixture, folder / ASIDE, tell)
    config = _within(config, budget, learning, evaluation_texts=config.evaluation_texts if explorers else 0)
    train_exits(config, lm, folder, mesh=mesh, answers=answers, tell=tell)
    # The first of every source, then the second of each: a short comparison sees all of them.
    prompts = [text[0] for row in itertools.zip_longest(*aside.values()) for text in row if text is not None]
    return compare(lm, folder, prompts, comparing) if prompts and not explorers else []


def choices(lm: LanguageModel, explorers: int | None, data: Sequence[str], given: Mapping[str, Any]) -> ExitTraining:
    """Choose what does not depend on the device: shapes, data, learning rate; raise DexError for a bad `explorers`."""
    layers, width = lm.config.num_layers, lm.config.width
    if explorers is not None and not 2 <= explorers <= layers:
        raise DexError(f"exits serve 2 to {layers} explorers in a model of {layers} layers, not {explorers}")
    shapes: dict[str, Any] = {"fused": True, "width": width, "norm_eps": lm.config.norm_eps}
    shapes["draft_size"] = min(LARGEST_VOCABULARY, lm.config.vocab_size)
    if explorers is None:
        exits = ExitsConfig(kind="mlp", depths=(0,), hidden=64 * round(width * 8 / 3 / 64) or 64, **shapes)
    else:
        exits = ExitsConfig(kind="linear", depths=even_depths(explorers, layers)[:-1], **shapes)
    # Updates of wide matrices add up over more inputs.
    settings: dict[str, Any] = {"learning_rate": 2e-3 * min(1.0, 576 / width), **given}
    return ExitTraining(
        exits=exits,
        train=TrainConfig(steps=10**9, final_rate=0.02, eval_every=None, **settings),
        model=lm.source,
        data=tuple(data),
        sources=SourceOptions(length=LENGTH, prompt_weight=0.3, held_out_least=8, starts=STARTS),
        options=DistillationOptions(draft_steps=1 if explorers else 4),
    )


def _budget_of(folder: Path) -> Budget:
    file = folder / BUDGET
    if not file.is_file():
        return Budget()
    try:
        return Budget(**json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise DexError(f"{file} is damaged: name another --folder") from error


class _Timing(NamedTuple):
    """The measurements that decide what depends on the device and its speed."""

    config: ExitTraining
    lm: LanguageModel
    file: Path  # of the budget
    mesh: Mesh | None
    fixed: bool  # whether the size of a batch was given
    started: float  # of the clock, minus the seconds that earlier processes spent
    seconds: float  # of the whole run
    display: Display

    def say(self, what: str = "writing texts to learn from") -> None:
        """Show the current phase, and how much of the time is left."""
        spent = time.perf_counter() - self.started
        self.display(Standing(what, min(1.0, spent / self.seconds), max(0.0, self.seconds - spent), True))

    def budget(self, kept: Answers, comparing: float) -> Budget:
        """Write texts until only the time to train on them EPOCHS times, and `comparing` seconds, are left."""
        config, texts = self.config, list[Text]()
        seconds_a_token, tokens, compiled_before = 0.0, 0, compile_seconds()
        self.say()
        for shard in kept.shards():
            texts += shard
            tokens += sum(len(text.token) for text in shard)
            if not seconds_a_token:
                self.say("measuring a step of training")
                seconds_a_token = self.seconds_a_token(texts)
            compiling = 0.0 if config.exits.depths[0] else COMPILING * (compile_seconds() - compiled_before)
            spent = time.perf_counter() - self.started
            left = self.seconds - spent - compiling - comparing
            write_json(self.file, dataclasses.asdict(Budget(spent)))
            self.say(f"texts to learn from, {tokens} tokens")
            if tokens * EPOCHS * seconds_a_token >= left:
                break
        steps, doubled = max(1.0, left / (seconds_a_token * config.train.batch * LENGTH)), 0
        while not self.fixed and steps > 2 * STEPS and config.train.batch * 2**doubled < MOST_ROWS:
            steps, doubled = steps / 2, doubled + 1
        different = len(np.unique(np.concatenate([text.token for text in texts])))
        return Budget(
            seconds=spent,
            tokens=tokens,
            batch=config.train.batch * 2**doubled,
            draft_size=min(config.exits.draft_size or different, different),
            warmup_steps=max(1, min(100, int(steps / 20))),
            checkpoint_every=max(1, int(60 * steps / max(left, 60.0))),
            compiling=compiling,
        )

    def seconds_a_token(self, texts: Sequence[Text]) -> float:
        """Measure the seconds that training takes for one token, in a few steps that are thrown away."""
        config, lm = self.config, self.lm
        rows = Epochs(texts, config.train.batch, LENGTH, config.train.seed)
        vocabulary = draft_vocabulary(lm, texts, config.exits.draft_size or lm.config.vocab_size)
        task = Distillation(lm, config.exits, vocabulary, rows, None, config.options, None, None)
        settings, times = dataclasses.replace(config.train, steps=5, warmup_steps=1), []
        with tempfile.TemporaryDirectory() as folder:
            train(task, settings, folder, mesh=self.mesh, notify=lambda _: times.append(time.perf_counter()))
        # The first step compiles, the last one saves.
        tokens = np.mean([np.sum(rows.batch(step).position >= 0) for step in range(5)])
        return float(np.median(np.diff(times[1:-1])) / tokens)


def _within(config: ExitTraining, budget: Budget, minutes: float, evaluation_texts: int) -> ExitTraining:
    settings = dataclasses.replace(
        config.train,
        minutes=minutes,
        batch=budget.batch,
        warmup_steps=budget.warmup_steps,
        checkpoint_every=budget.checkpoint_every,
        log_every=max(1, budget.checkpoint_every // 4),
    )
    exits = dataclasses.replace(config.exits, draft_size=budget.draft_size)
    return dataclasses.replace(
        config, exits=exits, train=settings, tokens=budget.tokens, evaluation_texts=evaluation_texts
    )


def compare(
    lm: LanguageModel, folder: Path, prompts: Sequence[Sequence[int]], seconds: float, tokens: int = 64
) -> list[Way]:
    """Decode prompts in turns: by AR, as decode.py does without what was trained, and with it.

    Args:
      lm: the model.
      folder: of the exits.
      prompts: token ids of each; at least one prompt.
      seconds: rounds over all prompts go on for so long; the first FEWEST_COMPARED prompts are always decoded.
      tokens: the most tokens of each answer.
    """
    ways: dict[str, dict[str, Any]] = {
        "plain decoding": {"method": AR(), "exits": "shared"},
        "decode.py without it": {"method": None, "exits": "default"},
        "decode.py with it": {"method": None, "exits": str(folder)},
    }
    times: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in ways}
    ticks: dict[str, list[float]] = {name: [math.nan] * len(prompts) for name in ways}

    def decode(name: str, at: int, counts: bool = True) -> None:
        out = generate(lm, [list(prompts[at])], max_new_tokens=tokens, **ways[name])
        made = int(out.lengths[0]) - 1
        if counts and made:
            times[name][at].append(out.stats.decode_seconds / made)
            ticks[name][at] = made / int(np.asarray(out.stats.ticks)[0])

    for name in ways:
        decode(name, 0, counts=False)  # compiles
    end, rounds = time.perf_counter() + seconds, 0
    with contextlib.closing(Display()) as display:
        while not rounds or time.perf_counter() < end:
            for at in range(len(prompts)):
                left = end - time.perf_counter()
                if at >= FEWEST_COMPARED and left < 0:
                    break
                share, left = 1 - max(left, 0.0) / max(seconds, 1.0), max(left, 0.0)
                display(Standing("decoding prompts kept aside", share, left, False))
                # Every other round goes backwards, so that no way always follows the same one.
                for name in list(ways)[:: -1 if rounds % 2 else 1]:
                    decode(name, at)
            rounds += 1
    medians = {name: np.array([np.median(each) if each else math.nan for each in rows]) for name, rows in times.items()}
    plain = medians["plain decoding"]
    return [
        Way(name, float(np.nanmedian(ticks[name])), float(np.nanmedian(1 / own)), float(np.nanmedian(plain / own)))
        for name, own in medians.items()
    ]


def table(ways: Sequence[Way]) -> str:
    """Format the figures of `compare` as markdown."""
    rows = [
        [way.name, f"{way.tokens_per_tick:.2f}", f"{way.tokens_per_second:.1f}", f"{way.over_plain:.2f}"]
        for way in ways
    ]
    return markdown(["on prompts kept aside, medians", "tokens a tick", "tokens a second", "over plain"], rows)


def best(ways: Sequence[Way]) -> str:
    """Return the name of the way to recommend: one that needs more must be faster by FASTER than those before."""
    chosen = ways[0]
    for way in ways[1:]:
        if way.over_plain > FASTER * chosen.over_plain:
            chosen = way
    return chosen.name
