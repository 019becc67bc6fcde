"""The roofline against plain arithmetic, and what must hold of it whatever the figures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import cost_twin

from dex_jax.decoding.methods import even_depths
from dex_jax.evaluation.planner import cost_model
from dex_jax.evaluation.planner.cost_model import Setting
from dex_jax.evaluation.planner.ead_profile import Ticks
from dex_jax.evaluation.planner.workload import ExitWork, Work
from dex_jax.hardware import Device, Hardware, Link, Measured

WORK = Work(layers=6, width=10, heads=4, kv_heads=2, attention=12, layer=1000, cached=8, vocabulary=70, embeddings=700)
SHARED = ExitWork("shared", 0, 0, 70, previous=False)
DRAFTER = ExitWork("mlp", 90, 0, 20, previous=True)
LINK = Link("link", 3e-3, 500.0)


def machine(**changes) -> Hardware:
    figures = {"flops": 4e4, "bandwidth": 1e4, "memory": 1e6, "kernel_seconds": 1e-4, "itemsize": 2}
    figures |= {"reached_bandwidth": 1.0, "reached_flops": 1.0}
    more = {name: changes.pop(name) for name in ("count", "hosts", "link", "network") if name in changes}
    device = Device("toy", **(figures | changes))
    return Hardware(device, **({"count": 8, "hosts": 1, "link": LINK, "network": LINK} | more))


def setting(**changes) -> Setting:
    return Setting(**({"work": WORK, "exits": SHARED, "hardware": machine(), "batch": 1, "context": 50} | changes))


def silent(depths: tuple[int, ...], rows: int, ticks: float) -> Ticks:
    """Without drafts: so many ticks a token, each of which a commit ends."""
    return Ticks(depths, rows, 1 / ticks, 1 / ticks)


TWIN_MODEL = {name: getattr(WORK, name) for name in ("layers", "width", "attention", "layer", "cached", "vocabulary")}
TWIN_MACHINE = {"bandwidth": 1e4, "flops": 4e4, "kernel": 1e-4, "item": 2, "latency": 3e-3, "link": 500.0}


@pytest.mark.parametrize(("batch", "tensor"), [(1, 1), (3, 2), (40, 1)])
def test_ar_is_the_twins(batch: int, tensor: int) -> None:
    expected = cost_twin.ar_step(TWIN_MODEL, batch, 50, tensor, TWIN_MACHINE)
    found = cost_model.ar_step(setting(batch=batch), tensor)
    assert found.total == pytest.approx(expected) == sum(dataclasses.astuple(found))
    assert type(found.total) is float  # files and verdicts hold plain numbers


@pytest.mark.parametrize(("batch", "depths", "rows"), [(1, (3, 6), 1), (5, (1, 3, 5, 6), 4), (1, (4, 6), 1)])
def test_a_tick_is_the_twins(batch: int, depths: tuple[int, ...], rows: int) -> None:
    found = cost_model.tick(setting(batch=batch), silent(depths, rows, 1.7))
    lengths = np.diff((0, *depths)).tolist()
    longest, stages = max(lengths), len(depths)
    expected = cost_twin.tick(TWIN_MODEL, longest, stages, rows, batch, 50, 1.7, TWIN_MACHINE, lengths[-1])
    assert found.total == pytest.approx(expected)


@pytest.mark.parametrize("previous", [False, True])
def test_the_last_stage_asks_the_final_layer_while_others_still_run(previous: bool) -> None:
    """With fewer layers than they have it has time to; exits that wait for what it shares gain less from that."""
    work = dataclasses.replace(WORK, vocabulary=160)
    s = setting(work=work, exits=dataclasses.replace(SHARED, columns=7, previous=previous))
    even, short, shorter = (cost_model.tick(s, silent(depths, 1, 1.0)) for depths in ((3, 6), (4, 6), (5, 6)))
    one = cost_twin.layer(TWIN_MODEL, 1, 1, 50 + 2, 1, TWIN_MACHINE)
    final = cost_twin.logits(TWIN_MODEL, 160, 1, 1, TWIN_MACHINE)
    asked = cost_twin.logits(TWIN_MODEL, 7, 1, 1, TWIN_MACHINE)
    assert 2 * one < final < 2 * one + asked
    assert even.head == pytest.approx(final - asked)
    assert short.head == (pytest.approx(final - 2 * one) if previous else 0)
    assert (shorter.head, shorter.layers) == (0, pytest.approx(even.layers * 5 / 3))


def test_a_tick_splits_a_stage_over_a_tensor_axis() -> None:
    one, two = (cost_model.tick(setting(), silent((3, 6), 1, 1.5), tensor) for tensor in (1, 2))
    assert two.layers == pytest.approx(one.layers / 2)
    # Two all-reduces a layer of 20 bytes, one of the embedding, and the gather of 70 logits.
    reduces = (3 * 2 + 1) * cost_twin.all_reduce(20, 2, TWIN_MACHINE)
    gathers = cost_twin.all_gather(280, 2, TWIN_MACHINE)
    assert two.communication - one.communication == pytest.approx(reduces + gathers)


def test_a_pipeline_by_hand() -> None:
    """Two stages: one sequence passes 6 layers, the head and 2 links; two sequences overlap."""
    s = setting()
    step = cost_model.pipelined_step(s, 2)
    moved = 3e-3 + 20 / 500
    assert step.total == pytest.approx(cost_model.ar_step(s).total + 2 * moved)
    both = cost_model.pipelined_step(setting(batch=2), 2)
    half = 3 * cost_twin.layer(TWIN_MODEL, 1, 1, 50, 1, TWIN_MACHINE) + cost_twin.head(TWIN_MODEL, 1, 1, TWIN_MACHINE)
    assert both.total == pytest.approx(2 * (half + moved))
    assert cost_model.pipelined_step(s, 1).total == pytest.approx(cost_model.ar_step(s).total)


TREE = Ticks((6,), 4, 1.9, 1.0, 2)


def drafted(rows: int) -> float:
    """A drafter step for so many rows."""
    own = cost_twin.read_or_compute(2 * 90, 2 * rows * 90, TWIN_MACHINE)
    return own + cost_twin.logits(TWIN_MODEL, 20, rows, 1, TWIN_MACHINE) + 12e-4


def test_a_tree_by_hand() -> None:
    """Four rows, all of them asked of the final layer, and two drafted levels: on one device, then over two stages."""
    s = setting(drafter=DRAFTER)
    layers = 6 * cost_twin.layer(TWIN_MODEL, 4, 1, 54, 1, TWIN_MACHINE)
    rest = cost_twin.head(TWIN_MODEL, 4, 1, TWIN_MACHINE) + 2 * drafted(4) + (200 + 250) * 1e-4
    found = cost_model.ar_step(s, trees=TREE)
    assert found.total == pytest.approx(layers + rest)
    assert found.drafts == pytest.approx(2 * (drafted(4) - 12e-4))
    assert cost_model.ar_step(setting(), trees=TREE).drafts == 0  # the text alone drafts
    # One message to the second stage, then a sum of states that all devices hear.
    moved = 3e-3 + 80 / 500 + cost_twin.all_reduce(80, 2, TWIN_MACHINE)
    assert cost_model.pipelined_step(s, 2, trees=TREE).total == pytest.approx(layers + rest + moved)


def test_a_tick_with_drafts_by_hand() -> None:
    """Two explorers whose roots finish in half of the ticks: then the final layer is asked about all rows."""
    s = setting(drafter=DRAFTER, exits=dataclasses.replace(SHARED, columns=7))
    found = cost_model.tick(s, Ticks((3, 6), 10, 1.3, 0.5, 5))
    layers = 3 * cost_twin.layer(TWIN_MODEL, 10, 1, 70, 1, TWIN_MACHINE)
    exits = cost_twin.logits(TWIN_MODEL, 7, 10, 1, TWIN_MACHINE) + 12e-4
    final = cost_twin.head(TWIN_MODEL, 10, 1, TWIN_MACHINE) - cost_twin.logits(TWIN_MODEL, 7, 10, 1, TWIN_MACHINE)
    moved = 3e-3 + 200 / 500
    # Beside what nodes propose, the drafter's parents' features are told.
    told = cost_twin.all_gather(160, 2, TWIN_MACHINE) + cost_twin.all_gather(400, 2, TWIN_MACHINE)
    # Below eight heads at most.
    assert found.total == pytest.approx(layers + exits + final / 2 + moved + told + 5 * drafted(8) + (200 + 250) * 1e-4)


def test_memory_by_hand() -> None:
    s = setting(batch=2)
    assert cost_model.bytes_per_device(s) == 2 * (6 * 1000 + 700 + 6 * 2 * 50 * 8)
    assert cost_model.bytes_per_device(s, 1, 2) == cost_model.bytes_per_device(s) / 2
    drafting = setting(exits=ExitWork("linear", 100, 30, 20, previous=False), batch=2)
    expected = 2 * (3 * 1000 + 700 + 100 + 30 + 20 * 10 + 3 * 2 * (50 + 3 * 4) * 8)
    trees = cost_model.bytes_per_device(setting(drafter=DRAFTER), slots=4, drafts=True)
    assert trees == 2 * (6 * 1000 + 700 + 90 + 20 * 10 + 6 * 54 * 8)
    assert cost_model.bytes_per_device(drafting, 3, slots=12, exits=1, depths=(2, 3, 6)) == expected


def test_packed_kernels_are_read_in_fewer_bytes() -> None:
    dense, packed = setting(), setting(packed=0.5)
    assert cost_model.bytes_per_device(packed) == 0.5 * (6 * 1000 + 700) + 2 * 6 * 50 * 8
    # A row's arithmetic takes less than reading: layers wait for bytes, of which caches keep theirs.
    read = cost_model.Setting.kernel_bytes.fget
    assert (read(dense), read(packed)) == (2, 0.5)
    for step in (cost_model.ar_step(dense), cost_model.ar_step(packed)):
        assert step.total > 0
    assert cost_model.ar_step(packed).total < cost_model.ar_step(dense).total
    exits = setting(exits=ExitWork("linear", 100, 30, 20, previous=False), packed=0.5)
    assert cost_model._exit_features(exits, 1) == cost_model._exit_features(dataclasses.replace(exits, packed=None), 1)


def test_collectives_over_hosts() -> None:
    """Four devices on two hosts: within each host, then between them."""
    slow = Link("slow", 0.5, 50.0)
    hardware = machine(count=4, hosts=2, network=slow)
    assert cost_model.all_gather(hardware, 100, 4) == pytest.approx((3e-3 + 50 / 500) + (0.5 + 50 / 50))
    assert cost_model.all_gather(hardware, 100, 2) == pytest.approx(3e-3 + 50 / 500)
    # Two stages of two devices each: the stages are a host apart.
    assert cost_model.all_gather(hardware, 100, 2, spacing=2) == pytest.approx(0.5 + 50 / 50)
    assert cost_model.all_reduce(hardware, 100, 1) == 0


MEASURED = Measured(
    layer={"unrolled": ((1.0, 0.0001), (4.0, 0.0002))},
    cache=((1.0, 1e-5), (4.0, 3e-5)),
    head=((1.0, 2e-4),),
    exits=((1.0, 3e-4),),
    layer_seconds={"unrolled": 0.01},
    tick_seconds=0.5,
    drafts_seconds=0.25,
)


def test_a_calibrated_machine_by_hand() -> None:
    s = setting(hardware=machine(measured=MEASURED))
    step = cost_model.ar_step(s)
    assert step.layers == pytest.approx(6 * (2000 * 1e-4 + 800 * 1e-5))
    assert (step.head, step.fixed) == pytest.approx((1400 * 2e-4, 6 * 0.01))
    four = cost_model.ar_step(dataclasses.replace(s, batch=4))
    assert four.layers == pytest.approx(6 * (2000 * 2e-4 + 4 * 800 * 1e-5))
    tick = cost_model.tick_on_one_device(s, silent((3, 6), 1, 2.0))
    assert tick.fixed == pytest.approx(6 * 0.01 + 0.5 + 12e-4)
    tree = cost_model.ar_step(s, trees=TREE)
    assert tree.fixed == pytest.approx(6 * 0.01 + 0.5 + 0.25)
    # Four rows: of products, attention and the final layer.
    assert tree.layers + tree.width == pytest.approx(6 * (2000 * 2e-4 + 2 * 54 * 8 * 3e-5))
    assert tree.head == pytest.approx(1400 * 2e-4)


figures = st.floats(0.1, 10)


@st.composite
def settings(draw) -> Setting:
    layers = draw(st.integers(2, 12))
    work = dataclasses.replace(WORK, layers=layers, layer=draw(st.integers(1, 5000)))
    columns = draw(st.sampled_from([5, 70]))
    exits = ExitWork("any", draw(st.integers(0, 500)), draw(st.integers(0, 500)), columns, draw(st.booleans()))
    drafter = draw(st.sampled_from([None, DRAFTER]))
    hardware = machine(
        flops=1e4 * draw(figures),
        bandwidth=1e4 * draw(figures),
        kernel_seconds=1e-4 * draw(figures),
        hosts=draw(st.sampled_from([1, 2, 4, 8])),
        link=Link("a", 1e-3 * draw(figures), 1e3 * draw(figures)),
        network=Link("b", 1e-3 * draw(figures), 1e3 * draw(figures)),
    )
    return Setting(work, exits, hardware, draw(st.integers(1, 64)), draw(st.integers(1, 2000)), drafter)


def steps(s: Setting, stages: int, rows: int, tensor: int) -> list[float]:
    """Seconds of every kind of step."""
    depths = even_depths(min(stages, s.work.layers), s.work.layers)
    without = silent(depths, rows, 1 + (len(depths) - 1) / 2)
    drafts = dataclasses.replace(without, levels=3)
    trees = Ticks(depths[-1:], rows, 2.0, 1.0, 3)
    return [
        *(cost_model.tick(s, counted, tensor).total for counted in (without, drafts)),
        *(cost_model.tick_on_one_device(s, counted).total for counted in (without, drafts)),
        *(cost_model.ar_step(s, tensor, counted).total for counted in (None, trees)),
        *(cost_model.pipelined_step(s, len(depths), tensor, counted).total for counted in (None, trees)),
        cost_model.layerskip_round(s, 1, rows, tensor).total,
    ]


shapes = st.tuples(st.integers(1, 6), st.integers(1, 8), st.sampled_from([1, 2]))


device_figures, links = map(st.sampled_from, (["flops", "bandwidth", "kernel_seconds"], ["link", "network"]))


@given(settings(), shapes, device_figures, links)
def test_a_better_device_or_link_is_never_slower(s: Setting, shape: tuple, what: str, which: str) -> None:
    device = s.hardware.device
    factor = 0.5 if what == "kernel_seconds" else 2.0
    link = getattr(s.hardware, which)
    for changed in (
        {"device": dataclasses.replace(device, **{what: factor * getattr(device, what)})},
        {which: dataclasses.replace(link, latency=0.5 * link.latency)},
        {which: dataclasses.replace(link, bandwidth=2.0 * link.bandwidth)},
    ):
        better = dataclasses.replace(s, hardware=dataclasses.replace(s.hardware, **changed))
        assert all(b <= a * (1 + 1e-9) for a, b in zip(steps(s, *shape), steps(better, *shape), strict=True))


@given(settings(), shapes)
def test_more_work_is_never_faster(s: Setting, shape: tuple[int, int, int]) -> None:
    for larger in (dataclasses.replace(s, batch=s.batch + 1), dataclasses.replace(s, context=2 * s.context)):
        assert all(b >= a * (1 - 1e-9) for a, b in zip(steps(s, *shape), steps(larger, *shape), strict=True))
    stages, rows, tensor = shape
    wider = steps(s, stages, rows + 1, tensor)
    assert all(b >= a * (1 - 1e-9) for a, b in zip(steps(s, *shape), wider, strict=True))


@given(settings(), st.sampled_from([1, 2]))
def test_one_stage_is_ar(s: Setting, tensor: int) -> None:
    one, tree = silent((s.work.layers,), 1, 1.0), Ticks((s.work.layers,), 4, 2.0, 1.0, 3)
    assert cost_model.tick(s, one, tensor) == cost_model.ar_step(s, tensor)
    assert cost_model.tick_on_one_device(s, one) == cost_model.ar_step(s)
    assert cost_model.tick(s, tree, tensor) == cost_model.ar_step(s, tensor, tree)
    assert cost_model.pipelined_step(dataclasses.replace(s, batch=1), 1, tensor, tree).total == pytest.approx(
        cost_model.ar_step(dataclasses.replace(s, batch=1), tensor, tree).total
    )
