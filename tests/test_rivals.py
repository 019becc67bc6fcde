"""The methods that DEX is compared with, on small transformers: tokens of AR, exits of DEX, honest counts."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference.small_models import LLAMA, LetterTokenizer, assert_same_tokens, ragged_prompts, random_exits, small_model
from reference.toy_models import ToyModel, cached_tables, toy_network
from reference.toy_runs import arrays, begin, emitted, random_case, twin_runs

import dex_jax
from dex_jax import AR, DEL, AdaDecode, DexError, DexSingleExit, LayerSkip, Oracle
from dex_jax.cli.arguments import method_of, parser
from dex_jax.cli.display import summary
from dex_jax.cli.records import json_record
from dex_jax.config import ExitsConfig
from dex_jax.decoding import session
from dex_jax.decoding.counting import bound_of, rounds_of, ticks_of
from dex_jax.decoding.dex import loop
from dex_jax.decoding.dex.trained_exits import Heads, TrainedHeads, exit_arrays
from dex_jax.decoding.footprint import session_shapes
from dex_jax.decoding.resolve import resolve
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.weights import merge_model

GOLDENS = Path(__file__).parent / "goldens"
METHODS = {
    "ar": AR(),
    "layerskip": LayerSkip(exit=3, draft_length=3),
    "adadecode": AdaDecode(depths=(1, 3, 4), threshold=0.2, draft_length=3),
    "del": DEL(depths=(1, 3, 4), draft_length=3),
    "oracle": Oracle(),
    "dex-single-exit": DexSingleExit(explorers=4),
}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
OPTIONS = {"greedy": {}, "sampled": SAMPLED}
NEW_TOKENS = 32
EXITS = {"attn": random_exits("attn", draft=40), "linear": random_exits("linear", fused=True, draft=40)}


@functools.cache
def model(layout=None):
    return small_model(layout=layout)


def generated(lm, name: str, **options) -> dex_jax.Output:
    options = {"exits": "shared", "max_new_tokens": NEW_TOKENS, **options}
    return dex_jax.generate(lm, ragged_prompts(3), method=METHODS[name], **options)


@functools.cache
def run(name: str, how: str = "greedy", kind: str | None = None, layout=None) -> dex_jax.Output:
    return generated(model(layout), name, exits=EXITS.get(kind, "shared"), **OPTIONS[how])


def assert_counts(output: dex_jax.Output) -> None:
    """What the statistics say about one another."""
    stats, schedule = output.stats, output.stats.schedule
    for row, length in enumerate(output.lengths.tolist()):
        exits = stats.exits[row]
        if schedule.method == "dex-single-exit":
            assert set(exits[1:length]) <= {1, schedule.stages}
            assert stats.ticks[row] == ticks_of(exits, length, schedule.stages)
            longest = max(np.diff((0, *schedule.depths)))
            assert stats.layer_steps[row] == stats.ticks[row] * longest
            assert stats.rounds is stats.drafted is None
            continue
        assert stats.ticks is stats.depth_side_speedup is None
        bound = bound_of(exits, length, schedule.depths)
        if schedule.method == "oracle":
            assert stats.layer_steps[row] == bound
            assert stats.rounds is stats.drafted is stats.accepted is None
            continue
        assert stats.rounds[row] == rounds_of(exits, length, schedule.stages)
        assert stats.tokens_per_round[row] == pytest.approx((length - 1) / stats.rounds[row])
        assert stats.accepted[row] == np.sum((exits[1:length] > 0) & (exits[1:length] < schedule.stages))
        assert stats.layer_steps[row] >= bound
        if schedule.method == "layerskip":
            depth, num_layers = schedule.depths
            assert stats.layer_steps[row] == stats.rounds[row] * num_layers + stats.drafted[row] * depth


@pytest.mark.parametrize(
    ("name", "how"),
    [("layerskip", "greedy"), ("oracle", "greedy"), slow("adadecode", "greedy"), slow("dex-single-exit", "sampled")],
)
def test_tokens_are_those_of_ar(name, how) -> None:
    output = run(name, how)
    assert_same_tokens(model(), output, run("ar", how), **OPTIONS[how])
    assert_counts(output)
    stats = output.stats
    if stats.drafted is not None:
        assert 0 < stats.accepted.sum() < stats.drafted.sum(), "all drafts or none were right: this would test nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("del", "attn"), ("adadecode", "linear")])
def test_trained_exits_draft_as_well(name, kind) -> None:
    output = run(name, "sampled", kind)
    assert_same_tokens(model(), output, run("ar", "sampled"), **SAMPLED)
    assert_counts(output)
    assert output.stats.exits_source == "random"


@pytest.mark.slow
def test_the_stacked_layout_gives_the_same() -> None:
    one, other = (run("del", "sampled", "attn", layout) for layout in (None, dex_jax.Stacked((1, 3, 4))))
    assert one.tokens.tolist() == other.tokens.tolist()
    for count in ("exits", "layer_steps", "drafted", "accepted"):
        assert getattr(one.stats, count).tolist() == getattr(other.stats, count).tolist()
    assert one.stats.accepted.sum() > 0


@pytest.mark.slow
def test_a_stop_string_counts_what_was_spent_up_to_it() -> None:
    lm = small_model(tokenizer=LetterTokenizer())
    for name in ("layerskip", "adadecode", "oracle"):
        whole = run(name)
        cut = generated(lm, name, stop=LetterTokenizer.letters(int(whole.tokens[0, 7])))
        length = int(cut.lengths[0])
        assert length <= 8
        assert cut.tokens[0, :length].tolist() == whole.tokens[0, :length].tolist()
        assert_counts(cut)
        assert cut.stats.layer_steps[0] < whole.stats.layer_steps[0]


def test_the_flags_name_the_methods() -> None:
    def method(*arguments: str):
        return method_of(parser().parse_args(list(arguments)))

    assert method("--method", "layerskip") == LayerSkip()
    assert method("--method", "layerskip", "--exit-depth", "3", "--draft-length", "2") == LayerSkip(3, 2)
    assert method("--method", "adadecode", "--explorers", "3", "--threshold", "0.5") == AdaDecode(3, threshold=0.5)
    assert method("--method", "del", "--depths", "6,30", "--draft-length", "4") == DEL(depths=(6, 30), draft_length=4)
    assert method("--method", "oracle") == Oracle()
    assert method("--method", "dex-single-exit", "--explorers", "3") == DexSingleExit(3)


def test_a_summary_and_a_record_tell_the_counts_apart() -> None:
    output, bound = run("layerskip"), run("oracle")
    stats, text = output.stats, summary(output, None)
    assert text.startswith(f"LayerSkip on cpu:cpu, float32: {output.lengths.sum()} tokens, {stats.rounds.sum()} rounds")
    assert f"{stats.layer_steps.sum()} layers one after the other" in text
    assert f"{stats.drafted.sum()} tokens drafted, {stats.accepted.sum()} of them accepted" in text
    assert not any(word in text for word in ("tick", "depth-side"))
    record = json_record(1, output, "x", None, None)
    assert (record["method"], record["draft"], record["ticks"]) == ("layerskip", False, None)
    assert record["depth_side_speedup"] is None
    for name in ("layer_steps", "rounds", "drafted", "accepted"):
        assert record[name] == getattr(stats, name)[1]
    assert summary(bound, None).startswith("EAD oracle (a bound, not a decoder) on cpu:cpu")
    assert json_record(0, bound, "x", None, None)["rounds"] is None


def test_half_precision_keeps_its_dtypes() -> None:
    """The loop's carry must come out as it went in; tracing shows it."""
    layout, dtype = dex_jax.Unrolled(), jnp.dtype(jnp.bfloat16)
    schedule = DEL(draft_length=3).schedule_for(4)
    shapes = session_shapes(LLAMA, dtype, schedule, layout, 2, 64, sampled=True)
    given = EXITS["attn"]
    spec = session.Spec(LLAMA, layout, schedule, given.config)

    def decode(weights, memory, last, lengths, limits, sampling):
        lm = merge_model(LLAMA, layout, weights)
        heads = Heads(exit_arrays(lm, given.config, given.parameters, given.vocabulary))
        memory = memory._replace(exits=TrainedHeads(given.config).empty(2, 0, dtype))
        begun = session.start_decoding(weights, heads, memory, last, lengths, limits, sampling, spec=spec, capacity=16)
        return begun, session.run_ticks(weights, heads, begun, limits, sampling, jnp.int32(9), spec=spec)

    arguments = (shapes.weights, shapes.memory, shapes.last, shapes.lengths, shapes.limits, shapes.sampling)
    begun, after = jax.eval_shape(decode, *arguments)
    assert begun.states.dtype == dtype
    assert jax.tree.map(lambda leaf: leaf.dtype, begun) == jax.tree.map(lambda leaf: leaf.dtype, after)


def test_a_single_exit_is_that_of_the_twin() -> None:
    stages, vocabulary = 4, 11
    found = set()

    @jax.jit
    def decode(tables, *case):
        *_, limits, sampling = case
        state = begin(tables, *case, stages=stages, rows=1)
        return loop.run(toy_network(tables), state, limits, sampling, proposing=(1,)).record

    for seed in range(3):
        tables = cached_tables(seed, stages, vocabulary, openness=0.2)
        toy, case = ToyModel(tables), random_case(seed, 3, vocabulary, sampled=True)
        runs = twin_runs(toy, case, vocab_size=vocabulary, stages=stages, rows=None, asked=(1,))
        record = jax.tree.map(np.asarray, decode(tables, *arrays(case, [run.tokens[0] for run in runs])))
        for row, run in enumerate(runs):
            assert emitted(record, row) == (run.tokens, run.exits)
            assert record.ticks[row] == run.ticks
            assert run.largest_cohort <= 1
            found |= set(run.exits)
    assert found == {-1, 1, stages}


def test_depths_come_from_the_exits_as_those_of_dex() -> None:
    def resolved(method, exits):
        return resolve(method, exits, LLAMA, "0").schedule

    assert resolved(Oracle(), "shared").depths == (1, 2, 3, 4)
    assert resolved(DEL(), "shared").depths == (1, 2, 3, 4)
    some = TrainedExits(ExitsConfig("shared", (1, 3), LLAMA.width), {}, None, "0", {}, "some")
    assert resolved(Oracle(explorers=2), "shared").depths == (2, 4)
    assert resolved(AdaDecode(explorers=2), "shared").depths == (2, 4)
    assert resolved(LayerSkip(exit=2), "shared").depths == (2, 4)
    assert resolve(LayerSkip(exit=2), "default", LLAMA, "0").source == "shared"
    # All that are trained, unless depths are given.
    assert resolved(DEL(), EXITS["attn"]).depths == resolved(Oracle(), EXITS["attn"]).depths == (1, 2, 3, 4)
    assert resolved(DEL(depths=(2, 4)), EXITS["attn"]).policy.depths == (2, 4)
    with pytest.raises(DexError, match="trained at depths 1, 3: choose depths among them"):
        resolved(LayerSkip(exit=2), some)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (LayerSkip(exit=0), "exit must be a whole number of at least 1, not 0"),
        (LayerSkip(exit=30), "must lie below the model's last layer, 30, and not at 30"),
        (AdaDecode(threshold=1.5), "a probability, from 0 to 1, and not 1.5"),
        (AdaDecode(threshold=float("nan")), "a probability"),
        (AdaDecode(depths=(6, 12)), "end at the model's last layer, 30"),
        (AdaDecode(explorers=2, depths=(6, 30)), "not both"),
        (DEL(decay=0.0), "above 0 and is at most 1, not 0"),
        (DEL(explorers=1), "needs an exit"),
        (DexSingleExit(explorers=31), "explorers must be from 1 to the model's 30 layers"),
        (Oracle(depths=(6, 6, 30)), "ascend"),
    ],
)
def test_what_is_refused(method, words) -> None:
    with pytest.raises(DexError, match=re.escape(words)) as error:
        method.schedule_for(30)
    assert "\n" not in str(error.value)


def counts_of(lm, golden: dict, depth: int, draft_length: int) -> tuple[list[list[int]], list[list[int]]]:
    """([rounds, drafted, accepted] of each prompt here, and there)."""
    runs = [run for run in golden["runs"] if (run["exit"], run["draft_length"]) == (depth, draft_length)]
    prompts = json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
    method = dex_jax.LayerSkip(exit=depth, draft_length=draft_length)
    options = {"method": method, "exits": "shared", "max_new_tokens": golden["new_tokens"]}
    stats = dex_jax.generate(lm, [prompts[run["prompt"]]["prompt_ids"] for run in runs], **options).stats
    ours = np.stack([stats.rounds, stats.drafted, stats.accepted], axis=1).tolist()
    return ours, [[run["rounds"], run["drafted"], run["accepted"]] for run in runs]


@pytest.mark.slow
def test_layerskip_accepts_as_many_drafts_as_transformers_does(smollm2, monkeypatch) -> None:
    """As its `assistant_early_exit`, prompt by prompt."""
    golden = json.loads((GOLDENS / "layerskip.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(dex_jax.LanguageModel, "eos_ids", ())
    ours, theirs = counts_of(smollm2, golden, depth=24, draft_length=4)
    _, drafted, accepted = np.sum(ours, axis=0)
    _, drafted_there, accepted_there = np.sum(theirs, axis=0)
    assert drafted_there > 4 * len(theirs)
    assert accepted / drafted == pytest.approx(accepted_there / drafted_there, rel=0.01)
    # A tie in floating point may change a round of one prompt, but hardly of two.
    assert sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1, (ours, theirs)
