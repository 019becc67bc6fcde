"""Which trained heads a generation uses, and at which depths: a method and `exits` become a schedule and its heads."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

from dex_jax.config import ModelConfig
from dex_jax.decoding.dex.drafters import GivenDrafter, fitted
from dex_jax.decoding.dex.trees import known_trees
from dex_jax.decoding.methods import DEFAULT_EXPLORERS, Dex, Method, Schedule
from dex_jax.errors import DexError
from dex_jax.io.eagle import find_eagle
from dex_jax.io.exits_file import TrainedExits, load_exits
from dex_jax.nn.exits import select_exits

DEFAULTS = Path(__file__).resolve().parents[1] / "default_exits"
"""One file for each model that trained exits ship for."""


GivenExits = str | os.PathLike | GivenDrafter
"""What users give as `exits`."""

_SAID: set[tuple[str, str]] = set()
"""Models, by their fingerprint, and remarks."""


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A method as it runs on a model, with its trained heads."""

    schedule: Schedule  # with exit depths that the exits are trained at, and the tree that was found for the drafter
    source: str | None = None  # of the exits, "shared" for the model's own head at every depth; None when K = 1
    exits: TrainedExits | None = None  # heads at x_1 .. x_{K-1}; None for "shared" and when K = 1
    drafter: GivenDrafter | None = None  # exit 0; None where the text alone drafts, or nothing does
    drafter_source: str | None = None
    remarks: tuple[str, ...] = ()  # sentences that a user should see

    def say(self, fingerprint: str) -> None:
        """Prints the remarks on stderr, each once in a process for a model."""
        for remark in self.remarks:
            if (fingerprint, remark) not in _SAID:
                _SAID.add((fingerprint, remark))
                print(remark, file=sys.stderr)


class Found(NamedTuple):
    """What a user's `exits` names."""

    fingerprint: str  # of the model
    source: str  # of heads at depths above 0: "shared", "default" or a path
    drafter: GivenDrafter | None  # exit 0; None for the text alone
    drafter_source: str | None  # "default" or a path, None without one
    own: str | None = None  # what the user gave himself is "exits", the "drafter", or neither (None)
    given: TrainedExits | None = None  # by the user, heads at depths above 0

    @property
    def exits(self) -> TrainedExits | None:
        """Heads at depths above 0, None for the model's own; those that ship are large, and read when asked for."""
        return default_exits(self.fingerprint) if self.source == "default" else self.given


def find_exits(exits: GivenExits, fingerprint: str) -> Found:
    """What `exits` means for a model: "shared", "default", a path, a hub id, or what was loaded from one.

    A drafter alone leaves the exits to what ships for the model, and exits the drafter. A DexError for a file that
    cannot be read.
    """
    if isinstance(exits, str) and exits == "shared":
        return Found(fingerprint, "shared", None, None)
    drafter = default_drafter(fingerprint)
    shipped = Found(fingerprint, "default", drafter, None if drafter is None else "default")
    if isinstance(exits, str) and exits == "default":
        return shipped
    given = opened(exits)
    given = load_exits(given) if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(given, TrainedExits) or given.config.depths == (0,):
        return shipped._replace(drafter=given, drafter_source=given.source, own="drafter")
    return shipped._replace(given=given, source=given.source, own="exits")


def opened(exits: GivenExits) -> GivenExits:
    """The EAGLE-3 head that a path or a hub id names, which is large and read once; all else as it is."""
    if not isinstance(exits, (str, os.PathLike)) or exits in ("shared", "default"):
        return exits
    return find_eagle(exits) or exits


def unmeasured(method: Method, exits: GivenExits, fingerprint: str) -> Method:
    """The method for one device where nothing measures which is the fastest: exits of one's own have explorers."""
    if not isinstance(method, Dex) or not method.is_free:
        return method
    found = find_exits(exits, fingerprint)
    if found.own != "exits" or found.exits is None:
        return Dex(explorers=1)
    return Dex(explorers=min(DEFAULT_EXPLORERS, found.exits.count + 1))


def resolve(method: Method, exits: GivenExits, config: ModelConfig, fingerprint: str) -> Resolved:
    """The schedule of a method, and its heads, for `exits` as of `find_exits`.

    Where an even grid asks for depths that are not trained, the nearest ones are taken.

    Raises:
      DexError: as `method.schedule_for` and `find_exits`; heads of another width, vocabulary or number of layers,
        without the depths that are asked for, or of no use to the method.
    """
    schedule = method.schedule_for(config.num_layers)
    resolved = Resolved(schedule)
    if schedule.stages == 1 and schedule.drafts is None:
        return resolved
    found = find_exits(exits, fingerprint)
    if schedule.stages > 1:
        resolved = _with_exits(schedule, found, config, getattr(method, "depths", None) is not None)
    elif found.own == "exits":
        raise DexError(
            f"{found.source} holds exits at depths, and one explorer has none: give more explorers, or leave it out"
        )
    if schedule.drafts is None:
        if found.own == "drafter":
            raise DexError(f"{found.drafter_source} holds a drafter, and the method has none: leave it out")
        return resolved
    return _with_drafter(resolved, method, found, config)


def _with_exits(schedule: Schedule, found: Found, config: ModelConfig, given_depths: bool) -> Resolved:
    trained, source, depths = found.exits, found.source, schedule.depths
    if found.own != "exits" and source == "default":
        why = None
        if trained is None:
            why = "no trained exits ship with this model"
        elif schedule.stages - 1 > trained.count:
            why = "the shipped exits are fewer"
        elif given_depths and not set(depths[:-1]) <= set(trained.config.depths):
            why = "the shipped exits are not trained at all these depths"
        if why is not None:
            return Resolved(schedule, "shared", remarks=(f'{why}: exits="shared" is used',))
    if trained is None:
        return Resolved(schedule, "shared")
    _check_fit(trained, config)
    remarks = []
    if trained.fingerprint != found.fingerprint:
        remarks.append(f"the exits in {source} were trained on another model: tokens stay the same, ticks may be more")
    reached = tuple(depth for depth in trained.config.depths if depth > 0)
    if not set(depths[:-1]) <= set(reached):
        trained_at = ", ".join(map(str, trained.config.depths))
        if given_depths:
            raise DexError(f"the exits in {source} are trained at depths {trained_at}: choose depths among them")
        depths = (*nearest_depths(depths[:-1], reached, source), depths[-1])
        moved = ", ".join(map(str, depths))
        remarks.append(f"exits are trained at depths {trained_at}: the exit depths are {moved}")
    subset, parameters = select_exits(trained.config, trained.parameters, tuple(depths[:-1]))
    trained = dataclasses.replace(trained, config=subset, parameters=parameters)
    return Resolved(dataclasses.replace(schedule, depths=depths), source, trained, remarks=tuple(remarks))


def _with_drafter(resolved: Resolved, method: Method, found: Found, config: ModelConfig) -> Resolved:
    drafter, source, schedule, remarks = found.drafter, found.drafter_source, resolved.schedule, resolved.remarks
    if drafter is None:
        return resolved
    if isinstance(drafter, TrainedExits):
        if not drafter.config.is_drafter:
            raise DexError(
                f"a drafter is one fused exit at depth 0 without attention (kind mlp, for example), and {source} has "
                f"one of kind {drafter.config.kind}: train one (configs/smollm2_135m_drafter.py), or leave it out"
            )
        _check_fit(drafter, config)
        if drafter.fingerprint != found.fingerprint:
            what = f"the drafter in {source} was trained on another model"
            remarks = (*remarks, f"{what}: tokens stay the same, ticks may be more")
    elif schedule.stages > 1:
        raise DexError(f"{source} has layers of its own and drafts for one explorer: give explorers=1")
    else:
        drafter = fitted(drafter, config)
    if isinstance(method, Dex) and method.draft is True:
        # With one explorer every row takes time; several wait for their layers, and ticks are what counts.
        trees = [tree.shape for tree in known_trees(drafter)]
        drafts = trees[0] if schedule.stages == 1 else max(trees, key=lambda tree: tree.rows)
        schedule = dataclasses.replace(schedule, drafts=drafts, rows=method.rows_of(schedule.stages, drafts))
    return dataclasses.replace(resolved, schedule=schedule, drafter=drafter, drafter_source=source, remarks=remarks)


@functools.lru_cache(maxsize=2)
def default_exits(fingerprint: str) -> TrainedExits | None:
    """The exits that ship for a model, by its fingerprint."""
    return _shipped(f"{fingerprint}.safetensors")


@functools.lru_cache(maxsize=2)
def default_drafter(fingerprint: str) -> TrainedExits | None:
    """The drafter that ships for a model, by its fingerprint."""
    return _shipped(f"{fingerprint}.drafter.safetensors")


def _shipped(name: str) -> TrainedExits | None:
    file = DEFAULTS / name
    return load_exits(file) if file.is_file() else None


def nearest_depths(wanted: tuple[int, ...], trained: tuple[int, ...], source: str) -> tuple[int, ...]:
    """The nearest trained depth for each wanted one in turn, of two the deeper, and none of them twice.

    A DexError for fewer trained than wanted.
    """
    if len(wanted) > len(trained):
        raise DexError(
            f"the exits in {source} are trained at {len(trained)} depths, which serve at most {len(trained) + 1} "
            f"explorers, not {len(wanted) + 1}: ask for fewer"
        )
    left = set(trained)
    for depth in wanted:
        left.remove(min(left, key=lambda each: (abs(each - depth), -each)))
    return tuple(sorted({*trained} - left))


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
