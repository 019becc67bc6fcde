"""EAD profiles: measured on a small model against teacher-forced counts, written, read, and assumed ones."""

from __future__ import annotations

import dataclasses
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from reference.small_models import LLAMA, LetterTokenizer, small_model

import dex_jax
from dex_jax.cli import profile as command
from dex_jax.decoding.counting import ticks_of
from dex_jax.decoding.dex.trees import LOOKUP_TREES
from dex_jax.decoding.methods import even_depths
from dex_jax.errors import DexError
from dex_jax.evaluation.planner import profile
from dex_jax.evaluation.planner.ead_profile import EAD, FORMAT, Profile, Ticks, read_profile
from dex_jax.forced.counts import dex_counts
from dex_jax.forced.run import Forced, measure, shared_exits
from dex_jax.forced.texts import answers

SMALL = {"vocab_size": 12, "num_layers": 3, "width": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_width": 24}
MODEL = dataclasses.replace(LLAMA, **SMALL, tied=False, context=256)
EXPLORERS = (2, 3)
# As many sequences at a time and new tokens as in the command's run, which shares programs with the tests before it.
BATCH, NEW = 8, 25


@functools.cache
def _model() -> dex_jax.LanguageModel:
    return small_model(MODEL, seed=3, tokenizer=LetterTokenizer())


@functools.cache
def _measured() -> tuple[Forced, list]:
    """The own head at every layer, on greedy answers; among 12 tokens it is often right."""
    lm = _model()
    rng = np.random.default_rng(1)
    texts = answers(lm, [rng.integers(0, 12, n).tolist() for n in (1, 7, 4, 9, 3)], NEW, batch=BATCH)
    measured = measure(lm, shared_exits(lm, (1, 2)), texts, explorers=EXPLORERS, depths=[(1, 3)], batch=BATCH)
    return measured, texts


@functools.cache
def _profile() -> Profile:
    measured, _ = _measured()
    groups = {"first": measured.of([0, 1]), "rest": measured.of([2, 3, 4])}
    return profile.profile_of(measured, groups, about={"model": "toy"})


def test_ticks_are_the_teacher_forced_counts() -> None:
    found, (measured, _) = _profile(), _measured()
    assert [grid.depths for grid in found.grids] == [*(even_depths(k, 3) for k in EXPLORERS), (1, 3)]
    for grid in found.grids:
        counts = [count.exits for count in dex_counts(measured, grid.depths)]
        ticks = sum(ticks_of(exits, len(exits), grid.stages) for exits in counts)
        tokens = sum(len(exits) - 1 for exits in counts)
        assert grid.ticks_per_token == pytest.approx(ticks / tokens)
        assert grid.depth_side_speedup == pytest.approx(grid.stages * tokens / ticks)
        every = np.concatenate([exits[1:] for exits in counts])
        np.testing.assert_allclose(grid.exits, [np.mean(every == k) for k in range(1, grid.stages + 1)])
    assert min(len(set(np.flatnonzero(grid.exits))) for grid in found.grids) >= 2


def test_ead_and_its_bounds_by_hand() -> None:
    ead = EAD((2, 4, 8), (0.5, 0.25, 0.25))
    assert ead.mean == 4
    assert ead.oracle_speedup == 2
    assert [ead.by(depth) for depth in (1, 2, 3, 4, 6, 8)] == [0.25, 0.5, 0.625, 0.75, 0.875, 1]
    assert ead.steps((4, 8)) == (0.75, 0.25)
    assert ead.resolution_bound((4, 8)) == pytest.approx(2 / 1.25)
    assert ead.resolution_bound((8,)) == 1


def test_ead_counts_the_first_right_depth() -> None:
    measured, found = _measured()[0], _profile()
    right = measured.said.best[:, :2, 0] == measured.target[:, None]
    first = np.where(right.any(axis=1), right.argmax(axis=1), 2)
    np.testing.assert_allclose(found.ead.share, np.bincount(first, minlength=3) / len(first))
    assert found.ead.depths == (1, 2, 3)
    assert found.ead.mean == pytest.approx(np.mean(first + 1))
    assert found.agreement == pytest.approx({depth: right[:, depth - 1].mean() for depth in (1, 2)})
    tokens = [sum(measured.lengths[:2]), sum(measured.lengths[2:])]
    joined = np.average([found.groups[name].share for name in ("first", "rest")], axis=0, weights=tokens)
    np.testing.assert_allclose(joined, found.ead.share)
    # An oracle does at least as well as any grid that rounds up.
    assert all(grid.resolution_bound <= found.ead.oracle_speedup + 1e-9 for grid in found.grids)


@pytest.mark.slow
def test_ticks_with_drafts_are_those_of_the_loop(monkeypatch) -> None:
    """Of one explorer and of a grid, all texts together."""
    lm, (measured, texts), tree = _model(), _measured(), LOOKUP_TREES[1]
    monkeypatch.setattr(profile, "known_trees", lambda drafter: (tree,))
    exits, grid = shared_exits(lm, (1, 2)), measured.grids[0]
    options = {"max_new_tokens": NEW, "batch": 3}
    one, several = profile.ticks_with_drafts(lm, exits, texts[:3], measured.grids[:1], **options)
    assert (one.depths, one.rows, one.levels) == ((3,), tree.shape.rows, 0)
    assert (several.depths, several.levels) == (grid, 0)
    methods = {one: dex_jax.Dex(explorers=1, draft=tree.shape), several: dex_jax.Dex(depths=grid, draft=tree.shape)}
    for ticks, method in methods.items():
        chosen = "default" if ticks is one else exits
        prompts = [prompt for prompt, _ in texts[:3]]
        out = dex_jax.generate(lm, prompts, method=method, exits=chosen, max_new_tokens=NEW)
        total, tokens = int(out.stats.ticks.sum()), int((out.lengths - 1).sum())
        assert ticks.rows == out.stats.schedule.rows
        assert ticks.tokens == pytest.approx(tokens / total)
        assert ticks.depth_side_speedup == pytest.approx(len(ticks.depths) * tokens / total)
        # Each token but those that exit 0 gave ends a path.
        drafted = sum(int((out.stats.exits[row, 1:length] == 0).sum()) for row, length in enumerate(out.lengths))
        assert ticks.commits == pytest.approx((tokens - drafted) / total)
    # Of one explorer's ticks each commits, but an answer may end within a path.
    assert one.commits == pytest.approx(1, abs=3 * one.tokens / tokens)


def test_what_is_written_is_read(tmp_path) -> None:
    found = dataclasses.replace(_profile(), drafts=(Ticks((3,), 4, 1.5, 1.0, 2), Ticks((2, 3), 8, 0.9, 0.5, 0)))
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(found.to_json(), allow_nan=False))
    assert read_profile(file) == found
    # Rows that never prune are exact, and a cap costs what one has cost elsewhere.
    depths, three = found.grids[1].depths, found.grids[1].ticks_per_token
    assert found.ticks(depths, 16) == found.ticks(depths, 1) == three
    assert dataclasses.replace(found, cap_loss={1: 0.1}).ticks(depths, 1) == pytest.approx(1.1 * three)
    assert found.ticks((1, 2, 4), 2) is None
    assert found.ticks((3,), 1) == 1


ASSUMED = {
    "format": FORMAT,
    "assumption": "half of the tokens are there by depth 2",
    "layers": 4,
    "ead": {"depths": [2, 4], "share": [0.5, 0.5]},
}


def test_an_assumed_profile(tmp_path) -> None:
    file = tmp_path / "assumed.json"
    file.write_text(json.dumps(ASSUMED | {"cap_loss": {"1": 0.1}}))
    found = read_profile(file)
    # K = 4: a quarter of the tokens at each of the first two exits, and so on up to the last.
    assert found.ticks((1, 2, 3, 4), 4) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert found.ticks((2, 4), 2) == pytest.approx(1.5)
    assert found.ticks((2, 4), 1) == pytest.approx(1.5 * 1.1)
    assert found.agreement_at(3) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is of format 'other'"),
        ({"layers": 5}, "must ascend to the last layer, 5"),
        ({"ead": {"depths": [2, 4], "share": [0.5, 0.4]}}, "add up to 1"),
        ({"ead": {"depths": [4, 2], "share": [0.5, 0.5]}}, "must ascend"),
        ({"ead": {"depths": [2]}}, "at ead"),
        ({"assumption": None}, "neither grids nor an assumption"),
        ({"drafts": [{"depths": [2], "rows": 4, "tokens": 2, "commits": 1}]}, "must end at layer 4"),
        ({"drafts": [{"depths": [4], "rows": 4, "tokens": 0, "commits": 1}]}, "emit tokens from rows"),
    ],
)
def test_bad_profiles_are_refused(tmp_path, change: dict, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(ASSUMED | change))
    with pytest.raises(DexError, match=message):
        read_profile(file)
    with pytest.raises(DexError, match="cannot be read"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(DexError, match="does not ascend through depths that have exits"):
        measure(_model(), shared_exits(_model(), (1,)), [([1], [2])], depths=[(2, 3)])


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("dex_jax.language_model.load", lambda *args, **kwargs: _model())
    monkeypatch.setattr(command, "remember_compilations", lambda: None)
    monkeypatch.setattr(profile, "known_trees", lambda drafter: LOOKUP_TREES[1:2])
    # Of three answers, which the slow test above has the loop give: two tokens of each tick's three come from exit 0.
    ticks, exits = np.array([4, 4, 4]), np.array([[-1, *[0, 0, 1] * 4]] * 3)
    stats = SimpleNamespace(ticks=ticks, exits=exits, schedule=SimpleNamespace(rows=4))
    monkeypatch.setattr(profile, "generate", lambda *_, **__: SimpleNamespace(lengths=3 * ticks + 1, stats=stats))
    data = tmp_path / "prompts.txt"
    data.write_text("ABC\nDEFGH\nBAD\n")
    arguments = ["--data", str(data), "--exits", "shared", "--max-new-tokens", str(NEW), "--output"]
    output = tmp_path / "profile.json"
    more = ["--explorers", "2", "--drafts"]
    assert command.main([*arguments, str(output), *more]) == 0
    found = read_profile(output)
    assert [grid.depths for grid in found.grids] == [(2, 3)]
    assert found.ead.depths == (1, 2, 3)
    assert found.about["texts"] == 3
    assert list(found.groups) == ["prompts"]
    assert found.drafts == (Ticks((3,), 4, 3.0, 1.0, 0), Ticks((2, 3), 4, 3.0, 1.0, 0))
    text = capsys.readouterr().out
    assert "tokens by exit" in text
    assert "levels drafted" in text
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, str(tmp_path / "none.json"), "--prompts", "0"])
    assert "argument --prompts: '0' is not a whole number" in capsys.readouterr().err
    assert command.main([*arguments, str(tmp_path / "none.json"), "--explorers", "7"]) == 2
    assert "serve none of these --explorers" in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()
