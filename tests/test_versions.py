"""Versions that fail together or compute wrongly: what is refused, what is warned of, and the canaries."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import jax.numpy as jnp
import pytest

from dex_jax import selfcheck
from dex_jax.versions import check_versions, conflict

# Tried in environments of these versions, on Python 3.13: which pairs can be imported.
WORK = [
    ("0.7.2", "0.11.2"), ("0.8.3", "0.12.0"), ("0.9.0", "0.12.1"), ("0.10.1", "0.12.8"), ("0.11.0", "0.12.7"),
    ("0.11.1", "0.12.9"), ("0.11.2", "0.12.10"), ("0.12.0.1", "0.12.12"),
]  # fmt: skip
FAIL = {
    ("0.9.0", "0.12.0"): "flax>=0.12.1", ("0.10.1", "0.11.2"): "flax>=0.12.1", ("0.11.0", "0.12.6"): "flax>=0.12.7",
    ("0.11.1", "0.12.8"): "flax>=0.12.9", ("0.11.2", "0.12.9"): "flax>=0.12.10", ("0.12.0", "0.12.9"): "flax>=0.12.10",
}  # fmt: skip


def install(monkeypatch, jax: str, flax: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"jax": jax, "flax": flax}.__getitem__)


@pytest.mark.parametrize("pair", WORK)
def test_pairs_that_work_pass_in_silence(pair, monkeypatch, capsys) -> None:
    install(monkeypatch, *pair)
    check_versions()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("pair", FAIL)
def test_pairs_that_fail_are_refused_with_what_to_install(pair, monkeypatch) -> None:
    install(monkeypatch, *pair)
    with pytest.raises(ImportError, match=FAIL[pair]):
        check_versions()


def test_versions_of_other_shapes_are_read() -> None:
    assert conflict("0.11.2.dev20260901+abc", "0.12.9rc1")
    assert conflict("unknown", "unknown") is None


def test_a_jax_that_miscompiles_is_warned_of_in_one_line(monkeypatch, capsys) -> None:
    install(monkeypatch, "0.10.2", "0.12.8")
    check_versions()
    (line,) = capsys.readouterr().err.splitlines()
    assert "39103" in line


def test_the_check_imports_neither_jax_nor_flax(tmp_path) -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sys.modules.keys() & {'jax', 'flax'})"
    command = [sys.executable, "-c", code, sys.modules["dex_jax.versions"].__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


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
