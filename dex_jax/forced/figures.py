"""How good trained exits are: agreement, divergence, calibration, and the ticks that they predict.

Letters: N answer positions of all texts, X trained depths, P pairs of an exit and what it reads of the position before,
K stages of a grid, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dex_jax.config import ExitsConfig
from dex_jax.decoding.generate import generate
from dex_jax.decoding.methods import AR, even_depths
from dex_jax.decoding.output import ticks_of
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.errors import DexError
from dex_jax.evaluation.exit_forcing import EXPLORERS, Measurement, Text, measure
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel, merge_model
from dex_jax.lattice import NO_TOKEN
from dex_jax.nn.exits import ExitHeads, initial_heads, parameters_of
from dex_jax.prompts import Prompt

BINS = 10


def shared_exits(lm: LanguageModel, depths: tuple[int, ...] | None) -> TrainedExits:
    """The model's own final norm and unembedding at some depths, without any training.

    Args:
      lm: the model.
      depths: below L; None takes those of the even grids that figures are given for.
    """
    layers = lm.config.num_layers
    if depths is None:
        depths = tuple(sorted({x for k in EXPLORERS if k <= layers for x in even_depths(k, layers)} - {layers}))
    config = ExitsConfig("shared", depths, lm.config.width, norm_eps=lm.config.norm_eps)
    model = merge_model(lm.config, lm.layout, lm.weights)
    parameters = parameters_of(initial_heads(config, model.final_norm[...]))
    return TrainedExits(config, parameters, None, lm.fingerprint, {}, "shared")


@dataclasses.dataclass(frozen=True)
class GridFigures:
    """What the exits of one even grid come to, with DECS and rows that never prune.

    Attributes:
      explorers: K.
      coverage: share of tokens that one of the first m exits of a fresh root gives, m = 1..K-1.
      ticks_per_token: ticks over tokens after the first; NaN where no text has two tokens.
      depth_side_speedup: sum of K (n - 1) over sum of ticks; NaN likewise.
    """

    explorers: int
    coverage: tuple[float, ...]
    ticks_per_token: float
    depth_side_speedup: float


@dataclasses.dataclass(frozen=True)
class ExitFigures:
    """Figures of trained exits over a set of texts; shares lie between 0 and 1, a token counts once.

    "True" means that exits that read the position before were given its final features.

    Attributes:
      texts, tokens: how many texts, and answer tokens in them up to the first EOS.
      depths: the X trained depths.
      agreement: [X], share of answer tokens that are the exit's best token, true.
      agreement_own: (depth, previous depth, share): the same where `ExitHeads.base` at the previous depth stands in for
        the final features; those that the grids use, none for exits that do not read the position before.
      divergence: [X], mean KL from the final distribution over draft vocabulary and rest, in nats, true.
      calibration_error: [X], expected calibration error of the best token's probability, 10 bins of equal mass, true.
      ead: [X + 1], share of tokens by the first trained depth that gives them, the last for none (L), true, no DECS.
      draft_share: share of answer tokens that the draft vocabulary holds, 1 for the full one.
      off_greedy: share of answer tokens that are not the final layer's best token here; above the odd tie, the answers
        were not this model's greedy ones.
      grids: one for each K whose even grid the trained depths hold.
    """

    texts: int
    tokens: int
    depths: tuple[int, ...]
    agreement: tuple[float, ...]
    agreement_own: tuple[tuple[int, int, float], ...]
    divergence: tuple[float, ...]
    calibration_error: tuple[float, ...]
    ead: tuple[float, ...]
    draft_share: float
    off_greedy: float
    grids: tuple[GridFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers; null for what is undefined."""
        return _jsonable(dataclasses.asdict(self))


def answers(lm: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int, batch: int) -> list[Text]:
    """The model's greedy answers, in the order of the prompts.

    Args:
      lm: the model.
      prompts: as `dex_jax.generate` takes them.
      max_new_tokens: of each answer, an EOS that ends it included.
      batch: prompts of similar length answered at a time.

    Raises:
      DexError: as `dex_jax.generate`.
    """
    if batch < 1:
        raise DexError(f"batch must be at least 1, not {batch}")
    ids = [lm.encode(prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    texts: dict[int, Text] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        # The last batch is filled up, so that it needs no program of its own.
        filled = [ids[i] for i in chosen] + [ids[chosen[-1]]] * (batch - len(chosen))
        out = generate(lm, filled, method=AR(), max_new_tokens=max_new_tokens, exits="shared")
        for row, i in enumerate(chosen):
            texts[i] = (ids[i], out.tokens[row, : out.lengths[row]].tolist())
    return [texts[i] for i in range(len(ids))]


def grouped_figures(
    lm: LanguageModel,
    heads: ExitHeads,
    vocabulary: np.ndarray | None,
    groups: Mapping[str, Sequence[Text]],
    *,
    explorers: Sequence[int] = EXPLORERS,
    batch: int = 8,
) -> dict[str, ExitFigures]:
    """Figures of each named group of texts, and "mean", the mean of the groups' figures, when there are several.

    Args:
      lm: the model.
      heads, vocabulary, explorers, batch: as of `exit_forcing.measure`.
      groups: name -> texts, (prompt, answer) of token ids each.

    Raises:
      DexError: no group or an empty one, and as of `exit_forcing.measure`.
    """
    if not groups or not all(groups.values()):
        raise DexError("there is nothing to measure: give at least one group, and at least one text in each")
    measured = measure(lm, heads, vocabulary, [t for g in groups.values() for t in g], explorers=explorers, batch=batch)
    found, start = {}, 0
    for name, texts in groups.items():
        found[name] = figures_of(measured.of(range(start, start + len(texts))))
        start += len(texts)
    if len(found) > 1:
        found["mean"] = mean_figures(list(found.values()))
    return found


def figures_of(measured: Measurement) -> ExitFigures:
    """The figures of a measurement."""
    said, trained = measured.said, len(measured.depths)
    right = (said.best[:, :, 0] == measured.target[:, None]).T
    gives = np.concatenate([right[:trained], np.ones((1, len(measured.target)), bool)])
    return ExitFigures(
        texts=len(measured.lengths),
        tokens=len(measured.target),
        depths=measured.depths,
        agreement=_floats(right[:trained].mean(axis=1)),
        agreement_own=tuple(
            (depth, previous, float(row.mean()))
            for (depth, previous), row in zip(measured.pairs[trained:], right[trained:], strict=True)
        ),
        divergence=_floats(said.divergence[:, :trained].mean(axis=0, dtype=np.float64)),
        calibration_error=tuple(
            calibration_error(confidence, row)
            for confidence, row in zip(said.confidence.T[:trained], right[:trained], strict=True)
        ),
        ead=_floats(np.bincount(gives.argmax(axis=0), minlength=trained + 1) / len(measured.target)),
        draft_share=float(measured.held.mean()),
        off_greedy=float((said.greedy != measured.target).mean()),
        grids=tuple(_grid_figures(measured, grid) for grid in measured.grids),
    )


def first_exits(measured: Measurement, grid: tuple[int, ...], born_at: int) -> np.ndarray:
    """The first exit of a node that gives its next token, DECS masking along the way.

    Args:
      measured: N tokens.
      grid: depths of a grid.
      born_at: 1..K, of the node; K for a fresh root. When exit k is asked, the node's parent has done
        min(K, k + born_at) stages, and that is what the exit reads.

    Returns:
      [N] int32: 1..K, K where none gives it.
    """
    stages = len(grid)
    right = proposals(measured, grid, born_at)[0] == measured.target[:, None]
    return np.where(right.any(axis=1), right.argmax(axis=1) + 1, stages).astype(np.int32)


def proposals(measured: Measurement, grid: tuple[int, ...], born_at: int) -> tuple[np.ndarray, np.ndarray]:
    """What the exits of a grid propose under a node, one after the other with DECS.

    Args:
      measured, grid, born_at: as of `first_exits`.

    Returns:
      (tokens [N, K - 1] int32, NO_TOKEN where an exit has nothing left; their log-probabilities [N, K - 1] float32,
      -inf there).
    """
    stages, count = len(grid), len(measured.target)
    held = np.full((count, stages - 1), NO_TOKEN, np.int32)
    score = np.full((count, stages - 1), -np.inf, np.float32)
    for k in range(1, stages):
        pair = _pair(measured, grid[k - 1], grid[min(stages, k + born_at) - 1])
        best = measured.said.best[:, pair]
        free = ~(best[:, :, None] == held[:, None, : k - 1]).any(axis=-1)
        place, left = free.argmax(axis=1)[:, None], free.any(axis=1)
        held[:, k - 1] = np.where(left, np.take_along_axis(best, place, axis=1)[:, 0], NO_TOKEN)
        found = np.take_along_axis(measured.said.log_probability[:, pair], place, axis=1)[:, 0]
        score[:, k - 1] = np.where(left, found, -np.inf)
    return held, score


def predicted_exits(measured: Measurement, grid: tuple[int, ...]) -> list[np.ndarray]:
    """`Stats.exits` of each text as a loop whose rows never prune would count them: -1, then 1..K; [n] int32 each."""
    stages = len(grid)
    table = np.stack([first_exits(measured, grid, born_at) for born_at in range(1, stages + 1)])
    found, start = [], 0
    for length in measured.lengths:
        exits = np.full(length, PREFILL_EXIT, np.int32)
        born_at = stages
        for i in range(1, length):
            born_at = exits[i] = table[born_at - 1, start + i]
        found.append(exits)
        start += length
    return found


def mean_figures(figures: Sequence[ExitFigures]) -> ExitFigures:
    """The mean of each figure over several of the same exits, each counting alike; texts and tokens are added up."""
    mean = _mean(figures)
    return dataclasses.replace(mean, texts=sum(f.texts for f in figures), tokens=sum(f.tokens for f in figures))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: the mean over bins of equal mass of |mean confidence - share right|.

    Args:
      confidence: [N] probabilities.
      right: [N] bool.
    """
    order = np.argsort(confidence, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [abs(confidence[part].mean(dtype=np.float64) - right[part].mean()) * len(part) for part in bins]
    return float(sum(gaps) / len(order))


def _pair(measured: Measurement, depth: int, previous: int) -> int:
    """Where a pair stands in `measured.pairs`; exits that do not read the position before have the true one only."""
    reads = len(measured.pairs) > len(measured.depths)
    return measured.pairs.index((depth, previous if reads else measured.layers))


def _grid_figures(measured: Measurement, grid: tuple[int, ...]) -> GridFigures:
    stages = len(grid)
    fresh = first_exits(measured, grid, born_at=stages)
    exits = predicted_exits(measured, grid)
    ticks = sum(ticks_of(row, len(row), stages) for row in exits)
    tokens = sum(len(row) - 1 for row in exits)
    return GridFigures(
        explorers=stages,
        coverage=tuple(float((fresh <= m).mean()) for m in range(1, stages)),
        ticks_per_token=ticks / tokens if tokens else math.nan,
        depth_side_speedup=stages * tokens / ticks if ticks else math.nan,
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{name: _mean([getattr(value, name) for value in values]) for name in names})  # type: ignore
    if isinstance(first, tuple):
        return tuple(_mean(part) for part in zip(*values, strict=True))
    return float(np.mean(values)) if isinstance(first, float) else first


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_jsonable(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
