"""Which exit heads a generation uses, and at which depths."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any, cast

from dex_jax.config import ModelConfig
from dex_jax.decoding.known_trees import known_trees
from dex_jax.decoding.layerskip import LayerSkip
from dex_jax.decoding.methods import Dex, Method, Schedule
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits, load_exits
from dex_jax.nn.exits import select_exits

DEFAULTS = Path(__file__).resolve().parents[1] / "default_exits"
"""One file for each model that trained exits ship for."""


_SAID: set[tuple[str, str]] = set()
"""Models, by their fingerprint, and remarks."""


@dataclasses.dataclass(frozen=True)
class ResolvedExits:
    """What a generation's `exits` comes to.

    Attributes:
      schedule: with exit depths that the exits are trained at.
      source: where they came from, "shared" for the model's own head at every depth, None when K = 1 and for serial
        rounds that draft from the text alone.
      trained: heads at x_1 .. x_{K-1}, or the drafter of serial rounds at depth 0; None for "shared" and without any.
      remarks: sentences that a user should see.
    """

    schedule: Schedule
    source: str | None
    trained: TrainedExits | None
    remarks: tuple[str, ...] = ()

    def say(self, fingerprint: str) -> None:
        """Prints the remarks on stderr, each once in a process for a model."""
        for remark in self.remarks:
            if (fingerprint, remark) not in _SAID:
                _SAID.add((fingerprint, remark))
                print(remark, file=sys.stderr)


def resolve_method(
    method: Method, exits: str | os.PathLike | TrainedExits, config: ModelConfig, fingerprint: str
) -> ResolvedExits:
    """The schedule of a method and its exits; arguments and errors as of `resolve_exits` and `method.schedule_for`.

    A method that is to run `everywhere` and names no depths takes those at which the exits are trained.
    """
    if getattr(method, "everywhere", False):
        method = dataclasses.replace(cast(Any, method), depths=all_depths(exits, config, fingerprint))
    schedule = method.schedule_for(config.num_layers)
    if schedule.tree is not None:
        given_tree = isinstance(method, Dex) and method.tree is not None
        return _resolve_drafter(exits, schedule, config, fingerprint, given_tree)
    given = getattr(method, "depths", None) is not None or isinstance(method, LayerSkip)
    return resolve_exits(exits, schedule, config, fingerprint, given_depths=given)


def resolve_exits(
    exits: str | os.PathLike | TrainedExits,
    schedule: Schedule,
    config: ModelConfig,
    fingerprint: str,
    *,
    given_depths: bool = False,
) -> ResolvedExits:
    """The exits of a schedule.

    Args:
      exits: "shared" (the model's own final norm and unembedding at every depth), "default" (what ships for the model,
        "shared" when nothing does), a path, or what `load_exits` gave.
      schedule: as the method says. Where an even grid asks for depths that are not trained, the nearest ones are taken.
      config: of the model.
      fingerprint: of the model.
      given_depths: whether the user chose the depths; they are not moved then.

    Raises:
      DexError: no exits there, exits of another width, vocabulary or number of layers, or depths that they do not have.
    """
    if schedule.stages == 1:
        return ResolvedExits(schedule, None, None)
    if isinstance(exits, str) and exits == "shared":
        return ResolvedExits(schedule, "shared", None)
    if isinstance(exits, str) and exits == "default":
        shipped = default_exits(fingerprint)
        if shipped is None or schedule.stages - 1 > shipped.count:
            why = "no trained exits ship with this model" if shipped is None else "the shipped exits are fewer"
            return ResolvedExits(schedule, "shared", None, (f'{why}: exits="shared" is used',))
        trained, source = shipped, "default"
        if given_depths and not set(schedule.depths[:-1]) <= set(shipped.config.depths):
            remark = 'the shipped exits are not trained at all these depths: exits="shared" is used'
            return ResolvedExits(schedule, "shared", None, (remark,))
    else:
        trained = exits if isinstance(exits, TrainedExits) else load_exits(exits)
        source = trained.source
    _check_fit(trained, config)
    remarks = []
    if trained.fingerprint != fingerprint:
        remarks.append(f"the exits in {source} were trained on another model: tokens stay the same, ticks may be more")
    depths = schedule.depths
    reached = tuple(depth for depth in trained.config.depths if depth > 0)
    if not reached:
        raise DexError(
            f'{source} holds a drafter, an exit at depth 0, which only schedule="serial" uses: choose that, or other '
            "exits"
        )
    if not set(depths[:-1]) <= set(reached):
        trained_at = ", ".join(map(str, trained.config.depths))
        if given_depths:
            raise DexError(f"the exits in {source} are trained at depths {trained_at}: choose depths among them")
        depths = (*nearest_depths(depths[:-1], reached, depths[-1], source), depths[-1])
        moved = ", ".join(map(str, depths))
        remarks.append(f"exits are trained at depths {trained_at}: the exit depths are {moved}")
    chosen = tuple(depths[:-1])
    subset, parameters = select_exits(trained.config, trained.parameters, chosen)
    trained = dataclasses.replace(trained, config=subset, parameters=parameters)
    return ResolvedExits(dataclasses.replace(schedule, depths=depths), source, trained, tuple(remarks))


def _resolve_drafter(
    exits: str | os.PathLike | TrainedExits,
    schedule: Schedule,
    config: ModelConfig,
    fingerprint: str,
    given_tree: bool,
) -> ResolvedExits:
    """The drafter of serial rounds, with the tree that was found for it; without one the text alone drafts."""
    drafter, source = find_drafter(exits, fingerprint)
    if drafter is None:
        return ResolvedExits(schedule, None, None)
    if not drafter.config.is_drafter:
        depths = ", ".join(map(str, drafter.config.depths))
        raise DexError(
            "serial rounds draft with one fused exit at depth 0 without attention (kind mlp, for example), and "
            f"{source} has {'fused ' * drafter.config.fused}exits of kind {drafter.config.kind} at depths {depths}: "
            "train one (configs/smollm2_135m_drafter.py), or leave exits out"
        )
    _check_fit(drafter, config)
    remarks = []
    if drafter.fingerprint != fingerprint:
        remarks.append(
            f"the drafter in {source} was trained on another model: tokens stay the same, rounds may be more"
        )
    if not given_tree:
        tree = known_trees(drafter)[0].shape
        schedule = dataclasses.replace(schedule, rows=tree.rows, tree=tree)
    return ResolvedExits(schedule, source, drafter, tuple(remarks))


def find_drafter(
    exits: str | os.PathLike | TrainedExits, fingerprint: str
) -> tuple[TrainedExits, str] | tuple[None, None]:
    """What `exits` means to serial rounds: (exits, where from).

    "shared" is none, "default" what ships for the model, and anything else as `resolve_exits` takes it, unchecked.
    """
    if isinstance(exits, str) and exits == "shared":
        return None, None
    if isinstance(exits, str) and exits == "default":
        shipped = default_drafter(fingerprint)
        return (None, None) if shipped is None else (shipped, "default")
    trained = exits if isinstance(exits, TrainedExits) else load_exits(exits)
    return trained, trained.source


def stand_at_depths(exits: str | os.PathLike | TrainedExits, fingerprint: str) -> bool:
    """Whether these are exits of one's own that only explorers side by side can use: no drafter, and not by default."""
    found, _ = find_drafter(exits, fingerprint)
    return found is not None and not found.config.is_drafter


def all_depths(exits: str | os.PathLike | TrainedExits, config: ModelConfig, fingerprint: str) -> tuple[int, ...]:
    """Every depth that `exits` stand at, and L."""
    trained: TrainedExits | None = None
    if isinstance(exits, TrainedExits):
        trained = exits
    elif exits == "default":
        trained = default_exits(fingerprint)
    elif exits != "shared":
        trained = load_exits(exits)
    if trained is None:
        return tuple(range(1, config.num_layers + 1))
    _check_fit(trained, config)
    return (*(depth for depth in trained.config.depths if depth > 0), config.num_layers)


@functools.lru_cache(maxsize=2)
def default_exits(fingerprint: str) -> TrainedExits | None:
    """The exits that ship for a model, by its fingerprint."""
    return _shipped(f"{fingerprint}.safetensors")


@functools.lru_cache(maxsize=2)
def default_drafter(fingerprint: str) -> TrainedExits | None:
    """The drafter of serial rounds that ships for a model, by its fingerprint."""
    return _shipped(f"{fingerprint}.drafter.safetensors")


def _shipped(name: str) -> TrainedExits | None:
    file = DEFAULTS / name
    return load_exits(file) if file.is_file() else None


def nearest_depths(wanted: tuple[int, ...], trained: tuple[int, ...], layers: int, source: str) -> tuple[int, ...]:
    """As many different trained depths, ascending, with the least sum of distances to the wanted ones.

    Of several such choices the one whose longest stage, that up to `layers` among them, has the fewest layers.

    Raises:
      DexError: fewer trained than wanted.
    """
    if len(wanted) > len(trained):
        raise DexError(
            f"the exits in {source} are trained at {len(trained)} depths, which serve at most {len(trained) + 1} "
            f"explorers, not {len(wanted) + 1}: ask for fewer"
        )
    # The best (distance, longest stage, depths) for the wanted depths so far, one for each last depth.
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, (0,))]
    for want in wanted:
        best = [
            min(
                (distance + abs(depth - want), max(longest, depth - depths[-1]), (*depths, depth))
                for distance, longest, depths in best
                if depths[-1] < depth
            )
            for depth in trained
            if depth > best[0][2][-1]
        ]
    return min((distance, max(longest, layers - depths[-1]), depths) for distance, longest, depths in best)[2][1:]


def _check_fit(trained: TrainedExits, config: ModelConfig) -> None:
    where = f"the exits in {trained.source}"
    if trained.config.width != config.width:
        raise DexError(f"{where} are for a model of width {trained.config.width}, and this one has {config.width}")
    if trained.config.depths[-1] >= config.num_layers:
        raise DexError(
            f"{where} reach depth {trained.config.depths[-1]}, and this model has {config.num_layers} layers"
        )
    if trained.vocabulary is not None and trained.vocabulary[-1] >= config.vocab_size:
        raise DexError(
            f"{where} know token {trained.vocabulary[-1]}, and this model's vocabulary ends at {config.vocab_size - 1}"
        )
