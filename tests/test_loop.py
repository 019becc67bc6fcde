"""The decode loop against its slow twin, on models whose arithmetic is exact: everything must be equal, always."""

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
from reference import toy_runs, twin
from reference.toy_models import Tables, ToyModel, random_tables, toy_network, toy_prefill

from dex_jax import DexError, init, step
from dex_jax.lattice import full_rows

MODELS_PER_CONFIG = 6


@dataclasses.dataclass(frozen=True)
class Config:
    """What the loop is compiled for; V' is `draft`, when the exits know a part of the vocabulary only."""

    stages: int
    rows: int
    batch: int = 8
    decs: bool = True
    sampled: bool = False
    vocab: int = 12
    draft: int | None = None

    def __str__(self) -> str:
        words = [f"K{self.stages}", f"W{self.rows}", f"B{self.batch}", f"V{self.vocab}"]
        words += [] if self.draft is None else [f"draft{self.draft}"]
        words += [] if self.decs else ["plain"]
        return "-".join([*words, "sampled" if self.sampled else "greedy"])

    @property
    def never_prunes(self) -> bool:
        return self.rows >= full_rows(self.stages)


CONFIGS = [
    Config(1, 1, batch=2),
    Config(2, 2, batch=3),
    Config(3, 1, batch=4),
    Config(4, 4),
    Config(4, 4, decs=False),
    Config(5, 2),
    Config(5, 8, draft=3),
    Config(6, 16, vocab=30),
    Config(1, 1, batch=3, sampled=True),
    Config(3, 2, decs=False, sampled=True),
    Config(4, 2, batch=4, sampled=True),
    Config(4, 4, batch=4, sampled=True, draft=5),
    Config(5, 8, sampled=True, vocab=30),
]
LARGE = (Config(6, 16, vocab=30), Config(5, 8, sampled=True, vocab=30))
every_config = pytest.mark.parametrize("config", [slow(each) if each in LARGE else each for each in CONFIGS], ids=str)


@dataclasses.dataclass(frozen=True)
class Explored:
    """One model, one batch: the twin's runs and what the library did."""

    model: ToyModel
    case: toy_runs.Case
    runs: list[twin.Run]
    ticks: toy_runs.Ticks

    @property
    def record(self):
        return jax.tree.map(lambda field: field[-1], self.ticks.record)

    def rows(self):
        """(prompt, draws, the twin's run, the library's tokens and exits) of each sequence."""
        for row, (prompt, run) in enumerate(zip(self.case.prompts, self.runs, strict=True)):
            draws = toy_runs.twin_draws(self.case, row, len(self.model.embedding))
            yield prompt, draws, run, *toy_runs.emitted(self.record, row)


def tables_of(config: Config, number: int) -> Tables:
    """Models from those whose exits nearly always agree with the last layer to those that hardly ever do.

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
    """The runs that the tests below look at from several sides."""
    found = []
    for number in range(MODELS_PER_CONFIG):
        tables = tables_of(config, number)
        model = ToyModel(tables)
        case = toy_runs.random_case(number, config.batch, config.vocab, sampled=config.sampled)
        shape = {"stages": config.stages, "rows": config.rows, "decs": config.decs}
        runs = toy_runs.twin_runs(model, case, vocab_size=config.vocab, **shape)
        ticks = toy_runs.watched(tables, case, [run.tokens[0] for run in runs], **shape)
        found.append(Explored(model, case, runs, ticks))
    return found


@every_config
def test_every_tick_equals_the_twin(config: Config) -> None:
    for one in explored(config):
        for row, run in enumerate(one.runs):
            assert toy_runs.emitted(one.record, row) == (run.tokens, run.exits)
            assert one.record.ticks[row] == run.ticks
            for tick, contents in enumerate(run.lattices, 1):
                assert toy_runs.lattice_contents(one.ticks, tick, row, config.stages) == contents, f"tick {tick}"


@every_config
def test_tokens_equal_autoregressive_decoding(config: Config) -> None:
    for one in explored(config):
        for row, (prompt, draws, _, tokens, _) in enumerate(one.rows()):
            assert tokens == twin.autoregressive(
                one.model,
                prompt,
                stages=config.stages,
                max_new_tokens=one.case.max_new_tokens[row],
                eos_ids=one.case.eos_ids,
                draws=draws,
            )


@every_config
def test_ticks_follow_from_exits(config: Config) -> None:
    for one in explored(config):
        for row, (*_, exits) in enumerate(one.rows()):
            assert one.record.ticks[row] == toy_runs.ticks_identity(exits, config.stages)


@every_config
def test_exits_are_the_teacher_forced_count_and_never_smaller_with_a_cap(config: Config) -> None:
    for one in explored(config):
        for prompt, draws, _, tokens, exits in one.rows():
            count = twin.teacher_forced_exits(
                one.model, prompt, tokens, stages=config.stages, decs=config.decs, draws=draws
            )
            if config.never_prunes:
                assert exits[1:] == count
            elif draws is None or draws.top_p == 1.0:
                # With top-p there is no such order: a token that only one of the two lattices has masked changes
                # what the rest of the distribution adds up to, and so what the filter leaves.
                assert all(exit_ >= least for exit_, least in zip(exits[1:], count, strict=True))


@every_config
def test_lattice_stays_within_its_bounds(config: Config) -> None:
    nodes = max(int(one.ticks.lattice.live.sum(axis=(2, 3)).max()) for one in explored(config))
    cohort = max(int(one.ticks.lattice.live.sum(axis=3).max()) for one in explored(config))
    assert nodes <= 2 ** (config.stages - 1)
    assert cohort <= min(config.rows, full_rows(config.stages))
    if config.never_prunes:
        assert sum(run.pruned for one in explored(config) for run in one.runs) == 0
        if config.decs and config.draft is None and config.vocab >= 12:
            # The bounds are the smallest: random cases do reach them.
            assert (nodes, cohort) == (2 ** (config.stages - 1), full_rows(config.stages))


@every_config
def test_sequences_that_are_done_stand_still(config: Config) -> None:
    for one in explored(config):
        lengths, done, ticks = one.ticks.record.lengths, one.ticks.record.done, one.ticks.record.ticks
        assert done[-1].all()
        live = one.ticks.lattice.live.any(axis=(2, 3))
        np.testing.assert_array_equal(live, ~done)
        for row, run in enumerate(one.runs):
            np.testing.assert_array_equal(ticks[:, row], np.minimum(np.arange(1, len(ticks) + 1), run.ticks))
            assert (lengths[max(run.ticks - 1, 0) :, row] == len(run.tokens)).all()
            np.testing.assert_array_equal(one.record.tokens[row, len(run.tokens) :], -1)
            np.testing.assert_array_equal(one.record.exits[row, len(run.tokens) :], -1)


@pytest.mark.slow
def test_the_cases_are_not_easy() -> None:
    """All that the tests above rest on does happen: deep lattices, every exit, pruning, ends of both kinds."""
    for config in CONFIGS:
        runs = [run for one in explored(config) for run in one.runs]
        exits = Counter(exit_ for run in runs for exit_ in run.exits)
        # With DECS exit k holds out for its k-th new token, so no exit past the size of a draft vocabulary has one.
        last = config.stages - 1 if config.draft is None else min(config.stages - 1, config.draft)
        assert set(exits) == {-1, *range(1, last + 1), config.stages}, config
        assert config.never_prunes or sum(run.pruned for run in runs) > 20, config
        assert any(len(run.tokens) == toy_runs.CAPACITY for run in runs), config
        assert any(run.ticks == 0 for run in runs) or config.batch < 8, config
        stopped = [
            run
            for one in explored(config)
            for run, limit in zip(one.runs, one.case.max_new_tokens, strict=True)
            if 1 < len(run.tokens) < limit
        ]
        assert stopped, config


def test_exits_can_run_out_of_tokens() -> None:
    """Three draft tokens and four exits: with DECS the fourth exit has nothing left to propose."""
    config = Config(5, 8, draft=3)
    assert config in CONFIGS
    offered = np.concatenate([one.ticks.lattice.offered[..., :3].reshape(-1, 3) for one in explored(config)])
    assert (offered >= 0).all(axis=1).any()


def test_decs_saves_ticks() -> None:
    """Without a cap DECS never costs a tick: what it masks is in the lattice already. (With one, siblings it adds may
    push out nodes that mattered.)"""
    plain = Config(4, 4, decs=False)
    saved = []
    for number, one in enumerate(explored(plain)):
        model = ToyModel(tables_of(plain, number))
        runs = toy_runs.twin_runs(model, one.case, stages=4, rows=4, decs=True, vocab_size=plain.vocab)
        for (*_, tokens, exits), run in zip(one.rows(), runs, strict=True):
            assert tokens == run.tokens
            saved.append(toy_runs.ticks_identity(exits, 4) - run.ticks)
    assert min(saved) >= 0
    assert np.mean(saved) > 0.2


def test_while_loop_equals_stepping() -> None:
    config = Config(3, 1, batch=4)
    for number, one in enumerate(explored(config)):
        first = [run.tokens[0] for run in one.runs]
        record = toy_runs.finished(tables_of(config, number), one.case, first, stages=3, rows=1, decs=True)
        chex.assert_trees_all_equal(record, one.record)


def test_one_sequence_alone_equals_its_row_of_a_batch() -> None:
    """The twin runs sequences one by one already; here the library does, in its own while_loop."""
    config = Config(4, 2, batch=4, sampled=True)
    one = explored(config)[0]
    for row in range(config.batch):
        alone = toy_runs.Case(
            prompts=[one.case.prompts[row]],
            max_new_tokens=[one.case.max_new_tokens[row]],
            seeds=[one.case.seeds[row]],
            eos_ids=one.case.eos_ids,
            temperature=one.case.temperature,
            top_k=one.case.top_k,
            top_p=one.case.top_p,
        )
        first = [one.runs[row].tokens[0]]
        record = toy_runs.finished(tables_of(config, 0), alone, first, stages=4, rows=2, decs=True)
        chex.assert_trees_all_equal(record, jax.tree.map(lambda field, row=row: field[row : row + 1], one.record))


def test_step_composes_with_vmap() -> None:
    """Two models side by side, the whole loop under one more batch axis."""
    config = Config(3, 1, batch=4)
    one, other = explored(config)[:2]
    shape = {"stages": 3, "rows": 1, "decs": True}
    pairs = []
    for number, run in enumerate((one, other)):
        arrays = toy_runs.arrays(run.case, [r.tokens[0] for r in run.runs])
        pairs.append((tables_of(config, number), *arrays))
    stacked = jax.tree.map(lambda a, b: np.stack([a, b]), *pairs)
    both = jax.jit(jax.vmap(functools.partial(toy_runs.watch, **shape)))(*stacked)
    for number, run in enumerate((one, other)):
        record = jax.tree.map(lambda field, n=number: np.asarray(field[n, -1]), both.record)
        chex.assert_trees_all_equal(record, run.record)


def test_what_does_not_fit_is_one_sentence() -> None:
    config = Config(3, 1, batch=4)
    one = explored(config)[0]
    prompts, lengths, first, limits, _ = toy_runs.arrays(one.case, [run.tokens[0] for run in one.runs])
    tables = jax.tree.map(jnp.asarray, tables_of(config, 0))
    network, memory = toy_network(tables), toy_prefill(tables, prompts, lengths, capacity=toy_runs.CAPACITY, slots=3)

    def begun(network=network, **changed):
        sizes = {"stages": 3, "rows": 1, "capacity": toy_runs.CAPACITY, "limits": limits}
        return init(network, memory, first, lengths, **(sizes | changed))

    one_for_all = limits._replace(max_new_tokens=5)
    for changed in ({"stages": 0}, {"rows": 1.5}, {"limits": 5}, {"limits": one_for_all}):
        with pytest.raises(DexError, match=next(iter(changed))):
            begun(**changed)
    blind = network._replace(exits=None)
    with pytest.raises(DexError, match="without exits"):
        begun(blind)
    for other, state, given, word in (
        (blind, begun(), limits, "without exits"),
        (network, begun(stages=2), limits, "2 stages"),
        (network, begun(), one_for_all, "limits"),
    ):
        with pytest.raises(DexError, match=word):
            step(other, state, given)
