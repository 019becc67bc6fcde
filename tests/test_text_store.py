"""Stored texts: what drafts find in them, and the file that several processes share and that a kill may cut off."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import twin
from reference.small_models import LLAMA, assert_same_tokens, ragged_prompts, random_transformer, small_model

import dex_jax
from dex_jax import Dex, DexError, LanguageModel, TextStore, TreeShape, Unrolled
from dex_jax.decoding import text_store
from dex_jax.decoding.dex.lookup import stored_continuation
from dex_jax.decoding.text_store import HEADER, tokenizer_of

TOKENIZER, OTHER = b"0" * 32, b"1" * 32
TREE = TreeShape((2, 1, 1, 1, 1), drafted=0, lookup=(0.3, 0.6, 0.7, 0.8, 0.8, 0.8, 0.9, 0.9))
texts = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=24), max_size=5)
lookup = jax.jit(stored_continuation, static_argnums=3)


def opened(path: Path, tokenizer: bytes = TOKENIZER, **options) -> TextStore:
    store = TextStore(path, **options)
    store.open(tokenizer)
    return store


def texts_of(store: TextStore) -> list[list[int]]:
    return [text.tolist() for text in store.texts()]


@settings(max_examples=60)
@given(texts, st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_the_latest_place_of_the_longest_match_is_found(earlier: list[list[int]], text: list[int]) -> None:
    store = TextStore(capacity=2**16)
    store.add(earlier)
    tokens, length, often = lookup(store.arrays(), np.array([*text, *[1] * (30 - len(text))], np.int32), len(text), 5)
    said, wanted, count = twin.stored_continuation(earlier, text, 5)
    assert int(length) == wanted
    if wanted:
        assert [None if token < 0 else token for token in tokens.tolist()] == said
        assert int(often) == count


def test_the_oldest_texts_are_forgotten_and_the_newest_are_found() -> None:
    store = TextStore(capacity=256)
    written = [[number, *range(1000, 1000 + number % 40)] for number in range(300)]
    for text in written:
        store.add([text])
        assert len(store) <= 256
        assert store.arrays().tokens.shape == (256,)
    kept = texts_of(store)
    assert kept == written[-len(kept) :]
    assert len(kept) >= 4
    found = [np.array([*text[:-1], *[7] * 60][:60], np.int32) for text in kept]
    for text, padded in zip(kept, found, strict=True):
        if len(text) > 20:
            tokens, length, _ = lookup(store.arrays(), padded, len(text) - 1, 2)
            assert (tokens[0], length) == (text[-1], len(text) - 1)


def test_room_grows_with_the_texts_and_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_store, "FEW", 64)
    random = np.random.default_rng(0)
    store, sizes, written = TextStore(capacity=2**12), set(), []
    for _ in range(60):
        written.append(random.integers(0, 5, random.integers(1, 40)).tolist())
        store.add(written[-1:])
        sizes.add(len(store.arrays().tokens))
        assert texts_of(store) == written
    assert sizes == {64, 256, 1024, 4096}
    monkeypatch.setattr(text_store, "FEW", 2**12)
    whole = TextStore(capacity=2**12)
    whole.add(written)
    assert all(np.array_equal(one, other) for one, other in zip(store.arrays(), whole.arrays(), strict=True))


def test_a_text_longer_than_the_store_keeps_its_end() -> None:
    store = TextStore(capacity=64)
    store.add([list(range(1000))])
    assert texts_of(store) == [list(range(968, 1000))]


def test_a_kill_loses_only_what_was_being_written(tmp_path: Path) -> None:
    """Cut off at every byte, also within the header: whole texts are there, and writing goes on after them."""
    path, written = tmp_path / "texts", [[1, 2, 3], [4], [5, 6, 7, 8]]
    opened(path).add(written)
    whole = path.read_bytes()
    ends = [HEADER + sum(8 + 4 * len(text) for text in written[:count]) for count in range(4)]
    assert ends[-1] == len(whole)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        left = sum(end <= size for end in ends[1:])
        store = opened(path)
        assert texts_of(store) == written[:left]
        store.add([[9, 9]])
        assert texts_of(opened(path)) == [*written[:left], [9, 9]]


def test_a_file_that_was_removed_meanwhile_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    store = opened(path)
    store.add([[1, 2, 3]])
    path.unlink()
    store.add([[4, 5]])
    assert texts_of(opened(path)) == [[4, 5]]


def _write(path: Path, number: int) -> None:
    store = opened(path)
    for each in range(30):
        store.add([[number, each, *range(each)]])


@pytest.mark.slow
def test_processes_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    first = opened(path)
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(path, number)) for number in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    first.add([[5]])
    found = texts_of(opened(path))
    written = [[number, each, *range(each)] for number in range(2) for each in range(30)]
    assert sorted(texts_of(first)) == sorted(found) == [*written, [5]]


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    opened(path).add([[1]])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert b"dex_jax texts" in path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a diary", "no store"), (b"dex_jax texts, version 2, tokenizer 00", "no store"), (None, "cannot be used")],
)
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "texts"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(DexError, match=message):
        opened(path)
    assert content is None or path.read_bytes() == content


def test_texts_of_another_tokenizer_and_damage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    store = opened(path)
    store.add([[1, 2], [3, 4]])
    with pytest.raises(DexError, match="another tokenizer"):
        opened(path, OTHER)
    with pytest.raises(DexError, match="another tokenizer"):
        store.open(OTHER)
    content = bytearray(path.read_bytes())
    content[HEADER + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DexError, match=f"damaged at byte {HEADER}"):
        opened(path)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(DexError, match="at least 64"):
        TextStore(capacity=10)
    with pytest.raises(DexError, match="TextStore or the path"):
        dex_jax.generate(small_model(), [[1, 2]], store=7, max_new_tokens=4)
    with pytest.raises(DexError, match="not open"):
        TextStore("texts").add([[1]])


@pytest.mark.parametrize(("dtype", "temperature"), [slow("float32", 1.0), ("bfloat16", 0.0)])
def test_tokens_stay_and_a_prompt_that_comes_again_takes_fewer_ticks(dtype: str, temperature: float) -> None:
    config = dataclasses.replace(LLAMA, num_layers=2)
    model, store = random_transformer(config, Unrolled(), 0, jnp.dtype(dtype)), TextStore(capacity=2**14)
    lm = LanguageModel(model, tokenizer=None, source="random", fingerprint="0")
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 3, "exits": "shared"}
    prompts = ragged_prompts(4)
    plain = dex_jax.generate(lm, prompts, method=dex_jax.AR(), **options)
    first, second = (
        dex_jax.generate(lm, prompts, method=Dex(explorers=1, draft=TREE), store=store, **options) for _ in range(2)
    )
    for output in (first, second):
        assert_same_tokens(lm, output, plain, **options)
    assert len(store) == 2 * sum(len(prompt) + 41 for prompt in prompts)
    assert second.stats.ticks.sum() < 0.6 * first.stats.ticks.sum()
    if dtype == "float32":
        several = dex_jax.generate(lm, prompts, method=Dex(explorers=2, draft=TREE), store=store, **options)
        assert_same_tokens(lm, several, plain, **options)
        assert several.stats.ticks.sum() < first.stats.ticks.sum()


@pytest.mark.slow
def test_a_path_keeps_texts_from_run_to_run_also_of_one_that_is_stopped(tmp_path: Path) -> None:
    lm, path = small_model(), tmp_path / "texts"
    options = {"max_new_tokens": 30, "method": Dex(explorers=1, draft=TREE), "exits": "shared", "store": path}
    updates = dex_jax.stream(lm, [[3, 4, 5]], ticks_per_update=3, **options)
    next(updates)
    output = next(updates)
    updates.close()
    kept = texts_of(opened(path, tokenizer_of(lm)))
    assert kept == [[3, 4, 5, *output.tokens[0, : output.lengths[0]].tolist()]]
    first, second = (dex_jax.generate(lm, [[3, 4, 5]], **options) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens)
    assert second.stats.ticks[0] < first.stats.ticks[0]
    assert os.path.getsize(path) == HEADER + 3 * 8 + 4 * (len(kept[0]) + 2 * 33)
