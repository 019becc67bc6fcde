"""The rivals of DEX in studies/: their rounds are the slow twin's, their tokens AR's, and their counts right."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import slow
from reference import chain_twin
from reference.small_models import LetterTokenizer, assert_same_tokens, ragged_prompts, random_exits, small_model
from reference.toy_chain import chain_toy
from reference.toy_models import ToyModel, random_tables, toy_prefill
from reference.toy_runs import CAPACITY, arrays, emitted, random_case, twin_draws
from reference.twin import autoregressive

import dex_jax
from benchmarks import methods_table
from dex_jax.decoding.record import until_done
from studies.rivals import DEL, AdaDecode, LayerSkip, layer_steps, loop
from studies.rivals.dynamic import Dynamic
from studies.rivals.interface import Policy
from studies.rivals.methods import Sure

GOLDENS = Path(__file__).parent / "goldens"
VOCABULARY, BATCH = 11, 3
DEPTHS = (2, 3, 5, 9)
POLICIES = {
    "layerskip": (Policy(3), (4, 9), chain_twin.Fixed),
    "adadecode": (Sure(4, 0.37), DEPTHS, lambda: chain_twin.Sure(0.37)),
    "del": (Dynamic(4, DEPTHS, 0.9), DEPTHS, lambda: chain_twin.Dynamic(DEPTHS, 4, 0.9)),
}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}


@functools.partial(jax.jit, static_argnames=("policy", "depths"))
def decode(tables, prompts, lengths, first, limits, sampling, *, policy, depths):
    """Return the record after the loop."""
    memory = toy_prefill(tables, prompts, lengths, capacity=CAPACITY + 2 * policy.rows, slots=0)
    network, options = chain_toy(tables, depths), {"policy": policy, "limits": limits, "sampling": sampling}
    state = loop.init(network, memory, first, lengths, capacity=CAPACITY, **options)
    return until_done(lambda state: loop.step(network, state, **options), state, None).record


@pytest.mark.parametrize(("name", "sampled"), [("layerskip", False), slow("adadecode", True), ("del", True)])
def test_rounds_are_those_of_the_twin_and_tokens_those_of_ar(name, sampled) -> None:
    policy, depths, make = POLICIES[name]
    stages = len(depths)
    drafted = accepted = rejected = 0
    for seed in range(6):
        tables = random_tables(seed, stages, VOCABULARY, openness=0.2, draft_size=9 if sampled else None)
        model, case = ToyModel(tables), random_case(seed, BATCH, VOCABULARY, sampled=sampled)
        draws = [twin_draws(case, row, VOCABULARY) for row in range(BATCH)]
        limits, shape = case.max_new_tokens, {"eos_ids": case.eos_ids, "stages": stages}
        plain = [
            autoregressive(model, prompt, **shape, max_new_tokens=limits[row], draws=draws[row])
            for row, prompt in enumerate(case.prompts)
        ]
        record = decode(tables, *arrays(case, [tokens[0] for tokens in plain]), policy=policy, depths=depths)
        record = jax.tree.map(np.asarray, record)
        for row, prompt in enumerate(case.prompts):
            given = {"depths": depths, "policy": make(), "draft_length": policy.draft_length, "eos": case.eos_ids}
            twin = chain_twin.chain_run(model, prompt, plain[row][0], limit=limits[row], draws=draws[row], **given)
            assert emitted(record, row) == (twin.tokens, twin.exits)
            assert twin.tokens == plain[row]
            assert record.ticks[row] == twin.rounds
            assert record.counts[row, len(twin.tokens) - 1].tolist() == [twin.layer_steps, twin.drafted]
            right = sum(0 < exit_number < stages for exit_number in twin.exits)
            drafted, accepted, rejected = drafted + twin.drafted, accepted + right, rejected + (twin.drafted > right)
    assert drafted > accepted > 10, "nothing was right, or nothing wrong: this would test nothing"
    assert rejected > 0


@pytest.mark.parametrize(
    ("method", "exits", "options"),
    [
        slow(LayerSkip(exit=3, draft_length=3), "shared", {}),
        slow(AdaDecode(None, (1, 3, 4), 0.2, 3), random_exits("linear", fused=True, draft=40), SAMPLED),
        slow(DEL(depths=(1, 3, 4), draft_length=3), random_exits("attn", draft=40), SAMPLED),
    ],
    ids=["layerskip", "adadecode", "del"],
)
def test_transformers_give_the_tokens_of_ar_and_counts_fit_together(method, exits, options) -> None:
    lm = small_model(tokenizer=LetterTokenizer())
    run = functools.partial(dex_jax.generate, lm, ragged_prompts(3), exits=exits, max_new_tokens=32, **options)
    output, plain = run(method=method), run(method=dex_jax.AR())
    assert_same_tokens(lm, output, plain, **options)
    assert layer_steps(plain.stats).tolist() == (4 * (plain.lengths - 1)).tolist()
    cut = run(method=method, stop=LetterTokenizer.letters(int(output.tokens[0, 7])))
    assert cut.lengths[0] <= 8
    assert cut.tokens[0, : cut.lengths[0]].tolist() == output.tokens[0, : cut.lengths[0]].tolist()
    assert layer_steps(cut.stats)[0] < layer_steps(output.stats)[0]
    for out in (output, cut):
        stats, stages = out.stats, out.stats.plan.stages
        assert stats.ticks is stats.depth_side_speedup is None
        for row, length in enumerate(out.lengths):
            given = stats.exits[row, 1:length]
            rounds = np.sum(given == stages) + (given[-1] != stages)
            assert stats.counts["rounds"][row] == rounds
            if stats.plan.method == "layerskip":
                assert layer_steps(stats)[row] == 4 * rounds + 3 * stats.counts["drafted"][row]
    assert 0 < output.stats.counts["accepted"].sum() < output.stats.counts["drafted"].sum()


@pytest.mark.slow
def test_the_table_shows_the_best_settings_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dex_jax, "load", lambda name: small_model(tokenizer=LetterTokenizer()))
    monkeypatch.setattr(methods_table, "LENGTHS", (2,))
    monkeypatch.setattr(methods_table, "THRESHOLDS", (0.3,))
    prompts, page = tmp_path / "words.txt", tmp_path / "table.md"
    prompts.write_text("abc\nbcd\ncde\ndef\nefg\nfgh\n", encoding="utf-8")
    command = ["--data", str(prompts), "--output", str(tmp_path / "table"), "--exits", "shared", "--explorers", "2"]
    command += ["--max-new-tokens", "12", "--batch", "2"]
    assert methods_table.main(command) == 0
    text = page.read_text("utf-8")
    assert "4 prompts; " in text
    monkeypatch.setattr(dex_jax, "generate", None)
    assert methods_table.main(command) == 0
    assert page.read_text("utf-8") == text


@pytest.mark.slow
def test_layerskip_accepts_as_many_drafts_as_transformers_does(smollm2, monkeypatch) -> None:
    """Counts equal those of `assistant_early_exit` by prompt; a floating-point tie may change a round of one prompt."""
    monkeypatch.setattr(dex_jax.LanguageModel, "eos_ids", ())
    golden, texts = (json.loads((GOLDENS / name).read_text("utf-8")) for name in ("layerskip.json", "smollm2.json"))
    prompts = [texts["prompts"][run["prompt"]]["prompt_ids"] for run in golden["runs"]]
    method, names = LayerSkip(golden["exit"], golden["draft_length"]), ("rounds", "drafted", "accepted")
    out = dex_jax.generate(smollm2, prompts, method=method, exits="shared", max_new_tokens=golden["new_tokens"])
    ours = np.stack([out.stats.counts[name] for name in names], axis=1)
    theirs = np.array([[run[name] for name in names] for run in golden["runs"]])
    share, share_there = (found[:, 2].sum() / found[:, 1].sum() for found in (ours, theirs))
    assert share == pytest.approx(share_there, rel=0.01)
    assert np.any(ours != theirs, axis=1).sum() <= 1, (ours, theirs)
