"""The plan that a request becomes on a model: what runs, on which compiled programs depend, and the heads it uses."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any, NamedTuple, Protocol

from jax.sharding import Mesh

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.decoding.dex.drafters import GivenDrafter, fitted, known_trees
from dex_jax.decoding.dex.interface import ExitZero
from dex_jax.decoding.dex.trained_exits import Heads, TrainedHeads
from dex_jax.decoding.dex.trees import TreeShape
from dex_jax.decoding.ladder import rungs
from dex_jax.decoding.request import AR, MOST_ROWS, Dex, check_method
from dex_jax.errors import DexError, is_whole
from dex_jax.grid import check_depths, even_depths, nearest_depths
from dex_jax.io.eagle import find_eagle
from dex_jax.io.exits_file import TrainedExits, default_drafter, default_exits, load_exits
from dex_jax.lattice import default_rows, full_rows
from dex_jax.nn.exits import select_exits
from dex_jax.nn.transformer import Staged

DEFAULT_EXPLORERS = 5
FULL_ROWS_LIMIT = 8

SPARE = 32
"""Cache positions past the last token that every method has, needed or not. In a cache of another length XLA adds up a
prompt's attention in another order, and so small a difference would change a method's tokens in bfloat16."""

_SAID: set[tuple[str, str]] = set()
"""The remarks that have been printed, as (fingerprint of the model, remark)."""

GivenExits = str | os.PathLike | GivenDrafter
"""The types that users give as `exits`."""


class GivenHeads(NamedTuple):
    """The heads of a generation as they were loaded, None where there are none."""

    exits: TrainedExits | None = None  # heads at x_1 .. x_{K-1}; None for "shared" and when K = 1
    drafter: GivenDrafter | None = None  # exit 0; None where the text alone drafts, or nothing does


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static argument of the jitted functions: first what a method says, then what a model and its heads add."""

    method: str  # "ar", "dex", or the name of a user's own
    depths: tuple[int, ...]  # exit depths x_1 < ... < x_K = L
    rows: int = 1  # W, rows a stage
    decs: bool = True  # whether depth-coupled sampling is on
    drafts: TreeShape | None = None  # how much exit 0 drafts below a head of a cohort; None for nothing
    loop: Any = "dex"  # what runs it: a name of loops.LOOPS, or a Loop of a user's own
    # The rows and drafts that a Dex asks for, as a drafter has its own trees for them; None for a tree that stays.
    tree_for: Dex | None = dataclasses.field(default=None, compare=False, repr=False)

    # ModelConfig; fields from here on depend on the model.
    config: Any = dataclasses.field(default=None, repr=False)
    mesh: Mesh | None = None  # None for one device
    layout: Staged | None = None  # of the weights on the mesh
    exits: ExitsConfig | None = None  # of the exits 1..K-1; None for the model's own, "shared", and for K = 1
    drafter: ExitZero | None = None  # exit 0; None where the text alone drafts, or nothing does

    # Programs do not depend on what follows. A session holds the heads' arrays, and removes them from its plan.
    heads: GivenHeads = dataclasses.field(default=GivenHeads(), compare=False, repr=False)
    # The sources of exits 1..K-1 and of the drafter: "shared", "default", a path, None for none.
    exits_source: str | None = dataclasses.field(default=None, compare=False, repr=False)
    drafter_source: str | None = dataclasses.field(default=None, compare=False, repr=False)
    choice: str | None = dataclasses.field(default=None, compare=False, repr=False)  # why, if it was chosen
    # Sentences that a user should see.
    remarks: tuple[str, ...] = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def stages(self) -> int:
        """Number of stages K."""
        return len(self.depths)

    @property
    def has_lattice(self) -> bool:
        """True if DEX's loop runs, the only one with a lattice."""
        return self.loop == "dex"

    @property
    def asks_drafter(self) -> bool:
        """True if a drafter at hand would be asked: a tree is chosen for it, or the method's own has levels for one."""
        chosen = self.tree_for is not None and self.tree_for.draft is True
        return self.drafts is not None and (chosen or self.drafts.drafter_levels > 0)

    @property
    def ahead(self) -> int:
        """Number of spare KV cache positions after the last token."""
        return max(SPARE, 0 if self.drafts is None else self.drafts.levels)

    @property
    def cached_heads(self) -> ExitZero | None:
        """The heads that keep a memory of the committed prefix: exits if they need one, as it serves a drafter too."""
        return TrainedHeads(self.exits) if self.exits is not None and self.exits.needs_previous else self.drafter

    @property
    def reads(self) -> tuple[int, ...]:
        """Depths of the hidden states that exit 0 reads beside those at L."""
        return () if self.drafter is None else self.drafter.reads

    def cached_arrays(self, heads: Heads) -> Any:
        """Return the arrays of the heads that `cached_heads` names."""
        return heads.drafter if self.cached_heads is self.drafter else heads.exits

    def say(self, fingerprint: str) -> None:
        """Print the remarks on stderr, each once per process and model."""
        for remark in self.remarks:
            if (fingerprint, remark) not in _SAID:
                _SAID.add((fingerprint, remark))
                print(remark, file=sys.stderr)


class OwnMethod(Protocol):
    """A decoding method of a user's own, which makes its plan itself.

    Its exit depths move to the nearest trained ones, unless it has `depths` that are not None.
    """

    def plan_for(self, num_layers: int) -> Plan:
        """Return the plan for a model of L = num_layers, as far as it does not depend on weights."""


Method = AR | Dex | OwnMethod


class Found(NamedTuple):
    """The heads that a user's `exits` names for a model."""

    fingerprint: str  # of the model
    source: str  # of heads at depths above 0: "shared", "default" or a path
    drafter: GivenDrafter | None = None  # exit 0; None for the text alone
    drafter_source: str | None = None  # "default" or a path, None without one
    own: str | None = None  # what the user gave: "exits", "drafter", or None for neither
    given: TrainedExits | None = None  # heads at depths above 0 that the user gave

    @property
    def exits(self) -> TrainedExits | None:
        """The heads at depths above 0, None for the model's own; those that ship are large, and loaded on access."""
        return default_exits(self.fingerprint) if self.source == "default" else self.given


def plan_for(method: Method, num_layers: int) -> Plan:
    """Return the plan of a method for a model of L = num_layers, before exits are known.

    Raises:
      DexError: both explorers and depths, K or depths out of range, depths not ascending or not ending at L, rows below
        1, or rows="full" with drafts or above K = 8.
    """
    check_method(method)
    if isinstance(method, AR):
        return Plan("ar", (num_layers,), decs=False, loop="ar")
    if not isinstance(method, Dex):
        return method.plan_for(num_layers)
    if not isinstance(method.draft, (bool, TreeShape)):
        raise DexError(f"draft must be True, False or a TreeShape, not {method.draft!r}")
    if not isinstance(method.decs, bool):
        raise DexError(f"decs must be True or False, not {method.decs!r}")
    depths = _depths(method, num_layers)
    return _with_tree(Plan("dex", depths, decs=method.decs, tree_for=method), None)


def _with_tree(plan: Plan, drafter: GivenDrafter | None) -> Plan:
    """Return the plan with rows W and a tree for the drafter, None for the text alone.

    Ticks choose rows from the largest tree. With given rows every tick runs the largest tree that fits them.
    """
    method = plan.tree_for
    if method is None:
        return plan
    if method.draft is not True:
        drafts = method.draft or None
        return dataclasses.replace(plan, drafts=drafts, rows=rows_of(method, plan.stages, drafts))
    trees = known_trees(drafter)
    rows = rows_of(method, plan.stages, trees[-1])
    if method.rows is None:
        return dataclasses.replace(plan, drafts=dataclasses.replace(trees[-1], rungs=rungs(rows)), rows=rows)
    if rows == plan.stages == 1:  # drafts would have no row
        return dataclasses.replace(plan, rows=1)
    fitting = [trees[0], *(tree for tree in trees if tree.rows <= rows)]
    return dataclasses.replace(plan, drafts=fitting[-1], rows=rows)


def with_stages(method: Method, stages: int | None) -> Method:
    """Return Dex with an explorer on each of a mesh's `stages`, unless it has explorers or depths; None is no mesh."""
    if stages is None or not isinstance(method, Dex) or method.explorers is not None or method.depths is not None:
        return method
    return dataclasses.replace(method, explorers=stages)


def _depths(method: Dex, num_layers: int) -> tuple[int, ...]:
    if method.explorers is not None and method.depths is not None:
        raise DexError("give explorers or depths, not both: depths already say how many explorers there are")
    if method.depths is not None:
        return check_depths(method.depths, num_layers)
    if method.explorers is None:
        return even_depths(1 if method.draft else min(DEFAULT_EXPLORERS, num_layers), num_layers)
    if not is_whole(method.explorers) or method.explorers > num_layers:
        raise DexError(f"explorers must be from 1 to the model's {num_layers} layers, not {method.explorers}")
    return even_depths(int(method.explorers), num_layers)


def rows_of(method: Dex, stages: int, drafts: TreeShape | None) -> int:
    """Return W for K = `stages` and the tree that exit 0 drafts."""
    if method.rows is None:
        return default_rows(stages) if drafts is None else drafted_rows(stages, drafts)
    if method.rows == "full":
        if drafts is not None:
            raise DexError('rows="full" is for draft=False: what exit 0 drafts is always pruned, give a number')
        if stages > FULL_ROWS_LIMIT:
            raise DexError(
                f'rows="full" needs 2^(K-2) rows a stage, {full_rows(stages)} for K = {stages}: it is offered up '
                f"to K = {FULL_ROWS_LIMIT}, give a number of rows instead"
            )
        return full_rows(stages)
    if not is_whole(method.rows) or int(method.rows) > MOST_ROWS:
        raise DexError(f'rows must be a whole number from 1 to {MOST_ROWS}, or "full", not {method.rows}')
    return int(method.rows)


def drafted_rows(stages: int, drafts: TreeShape) -> int:
    """Return the default rows of a stage with drafts: one anchor's tree, and a row for each further anchor, up to 32.

    Examples:
      >>> [drafted_rows(stages, known_trees(None)[-1]) for stages in (1, 2, 5, 10)]
      [8, 8, 15, 32]
    """
    return max(drafts.rows, min(default_rows(stages) + drafts.rows - 1, 32))


def resolve(method: Method, exits: GivenExits, config: ModelConfig, fingerprint: str) -> Plan:
    """Return the plan of a method with the heads that it uses; `exits` are as in `find_exits`.

    The nearest trained depths replace those depths of an even grid that are not trained.

    Raises:
      DexError: as `plan_for` and `find_exits`; heads of another width, vocabulary or number of layers, without the
        requested depths, or of no use to the method.
    """
    plan = plan_for(method, config.num_layers)
    if plan.stages == 1 and plan.drafts is None:
        return plan
    found = find_exits(exits, fingerprint)
    if plan.stages > 1:
        plan = _with_exits(plan, found, config, getattr(method, "depths", None) is not None)
    elif found.own == "exits":
        raise DexError(
            f"{found.source} holds exits at depths, and one explorer has none: give more explorers, or leave it out"
        )
    if plan.asks_drafter:
        return _with_drafter(plan, found, config)
    if found.own == "drafter":
        raise DexError(f"{found.drafter_source} holds a drafter, and the method asks none: leave it out")
    return plan


def _with_exits(plan: Plan, found: Found, config: ModelConfig, given_depths: bool) -> Plan:
    trained, source, depths = found.exits, found.source, plan.depths
    shared = dataclasses.replace(plan, exits_source="shared")
    if found.own != "exits" and source == "default":
        why = None
        if trained is None:
            why = "no trained exits ship with this model"
        elif plan.stages - 1 > trained.count:
            why = "the shipped exits are fewer"
        elif given_depths and not set(depths[:-1]) <= set(trained.config.depths):
            why = "the shipped exits are not trained at all these depths"
        if why is not None:
            return dataclasses.replace(shared, remarks=(f'{why}: exits="shared" is used',))
    if trained is None:
        return shared
    _check_fit(trained, config)
    remarks = []
    if trained.fingerprint != found.fingerprint:
        remarks.append(f"the exits in {source} were trained on another model: tokens stay the same, ticks may be more")
    trained_depths = tuple(depth for depth in trained.config.depths if depth > 0)
    if not set(depths[:-1]) <= set(trained_depths):
        trained_at = ", ".join(map(str, trained.config.depths))
        if given_depths:
            raise DexError(f"the exits in {source} are trained at depths {trained_at}: choose depths among them")
        depths = (*nearest_depths(depths[:-1], trained_depths, source), depths[-1])
        moved = ", ".join(map(str, depths))
        remarks.append(f"exits are trained at depths {trained_at}: the exit depths are {moved}")
    subset, parameters = select_exits(trained.config, trained.parameters, depths[:-1])
    heads = GivenHeads(dataclasses.replace(trained, config=subset, parameters=parameters))
    return dataclasses.replace(
        plan, depths=depths, exits=subset, heads=heads, exits_source=source, remarks=tuple(remarks)
    )


def _with_drafter(plan: Plan, found: Found, config: ModelConfig) -> Plan:
    drafter, source, remarks = found.drafter, found.drafter_source, plan.remarks
    if drafter is None:
        return plan
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
    elif plan.stages > 1:
        raise DexError(f"{source} has layers of its own and drafts for one explorer: give explorers=1")
    else:
        drafter = fitted(drafter, config)
    plan = _with_tree(plan, drafter)
    heads = plan.heads._replace(drafter=drafter)
    return dataclasses.replace(plan, heads=heads, drafter_source=source, remarks=remarks)


def find_exits(exits: GivenExits, fingerprint: str) -> Found:
    """Find the heads that `exits` names for a model: "shared", "default", a path, a hub id, or loaded heads.

    A drafter alone leaves the exits at the default, and exits alone the drafter. Raise DexError where a file cannot be
    read.
    """
    if isinstance(exits, str) and exits == "shared":
        return Found(fingerprint, "shared")
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
    """Load the EAGLE-3 head that `exits` names, which is large, so that it is read once; return all else as it is."""
    if not isinstance(exits, (str, os.PathLike)) or exits in ("shared", "default"):
        return exits
    return find_eagle(exits) or exits


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
