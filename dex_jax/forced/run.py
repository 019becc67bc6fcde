"""The one teacher-forcing pass: what each exit says at every answer position of some texts.

Every text runs through the model once. Of each exit's logits only the best few tokens and some figures leave the
device, and the logits of one exit at one block of positions are all that exists at a time.

Letters: N answer positions, X trained depths, P asks, C best tokens kept, L layers, K stages, V' draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.methods import even_depths
from dex_jax.errors import DexError
from dex_jax.forced.asks import Ask, dex_asks, known_as
from dex_jax.forced.programs import Said, Statics, answer_rows, ask_exits
from dex_jax.forced.texts import Text, batches, checked_text, padded
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.nn.exits import initial_heads, parameters_of
from dex_jax.nn.weights import merge_model
from dex_jax.sampling import Sampling

EXPLORERS = (2, 3, 5, 6, 10)
EVERY_LAG = 2**30
BLOCK = 256
"""Positions whose logits exist at one time, of one exit."""


@dataclasses.dataclass(frozen=True, eq=False)
class Forced:
    """What exits said at every answer position of some texts, one text after the other, N positions in all."""

    layers: int  # L
    exits: ExitsConfig  # of which kind they are, at X depths
    asks: tuple[Ask, ...]  # P, in the order of the arrays
    most_lag: int  # lags above it were asked as this one
    grids: tuple[tuple[int, ...], ...]  # depths x_1 < ... < x_K = L of the grids whose asks are all there
    said: Said  # arrays on the host; C >= K - 1 for every grid unless V' is smaller
    target: np.ndarray  # [N] int32, the answers' tokens
    held: np.ndarray  # [N] bool, whether the draft vocabulary holds the target
    lengths: tuple[int, ...]  # how many positions each text has

    @property
    def depths(self) -> tuple[int, ...]:
        """The X trained depths."""
        return self.exits.depths

    def known(self, ask: Ask) -> Ask:
        """The ask as it was asked."""
        return known_as(_nearer(ask, self.most_lag), self.exits, self.layers)

    def place(self, ask: Ask) -> int:
        """Where an ask stands."""
        return self.asks.index(self.known(ask))

    def of(self, texts: Sequence[int]) -> Forced:
        """The same of some of the texts, by number."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        at = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in texts])
        return dataclasses.replace(
            self,
            said=jax.tree.map(lambda field: field[at], self.said),
            target=self.target[at],
            held=self.held[at],
            lengths=tuple(self.lengths[i] for i in texts),
        )


def shared_exits(lm: LanguageModel, depths: tuple[int, ...] | None = None) -> TrainedExits:
    """The model's own final norm and unembedding at some depths, without any training.

    None takes the depths of the even grids that figures are given for.
    """
    layers = lm.config.num_layers
    if depths is None:
        depths = tuple(sorted({x for k in EXPLORERS if k <= layers for x in even_depths(k, layers)} - {layers}))
    config = ExitsConfig("shared", depths, lm.config.width, norm_eps=lm.config.norm_eps)
    model = merge_model(lm.config, lm.layout, lm.weights)
    parameters = parameters_of(initial_heads(config, model.final_scale))
    return TrainedExits(config, parameters, None, lm.fingerprint, {}, "shared")


def measure(
    lm: LanguageModel,
    exits: TrainedExits,
    texts: Sequence[Text],
    *,
    explorers: Sequence[int] = EXPLORERS,
    depths: Sequence[tuple[int, ...]] = (),
    batch: int = 8,
) -> Forced:
    """Asks what figures of exits are made of: every exit with true features, and all that grids ask.

    For kind "attn" one thing is an approximation: of a node's ancestors that are not committed yet, only the parent is
    hidden from the context layer, while older ones count as committed. In a lattice they may be missing too.

    Args:
      lm: the model.
      exits: at trained depths below L.
      texts: (prompt, answer) of token ids, answered greedily by the model; nothing counts after an EOS.
      explorers: K of the even grids; those that the trained depths do not hold are left out.
      depths: further grids, x_1 < ... < x_K = L each.
      batch: B.

    Raises:
      DexError: as `force`, or further grids that the trained depths do not hold.
    """
    layers = lm.config.num_layers
    even = [even_depths(k, layers) for k in explorers if 1 < k <= layers]
    grids = [grid for grid in even if set(grid[:-1]) <= set(exits.config.depths)]
    grids += [_checked_grid(exits.config, layers, grid) for grid in depths]
    asks = [Ask(depth, layers, 1) for depth in exits.config.depths]
    asks += [ask for grid in grids for ask in dex_asks(grid, exits.config)]
    return force(lm, exits, texts, asks, grids=grids, batch=batch, most_lag=2)


def force(
    lm: LanguageModel,
    exits: TrainedExits,
    texts: Sequence[Text],
    asks: Sequence[Ask],
    *,
    count: int = 1,
    grids: Sequence[tuple[int, ...]] = (),
    batch: int = 8,
    most_lag: int = EVERY_LAG,
    sampling: Sampling | None = None,
) -> Forced:
    """Teacher-forces texts and asks exits at every answer position; nothing counts after an EOS.

    The P `asks` are at depths that the exits have, those of all `grids` among them; larger lags than `most_lag` are
    asked with that one. The exits are cast to the model's dtype. At least `count` best tokens are kept; with the
    `sampling` of a single text, by temperature alone, they are those that would be drawn first.

    Raises:
      DexError: exits that do not fit the model, or texts without a prompt or an answer or too long.
    """
    _check_exits(lm.config, exits)
    kept = [checked_text(lm, number, *text) for number, text in enumerate(texts, 1)]
    if not kept or batch < 1:
        raise DexError(
            f"there is nothing to measure: {len(kept)} texts in batches of {batch}, give at least one of each"
        )
    layers = lm.config.num_layers
    known = dict.fromkeys(known_as(_nearer(ask, most_lag), exits.config, layers) for ask in asks)
    size = lm.config.vocab_size if exits.vocabulary is None else len(exits.vocabulary)
    count = min(size, max([count, *(len(grid) - 1 for grid in grids)]))
    statics = Statics(lm.config, lm.layout, exits.config, tuple(sorted(known)), count)
    parameters = {name: jnp.asarray(value, lm.dtype) for name, value in exits.parameters.items()}
    draft = None if exits.vocabulary is None else jnp.asarray(exits.vocabulary, jnp.int32)

    longest = max(len(answer) for _, answer in kept)
    found: dict[int, Said] = {}
    for chosen in batches([len(prompt) + len(answer) for prompt, answer in kept], batch):
        ids, at = padded([kept[i] for i in chosen], batch, longest)
        rows = answer_rows(statics, lm.weights, parameters, jnp.asarray(ids), jnp.asarray(at))
        index = np.concatenate([row * longest + np.arange(len(kept[i][1])) for row, i in enumerate(chosen)])
        position = np.concatenate([len(kept[i][0]) + np.arange(len(kept[i][1])) for i in chosen])
        blocks = []
        for first in range(0, len(index), BLOCK):
            part = index[first : first + BLOCK]
            block, after = (
                jnp.asarray(np.pad(each, (0, BLOCK - len(part)))) for each in (part, position[first : first + BLOCK])
            )
            said = jax.device_get(ask_exits(statics, lm.weights, parameters, draft, rows, block, sampling, after))
            blocks.append(Said(*(field[: len(part)] for field in said)))
        joined = _joined(blocks)
        bounds = np.cumsum([0, *(len(kept[i][1]) for i in chosen)])
        for row, i in enumerate(chosen):
            found[i] = Said(*(field[bounds[row] : bounds[row + 1]] for field in joined))
    target = np.concatenate([np.asarray(answer, np.int32) for _, answer in kept])
    return Forced(
        layers=layers,
        exits=exits.config,
        asks=statics.asks,
        most_lag=most_lag,
        grids=tuple(grids),
        said=_joined([found[i] for i in range(len(kept))]),
        target=target,
        held=np.ones(len(target), bool) if exits.vocabulary is None else np.isin(target, exits.vocabulary),
        lengths=tuple(len(answer) for _, answer in kept),
    )


def _nearer(ask: Ask, most_lag: int) -> Ask:
    return ask._replace(lag=min(ask.lag, most_lag))


def _joined(parts: Sequence[Said]) -> Said:
    return jax.tree.map(lambda *fields: np.concatenate(fields), *parts)


def _checked_grid(config: ExitsConfig, layers: int, grid: tuple[int, ...]) -> tuple[int, ...]:
    ascending = all(a < b for a, b in itertools.pairwise(grid))
    if not (ascending and len(grid) > 1 and grid[-1] == layers and set(grid[:-1]) <= set(config.depths)):
        trained = ", ".join(map(str, config.depths))
        raise DexError(
            f"the grid {','.join(map(str, grid))} does not ascend through depths that have exits ({trained}) to the "
            f"last layer, {layers}: give another"
        )
    return tuple(grid)


def _check_exits(model: ModelConfig, found: TrainedExits) -> None:
    exits, vocabulary = found.config, found.vocabulary
    if exits.width != model.width or exits.depths[-1] >= model.num_layers:
        raise DexError(
            f"exits of width {exits.width} at depths {exits.depths} do not fit a model of width {model.width} and "
            f"{model.num_layers} layers: use those that were trained for it"
        )
    size = None if vocabulary is None else len(vocabulary)
    if size != exits.draft_size:
        raise DexError(f"the exits need a draft vocabulary of {exits.draft_size} tokens and were given {size}")
    if vocabulary is not None and not (
        np.all(np.diff(vocabulary) > 0) and vocabulary[0] >= 0 and vocabulary[-1] < model.vocab_size
    ):
        raise DexError("the draft vocabulary must hold ascending token ids of the model's vocabulary, without repeats")
