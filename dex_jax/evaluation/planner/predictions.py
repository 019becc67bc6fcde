"""What each way of decoding would do on some hardware: candidates, predictions, a recommendation.

Every way is given the same devices. Speeds are tokens a second of one sequence; a batch makes B times as many. Where a
profile knows ticks with drafts, one explorer's trees run wherever AR does, and beside explorers without drafts there
are those with drafts: the fair rival of these is the pipeline that runs trees.
Letters: B sequences, W rows a stage, K stages, T devices of a tensor axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dex_jax.decoding.methods import even_depths
from dex_jax.errors import DexError
from dex_jax.evaluation.planner import cost_model
from dex_jax.evaluation.planner.cost_model import Parts, Setting
from dex_jax.evaluation.planner.ead_profile import Profile, Ticks
from dex_jax.hardware import USABLE
from dex_jax.lattice import default_rows, full_rows
from dex_jax.tables import markdown

WORTH_IT = 1.05
"""Several explorers are recommended when they are predicted to be at least this much faster than the fastest other way
on the devices."""

ASSUMED_EXPLORERS = 16
"""Grids of an assumed profile reach from K = 2 to this, or to L."""

MOST_DRAFTED = 8
"""LayerSkip drafts 1 to this many tokens a round; the planner takes the best."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One way of decoding.

    Attributes:
      method: "ar" (one device, or as few as hold the model, splitting every layer), "ar pipelined", "ar tensor", "ar
        replicas", the same four with "trees" for one explorer with drafts, "layerskip", and of several explorers "dex"
        (a stage a device) or "dex one device".
      stages, tensor, devices: of the mesh, and how many devices it keeps busy.
      depths, rows: of explorers; depths of LayerSkip are its exit and L.
      step: seconds of a step, tick or round, by what takes them.
      tokens_a_step: of each sequence, on average.
      bytes_per_device: weights and caches on the fullest device.
      fits: whether they fit.
      detail: for people.
      batch: B, sequences that all devices together decode.
      price: dollars an hour of one device; None when unknown.
    """

    method: str
    stages: int
    tensor: int
    devices: int
    depths: tuple[int, ...]
    rows: float
    step: Parts
    tokens_a_step: float
    bytes_per_device: float
    fits: bool
    detail: str
    batch: int
    price: float | None

    @property
    def capacity(self) -> float:
        """Slots of the lattice, K W; 0 without one."""
        return len(self.depths) * self.rows if self.method.startswith(("dex", "trees")) else 0

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence."""
        return self.tokens_a_step / self.step.total

    @property
    def device_seconds(self) -> float:
        """Of all busy devices, for one token of one sequence."""
        return self.devices * self.step.total / (self.batch * self.tokens_a_step)

    @property
    def dollars_per_million(self) -> float | None:
        """For a million tokens; None without a price."""
        return None if self.price is None else self.price * self.device_seconds * 1e6 / 3600

    def to_json(self) -> dict[str, Any]:
        """Fields and what follows from them."""
        follows = ("capacity", "tokens_per_second", "device_seconds", "dollars_per_million")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in follows}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All predictions, and which to take.

    Attributes:
      predictions: fastest first; those that do not fit come last.
      choice: the recommended one; None when nothing fits.
      best_dex, best_other: the fastest of several explorers and of all others that fit; None where there is none.
      sentence: the recommendation for people.
    """

    predictions: tuple[Prediction, ...]
    choice: Prediction | None
    best_dex: Prediction | None
    best_other: Prediction | None
    sentence: str


def plan(
    s: Setting, profile: Profile, *, explorers: Sequence[int] | None = None, rows: Sequence[int] | None = None
) -> Plan:
    """Predicts every way of decoding and recommends one.

    Args:
      s: what is decoded on what.
      profile: of the model and its exits.
      explorers: K to consider; None: all that the profile has grids for.
      rows: W to consider; None: the default, and those whose loss the profile tells.

    Raises:
      DexError: a profile of a model with another number of layers, or no grid left.
    """
    if profile.layers != s.work.layers:
        raise DexError(
            f"the profile is of a model of {profile.layers} layers, and this one has {s.work.layers}: measure its own"
        )
    found = [*others(s, profile), *dex(s, profile, explorers, rows)]
    ordered = tuple(sorted(found, key=lambda p: (not p.fits, -p.tokens_per_second)))
    fitting = [p for p in ordered if p.fits]
    best_dex = next((p for p in fitting if p.method.startswith("dex")), None)
    best_other = next((p for p in fitting if not p.method.startswith("dex")), None)
    if not fitting:
        least = min(found, key=lambda p: p.bytes_per_device)
        sentence = (
            f"Nothing fits: the least is {least.bytes_per_device / 1e9:.1f} GB a device ({least.detail}), and a device "
            f"has {s.hardware.device.memory / 1e9:.0f} GB, {USABLE:.0%} of them usable."
        )
        return Plan(ordered, None, None, None, sentence)
    if best_dex is None or (
        best_other is not None and best_dex.tokens_per_second < WORTH_IT * best_other.tokens_per_second
    ):
        assert best_other is not None
        sentence = f"One explorer or none: {best_other.detail} makes {best_other.tokens_per_second:.1f} tokens/s"
        if best_dex is not None:
            sentence += f", the best of several explorers ({best_dex.detail}) {best_dex.tokens_per_second:.1f}"
            if best_dex.tokens_per_second > best_other.tokens_per_second:
                sentence += f", which is less than {WORTH_IT - 1:.0%} more"
        return Plan(ordered, best_other, best_dex, best_other, sentence + ".")
    sentence = f"Several explorers: {best_dex.detail}, {best_dex.tokens_per_second:.1f} tokens/s"
    if best_other is not None:
        gain = best_dex.tokens_per_second / best_other.tokens_per_second
        sentence += f", {gain:.2f} times the best other way ({best_other.detail})"
    return Plan(ordered, best_dex, best_dex, best_other, sentence + ".")


def dex(
    s: Setting, profile: Profile, explorers: Sequence[int] | None = None, rows: Sequence[int] | None = None
) -> list[Prediction]:
    """Several explorers on every mesh K x T that the devices allow and every grid and cap of the profile, and on one
    device.

    Arguments and errors as of `plan`.
    """
    found = []
    for ticks in _grids(profile, s.work.layers, explorers, rows):
        depths, drafts, stages = ticks.depths, ticks.levels is not None, len(ticks.depths)
        counts: dict[str, Any] = {"depths": depths, "rows": ticks.rows, "tokens_a_step": ticks.tokens}
        held: dict[str, Any] = {"slots": stages * ticks.rows, "drafts": drafts}
        name = f"DEX-1/{stages}{' with drafts' if drafts else ''}, exits at {' '.join(map(str, depths[:-1]))}"
        name += f", {ticks.rows:g} rows"
        for tensor in tensor_axes(s, s.hardware.count // stages):
            step = cost_model.tick(s, ticks, tensor)
            size = cost_model.bytes_per_device(s, stages, tensor, exits=1, depths=depths, **held)
            where = f"stage={stages}" + (f",tensor={tensor}" if tensor > 1 else "")
            found.append(prediction(s, "dex", (stages, tensor), step, size, f"{name}, mesh {where}", **counts))
        step = cost_model.tick_on_one_device(s, ticks)
        size = cost_model.bytes_per_device(s, exits=stages - 1, **held)
        found.append(prediction(s, "dex one device", (1, 1), step, size, f"{name}, one device", **counts))
    return found


def others(s: Setting, profile: Profile) -> list[Prediction]:
    """Every other way on the same devices: AR, pipelined, tensor-parallel, replicas; LayerSkip; and one explorer with
    that of the trees that is best for each of AR's ways.
    """
    trees = [_one_explorer(s, ticks) for ticks in profile.drafts if len(ticks.depths) == 1]
    best = [max(way, key=lambda p: (p.fits, p.tokens_per_second)) for way in zip(*trees, strict=True)]
    layerskip = [_layerskip(s, profile, tensor) for tensor in tensor_axes(s, s.hardware.count)]
    return [*_one_explorer(s), *layerskip, *best]


def _one_explorer(s: Setting, trees: Ticks | None = None) -> list[Prediction]:
    """AR, or one explorer with drafts: on one device, or as few as hold AR, pipelined, tensor-parallel, replicas."""
    count, single, found = s.hardware.count, smallest_tensor(s), []
    kind, name = ("ar", "AR") if trees is None else ("trees", f"trees of {trees.rows:g} rows")
    counts: dict[str, Any] = {} if trees is None else {"rows": trees.rows, "tokens_a_step": trees.tokens}
    held: dict[str, Any] = {} if trees is None else {"slots": trees.rows, "drafts": True}

    def add(way: str, mesh: tuple[int, int], step: Parts, where: str, part: Setting = s, **more: Any) -> None:
        size = cost_model.bytes_per_device(part, *mesh, **held)
        found.append(prediction(s, f"{kind}{way}", mesh, step, size, f"{name}{where}", **counts, **more))

    where = "one device" if single == 1 else f"{single} devices that split every layer"
    add("", (1, single), cost_model.ar_step(s, single, trees), f" on {where}")
    for tensor in tensor_axes(s, count):
        stages = min(count // tensor, s.work.layers)
        if tensor > single:
            step = cost_model.ar_step(s, tensor, trees)
            add(" tensor", (1, tensor), step, f", every layer split over {tensor} devices")
        if stages > 1:
            step = cost_model.pipelined_step(s, stages, tensor, trees)
            each = f" of {tensor} devices each" if tensor > 1 else ""
            add(" pipelined", (stages, tensor), step, f", pipeline of {stages} stages{each}")
    copies = count // single
    if copies > 1:
        busy = min(copies, s.batch)
        part = dataclasses.replace(s, batch=math.ceil(s.batch / busy))
        where = f", {busy} of {copies} replicas busy, {part.batch} sequences each"
        step = cost_model.ar_step(part, single, trees)
        add(" replicas", (1, single), step, where, part, devices=busy * single)
    return found


def tensor_axes(s: Setting, devices: int) -> list[int]:
    """Sizes of a tensor axis up to `devices` that divide the heads."""
    return [tensor for tensor in range(1, devices + 1) if s.work.divisible(tensor)]


def smallest_tensor(s: Setting) -> int:
    """The smallest tensor axis with which AR fits; the largest there is when none does."""
    axes = tensor_axes(s, s.hardware.count)
    fitting = [t for t in axes if cost_model.bytes_per_device(s, 1, t) <= USABLE * s.hardware.device.memory]
    return (fitting or axes[-1:])[0]


def _layerskip(s: Setting, profile: Profile, tensor: int) -> Prediction:
    """The best exit and draft length of LayerSkip on one device or T, drafts taken to be right independently."""
    size = cost_model.bytes_per_device(s, 1, tensor)
    where = "" if tensor == 1 else f", every layer split over {tensor} devices"
    found = []
    for depth in sorted({depth for depth in (*profile.ead.depths, *profile.agreement) if depth < s.work.layers}):
        for drafted in range(1, MOST_DRAFTED + 1):
            step = cost_model.layerskip_round(s, depth, drafted, tensor)
            tokens = cost_model.layerskip_tokens(profile.agreement_at(depth), drafted)
            detail = f"LayerSkip, {drafted} drafted at depth {depth}{where}"
            own: dict[str, Any] = {"depths": (depth, s.work.layers), "tokens_a_step": tokens}
            found.append(prediction(s, "layerskip", (1, tensor), step, size, detail, **own))
    return max(found, key=lambda each: each.tokens_per_second)


def _grids(profile: Profile, layers: int, explorers: Sequence[int] | None, rows: Sequence[int] | None) -> list[Ticks]:
    """Ticks of the grids and rows to consider, without drafts and with those that the profile knows."""
    if profile.assumption is None:
        grids = [grid.depths for grid in profile.grids]
    else:
        most = min(layers, max(explorers or (ASSUMED_EXPLORERS,)))
        grids = [even_depths(stages, layers) for stages in range(2, most + 1)]
    found = [ticks for ticks in profile.drafts if len(ticks.depths) > 1]
    for depths in grids:
        full = full_rows(len(depths))
        for cap in sorted({min(full, cap) for cap in (*(rows or ()), default_rows(len(depths)), *profile.cap_loss)}):
            ticks = profile.ticks(depths, cap)
            found += [] if ticks is None else [Ticks(depths, cap, 1 / ticks, 1 / ticks)]
    kept = [
        ticks
        for ticks in found
        if (explorers is None or len(ticks.depths) in explorers)
        and (rows is None or ticks.rows in rows or ticks.rows == full_rows(len(ticks.depths)) < max(rows))
    ]
    if not kept:
        raise DexError("the profile holds none of these K and rows: measure them, or ask for others")
    return kept


def prediction(
    s: Setting, method: str, mesh: tuple[int, int], step: Parts, size: float, detail: str, **more: Any
) -> Prediction:
    """A prediction of one way on a mesh (stages, tensor), which takes `size` bytes a device; `more`: other fields."""
    device, (stages, tensor) = s.hardware.device, mesh
    usual: dict[str, Any] = {"depths": (s.work.layers,), "rows": 1, "tokens_a_step": 1.0, "devices": stages * tensor}
    return Prediction(
        method=method,
        stages=stages,
        tensor=tensor,
        step=step,
        bytes_per_device=size,
        fits=size <= USABLE * device.memory,
        detail=detail,
        batch=s.batch,
        price=device.price,
        **(usual | more),
    )


def predictions_table(predictions: Sequence[Prediction]) -> str:
    """One line a way: speed, over AR's pipeline and the one that runs trees (over one device if it is all there is),
    step, and what takes its time.
    """
    parts = ["layers", "width", "head", "exits", "drafts", "comm", "fixed"]
    rivals = [_fastest(predictions, kind) for kind in ("ar", "trees")]
    rows = []
    for p in predictions:
        price = "-" if p.dollars_per_million is None else f"{p.dollars_per_million:.2f}"
        speed = f"{p.tokens_per_second:.1f}" if p.fits else "too big"
        over = ["-" if speed is None else f"{p.tokens_per_second / speed:.2f}" for speed in rivals]
        shares = [f"{100 * value / p.step.total:.0f}" for value in dataclasses.astuple(p.step)]
        size = f"{p.bytes_per_device / 1e9:.2f}"
        rows.append(
            [p.detail, speed, *over, f"{p.step.total * 1e3:.3f}", f"{p.tokens_a_step:.2f}", size, *shares, price]
        )
    heads = ["way", "tok/s", "over AR", "over trees", "step ms", "tok/step", "GB/device"]
    return markdown([*heads, *(f"% {n}" for n in parts), "$/M tok"], rows)


def _fastest(predictions: Sequence[Prediction], kind: str) -> float | None:
    """Tokens a second of the fastest pipeline of a kind, "ar" or "trees", or without any of the kind on one device."""
    for method in (f"{kind} pipelined", kind):
        speeds = [p.tokens_per_second for p in predictions if p.method == method]
        if speeds:
            return max(speeds)
    return None
