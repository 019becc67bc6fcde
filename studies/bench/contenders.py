"""Methods as the benchmark names them, their settings, and which setting of a static rival is its best."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.decoding.chain.dynamic_exit import DEL
from dex_jax.decoding.methods import AR, Dex, Method
from dex_jax.decoding.resolve import all_depths
from dex_jax.decoding.rivals import AdaDecode, DexSingleExit, LayerSkip, Oracle
from dex_jax.errors import DexError
from studies.bench.runs import Run, name_of

SWEPT = {"layerskip": ("exit", "draft_length"), "adadecode": ("depths", "threshold")}
"""Method -> the fields that are chosen by a sweep."""

EXIT_SHARES = (0.1, 0.2, 0.3, 0.4)
"""Where a sweep of LayerSkip drafts unless told: shares of L, moved to where exits stand."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method with all its fields."""

    name: str  # on the command line and in results
    method: Method  # what `dex_jax.generate` takes
    setting: dict[str, Any]  # fields that are not its defaults
    drafter: bool  # whether it is drafted for by a drafter instead of exits at depths

    @property
    def words(self) -> str:
        """As the `name` of its runs."""
        return name_of(self.name, self.setting)


Maker = Callable[..., Method]

METHODS: dict[str, tuple[Maker, bool]] = {
    "ar": (AR, False),
    "dex": (lambda **fields: Dex(draft=False, **fields), True),
    "dex_drafts": (lambda **fields: Dex(**fields), True),
    "dex_one_explorer": (lambda **fields: Dex(explorers=1, **fields), False),
    "dex_auto": (lambda **fields: Dex(**fields), False),
    "dex_no_decs": (lambda **fields: Dex(draft=False, decs=False, **fields), True),
    "dex_single_exit": (DexSingleExit, True),
    "layerskip": (LayerSkip, False),
    "adadecode": (AdaDecode, True),
    "del": (DEL, False),
    "oracle": (Oracle, False),
}
"""Name -> (what makes the method, whether it takes `explorers`). "dex" is the paper's method, without drafts; users get
"dex_drafts" for several explorers, "dex_one_explorer" for one, "dex_auto" where they ask for nothing."""

WITH_DRAFTER = ("dex_one_explorer", "dex_auto")
ON_MANY_DEVICES = ("dex", "dex_drafts", "dex_no_decs", "dex_single_exit")
"""Their stages run side by side, which is for K devices: on one their seconds are told, and mean little."""


def contender(name: str, explorers: int, **setting: Any) -> Contender:
    """One of METHODS, or a DexError; `explorers` is K of methods on a grid, `setting` holds other fields."""
    if name not in METHODS:
        raise DexError(f"unknown method {name!r}: choose among {', '.join(METHODS)}")
    make, on_grid = METHODS[name]
    fields = ({"explorers": explorers} if on_grid and "depths" not in setting else {}) | setting
    # Settings are told and read back as JSON, which knows lists alone.
    method = make(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    return Contender(name, method, fields, name in WITH_DRAFTER)


def sweep(
    name: str,
    explorers: int,
    exit_depths: Sequence[int],
    draft_lengths: Sequence[int],
    thresholds: Sequence[float],
    num_layers: int,
) -> list[Contender]:
    """All settings of a static method; none for methods that have nothing to choose.

    AdaDecode drafts on DEX's grid and on a grid of the two shallowest of `exit_depths`: a token that is sure only at a
    deep exit costs it nearly all layers, so fewer exits can be better.
    """
    if name == "layerskip":
        return [contender(name, explorers, exit=d, draft_length=g) for d in exit_depths for g in draft_lengths]
    if name == "adadecode":
        shallow = [*sorted(exit_depths)[:2], num_layers]
        grids: list[dict[str, Any]] = [{}, *([{"depths": shallow}] if len(shallow) > 1 else [])]
        return [contender(name, explorers, threshold=share, **grid) for grid in grids for share in thresholds]
    return []


def swept_depths(exits: Any, config: ModelConfig, fingerprint: str) -> tuple[int, ...]:
    """Depths at which a sweep of LayerSkip drafts: near EXIT_SHARES of L, where exits stand."""
    standing = [depth for depth in all_depths(exits, config, fingerprint) if depth < config.num_layers]
    if not standing:
        raise DexError("LayerSkip needs an exit below the last layer: leave it out for a model of one layer")
    wanted = [share * config.num_layers for share in EXIT_SHARES]
    return tuple(sorted({min(standing, key=lambda depth: (abs(depth - want), depth)) for want in wanted}))


def by_setting(runs: Iterable[Run], name: str, kind: str) -> list[tuple[dict[str, Any], float]]:
    """(setting, cost a token) of each setting of a method among tuning runs, cheapest first."""
    groups: dict[str, list[Run]] = {}
    wanted = "wall" if kind == "wall" else "depth"
    for run in runs:
        if run.split == "tune" and run.method == name and run.kind == wanted:
            groups.setdefault(run.name, []).append(run)
    found = [(group[0].setting, _typical(group, kind)) for group in groups.values()]
    return sorted(found, key=lambda pair: pair[1])


def _typical(runs: list[Run], kind: str) -> float:
    """Cost a token after the first, over prompts together; of repeated runs of a prompt, the median."""
    prompts: dict[tuple[str, str], list[float]] = {}
    tokens: dict[tuple[str, str], int] = {}
    for run in runs:
        prompts.setdefault((run.task, run.prompt_id), []).append(float(run.cost(kind) or 0.0))
        tokens[run.task, run.prompt_id] = run.new_tokens - 1
    total = sum(tokens.values())
    return sum(float(np.median(times)) for times in prompts.values()) / total if total else float("inf")


def best_setting(runs: Iterable[Run], name: str, kind: str) -> dict[str, Any]:
    """The cheapest setting of a swept method on tuning prompts, in a kind of figure. DexError: no setting was tried."""
    found = by_setting(runs, name, kind)
    if not found:
        raise DexError(f"there is no sweep of {name} among the runs: give at least one setting and one tuning prompt")
    return found[0][0]
