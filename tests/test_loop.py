"""The decode loop against its slow twin, on models with exact arithmetic: everything must be equal, always."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import toy_runs, twin
from reference.toy_models import Tables, ToyModel, random_tables, toy_network, toy_prefill

from dex_jax import DexError, Limits, TreeShape, init, step
from dex_jax.decoding import record
from dex_jax.decoding.dex.lookup import continuation
from dex_jax.decoding.record import ticks_of
from dex_jax.lattice import full_rows

MODELS_PER_CONFIG = 6


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings that the loop is compiled for; `draft` is V', if the exits know only a part of the vocabulary."""

    stages: int
    rows: int
    batch: int = 8
    decs: bool = True
    sampled: bool = False
    vocab: int = 12
    draft: int | None = None
    tree: TreeShape | None = None

    def __str__(self) -> str:
        words = [f"K{self.stages}", f"W{self.rows}", f"B{self.batch}", f"V{self.vocab}"]
        words += [] if self.draft is None else [f"draft{self.draft}"]
        words += [] if self.decs else ["plain"]
        words += [] if self.tree is None else ["tree" + "".join(map(str, self.tree.widths))]
        return "-".join([*words, "sampled" if self.sampled else "greedy"])

    @property
    def never_prunes(self) -> bool:
        return self.rows >= full_rows(self.stages) and self.tree is None

    @property
    def shape(self) -> dict:
        return {"stages": self.stages, "rows": self.rows, "decs": self.decs, "drafts": self.tree}


LOOKUP = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9)
NO_LOOKUP = (0.0,) * 8
CONFIGS = [
    Config(3, 1, batch=4),
    Config(4, 4),
    Config(4, 4, decs=False),
    Config(1, 1, batch=3, sampled=True),
    Config(3, 2, decs=False, sampled=True),
    Config(4, 4, batch=4, sampled=True, draft=5),
    Config(1, 4, batch=3, tree=TreeShape((1, 1, 1), 0, LOOKUP)),
    Config(1, 6, batch=3, sampled=True, draft=7, tree=TreeShape((2, 2, 1), 3, LOOKUP)),
    Config(2, 12, tree=TreeShape((2, 1), 2, LOOKUP)),
    Config(3, 4, decs=False, tree=TreeShape((2, 2), 2, NO_LOOKUP)),
    Config(4, 6, batch=4, sampled=True, draft=5, tree=TreeShape((2, 1), 2, LOOKUP)),
]
PAPER = [config for config in CONFIGS if config.tree is None]
QUICK = [CONFIGS[number] for number in (3, 5, 6, 8)]


def configs(chosen: list[Config]) -> pytest.MarkDecorator:
    """Return configs as parameters; those outside QUICK are slow, as they take seconds to compile."""
    return pytest.mark.parametrize("config", [each if each in QUICK else slow(each) for each in chosen], ids=str)


every_config = configs(CONFIGS)


@dataclasses.dataclass(frozen=True)
class Explored:
    """The twin's runs and the library's ticks, for one model and one batch."""

    model: ToyModel
    case: toy_runs.Case
    runs: list[twin.Run]
    ticks: toy_runs.Ticks

    @property
    def record(self):
        return jax.tree.map(lambda field: field[-1], self.ticks.record)

    def rows(self):
        """Yield (prompt, draws, the twin's run, the library's tokens and exits) of each sequence."""
        for row, (prompt, run) in enumerate(zip(self.case.prompts, self.runs, strict=True)):
            draws = toy_runs.twin_draws(self.case, row, len(self.model.embedding))
            yield prompt, draws, run, *toy_runs.emitted(self.record, row)


def tables_of(config: Config, number: int) -> Tables:
    """Return a model; by `number` its exits nearly always, sometimes or hardly ever agree with the final layer.

    Logits of few values make ties; logits far apart make probabilities of one, so that a child scores as its parent.
    """
    return random_tables(
        number,
        config.stages,
        config.vocab,
        openness=(0.1, 0.3, 0.6)[number % 3],
        spread=(2, 200, 6)[(number + number // 3) % 3],
        disagreement=(1, 2)[number // 2 % 2],
        draft_size=config.draft,
    )


@functools.cache
def explored(config: Config) -> list[Explored]:
    """Return the runs that the tests below check in several ways."""
    found = []
    for number in range(MODELS_PER_CONFIG):
        tables = tables_of(config, number)
        model = ToyModel(tables)
        case = toy_runs.random_case(number, config.batch, config.vocab, sampled=config.sampled)
        runs = toy_runs.twin_runs(model, case, vocab_size=config.vocab, **config.shape)
        ticks = toy_runs.watched(tables, case, [run.tokens[0] for run in runs], **config.shape)
        found.append(Explored(model, case, runs, ticks))
    return found


@every_config
def test_every_tick_equals_the_twin(config: Config) -> None:
    for one in explored(config):
        for row, run in enumerate(one.runs):
            assert toy_runs.emitted(one.record, row) == (run.tokens, run.exits)
            assert one.record.ticks[row] == run.ticks
            assert (one.record.tokens[row, len(run.tokens) :] == -1).all()
            assert not one.ticks.lattice.live[-1, row].any()
            for tick, contents in enumerate(run.lattices, 1):
                assert toy_runs.lattice_contents(one.ticks, tick, row, config.stages) == contents, f"tick {tick}"


@every_config
def test_tokens_are_ars_ticks_follow_from_exits_and_exits_are_the_teacher_forced_count(config: Config) -> None:
    for one in explored(config):
        for row, (prompt, draws, _, tokens, exits) in enumerate(one.rows()):
            shape, limit = {"stages": config.stages, "draws": draws}, one.case.max_new_tokens[row]
            plain = twin.autoregressive(one.model, prompt, max_new_tokens=limit, eos_ids=one.case.eos_ids, **shape)
            assert tokens == plain
            assert one.record.ticks[row] == ticks_of(np.array(exits), len(exits), config.stages)
            count = twin.teacher_forced_exits(one.model, prompt, tokens, decs=config.decs, **shape)
            if config.never_prunes:
                assert exits[1:] == count
            elif config.tree is None and (draws is None or draws.top_p == 1.0):
                # With a cap exits are never smaller. Top-p breaks that order: a token that only one of the two
                # lattices has masked changes what the rest adds up to, and so what the filter leaves.
                assert all(exit_ >= least for exit_, least in zip(exits[1:], count, strict=True))


@configs(PAPER)
def test_lattice_stays_within_its_bounds(config: Config) -> None:
    nodes = max(int(one.ticks.lattice.live.sum(axis=(2, 3)).max()) for one in explored(config))
    cohort = max(int(one.ticks.lattice.live.sum(axis=3).max()) for one in explored(config))
    assert nodes <= 2 ** (config.stages - 1)
    assert cohort <= min(config.rows, full_rows(config.stages))
    if config.never_prunes:
        assert sum(run.pruned for one in explored(config) for run in one.runs) == 0
        if config.decs and config.draft is None and config.vocab >= 12:
            # The bounds are tight, as random cases reach them.
            assert (nodes, cohort) == (2 ** (config.stages - 1), full_rows(config.stages))


@pytest.mark.slow
def test_the_cases_are_not_easy() -> None:
    """The cases that the tests above need do occur: deep lattices, every exit, pruning, both kinds of ends."""
    for config in CONFIGS:
        runs = [run for one in explored(config) for run in one.runs]
        exits = Counter(exit_ for run in runs for exit_ in run.exits)
        # With DECS exit k gives its node's k-th new token, so no exit past the size of a draft vocabulary has one.
        last = config.stages - 1 if config.draft is None else min(config.stages - 1, config.draft)
        first = 1 if config.tree is None else 0
        assert set(exits) == {-1, *range(first, last + 1), config.stages}, config
        assert config.never_prunes or config.tree or sum(run.pruned for run in runs) > 20, config
        assert any(len(run.tokens) == toy_runs.CAPACITY for run in runs), config
        assert any(run.ticks == 0 for run in runs) or config.batch < 8, config
        stopped = [
            run
            for one in explored(config)
            for run, limit in zip(one.runs, one.case.max_new_tokens, strict=True)
            if 1 < len(run.tokens) < limit
        ]
        assert stopped, config


@pytest.mark.parametrize(("stages", "sampled"), [(1, False), slow(2, True)])
def test_a_cohort_drafts_and_keeps_what_is_worth_its_time(stages: int, sampled: bool) -> None:
    """The batch is one sequence, as a batch chooses for all sequences together; the twin says what cohorts keep."""
    rows_chosen: set[int] = set()
    levels_chosen: set[int] = set()
    tree = TreeShape((2, 1, 1), 2, LOOKUP, rungs=(1, 2, 3))
    config = Config(stages, 5, 1, tree=tree, sampled=sampled)
    for seed in range(6):
        tables = tables_of(config, seed)
        case = toy_runs.random_case(seed, 1, config.vocab, sampled=sampled)
        case = case._replace(max_new_tokens=[toy_runs.CAPACITY], eos_ids=())
        (run,) = toy_runs.twin_runs(ToyModel(tables), case, vocab_size=config.vocab, **config.shape)
        state = toy_runs.finished(tables, case, run.tokens[:1], **config.shape)
        assert toy_runs.emitted(state.record, 0) == (run.tokens, run.exits)
        np.testing.assert_allclose(
            [state.row_choice.acceptance[0], state.row_choice.usefulness[0]],
            [run.acceptance, run.usefulness],
            rtol=1e-3,
        )
        assert state.row_choice.ran[0, -1] == sum(run.levels)
        rows_chosen |= set(run.rows)
        levels_chosen |= set(run.levels)
    assert len(rows_chosen) > 2
    assert len(levels_chosen) > 2


def test_a_tree_that_means_nothing_is_refused() -> None:
    for rungs in ((2, 2), (2, 1), (0, 1)):
        with pytest.raises(DexError, match="row counts that ascend"):
            TreeShape((1,), 0, LOOKUP, rungs)


after = jax.jit(continuation, static_argnums=2)
emit, emit_path = jax.jit(record.emit), jax.jit(record.emit_path)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30))
def test_the_continuation_is_that_of_the_longest_latest_match(text: list[int]) -> None:
    padded = np.array([*text, *[1] * (30 - len(text))], np.int32)
    tokens, matched = after(padded, len(text), 5)
    wanted, length = twin.continuation(text, 5)
    assert int(matched) == length
    if length:
        assert tokens.tolist() == wanted


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_a_path_is_emitted_as_its_tokens_would_be_one_by_one(seed: int) -> None:
    batch, size, capacity = 3, 5, 9
    rng = np.random.default_rng(seed)
    limits = Limits(rng.integers(1, capacity + 1, batch).astype(np.int32), np.array([3], np.int32))
    at_once = singly = record.new_record(rng.integers(0, 6, batch).astype(np.int32), capacity, limits)
    for _ in range(3):
        tokens = rng.integers(0, 6, (batch, size)).astype(np.int32)
        born_at = rng.integers(0, 2, (batch, size)).astype(np.int32)
        count = rng.integers(1, size + 1, batch).astype(np.int32)
        for i in range(size):
            singly = emit(singly, tokens[:, i], born_at[:, i], (i < count) & ~singly.done, limits)
        singly = singly._replace(ticks=at_once.ticks)  # the loop counts ticks
        at_once, _ = emit_path(at_once, tokens, born_at, count, limits)
        chex.assert_trees_all_equal(at_once, singly)


@pytest.mark.slow
def test_decs_saves_ticks() -> None:
    """Without a cap DECS costs no tick, as the lattice has what it masks; a cap may drop better nodes for siblings."""
    plain = Config(4, 4, decs=False)
    saved = []
    for number, one in enumerate(explored(plain)):
        model = ToyModel(tables_of(plain, number))
        runs = toy_runs.twin_runs(model, one.case, stages=4, rows=4, decs=True, vocab_size=plain.vocab)
        for (*_, tokens, exits), run in zip(one.rows(), runs, strict=True):
            assert tokens == run.tokens
            saved.append(ticks_of(np.array(exits), len(exits), 4) - run.ticks)
    assert min(saved) >= 0
    assert np.mean(saved) > 0.2


def test_the_while_loop_equals_stepping_also_under_vmap() -> None:
    """Two models run side by side, with the whole loop under one more batch axis."""
    config = Config(3, 1, batch=4)
    pair = explored(config)[:2]
    cases = [toy_runs.arrays(one.case, [run.tokens[0] for run in one.runs]) for one in pair]
    arguments = [(tables_of(config, number), *arrays) for number, arrays in enumerate(cases)]
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), *arguments)
    both = jax.jit(jax.vmap(functools.partial(toy_runs.finish, **config.shape)))(*stacked).record
    for number, one in enumerate(pair):
        chex.assert_trees_all_equal(jax.tree.map(lambda field, n=number: np.asarray(field[n]), both), one.record)


def test_what_does_not_fit_is_one_sentence() -> None:
    config = Config(3, 1, batch=4)
    one = explored(config)[0]
    prompts, lengths, first, limits, _ = toy_runs.arrays(one.case, [run.tokens[0] for run in one.runs])
    tables = jax.tree.map(jnp.asarray, tables_of(config, 0))
    network = toy_network(tables)
    prefill = functools.partial(toy_prefill, capacity=toy_runs.CAPACITY, slots=3)
    memory = jax.eval_shape(prefill, tables, prompts, lengths)

    def begun(network=network, **changed):
        sizes = {"stages": 3, "rows": 1, "capacity": toy_runs.CAPACITY, "limits": limits}
        return jax.eval_shape(lambda memory: init(network, memory, first, lengths, **(sizes | changed)), memory)

    one_for_all = limits._replace(max_new_tokens=5)
    for changed in ({"stages": 0}, {"rows": 1.5}, {"limits": 5}, {"limits": one_for_all}):
        with pytest.raises(DexError, match=next(iter(changed))):
            begun(**changed)
    blind = network._replace(exits=None)
    with pytest.raises(DexError, match="without exits"):
        begun(blind)
    for other, state, unlike, word in (
        (blind, begun(), limits, "without exits"),
        (network, begun(stages=2), limits, "2 stages"),
        (network, begun(), one_for_all, "limits"),
    ):
        with pytest.raises(DexError, match=word):
            jax.eval_shape(functools.partial(step, other, limits=unlike), state)
