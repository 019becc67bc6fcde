"""The planner's formula against a small twin of it, worked out by hand, and its command."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dex_jax import planner
from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.hardware import DEVICES, Device, Hardware, hardware, platform_of
from dex_jax.planner import Setting, Ticks, predict

# L = 5, D = 8, H = 4, G = 2, d = 2, F = 16, V = 100: a layer has 64 + 2 * 32 + 64 weights of attention, 3 * 128 of its
# mlp and 2 * 8 of norms, the unembedding is the embedding.
MODEL = ModelConfig("llama", 100, 5, 8, 4, 2, 2, 16, 512, tied=True)
LAYER, HEAD = 592, 800
# 0.8 of the bandwidth is 1,000 bytes a second, 0.6 of the arithmetic 6,000 operations.
TOY = Device("toy", 10_000.0, 1250.0, 20_000.0, 1e-3, 8, "", "")
TREE, TWO, FOUR = Ticks(1, 4, 2, 1.75), Ticks(2, 4, 2, 2.4), Ticks(4, 3, 0, 2.0)


def machine(count: int, **changes: float) -> Hardware:
    return Hardware(TOY, count, "", **({"latency": 0.125, "link_bandwidth": 500.0} | changes))


def by_hand(layers: float, rows: int, split: int, head: float, exits: int, levels: int | None, batch: int) -> float:
    """Return the seconds of a step without what devices exchange: S = 30, two bytes a number, a byte a weight."""
    attention = max(30 * batch * 2 * 2 * 2 * 2 / 1000, 4 * rows * batch * 30 * 4 * 2 / 6000)
    seconds = layers * ((max(LAYER / 1000, 2 * LAYER * rows * batch / 6000) + attention) / split + 0.010)
    of_head = head * (max(HEAD / 1000, 2 * HEAD * rows * batch / 6000) / split + 0.004)
    of_exits = exits * (max(2 * (800 + 192) / 1000, 2 * (800 + 192) * rows * batch / 6000) + 0.012)
    level = max(2 * (800 + 1024) / 1000, 2 * (800 + 1024) * min(rows, 8) * batch / 6000) + 0.012
    return seconds + max(of_head, of_exits) + (0 if levels is None else 0.450 + levels * level)


def gathered(size: float, devices: int) -> float:
    return math.ceil(math.log2(devices)) * 0.125 + (devices - 1) / devices * size / 500


def told(explorers: int, states: float, rows: int) -> float:
    return 0.125 + states / 500 + gathered(explorers * (states + 8 * rows), explorers)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_way_is_what_the_twin_says(batch: int) -> None:
    ways = predict(Setting(MODEL, machine(4), batch, 30, 1.0), [TREE, TWO, FOUR])
    found = {(each.name, each.where): each for each in ways}
    one, states, wide = 16 * batch, 4 * 16 * batch, 3 * 16 * batch  # bytes of a step's hidden states
    split = [5 * 4 * gathered(size, 2) + gathered(4 * rows * batch * 100, 2) for rows, size in ((1, one), (4, states))]
    through = [3 * (0.125 + size / 500) + 2 * gathered(size, 4) for size in (one, states)]
    committing = min(1, batch * 1.2)
    expected = {
        ("AR", "one device"): (by_hand(5, 1, 1, 1, 0, None, batch), 0, 1),
        ("AR", "tensor=2"): (by_hand(5, 1, 2, 1, 0, None, batch), split[0], 1),
        ("AR", "stage=4"): (by_hand(5, 1, 1, 1, 0, None, batch), through[0], 1),
        ("trees", "one device"): (by_hand(5, 4, 1, 1, 0, 2, batch), 0, 1.75),
        ("trees", "tensor=2"): (by_hand(5, 4, 2, 1, 0, 2, batch), split[1], 1.75),
        ("trees", "stage=4"): (by_hand(5, 4, 1, 1, 0, 2, batch), through[1], 1.75),
        ("DEX, K = 2", "stage=2,tensor=2"): (
            by_hand(3, 4, 2, committing, 1, 2, batch),
            3 * 4 * gathered(states, 2) + gathered(16 * batch * 100, 2) + told(2, states, 4 * batch),
            1.2,
        ),
        ("DEX, K = 4", "stage=4"): (by_hand(2, 3, 1, min(1, batch * 0.5), 1, 0, batch), told(4, wide, 3 * batch), 0.5),
    }
    assert found.keys() == expected.keys()
    for way, (seconds, messages, tokens) in expected.items():
        assert found[way].messages == pytest.approx(messages), way
        assert found[way].seconds == pytest.approx(seconds + messages), way
        assert found[way].tokens_per_second == pytest.approx(tokens / (seconds + messages)), way


def test_several_stages_on_a_device_and_what_it_holds() -> None:
    *_, two, four = predict(Setting(MODEL, machine(2), 1, 30, 1.0), [TWO, FOUR])
    assert (two.where, four.where) == ("stage=2", "stage=2")
    assert four.messages == pytest.approx(0.125 + 48 / 500 + gathered(4 * (48 + 24), 2))
    assert four.seconds - four.messages == pytest.approx(by_hand(4, 3, 1, 0.5, 2, 0, 1))
    cached, heads = 4 * (30 + 4 * 3) * 2 * 2 * 2, 800 + (2 * 3 + 16) * 64
    assert four.bytes_per_device == 4 * LAYER + HEAD + 2 * (cached + heads)
    assert predict(Setting(MODEL, machine(1), 1, 30, 1.0))[0].bytes_per_device == 5 * LAYER + HEAD + 2 * 5 * 30 * 8
    # Two explorers leave one of three devices over, and four cannot share them evenly.
    assert [each.name for each in predict(Setting(MODEL, machine(3)), [TWO, FOUR])][-1] == "DEX, K = 2"
    assert planner.table(predict(Setting(MODEL, machine(2), 100, 300))).endswith("into the memory of these devices.")


@settings(max_examples=10)
@given(st.sampled_from(["bandwidth", "flops", "link_bandwidth", "latency", "kernel"]), st.integers(1, 64))
def test_a_better_machine_is_never_slower(figure: str, batch: int) -> None:
    def speeds(factor: float) -> list[float]:
        base = {"bandwidth": 2e12, "flops": 4e14, "link_bandwidth": 4e11, "latency": 4e-6, "kernel": 4e-6}[figure]
        value = base / factor if figure in ("latency", "kernel") else base * factor
        found = predict(Setting(planner.SHAPES["llama-2-70b"], hardware(f"h100x8,{figure}={value}"), batch))
        return [each.tokens_per_second for each in found]

    assert all(a <= b * (1 + 1e-9) for a, b in zip(speeds(1), speeds(2), strict=True))


def test_names_of_hardware() -> None:
    eight, sixteen, own = hardware("h100x8"), hardware("h100x16"), hardware("v5ex4,link=dcn,memory=15e9,latency=1e-3")
    assert (eight.device, eight.count, eight.link, eight.link_bandwidth) == (DEVICES["h100"], 8, "nvlink4", 450e9)
    assert (sixteen.link, hardware("h100").count) == ("infiniband", 1)
    assert (own.link, own.device.memory, own.latency, own.link_bandwidth) == ("dcn", 15e9, 1e-3, 25e9)
    assert [platform_of(name) for name in ("cpu", "l4", "v6e")] == ["cpu", "gpu", "tpu"]
    for text in (
        "abacus",
        "h100x0",
        "h100xtwo",
        "h100,link=string",
        "h100,memory=-1",
        "h100,memory=inf",
        "h100,speed=2",
    ):
        with pytest.raises(DexError, match="--hardware"):
            hardware(text)


def test_the_line_in_readme_runs(capsys) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    line = re.search(r"^uv run python -m dex_jax\.planner (.*?) *#", readme, re.MULTILINE)[1]
    assert planner.main(shlex.split(line)) == 0
    out = capsys.readouterr().out
    assert [out.count(f"\n| {name} ") for name in ("AR", "trees", "DEX, K = 2")] == [3, 3, 1]
    assert "should be fastest" in out


@pytest.mark.parametrize("flags", ["abacus", "h100 --model no-such-model", "h100 --batch 0", "h100 --bits 0"])
def test_bad_input_is_a_sentence(flags: str, capsys) -> None:
    assert planner.main(["--hardware", *flags.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)


@pytest.mark.parametrize("text", ["2:16", "0:1:1:2", "2:16:8:nan", "2:16:-1:2", "two:16:8:2"])
def test_bad_ticks(text: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        planner.main(["--hardware", "h100", "--ticks", text])
    assert stopped.value.code == 2
    assert "K:ROWS:LEVELS:SPEEDUP" in capsys.readouterr().err
