"""A training of exits from its configuration to the file: killed, continued, begun from others, on several devices."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import types

import chex
import exit_training_worker
import jax
import numpy as np
import pytest
from environment import flags_for_devices
from exit_training_worker import CONFIG, EXITS, base_model
from reference.greedy import is_greedy
from reference.small_models import LLAMA, random_exits, small_model

import dex_jax
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits, load_exits
from dex_jax.nn.exits import initial_heads, parameters_of
from dex_jax.training.distillation import Distillation, DistillationOptions
from dex_jax.training.exit_training import held_out_texts, train_exits
from dex_jax.training.items import Item, Turn
from dex_jax.training.journal import read_journal


def quiet(line: str) -> None:
    """Ignore a line."""


def largest_change(one: TrainedExits, other: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(one.parameters[name] - other[name]).max()) for name in other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Run a training without interruption: its folder, its exits, and the backbone's weights before and after."""
    folder = tmp_path_factory.mktemp("whole")
    lm = base_model()
    before = jax.tree.map(np.array, lm.weights)
    exits = train_exits(CONFIG, lm, folder, tell=quiet)
    return types.SimpleNamespace(folder=folder, exits=exits, before=before, after=lm.weights)


@pytest.mark.slow
def test_a_run_writes_its_exits_and_figures(whole) -> None:
    exits = load_exits(whole.folder)
    assert exits.config == dataclasses.replace(EXITS, norm_eps=LLAMA.norm_eps)
    assert exits.fingerprint == base_model().fingerprint
    assert 6 * 40 < exits.metadata["tokens"] <= 6 * 4 * 20
    assert exits.metadata["steps"] == 6
    assert len(exits.metadata["held_out"]["self"]["agreement"]) == 2
    fresh = parameters_of(initial_heads(EXITS, np.ones(LLAMA.width)))
    assert largest_change(exits, {"map": fresh["map"]}) > 1e-3
    records = read_journal(whole.folder)
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, whole.before, whole.after)
    # A finished run returns its exits again; the width is the model's, whatever the configuration says.
    narrow = dataclasses.replace(CONFIG, exits=dataclasses.replace(EXITS, width=1))
    again = train_exits(narrow, base_model(), whole.folder, tell=quiet)
    assert largest_change(again, whole.exits.parameters) == 0
    assert again.config.width == LLAMA.width


@pytest.mark.slow
def test_a_run_goes_on_for_more_steps_with_the_same_texts(tmp_path) -> None:
    config = dataclasses.replace(CONFIG, tokens=None, evaluation_texts=0)
    for steps in (2, 4):
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))
        assert train_exits(longer, base_model(), tmp_path, tell=quiet).metadata["steps"] == steps


@pytest.mark.slow
def test_a_run_that_broke_off_goes_on_to_the_same_exits(whole, tmp_path, monkeypatch, capfd) -> None:
    batch, steps = Distillation.batch, itertools.count()

    def breaking(self, step):
        if next(steps) == 5:
            raise RuntimeError("broken off")
        return batch(self, step)

    monkeypatch.setattr(Distillation, "batch", breaking)
    with pytest.raises(RuntimeError, match="broken off"):
        train_exits(CONFIG, base_model(), tmp_path, tell=quiet)
    assert load_exits(tmp_path).metadata["steps"] == 4, "the exits of the newest checkpoint can be used"
    exits = train_exits(CONFIG, base_model(), tmp_path, tell=quiet)
    assert "Resuming from step" in capfd.readouterr().err
    for found in (exits, load_exits(tmp_path)):
        assert np.array_equal(found.vocabulary, whole.exits.vocabulary)
        chex.assert_trees_all_equal(dict(found.parameters), whole.exits.parameters)
    about = [{**each.metadata, "minutes": None} for each in (exits, whole.exits)]
    assert about[0] == about[1]
    held_out = "answers/held_out.json"
    assert (tmp_path / held_out).read_text() == (whole.folder / held_out).read_text()


@pytest.mark.slow
def test_a_run_starts_from_some_of_the_given_exits_and_warns_of_another_backbone(whole, tmp_path) -> None:
    train = dataclasses.replace(CONFIG.train, steps=1, learning_rate=1e-9)
    shapes = dataclasses.replace(EXITS, depths=(2,))
    config = dataclasses.replace(CONFIG, train=train, evaluation_texts=0, exits=shapes)
    told: list[str] = []
    given = dataclasses.replace(whole.exits, fingerprint="another")
    exits = train_exits(config, base_model(), tmp_path, initial=given, tell=told.append)
    assert exits.config.depths == (2,)
    assert np.array_equal(exits.vocabulary, given.vocabulary)
    assert exits.parameters.keys() == given.parameters.keys()
    of_exit_2 = {name: x if name.startswith("context.") else x[1:] for name, x in given.parameters.items()}
    assert largest_change(exits, of_exit_2) < 1e-6
    assert exits.fingerprint == base_model().fingerprint
    assert exits.metadata["held_out"] == {}
    (warning,) = (line for line in told if line.startswith("warning: "))
    assert "another" in warning


@pytest.mark.slow
def test_a_drafter_is_trained_and_drafts(tmp_path) -> None:
    exits = dataclasses.replace(EXITS, depths=(0,), kind="mlp", fused=True)
    config = dataclasses.replace(CONFIG, exits=exits, options=DistillationOptions(draft_steps=3))
    trained = train_exits(config, base_model(), tmp_path, tell=quiet)
    names = {name for record in read_journal(tmp_path) for name in record if name.startswith("agreement")}
    assert names == {"agreement_draft_1", "agreement_draft_2", "agreement_draft_3"}
    assert len(trained.metadata["held_out"]["self"]["agreement"]) == 1
    lm, prompt = base_model(), [1, 5, 7]
    out = dex_jax.generate(lm, [prompt], method=dex_jax.Dex(explorers=1), exits=trained, max_new_tokens=12)
    assert is_greedy(lm, prompt, out.tokens[0, : out.lengths[0]].tolist())


@pytest.mark.parametrize(
    ("changes", "draft_steps", "says"),
    [
        ({"fused": True, "draft_size": None}, 3, r"not fused attn at \(1, 2\)"),
        ({"fused": True, "depths": (0,), "draft_size": None}, 3, r"without attention .* not fused attn at \(0,\)"),
        ({"kind": "linear", "window": 9}, 1, "kind is attn there and linear here; window is 5 there and 9 here"),
        ({"depths": (0, 1)}, 1, r"depths is \(1, 2\) there and \(0, 1\) here"),
        ({"draft_size": None}, 1, "draft_size is 24 there and None here"),
        ({"depths": (1, 3)}, 1, "below the model's 3 layers"),
    ],
)
def test_exits_that_cannot_be_trained_are_refused_before_any_data_is_read(tmp_path, changes, draft_steps, says) -> None:
    initial = dataclasses.replace(random_exits("attn", draft=24, depths=(1, 2)), config=EXITS)
    exits, options = dataclasses.replace(EXITS, **changes), DistillationOptions(draft_steps=draft_steps)
    config, told = dataclasses.replace(CONFIG, exits=exits, options=options), []
    with pytest.raises(DexError, match=says):
        train_exits(config, base_model(), tmp_path / "new", initial=initial, tell=told.append)
    assert not told
    assert not (tmp_path / "new").exists()


def test_held_out_texts_are_prompts_with_answers(tmp_path) -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=1))
    best = np.asarray(lm.logits(np.arange(48)[:, None])[:, 0].argmax(axis=-1))
    again = next(token for token in range(48) if best[token] == token)  # a prompt that its answer repeats
    ends = next(token for token in range(48) if best[token] not in (0, again, token))
    lm = small_model(dataclasses.replace(lm.config, eos_ids=(int(best[ends]),)))
    sources = {
        "prompts": [Item((Turn((again,), 12),))],
        "only EOS": [Item((Turn((ends,), 12),))],
        "two turns": [Item((Turn((again,), 3, temperature=1.0), Turn((ends, 9), 12)))],
        "texts": [Item((Turn((3, 4, 5)),))],
        "none": [],
    }
    file = tmp_path / "held_out.json"
    groups = held_out_texts(CONFIG, lm, types.SimpleNamespace(held_out=sources), file, quiet)
    assert list(groups) == ["prompts", "two turns", "texts"]
    ((prompt, answer),) = groups["prompts"]
    assert prompt == [again]
    assert answer[0] == again
    assert len(answer) == CONFIG.evaluation_tokens
    (prompt, answer) = groups["two turns"][0]
    assert prompt[0] == again
    assert prompt[-2:] == [ends, 9]
    assert 1 <= len(answer) <= CONFIG.evaluation_tokens
    assert groups["texts"] == [([3], [4, 5])]
    assert held_out_texts(CONFIG, lm, types.SimpleNamespace(held_out={}), file, quiet) == groups, "made once, and kept"


@pytest.mark.slow
def test_a_mesh_gives_one_devices_exits(whole, tmp_path) -> None:
    flags = {"XLA_FLAGS": flags_for_devices(4), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, exit_training_worker.__file__, tmp_path], env=os.environ | flags, check=True)
    exits = load_exits(tmp_path)
    assert np.array_equal(exits.vocabulary, whole.exits.vocabulary)
    chex.assert_trees_all_close(dict(exits.parameters), whole.exits.parameters, rtol=1e-4, atol=2e-6)
