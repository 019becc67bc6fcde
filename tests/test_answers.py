"""Training texts: the answers that a model gives to items, files of these, and rows that hold several."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from hypothesis import given
from hypothesis import strategies as st
from reference.greedy import is_greedy
from reference.small_models import LLAMA, small_model

from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel
from dex_jax.nn.forward import depth_states
from dex_jax.nn.kinds import LayerKind
from dex_jax.nn.weights import merge_model
from dex_jax.training import answers
from dex_jax.training.answers import Answers, Text, write_texts
from dex_jax.training.items import Item, Turn
from dex_jax.training.packing import NOTHING, Epochs, read_rows

ITEMS = [
    Item((Turn((1, 5, 9), 7, forced_weight=0.25),)),
    Item((Turn((3,), 4, 1.0, 0.9), Turn((8, 2), 6))),
    Item((Turn((4, 4, 7, 1), forced_weight=1.0),)),
    Item((Turn((3, 6), 5, 1.0, 0.9), Turn((8,), 3))),
]
SEEDS = [10, 11, 12, 13]


@functools.cache
def model() -> LanguageModel:
    return small_model(dataclasses.replace(LLAMA, num_layers=2, eos_ids=(0,)))


def test_a_text_is_what_the_model_makes_of_its_item_whatever_is_beside_it() -> None:
    texts = write_texts(model(), ITEMS, SEEDS)
    for item, seed, text in zip(ITEMS, SEEDS, texts, strict=True):
        (alone,) = write_texts(model(), [item], [seed])
        assert np.array_equal(alone.token, text.token)
        assert len(text.token) == len(text.weight) <= item.longest
    first, two_turns, text, _ = texts
    assert first.token[:3].tolist() == [1, 5, 9]
    assert first.answer == 3
    assert first.weight.tolist() == [0.25, 0.25, *[1.0] * (len(first.token) - 2)]
    said = first.token[3:].tolist()
    assert is_greedy(model(), [1, 5, 9], said if len(said) == 7 else [*said, 0])
    assert two_turns.token[two_turns.answer - 2 : two_turns.answer].tolist() == [8, 2]
    assert two_turns.weight[two_turns.answer - 3 : two_turns.answer].tolist() == [0.0, 0.0, 1.0]
    assert text.token.tolist() == [4, 4, 7, 1]
    assert (text.weight.tolist(), text.answer, text.learnt) == ([1.0] * 4, 1, 4)
    other = write_texts(model(), ITEMS[1:2], [99])[0]
    assert other.token.tolist() != two_turns.token.tolist(), "sampled otherwise"


def item_of(number: int) -> Item:
    return Item((Turn((1 + number % 40,), 5),))


def folder_of(path: Path, seed: int = 3) -> Answers:
    return Answers(model(), item_of, path, {"data": "one"}, seed)


def test_what_is_there_is_used_again_and_what_is_others_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(answers, "SHARD", 4)
    told: list[int] = []
    texts = folder_of(tmp_path).at_least(30, told.append)
    assert told[-1] == 30
    assert 30 <= sum(len(text.token) for text in texts) < 30 + 4 * 6
    assert [text.token[0] for text in texts] == [1 + number for number in range(len(texts))]
    monkeypatch.setattr(answers, "write_texts", None)  # nothing may be written again
    again = folder_of(tmp_path).at_least(30)
    assert [text.token.tolist() for text in again] == [text.token.tolist() for text in texts]
    with pytest.raises(DexError, match=r"another model or other data \(another seed\)"):
        folder_of(tmp_path, seed=4)
    file = next(tmp_path.glob("*.npz"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DexError, match="is damaged: remove it"):
        folder_of(tmp_path).at_least(30)
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(DexError, match="is damaged: remove"):
        folder_of(tmp_path)


def make(path: Path) -> None:
    answers.SHARD = 4
    folder_of(path).at_least(60)


@pytest.mark.slow
def test_processes_share_a_folder(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=make, args=(tmp_path / "shared",)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    make(tmp_path / "alone")
    assert json.loads((tmp_path / "shared" / "about.json").read_text())["seed"] == 3
    alone = sorted((tmp_path / "alone").glob("*.npz"))
    assert len(alone) > 2
    for file in alone:
        with np.load(file) as one, np.load(tmp_path / "shared" / file.name) as other:
            assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not [*(tmp_path / "shared").glob("*.lock")]


def texts_of(lengths: list[int]) -> list[Text]:
    starts = np.cumsum([0, *lengths])
    return [
        Text(np.arange(begin, begin + size, dtype=np.int32), np.ones(size, np.float32), 1)
        for begin, size in zip(starts, lengths, strict=False)
    ]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_has_each_text_once_and_any_batch_is_the_same_at_every_call(lengths, batch, seed) -> None:
    size = 10
    epochs, found = Epochs(texts_of(lengths), batch, size, seed), []
    one_epoch = max(1, len(epochs._packed(0)) // batch)
    for number in range(one_epoch):
        rows = epochs.batch(number)
        assert [field.shape for field in rows] == [(batch, size)] * 3
        assert np.array_equal(rows.token == NOTHING, rows.position == NOTHING)
        assert np.array_equal(rows.token == NOTHING, rows.weight == 0)
        found += rows.token[rows.token != NOTHING].tolist()
        text_begins = rows.token - rows.position
        assert np.isin(text_begins[rows.token != NOTHING], np.cumsum([0, *lengths])).all()
    assert len(set(found)) == len(found)
    if len(epochs._packed(0)) % batch == 0:
        assert len(found) == sum(min(length, size) for length in lengths)
    again = Epochs(texts_of(lengths), batch, size, seed)
    for number in (one_epoch + 1, 0, one_epoch):
        np.testing.assert_array_equal(again.batch(number).token, epochs.batch(number).token)


@pytest.mark.parametrize("windows", [slow(()), (LayerKind(window=3), LayerKind())])
def test_a_text_in_a_row_of_several_has_the_states_that_it_has_alone(windows) -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2, layer_kinds=windows))
    rng = np.random.default_rng(0)
    texts = [Text(rng.integers(0, 48, n).astype(np.int32), np.ones(n, np.float32), 1) for n in (3, 7, 5, 4)]
    rows = Epochs(texts, 2, 12, 0).batch(0)
    depths = (0, 1, 2)
    read = jax.jit(lambda rows: read_rows(merge_model(lm.config, lm.weights), rows, depths))
    found, compared = read(rows), 0
    for row, begin in np.argwhere(rows.position == 0):
        text = next(
            text for text in texts if np.array_equal(rows.token[row, begin : begin + len(text.token)], text.token)
        )
        here = slice(begin, begin + len(text.token))
        alone = depth_states(merge_model(lm.config, lm.weights), jnp.asarray(text.token)[None], depths)[:, 0]
        np.testing.assert_allclose(found.states[:, row, here], alone, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.final[row, here], found.states[2, row, here])
        np.testing.assert_array_equal(found.embedded[row, here], found.states[0, row, here])
        compared += 1
    assert compared == 4
