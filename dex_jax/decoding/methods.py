"""Decoding methods as users name them, and what they come to for a model of L layers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Protocol

import numpy as np

from dex_jax.decoding.chain_interface import Policy
from dex_jax.decoding.drafts import TreeShape
from dex_jax.decoding.known_trees import LOOKUP_TREE
from dex_jax.errors import DexError
from dex_jax.lattice import default_rows, full_rows

DEFAULT_EXPLORERS = 5
FULL_ROWS_LIMIT = 8
MOST_ROWS = 4096
SCHEDULES = ("auto", "serial", "parallel")

SPARE = 32
"""Cache positions past the last token that every method has, needed or not. XLA adds up a prompt's attention in another
order in a cache of another length: where methods would begin with other last bits, bfloat16 parts them."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A method made concrete.

    Attributes:
      method: "ar", "dex", or a rival's name.
      depths: exit depths x_1 < ... < x_K = L.
      rows: W, rows a stage; of serial rounds N, rows of the tree; on a chain R, rows of a round.
      decs: whether depth-coupled sampling is on.
      tree: of serial rounds; None otherwise.
      policy: of methods that draft on a chain (decoding/chain.py), which have neither ticks nor a tree; None otherwise.
      proposing: the exits that propose where stages run side by side; None for all.
    """

    method: str
    depths: tuple[int, ...]
    rows: int
    decs: bool
    tree: TreeShape | None = None
    policy: Policy | None = None
    proposing: tuple[int, ...] | None = None

    @property
    def kind(self) -> str | None:
        """ "serial" or "parallel"; None for AR and for methods that draft on a chain."""
        if self.method == "ar" or self.policy is not None:
            return None
        return "parallel" if self.tree is None else "serial"

    @property
    def ahead(self) -> int:
        """How many positions past the last token the committed cache has, of which any may be written at."""
        written = 0 if self.tree is None else self.tree.levels
        return max(SPARE, written if self.policy is None else 2 * self.policy.rows)

    @property
    def stages(self) -> int:
        """K."""
        return len(self.depths)


@dataclasses.dataclass(frozen=True)
class AR:
    """Plain autoregressive decoding: every token through all layers, one after the other. Reports K = 1."""

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers."""
        return Schedule("ar", (num_layers,), 1, decs=False)


@dataclasses.dataclass(frozen=True)
class Dex:
    """Depth Exploration Decoding (arXiv 2606.29223): drafts are explored, the final layer's token is always kept.

    Attributes:
      explorers: K, with an even grid of exit depths ceil(k L / K); 5 when neither this nor `depths` is given.
      depths: exit depths themselves, ascending and ending at L.
      rows: W, how many nodes a stage runs at most; None is min(max(1, 2^(K-2)), 32), "full" never prunes.
      decs: whether an exit may not repeat a token that its node's children hold.
      schedule: "parallel", all stages side by side in every tick, which K devices are for; "serial", rounds that draft
        a few tokens ahead and run them through all layers at once, for one device; "auto", one of the two or plain AR,
        whichever should be fastest on the device at hand (decoding/auto.py).
      tree: of "serial": how large a round's tree may get; None takes what was found for the drafter.

    The first four fields belong to "parallel" and `tree` to "serial": "auto" with one of them means that schedule.

    Examples:
      >>> Dex(explorers=3).schedule_for(30).depths
      (10, 20, 30)
      >>> Dex(depths=(6, 12, 30)).schedule_for(30).rows
      2
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    rows: int | str | None = None
    decs: bool = True
    schedule: str = "auto"
    tree: TreeShape | None = None

    @property
    def kind(self) -> str:
        """One of SCHEDULES: what `schedule` says, or what another field that is given means."""
        if self.schedule != "auto":
            return self.schedule
        if self.tree is not None:
            return "serial"
        return "auto" if self._grid_field() is None else "parallel"

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers.

        Raises:
          DexError: both explorers and depths, K or depths out of range, depths not ascending or not ending at L,
            rows below 1, rows="full" above K = 8, an unknown schedule, fields of "parallel" with "serial", or "auto",
            which takes more than a number of layers to settle.
        """
        if self.schedule not in SCHEDULES:
            raise DexError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}")
        if self.kind == "auto":
            raise DexError('schedule="auto" is settled when something is generated: name "serial" or "parallel" here')
        if self.kind == "serial":
            given = self._grid_field()
            if given is not None:
                raise DexError(f'{given} belongs to schedule="parallel" and means nothing with "serial": leave it out')
            tree = LOOKUP_TREE if self.tree is None else self.tree
            return Schedule("dex", (num_layers,), tree.rows, decs=False, tree=tree)
        if self.tree is not None:
            raise DexError('tree belongs to schedule="serial": leave it out for "parallel"')
        depths = self._depths(num_layers)
        return Schedule("dex", depths, self._rows(len(depths)), self.decs)

    def _grid_field(self) -> str | None:
        """The first field of a grid of exits that is given."""
        given = {name: getattr(self, name) is not None for name in ("explorers", "depths", "rows")}
        return next((name for name, there in (given | {"decs": not self.decs}).items() if there), None)

    def _depths(self, num_layers: int) -> tuple[int, ...]:
        if self.explorers is not None and self.depths is not None:
            raise DexError("give explorers or depths, not both: depths already say how many explorers there are")
        if self.depths is None:
            stages = DEFAULT_EXPLORERS if self.explorers is None else self.explorers
            if self.explorers is None:
                stages = min(stages, num_layers)
            if not _is_whole(stages) or stages > num_layers:
                raise DexError(f"explorers must be from 1 to the model's {num_layers} layers, not {stages}")
            return even_depths(int(stages), num_layers)
        return check_depths(self.depths, num_layers)

    def _rows(self, stages: int) -> int:
        if self.rows is None:
            return default_rows(stages)
        if self.rows == "full":
            if stages > FULL_ROWS_LIMIT:
                raise DexError(
                    f'rows="full" needs 2^(K-2) rows a stage, {full_rows(stages)} for K = {stages}: it is offered up '
                    f"to K = {FULL_ROWS_LIMIT}, give a number of rows instead"
                )
            return full_rows(stages)
        if not _is_whole(self.rows) or int(self.rows) > MOST_ROWS:
            raise DexError(f'rows must be a whole number from 1 to {MOST_ROWS}, or "full", not {self.rows}')
        return int(self.rows)


def even_depths(stages: int, num_layers: int) -> tuple[int, ...]:
    """The even grid of DEX-1/K: x_k = ceil(k L / K)."""
    return tuple(-(-k * num_layers // stages) for k in range(1, stages + 1))


class Method(Protocol):
    """A way to decode: AR, Dex, or one of the rivals."""

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers."""
        ...


def is_auto(method: Method) -> bool:
    """Whether what runs is still to be chosen."""
    return isinstance(method, Dex) and method.kind == "auto"


def whole_number(**fields: Any) -> None:
    """Refuses fields that are no whole numbers of at least 1.

    Raises:
      DexError: naming the first of them.
    """
    for name, value in fields.items():
        if not _is_whole(value):
            raise DexError(f"{name} must be a whole number of at least 1, not {value!r}")


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, np.integer)) and int(value) >= 1


def with_stages(method: Method | None, stages: int | None) -> Method:
    """The method on a mesh of `stages`, None on one device: on a mesh "auto" is one explorer a stage."""
    method = Dex() if method is None else method
    if not hasattr(method, "schedule_for") or isinstance(method, type):
        raise DexError(f"a method is an object such as dex_jax.Dex() or dex_jax.AR(), not {method!r}")
    if stages is None or not isinstance(method, Dex) or method.kind not in ("auto", "parallel"):
        return method
    free = method.explorers is None and method.depths is None
    return dataclasses.replace(method, explorers=stages if free else method.explorers, schedule="parallel")


def check_depths(depths: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Exit depths that a user gave, as whole numbers.

    Raises:
      DexError: none, out of range, not ascending or not ending at L.
    """
    depths = tuple(int(x) for x in depths)
    text = ",".join(map(str, depths))
    if not depths or depths[0] < 1 or depths[-1] > num_layers:
        raise DexError(f"depths must lie between 1 and the model's {num_layers} layers, not {text or 'nothing'}")
    if any(a >= b for a, b in itertools.pairwise(depths)):
        raise DexError(f"depths must ascend without repeats, not {text}")
    if depths[-1] != num_layers:
        raise DexError(f"depths must end at the model's last layer, {num_layers}, not at {depths[-1]}")
    return depths
