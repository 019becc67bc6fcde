"""The figures of trained exits on a model's answers: agreement, divergence, and the ticks that they predict.

Letters: N answer positions of all texts, X trained depths, K stages of a grid, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dex_jax.decoding.forced import Forced, PromptAndAnswer, batches, dex_exits, first_exits, force
from dex_jax.decoding.generate import generate
from dex_jax.decoding.record import ticks_of
from dex_jax.decoding.request import AR
from dex_jax.errors import DexError
from dex_jax.grid import even_depths
from dex_jax.io.exits_file import TrainedExits
from dex_jax.io.prompts import Prompt
from dex_jax.io.whole_files import plain
from dex_jax.language_model import LanguageModel
from dex_jax.tables import markdown

EXPLORERS = (2, 3, 5, 6, 10)
"""K of the even grids that the model's own head is measured on; trained exits are on all that their depths hold."""


@dataclasses.dataclass(frozen=True)
class GridFigures:
    """The figures of the exits of one even grid, with DECS and rows that never prune."""

    explorers: int  # K
    coverage: tuple[float, ...]  # share of tokens that one of the first m exits of a fresh root gives, m = 1..K-1
    ticks_per_token: float  # ticks over tokens after the first; NaN where no text has two tokens
    depth_side_speedup: float  # sum of K (n - 1) over sum of ticks; NaN likewise


@dataclasses.dataclass(frozen=True)
class ExitFigures:
    """Figures of trained exits over a set of texts; shares lie between 0 and 1, a token counts once.

    "True" means that exits which read the position before get its final features.

    Attributes:
      texts, tokens: numbers of texts, and of their answer tokens up to the first EOS.
      depths: the X trained depths.
      agreement: [X], share of answer tokens that are the exit's best token, true.
      agreement_own: (depth, previous depth, share): the same where `ExitHeads.base` at the previous depth stands in for
        the final features, for all pairs that the grids use; () for exits that do not read the position before.
      divergence: [X], mean KL from the final distribution over draft vocabulary and rest, in nats, true.
      ead: [X + 1], share of tokens by the first trained depth that gives them, last those of depth L; true, no DECS.
      draft_share: share of answer tokens that the draft vocabulary holds, 1 for the full one.
      grids: one for each K with an even grid that the trained depths hold.
    """

    texts: int
    tokens: int
    depths: tuple[int, ...]
    agreement: tuple[float, ...]
    agreement_own: tuple[tuple[int, int, float], ...]
    divergence: tuple[float, ...]
    ead: tuple[float, ...]
    draft_share: float
    grids: tuple[GridFigures, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, with None for what is undefined."""
        return plain(dataclasses.asdict(self))


def answers(lm: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int, batch: int) -> list[PromptAndAnswer]:
    """Return the model's greedy answers to prompts, as texts in the order of the prompts.

    Prompts of similar length are answered a `batch` at a time. Raise DexError where `dex_jax.generate` does.
    """
    if batch < 1:
        raise DexError(f"batch must be at least 1, not {batch}")
    ids = [lm.encode(prompt) for prompt in prompts]
    texts: dict[int, PromptAndAnswer] = {}
    for chosen in batches([len(each) for each in ids], batch):
        # The last batch is filled up, so that it needs no program of its own.
        filled = [ids[i] for i in chosen] + [ids[chosen[-1]]] * (batch - len(chosen))
        out = generate(lm, filled, method=AR(), max_new_tokens=max_new_tokens, exits="shared")
        for row, i in enumerate(chosen):
            texts[i] = (ids[i], out.tokens[row, : out.lengths[row]].tolist())
    return [texts[i] for i in range(len(ids))]


def even_grids(layers: int) -> list[tuple[int, ...]]:
    """Return the even grids x_1 < ... < x_K = L of those EXPLORERS that have at least a layer each."""
    return [even_depths(k, layers) for k in EXPLORERS if k <= layers]


def grouped_figures(
    lm: LanguageModel, exits: TrainedExits, groups: Mapping[str, Sequence[PromptAndAnswer]], batch: int = 8
) -> dict[str, ExitFigures]:
    """Measure exits on each named group of texts, and add "mean", the mean of the groups, when there are several.

    Args:
      lm: the model.
      exits: trained exits below L; even grids that their depths do not hold are left out.
      groups: name -> texts, (prompt, answer) of token ids each, answered greedily by the model.
      batch: B.

    Raises:
      DexError: there is no group or an empty one, or `forced.force` raises it.
    """
    if not groups or not all(groups.values()):
        raise DexError("there is nothing to measure: give at least one group, and at least one text in each")
    layers, depths = lm.config.num_layers, set(exits.config.depths)
    grids = [grid for k in range(2, layers + 1) if set((grid := even_depths(k, layers))[:-1]) <= depths]
    forced = force(lm, exits, [text for texts in groups.values() for text in texts], grids, batch=batch)
    found, start = {}, 0
    for name, texts in groups.items():
        found[name] = figures_of(forced.of(range(start, start + len(texts))))
        start += len(texts)
    if len(found) > 1:
        found["mean"] = mean_figures(list(found.values()))
    return found


def figures_of(forced: Forced) -> ExitFigures:
    """Return the figures of what `forced.force` found."""
    outputs, count = forced.outputs, len(forced.answer_tokens)
    right = (outputs.best[:, :, 0] == forced.answer_tokens[:, None]).T
    depths = forced.exits.depths
    true = [forced.asks.index((depth, forced.layers)) for depth in depths]
    gives = np.concatenate([right[true], np.ones((1, count), bool)])
    return ExitFigures(
        texts=len(forced.lengths),
        tokens=count,
        depths=depths,
        agreement=tuple(right[true].mean(axis=1).tolist()),
        agreement_own=tuple(
            (depth, source, float(row.mean()))
            for (depth, source), row in zip(forced.asks, right, strict=True)
            if source != forced.layers
        ),
        divergence=tuple(outputs.divergence[:, true].mean(axis=0, dtype=np.float64).tolist()),
        ead=tuple((np.bincount(gives.argmax(axis=0), minlength=len(gives)) / count).tolist()),
        draft_share=float(forced.held.mean()),
        grids=tuple(_grid_figures(forced, grid) for grid in forced.grids),
    )


def mean_figures(figures: Sequence[ExitFigures]) -> ExitFigures:
    """Return the unweighted mean of several figures of the same exits; texts and tokens are added up."""
    mean = _mean(figures)
    return dataclasses.replace(mean, texts=sum(f.texts for f in figures), tokens=sum(f.tokens for f in figures))


def _grid_figures(forced: Forced, grid: tuple[int, ...]) -> GridFigures:
    stages = len(grid)
    fresh, exits = first_exits(forced, grid, stages), dex_exits(forced, grid)
    ticks = sum(ticks_of(row, len(row), stages) for row in exits)
    tokens = sum(len(row) - 1 for row in exits)
    return GridFigures(
        explorers=stages,
        coverage=tuple(float((fresh <= m).mean()) for m in range(1, stages)),
        ticks_per_token=ticks / tokens if tokens else math.nan,
        depth_side_speedup=stages * tokens / ticks if ticks else math.nan,
    )


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{name: _mean([getattr(value, name) for value in values]) for name in names})  # type: ignore
    if isinstance(first, tuple):
        return tuple(_mean(part) for part in zip(*values, strict=True))
    return float(np.mean(values)) if isinstance(first, float) else first


def tables(groups: Mapping[str, ExitFigures]) -> str:
    """Format the figures of groups as markdown: tables by depth and by K, then a line on all exits."""
    return "\n\n".join(f"**{name}**\n\n{_group_tables(figures)}" for name, figures in groups.items())


def _group_tables(figures: ExitFigures) -> str:
    columns = (figures.agreement, figures.divergence, figures.ead)
    by_depth = [
        [str(depth), *(f"{share:.3f}" for share in shares)]
        for depth, *shares in zip(figures.depths, *columns, strict=False)
    ]
    parts = [markdown(["depth", "agreement", "KL (nats)", "EAD here"], by_depth)]
    if figures.agreement_own:
        own = [[str(depth), str(previous), f"{share:.3f}"] for depth, previous, share in figures.agreement_own]
        parts.append(markdown(["depth", "previous position at depth", "agreement"], own))
    by_grid = [
        [
            str(grid.explorers),
            _number(grid.depth_side_speedup),
            _number(grid.ticks_per_token),
            " ".join(f"{share:.2f}" for share in grid.coverage),
        ]
        for grid in figures.grids
    ]
    if by_grid:
        parts.append(markdown(["K", "depth-side speedup", "ticks per token", "coverage with DECS"], by_grid))
    parts.append(
        f"{figures.tokens} tokens of {figures.texts} texts; {figures.ead[-1]:.3f} of them no trained depth gives; "
        f"the draft vocabulary holds {figures.draft_share:.3f}."
    )
    return "\n\n".join(parts)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
