"""Filters against sorting, noise by position, and the distribution of what DEX samples."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference.filters import filter_logits
from reference.toy_models import ToyModel, random_tables, toy_network, toy_prefill

from dex_jax import Limits, Sampling, init, run
from dex_jax.decoding.record import Record
from dex_jax.sampling import (
    COLUMN_BLOCKS,
    DROPPED,
    best_column,
    choose,
    filtered,
    position_noise,
    sampling_keys,
    threshold,
)

ROWS, VOCAB = 3, 7

by_threshold = jax.jit(filtered)
chosen = jax.jit(choose)
best_of = jax.jit(best_column)

# Few distinct values make ties; a mask leaves -inf.
tied = st.sampled_from([-np.inf, -3.0, -1.0, -0.0, 0.0, 0.5, 2.0])
# XLA takes subnormals for zero, NumPy does not.
spread = st.floats(-30, 30, width=32, allow_subnormal=False)
shares = st.floats(2.0**-10, 1, width=32)
logit_rows = st.one_of(hnp.arrays(np.float32, (ROWS, VOCAB), elements=values) for values in (tied, spread))


def by_sorting(logits: np.ndarray, top_k: int | None, top_p: float | None) -> np.ndarray:
    return np.stack([filter_logits(row, top_k, top_p) for row in logits])


@given(st.sampled_from([7, *(3 * size for size in COLUMN_BLOCKS)]), st.integers(0, 2**32 - 1))
def test_the_best_column_is_numpys_argmax(columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.choice(np.float32([-np.inf, -3.0, 0.0, 2.0]), (4, columns), p=[0.5, 0.3, 0.15, 0.05])
    rows[0] = -np.inf
    rows[1] = rng.standard_normal(columns)
    np.testing.assert_array_equal(best_of(rows), rows.argmax(axis=1))


@given(logit_rows, st.integers(1, VOCAB + 2))
def test_top_k_equals_sorting(logits: np.ndarray, top_k: int) -> None:
    got = np.asarray(by_threshold(logits, jnp.int32(top_k), None))
    np.testing.assert_array_equal(got, by_sorting(logits, top_k, None))


@given(logit_rows, shares)
def test_top_p_equals_sorting(logits: np.ndarray, top_p: float) -> None:
    _assert_top_p(logits, None, top_p)


@given(logit_rows, st.integers(1, VOCAB), shares)
def test_top_k_comes_before_top_p(logits: np.ndarray, top_k: int, top_p: float) -> None:
    _assert_top_p(logits, top_k, top_p)


def _assert_top_p(logits: np.ndarray, top_k: int | None, top_p: float) -> None:
    """Assert that the set is between those that sorting keeps for a share slightly below p and slightly above it.

    Each set has the largest logits, with all ties, so sets are nested, and float32's rounding may give any of these.
    """
    got = np.asarray(by_threshold(logits, None if top_k is None else jnp.int32(top_k), jnp.float32(top_p)))
    for row, kept in zip(logits, got, strict=True):
        least, most = (np.isfinite(filter_logits(row, top_k, top_p + nudge)) for nudge in (-2e-6, 2e-6))
        here = np.isfinite(kept)
        assert np.array_equal(kept[here], row[here]), (row, kept)
        assert np.all(here >= least), (row, kept)
        assert np.all(here <= most), (row, kept)
        if here.any() and not here.all():
            assert row[here].min() > row[~here].max(), (row, kept)


def test_a_row_with_nothing_left_says_so_and_of_equals_the_lowest_id_is_taken() -> None:
    logits = np.array([[DROPPED] * 3, [DROPPED, 0.0, DROPPED]], np.float32)
    assert chosen(logits, None, None)[1].tolist() == [False, True]
    equal = np.array([[1.0, 3.0, 3.0], [DROPPED, 0.0, 0.0]], np.float32)
    assert chosen(equal, None, None)[0].tolist() == [1, 1]  # greedy takes the lowest id
    sampling = Sampling(sampling_keys([0]), jnp.float32(0.7), jnp.int32(2), jnp.float32(0.5))
    token, left = chosen(logits, sampling, np.full((2, 3), 5.0, np.float32))
    assert left.tolist() == [False, True]
    assert int(token[1]) == 1


def test_noise_belongs_to_seed_and_position() -> None:
    keys = sampling_keys([3, 4])
    noise = {(b, n): np.asarray(position_noise(keys[b], jnp.int32(n), 11)) for b in (0, 1) for n in (5, 6)}
    assert all(row.shape == (11,) and row.dtype == np.float32 for row in noise.values())
    assert len({row.tobytes() for row in noise.values()}) == 4
    again = position_noise(sampling_keys([4])[0], jnp.int32(6), 11)
    np.testing.assert_array_equal(again, noise[1, 6])
    assert jax.random.key_impl(keys) == "threefry2x32"


def chi_square(observed: np.ndarray, expected: np.ndarray) -> tuple[float, int]:
    """Return (statistic, degrees of freedom) of counts, cells of fewer than 5 expected put together."""
    small = expected < 5
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    if expected[-1] == 0:
        assert observed[-1] == 0, "a token of probability 0 was sampled"
        observed, expected = observed[:-1], expected[:-1]
    return float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1


def p_value(statistic: float, degrees: int) -> float:
    """Return the probability of a larger chi-square."""
    return float(jax.scipy.special.gammaincc(jnp.float32(degrees / 2), jnp.float32(statistic / 2)))


SEQUENCES, BATCH, LENGTH, CHI_VOCAB, CHI_STAGES, CHI_ROWS = 20_000, 500, 4, 50, 3, 2
PROMPT = [3, 14, 15]


@jax.jit
def _sampled_by_dex(tables, first: jax.Array, sampling: Sampling) -> Record:
    batch = first.shape[0]
    lengths = jnp.full(batch, len(PROMPT))
    prompts = jnp.broadcast_to(jnp.array([PROMPT]), (batch, len(PROMPT)))
    memory = toy_prefill(tables, prompts, lengths, capacity=LENGTH, slots=CHI_STAGES * CHI_ROWS)
    limits = Limits(jnp.full(batch, LENGTH), jnp.array([-1]))
    shape = {"stages": CHI_STAGES, "rows": CHI_ROWS, "capacity": LENGTH}
    state = init(toy_network(tables), memory, first, lengths, limits=limits, sampling=sampling, **shape)
    return run(toy_network(tables), state, limits, sampling).record


CUT = jax.jit(threshold, static_argnums=0)


@given(
    # There are few lengths, as each is compiled.
    st.sampled_from([1, 40]).flatmap(lambda size: st.lists(st.integers(0, 2**32 - 1), min_size=size, max_size=size)),
    st.integers(1, 50),
)
def test_the_cut_of_gpus_and_tpus_is_the_one_of_cpus(values: list[int], enough: int) -> None:
    ordered = jnp.asarray([values], jnp.uint32)
    weight = jnp.ones((1, 1, len(values)), jnp.int32)
    found = [int(CUT(bits, ordered, weight, jnp.int32(enough))[0]) for bits in (1, 2, 4)]
    assert found == [sorted(values)[-enough] if enough <= len(values) else 0] * 3
    two = CUT(4, jnp.tile(ordered, (2, 1)), jnp.tile(weight, (2, 1, 1)), jnp.asarray([enough, len(values)]))
    assert two.tolist() == [found[0], min(values)], "each row its own"


@pytest.mark.slow
def test_dex_samples_from_the_model_s_own_distribution() -> None:
    """Tokens 1 to 3 are tested (token 0 is given), each against the softmax after its own prefix."""
    temperature, top_k, top_p = 0.8, 12, 0.9
    tables = random_tables(5, CHI_STAGES, CHI_VOCAB, openness=0.2, spread=6, disagreement=1)
    model = ToyModel(tables)
    make_keys = jax.jit(jax.vmap(functools.partial(jax.random.key, impl="threefry2x32")))
    settings = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    first = 21
    records = []
    for start in range(0, SEQUENCES, BATCH):
        sampling = Sampling(make_keys(1000 + start + jnp.arange(BATCH)), *settings)
        records.append(_sampled_by_dex(tables, jnp.full(BATCH, first), sampling))
    record = jax.tree.map(lambda *parts: np.concatenate(parts), *records)
    np.testing.assert_array_equal(record.lengths, LENGTH)
    # Most of what is tested was proposed by an exit and followed a collapse.
    assert (record.exits[:, 2:] < CHI_STAGES).mean() > 0.3

    def softmax_after(tokens: list[int]) -> np.ndarray:
        scaled = model.logits((*PROMPT, *tokens), CHI_STAGES) / np.float32(temperature)
        scaled = filter_logits(scaled, top_k, top_p).astype(np.float64)
        weights = np.exp(scaled - scaled.max())
        return weights / weights.sum()

    for index in (1, 2, 3):
        # Each prefix that came up often enough has a test, added up; the rest share one row of expectations.
        prefixes, number = np.unique(record.tokens[:, 1:index], axis=0, return_inverse=True)
        statistic, degrees = 0.0, 0
        rest_observed, rest_expected = np.zeros(CHI_VOCAB), np.zeros(CHI_VOCAB)
        for i, prefix in enumerate(prefixes):
            observed = np.bincount(record.tokens[number.reshape(-1) == i, index], minlength=CHI_VOCAB)
            expected = softmax_after([first, *prefix.tolist()]) * observed.sum()
            if observed.sum() >= 100:
                more = chi_square(observed, expected)
                statistic, degrees = statistic + more[0], degrees + more[1]
            else:
                rest_observed, rest_expected = rest_observed + observed, rest_expected + expected
        if rest_observed.sum() >= 100:
            more = chi_square(rest_observed, rest_expected)
            statistic, degrees = statistic + more[0], degrees + more[1]
        assert p_value(statistic, degrees) > 1e-3, f"token {index}: chi-square {statistic:.0f} at {degrees} degrees"


def test_chi_square_finds_a_wrong_distribution() -> None:
    """The test above needs this: a bias of 0.006 in two of fifty tokens is found, and fair samples pass."""
    rng = np.random.default_rng(0)
    fair = np.full(50, 1 / 50)
    biased = fair.copy()
    biased[:2] += [0.006, -0.006]
    expected = fair * SEQUENCES
    assert p_value(*chi_square(rng.multinomial(SEQUENCES, fair), expected)) > 1e-3
    assert p_value(*chi_square(rng.multinomial(SEQUENCES, biased), expected)) < 1e-3
    assert p_value(67.5, 49) == pytest.approx(0.0409, abs=0.002)
    assert math.isclose(p_value(0.0, 3), 1.0)


def test_the_mask_comes_before_the_filter() -> None:
    """With its best token masked, top_k = 1 leaves a row its second best rather than nothing."""
    logits = np.array([[DROPPED, 2.0, 1.0]], np.float32)
    sampling = Sampling(sampling_keys([0]), jnp.float32(1.0), jnp.int32(1))
    token, left = chosen(logits, sampling, np.array([[0.0, 0.0, 50.0]], np.float32))
    assert (token.tolist(), left.tolist()) == ([1], [True])
