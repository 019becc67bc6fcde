"""Decoding methods as users name them, and what they come to for a model of L layers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Protocol

from dex_jax.decoding.dex.shape import TreeShape
from dex_jax.decoding.dex.trees import LOOKUP_TREE
from dex_jax.decoding.loops import AR_LOOP, DEX_LOOP, Loop
from dex_jax.errors import DexError, is_whole
from dex_jax.lattice import default_rows, full_rows

DEFAULT_EXPLORERS = 5
FULL_ROWS_LIMIT = 8
MOST_ROWS = 4096

SPARE = 32
"""Cache positions past the last token that every method has, needed or not. XLA adds up a prompt's attention in another
order in a cache of another length: where methods would begin with other last bits, bfloat16 parts them."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A method made concrete."""

    method: str  # "ar", "dex", or the name of one's own
    depths: tuple[int, ...]  # exit depths x_1 < ... < x_K = L
    rows: int  # W, rows a stage
    decs: bool  # whether depth-coupled sampling is on
    drafts: TreeShape | None = None  # how much exit 0 drafts below a head of a cohort; None for nothing
    loop: Loop = DEX_LOOP  # what runs it

    @property
    def has_lattice(self) -> bool:
        """Whether it is DEX, or a form of it."""
        return self.loop is DEX_LOOP

    @property
    def ahead(self) -> int:
        """How many positions past the last token the committed cache has, of which any may be written at."""
        return max(SPARE, 0 if self.drafts is None else self.drafts.levels)

    @property
    def stages(self) -> int:
        """K."""
        return len(self.depths)


@dataclasses.dataclass(frozen=True)
class AR:
    """Plain autoregressive decoding: every token through all layers, one after the other. Reports K = 1."""

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers."""
        return Schedule("ar", (num_layers,), 1, decs=False, loop=AR_LOOP)


@dataclasses.dataclass(frozen=True)
class Dex:
    """Depth Exploration Decoding (arXiv 2606.29223): drafts are explored, the final layer's token is always kept.

    Attributes:
      explorers: K, with an even grid of exit depths ceil(k L / K). None, with no depths either, is 1 on one device, or
        AR where that should be faster (decoding/auto.py), and the stages of a mesh on a mesh; without drafts it is 5.
      depths: exit depths themselves, ascending and ending at L.
      rows: W, how many nodes a stage runs at most, the most probable ones; None is what `default_rows` says, "full",
        without drafts only, never prunes.
      decs: whether an exit may not repeat a token that its node's children hold.
      draft: whether exit 0 drafts below every node; False is the paper's method. A TreeShape says how much, instead of
        what was found for the drafter.

    Examples:
      >>> Dex(explorers=3).schedule_for(30).depths
      (10, 20, 30)
      >>> Dex(depths=(6, 12, 30), draft=False).schedule_for(30).rows
      2
    """

    explorers: int | None = None
    depths: tuple[int, ...] | None = None
    rows: int | str | None = None
    decs: bool = True
    draft: bool | TreeShape = True

    @property
    def is_free(self) -> bool:
        """Whether nothing is asked for, so that what runs may still be chosen."""
        return self == Dex()

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers.

        Raises:
          DexError: both explorers and depths, K or depths out of range, depths not ascending or not ending at L,
            rows below 1, or rows="full" with drafts or above K = 8.
        """
        if not isinstance(self.draft, (bool, TreeShape)):
            raise DexError(f"draft must be True, False or a TreeShape, not {self.draft!r}")
        depths = self._depths(num_layers)
        drafts = LOOKUP_TREE if self.draft is True else self.draft or None
        return Schedule("dex", depths, self.rows_of(len(depths), drafts), self.decs, drafts)

    def rows_of(self, stages: int, drafts: TreeShape | None) -> int:
        """W for K = `stages` and what exit 0 drafts."""
        if self.rows is None:
            return default_rows(stages) if drafts is None else drafted_rows(stages, drafts)
        if self.rows == "full":
            if drafts is not None:
                raise DexError('rows="full" is for draft=False: what exit 0 drafts is always pruned, give a number')
            if stages > FULL_ROWS_LIMIT:
                raise DexError(
                    f'rows="full" needs 2^(K-2) rows a stage, {full_rows(stages)} for K = {stages}: it is offered up '
                    f"to K = {FULL_ROWS_LIMIT}, give a number of rows instead"
                )
            return full_rows(stages)
        if not is_whole(self.rows) or int(self.rows) > MOST_ROWS:
            raise DexError(f'rows must be a whole number from 1 to {MOST_ROWS}, or "full", not {self.rows}')
        return int(self.rows)

    def _depths(self, num_layers: int) -> tuple[int, ...]:
        if self.explorers is not None and self.depths is not None:
            raise DexError("give explorers or depths, not both: depths already say how many explorers there are")
        if self.depths is not None:
            return check_depths(self.depths, num_layers)
        if self.explorers is None:
            return even_depths(1 if self.draft else min(DEFAULT_EXPLORERS, num_layers), num_layers)
        if not is_whole(self.explorers) or self.explorers > num_layers:
            raise DexError(f"explorers must be from 1 to the model's {num_layers} layers, not {self.explorers}")
        return even_depths(int(self.explorers), num_layers)


def drafted_rows(stages: int, drafts: TreeShape) -> int:
    """Rows a stage with drafts, when the user does not say: one head's tree, and a row for each further head.

    Examples:
      >>> [drafted_rows(stages, LOOKUP_TREE) for stages in (1, 2, 5, 10)]
      [8, 8, 15, 32]
    """
    return max(drafts.rows, min(default_rows(stages) + drafts.rows - 1, 32))


def even_depths(stages: int, num_layers: int) -> tuple[int, ...]:
    """The even grid of DEX-1/K: x_k = ceil(k L / K)."""
    return tuple(-(-k * num_layers // stages) for k in range(1, stages + 1))


class Method(Protocol):
    """A way to decode: AR, Dex, or one's own.

    A `depths` that it has and that is not None is kept: for other methods exit depths move to where exits are trained.
    """

    def schedule_for(self, num_layers: int) -> Schedule:
        """The schedule for a model of L = num_layers."""
        ...


def with_stages(method: Method, stages: int | None) -> Method:
    """The method on a mesh of `stages`, None on one device: on a mesh each explorer has a stage."""
    if not hasattr(method, "schedule_for") or isinstance(method, type):
        raise DexError(f"a method is an object such as dex_jax.Dex() or dex_jax.AR(), not {method!r}")
    if stages is None or not isinstance(method, Dex) or method.explorers is not None or method.depths is not None:
        return method
    return dataclasses.replace(method, explorers=stages)


def check_depths(depths: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Exit depths that a user gave, as whole numbers; a DexError for none, or other than x_1 < ... < x_K = L."""
    depths = tuple(int(x) for x in depths)
    text = ",".join(map(str, depths))
    if not depths or depths[0] < 1 or depths[-1] > num_layers:
        raise DexError(f"depths must lie between 1 and the model's {num_layers} layers, not {text or 'nothing'}")
    if any(a >= b for a, b in itertools.pairwise(depths)):
        raise DexError(f"depths must ascend without repeats, not {text}")
    if depths[-1] != num_layers:
        raise DexError(f"depths must end at the model's last layer, {num_layers}, not at {depths[-1]}")
    return depths
