"""The self-check on a tiny random model: what it prints, and that it notices what is wrong."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax import selfcheck
from dex_jax.cli import selfcheck as program
from dex_jax.decoding.plan import plan_for
from dex_jax.decoding.request import Request
from dex_jax.decoding.session import Session

CONFIG = dataclasses.replace(LLAMA, num_layers=3)


@pytest.fixture(scope="module")
def lm():
    return small_model(CONFIG)


@pytest.mark.slow
def test_every_check_holds() -> None:
    lm = small_model(dataclasses.replace(CONFIG, num_layers=2))
    report = selfcheck.selfcheck(lm)
    assert report.holds, report.text()
    assert len(report.findings) == 9


@pytest.mark.slow
def test_the_quick_form_checks_tokens_and_ticks(lm, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dex_jax.language_model.load", lambda model, dtype, weights: lm)
    assert program.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok   ") for line in lines) == 3
    assert any(line.startswith("plan: DEX-1/3, exits at 1, 2, 3, ") for line in lines)
    assert lines[-1] == "all checks hold"


def outputs(lm, method, **options):
    return [dex_jax.generate(lm, [[1, 2, 3]], method=method, exits="shared", max_new_tokens=24, **options)]


def test_a_wrong_token_is_found(lm) -> None:
    method = dex_jax.Dex(explorers=3, draft=False)
    explored, plain = outputs(lm, method), outputs(lm, dex_jax.AR())
    explored[0].tokens[0, 5] = (explored[0].tokens[0, 5] + 1) % CONFIG.vocab_size
    finding = selfcheck._same_tokens(lm, "tokens", explored, plain, 0.0)
    assert not finding.holds
    assert "prompt 1 differs from token 5 on" in finding.detail
    assert "too wide to be rounding" in finding.detail


def test_wrong_ticks_are_found(lm) -> None:
    method = dex_jax.Dex(explorers=3, draft=False)
    plan = plan_for(method, CONFIG.num_layers)
    explored = outputs(lm, method)
    assert selfcheck._counted_ticks("greedy", explored, plan).holds
    explored[0].stats.exits[0, 3] = explored[0].stats.exits[0, 3] % 3 + 1
    assert not selfcheck._counted_ticks("greedy", explored, plan).holds
    failed = selfcheck.Report({}, [selfcheck._counted_ticks("greedy", explored, plan)])
    assert not failed.holds
    assert failed.text().splitlines()[-1] == "FAILED"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cpu", "GB/s"),
        ("NVIDIA A100-SXM4-40GB", "of a100-40's 1,555"),
        ("NVIDIA A100-SXM4-80GB", "of a100's 2,039"),
        ("Tesla T4", "of t4's 320"),
        ("TPU v5 lite", "of v5e's 819"),
        ("TPU v5p", "of v5p's 2,765"),
    ],
)
def test_a_step_is_measured_by_what_memory_gives(monkeypatch, kind: str, said: str) -> None:
    lm = small_model(dataclasses.replace(CONFIG, tied=False))
    monkeypatch.setattr(selfcheck.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    found = selfcheck._reading(lm, 0.5)
    read = lm.parameter_bytes - lm.config.vocab_size * lm.config.width * lm.dtype.itemsize
    assert found.startswith(f"{read / 0.5e-3 / 1e9:,.1f} GB/s")
    assert found.endswith(said)


def test_kernels_are_counted_on_devices_alone() -> None:
    def plane(name: str, **lines: int) -> SimpleNamespace:
        found = [SimpleNamespace(name=line.replace("_", " "), events=iter(range(n))) for line, n in lines.items()]
        return SimpleNamespace(name=name, lines=found)

    gpu, tpu = plane("/device:GPU:0", Stream_7=5, Stream_13=2, Source=9), plane("/device:TPU:0", XLA_Ops=3, Steps=1)
    assert selfcheck._kernels(SimpleNamespace(planes=[gpu, plane("/host:CPU", Stream_1=4)])) == 7
    assert selfcheck._kernels(SimpleNamespace(planes=[tpu])) == 3


def test_a_tick_is_seen_by_the_profiler(lm) -> None:
    plan = plan_for(dex_jax.AR(), CONFIG.num_layers)
    session = Session(lm, [[1, 2, 3]], plan, Request(max_new_tokens=24))
    session.prefill()
    assert selfcheck._launched(session) == 0  # a CPU is no device of its own


def test_exit_codes(monkeypatch, capsys) -> None:
    report = selfcheck.Report({"device": "cpu"}, [selfcheck.Finding("tokens", True, "equal")])
    monkeypatch.setattr("dex_jax.language_model.load", lambda model, dtype, weights: None)
    monkeypatch.setattr(selfcheck, "selfcheck", lambda lm: report)
    assert program.main([]) == 0
    assert capsys.readouterr().out.rstrip("\n") == report.text()
    assert program.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"] is True
    broken = selfcheck.Report({}, [selfcheck.Finding("tokens", False, "differ")])
    monkeypatch.setattr(selfcheck, "selfcheck", lambda lm: broken)
    assert program.main([]) == 1


@pytest.mark.parametrize("issue", selfcheck.CANARIES)
def test_this_jax_computes_what_others_did_not(issue) -> None:
    assert selfcheck.CANARIES[issue]()


@pytest.mark.parametrize(("name", "issue"), [("arctan", "39352"), ("sum", "39103")])
def test_a_wrong_result_is_found(name, issue, monkeypatch) -> None:
    right = getattr(jnp, name)
    monkeypatch.setattr(jnp, name, lambda x: right(x) * 0.99)
    finding = selfcheck._canaries()
    assert not finding.holds
    assert issue in finding.detail
