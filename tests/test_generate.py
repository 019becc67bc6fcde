"""generate() and stream() on small random models: every way gives the same tokens, and bad input one sentence."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from conftest import slow
from reference import twin
from reference.small_models import LLAMA, LetterTokenizer, SmallModel, assert_same_tokens, ragged_prompts, small_model
from reference.toy_runs import noise_table

import dex_jax
from dex_jax import AR, Dex, DexError
from dex_jax.decoding import plan
from dex_jax.decoding.program import forget
from dex_jax.decoding.session import RUN, START
from dex_jax.decoding.stopping import StopStrings
from dex_jax.io.prompts import encode_prompt

TOKENS = 14
SAMPLED = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}
SEED = 11
UNEVEN = Dex(depths=(1, 3, 4), draft=False)
OPTIONS = {"method": UNEVEN, "max_new_tokens": TOKENS, "exits": "shared"}
METHODS = {"K3 uneven": UNEVEN, "K4 two rows": Dex(explorers=4, rows=2, draft=False)}


# These tests spend their time on compiling, so they share few programs. Golden tests have the other families.
@functools.cache
def model():
    return small_model()


def generate(lm, method, prompts=None, **options) -> dex_jax.Output:
    options = {"max_new_tokens": TOKENS, "exits": "shared", **options}
    return dex_jax.generate(lm, ragged_prompts() if prompts is None else prompts, method=method, **options)


@functools.cache
def autoregressive(sampled: bool) -> dex_jax.Output:
    return generate(model(), AR(), seed=SEED, **(SAMPLED if sampled else {}))


@functools.cache
def explored(name: str, sampled: bool = False) -> dex_jax.Output:
    return generate(model(), METHODS[name], seed=SEED, **(SAMPLED if sampled else {}))


def emitted(output: dex_jax.Output, row: int) -> tuple[list[int], list[int]]:
    length = output.lengths[row]
    return output.tokens[row, :length].tolist(), output.stats.exits[row, :length].tolist()


@pytest.mark.parametrize("sampled", [False, slow(True)], ids=["greedy", "sampled"])
def test_autoregressive_decoding_is_the_argmax_after_every_prefix(sampled: bool) -> None:
    """If tokens are sampled, the argmax is that of the logits with the noise of the position."""
    whole, draws = SmallModel(LLAMA, (4,)), None
    for row, prompt in enumerate(ragged_prompts()):
        if sampled:
            draws = twin.Draws(noise_table(SEED + row, LLAMA.vocab_size).__getitem__, **SAMPLED)
        expected = twin.autoregressive(whole, prompt, stages=1, max_new_tokens=TOKENS, draws=draws)
        assert emitted(autoregressive(sampled), row)[0] == expected
    stats = autoregressive(sampled).stats
    assert (stats.plan.stages, stats.plan.exits_source) == (1, None)
    np.testing.assert_array_equal(stats.ticks, TOKENS - 1)
    np.testing.assert_array_equal(stats.depth_side_speedup, 1.0)


@pytest.mark.parametrize("name", ["K3 uneven", slow("K4 two rows")])
def test_dex_equals_ar_and_counts_follow_from_exits(name: str) -> None:
    output = explored(name)
    assert_same_tokens(model(), output, autoregressive(False))
    stages, ticks, speedup = output.stats.plan.stages, output.stats.ticks, output.stats.depth_side_speedup
    assert ticks.tolist() == [stages + sum(emitted(output, row)[1][1:-1]) for row in range(len(ticks))]
    assert speedup == pytest.approx(stages * (output.lengths - 1) / ticks)
    assert (speedup >= 1).all()


@pytest.mark.slow
def test_samples_of_dex_are_those_of_ar() -> None:
    sampled = explored("K3 uneven", True)
    assert_same_tokens(model(), sampled, autoregressive(True), **SAMPLED)
    assert not np.array_equal(sampled.tokens, explored("K3 uneven").tokens)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["K3 uneven", "K4 two rows"])
def test_exits_and_ticks_are_those_of_the_twin(name: str) -> None:
    output = explored(name)
    plan = output.stats.plan
    whole = SmallModel(LLAMA, plan.depths)
    used = set()
    for row, prompt in enumerate(ragged_prompts()):
        run = twin.decode(whole, prompt, stages=plan.stages, rows=plan.rows, max_new_tokens=TOKENS, eos_ids=())
        assert (*emitted(output, row), output.stats.ticks[row]) == (run.tokens, run.exits, run.ticks)
        used |= set(run.exits[1:])
    assert used == set(range(1, plan.stages + 1))


@pytest.mark.slow
def test_a_ragged_batch_equals_single_runs() -> None:
    lm, batch = model(), explored("K3 uneven", sampled=True)
    for row, prompt in enumerate(ragged_prompts()):
        alone = generate(lm, UNEVEN, [prompt], seed=SEED + row, **SAMPLED)
        one_row = dataclasses.replace(
            batch,
            tokens=batch.tokens[row : row + 1],
            lengths=batch.lengths[row : row + 1],
            prompt_tokens=[prompt],
            seeds=batch.seeds[row : row + 1],
        )
        assert_same_tokens(lm, alone, one_row, **SAMPLED)
        # Without pruning, exits depend on nothing but which token is best: no rounding of scores.
        if np.array_equal(alone.tokens, one_row.tokens):
            np.testing.assert_array_equal(alone.stats.exits[0], batch.stats.exits[row])


def test_samples_take_consecutive_seeds() -> None:
    first, second = ragged_prompts()[:2]
    output = generate(model(), UNEVEN, [first, second], num_samples=4, seed=5, **SAMPLED)
    assert output.seeds == list(range(5, 13))
    assert output.prompt_tokens == [first] * 4 + [second] * 4
    listed = generate(model(), UNEVEN, [first] * 4 + [second] * 4, seed=list(range(5, 13)), **SAMPLED)
    np.testing.assert_array_equal(listed.tokens, output.tokens)
    assert len({row.tobytes() for row in output.tokens[:4]}) > 1
    same = generate(model(), UNEVEN, [first] * 8, seed=[7] * 8, **SAMPLED)
    assert len({row.tobytes() for row in same.tokens}) == 1
    np.testing.assert_array_equal(same.tokens[0], output.tokens[2])


def test_eos_ends_its_row_and_is_kept() -> None:
    whole = autoregressive(False).tokens
    eos = int(whole[1, 5])
    lm = small_model(tokenizer=LetterTokenizer(eos_ids=(eos,)))
    for method in (AR(), UNEVEN):
        output = generate(lm, method)
        for row in range(len(whole)):
            where = np.flatnonzero(whole[row] == eos)
            length = int(where[0]) + 1 if len(where) else TOKENS
            tokens, exits = emitted(output, row)
            assert tokens == whole[row, :length].tolist()
            stages = output.stats.plan.stages
            assert output.stats.ticks[row] == (0 if length == 1 else stages + sum(exits[1:-1]))
            assert LetterTokenizer.letters(eos) not in output.texts[row]
        assert output.lengths.min() < TOKENS


def test_streaming_yields_prefixes_of_the_same_output() -> None:
    lm = small_model(tokenizer=LetterTokenizer())
    whole, held = generate(lm, UNEVEN), RUN.held
    for ticks_per_update in (1, 3, 64):
        updates = list(dex_jax.stream(lm, ragged_prompts(), **OPTIONS, ticks_per_update=ticks_per_update))
        before = [0] * len(ragged_prompts())
        for update in updates:
            for row, tokens in enumerate(update.tokens):
                length = update.lengths[row]
                assert length >= before[row]
                before[row] = length
                np.testing.assert_array_equal(tokens[:length], whole.tokens[row, :length])
                np.testing.assert_array_equal(tokens[length:], -1)
                assert whole.texts[row].startswith(update.texts[row])
        np.testing.assert_array_equal(updates[-1].tokens, whole.tokens)
        np.testing.assert_array_equal(updates[-1].stats.exits, whole.stats.exits)
        np.testing.assert_array_equal(updates[-1].stats.ticks, whole.stats.ticks)
        assert updates[-1].finished.all()
        assert all(not update.finished.all() for update in updates[:-1])
        if ticks_per_update == 1:
            assert len(updates) == whole.stats.ticks.max() + 1
    assert RUN.held == held, "one program runs all ticks"


def test_stop_strings_do_not_depend_on_the_chunk() -> None:
    lm = small_model(tokenizer=LetterTokenizer())
    whole = generate(lm, UNEVEN)
    # One string spans two tokens, the other ends in the middle of a token of two letters, if there is one.
    stop = [whole.texts[0][4:6], whole.texts[2][5:7]]
    results = []
    for ticks_per_update in (1, 3, 64):
        *_, last = dex_jax.stream(lm, ragged_prompts(), **OPTIONS, stop=stop, ticks_per_update=ticks_per_update)
        results.append(last)
        chex.assert_trees_all_equal(*((each.tokens, each.stats.exits, each.stats.ticks) for each in (last, results[0])))
        assert (last.texts, last.lengths.tolist()) == (results[0].texts, results[0].lengths.tolist())
    for row, text in enumerate(whole.texts):
        found = [text.find(string) for string in stop if string in text]
        assert last.texts[row] == (text[: min(found)] if found else text)
        tokens, exits = emitted(last, row)
        # Tokens stay up to the one that completes the stop string, and no further.
        assert (last.lengths[row] < TOKENS) <= bool(found)
        if found:
            assert any(string in lm.tokenizer.decode(tokens) for string in stop)
            assert not any(string in lm.tokenizer.decode(tokens[:-1]) for string in stop)
        assert last.stats.ticks[row] == (0 if len(tokens) < 2 else 3 + sum(exits[1:-1]))
    assert last.finished.all()
    assert last.lengths.min() < TOKENS


def test_the_stop_string_that_is_complete_first_decides() -> None:
    """The one that begins first does not decide, as its end may lie in a chunk that another run has not seen yet."""
    tokenizer = LetterTokenizer()
    stops = StopStrings(["BCDEF", "DE", "zz"], tokenizer)
    tokens = tokenizer.encode("ABCDEFG")
    assert stops.apply(tokens[:4]) == ("ABCD", None)
    for seen in (5, 6, 7):
        assert stops.apply(tokens[:seen]) == ("ABC", 5)
    # A token of two letters may complete a stop string with its first: nothing of it stays.
    assert LetterTokenizer.letters(26) == "aa"
    assert StopStrings("Ba", tokenizer).apply([0, 1, 26, 2]) == ("A", 3)
    assert StopStrings(None, None).apply([0, 1]) == ("", None)


def test_a_prompt_longer_than_a_chunk_of_the_prefill() -> None:
    lm = small_model(dataclasses.replace(LLAMA, num_layers=1))
    prompt = np.random.default_rng(3).integers(0, LLAMA.vocab_size, 700).tolist()
    output = generate(lm, AR(), [prompt], max_new_tokens=2)
    logits = np.asarray(lm.logits([[*prompt, int(output.tokens[0, 0])]]))[0]
    assert output.tokens[0].tolist() == logits[-2:].argmax(axis=-1).tolist()


class CompileCounter:
    """A counter of everything that XLA compiles, jitted programs and single operations alike."""

    count = 0

    def __call__(self, event: str, duration: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


def test_another_request_of_the_same_size_compiles_nothing() -> None:
    lm, counter = small_model(dataclasses.replace(LLAMA, num_layers=1)), CompileCounter()
    jax.monitoring.register_event_duration_secs_listener(counter)
    try:
        jax.jit(lambda x: x + 1)(np.float32(np.random.default_rng().random()))
        assert counter.count > 0, "compilations are not seen under this name"
        generate(lm, AR(), [[1, 2, 3]], seed=0, **SAMPLED)
        counter.count = 0
        output = generate(lm, AR(), [[4, 5, 6, 7, 8, 9]], seed=1, **SAMPLED, max_new_tokens=TOKENS + 3)
        assert output.lengths.tolist() == [TOKENS + 3]
        for other in ({"max_new_tokens": 100}, {"temperature": 0.7, "top_k": None, "top_p": None}):
            generate(lm, AR(), [[1, 2]], **{**SAMPLED, **other})
        assert counter.count == 0
        generate(lm, AR(), [[1, 2, 3], [4], [5]], seed=0, **SAMPLED)
        held = RUN.held, START.held
        generate(lm, AR(), [[1, 2, 3]] * 4, seed=0, **SAMPLED)
        generate(lm, AR(), [list(range(40)), [4, 5], [6]], seed=0, **SAMPLED)
        assert (RUN.held, START.held) == held, "prompts of any length, and three sequences as four"
    finally:
        # jax 0.7 cannot remove one listener: there the counter stays, and nobody reads it.
        if hasattr(jax.monitoring, "unregister_event_duration_listener"):
            jax.monitoring.unregister_event_duration_listener(counter)


@pytest.mark.slow
def test_all_ticks_of_a_generation_are_run_by_one_program() -> None:
    forget()
    lm = small_model(dataclasses.replace(LLAMA, num_layers=1))
    options = {"exits": "shared", "max_new_tokens": 12, "ticks_per_update": 2}
    assert len(list(dex_jax.stream(lm, [[1, 2, 3]], method=Dex(explorers=1), **options))) > 2
    assert RUN.held == 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_told() -> None:
    lm = small_model(tokenizer=LetterTokenizer())
    with pytest.raises(DexError, match="writes token 25, and its model knows 0 to 19"):
        encode_prompt("BZ", lm.tokenizer, 20, "somewhere")


def test_default_exits_say_once_that_they_are_shared(capsys, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_SAID", set())
    output = [generate(model(), UNEVEN, exits="default") for _ in range(2)][-1]
    assert output.stats.plan.exits_source == "shared"
    assert capsys.readouterr().err.count("shared") == 1
    np.testing.assert_array_equal(output.tokens, explored("K3 uneven").tokens)


def test_a_model_says_what_it_is() -> None:
    lm = model()
    shown = repr(lm)
    for part in (lm.source, f"{lm.config.num_layers} layers", str(lm.config.vocab_size), "float32", "MB"):
        assert part in shown
    assert "\n" not in shown


def test_an_output_shows_texts_and_what_they_took() -> None:
    out = autoregressive(False)
    shown = str(out)
    head, first, second, *_, times = shown.splitlines()
    assert head.startswith("AR on cpu")
    assert f"{out.lengths.sum()} tokens" in head
    assert " ".join(map(str, out.tokens[0, :6].tolist())) in first
    assert f"{out.stats.ticks[1]} ticks" in second
    assert "prefill" in times
    texts = ["word " * 100, "b"] * 8
    many = dataclasses.replace(
        out, texts=texts, tokenizer=object(), tokens=out.tokens.repeat(2, 0), lengths=out.lengths.repeat(2)
    )
    stats = dataclasses.replace(out.stats, ticks=None, depth_side_speedup=None, decode_seconds=0.0)
    shown = str(dataclasses.replace(many, stats=stats))
    assert "…" in shown
    assert "ticks" not in shown
    assert "and 8 more" in shown
    assert max(map(len, shown.splitlines())) < 120


BAD = {
    "no prompt": ({"prompts": []}, "no prompt"),
    "empty prompt": ({"prompts": [[]]}, "empty"),
    "blank text": ({"prompts": ["  "]}, "empty"),
    "text without a tokenizer": ({"prompts": ["hello"]}, "tokenizer"),
    "messages without a tokenizer": ({"prompts": [[{"role": "user", "content": "hi"}]]}, "tokenizer"),
    "token above the vocabulary": ({"prompts": [[1, 48]]}, "token id 48"),
    "token below zero": ({"prompts": [[-1]]}, "token id -1"),
    "a mixture": ({"prompts": [[1, "two"]]}, "mixture"),
    "beyond the context": ({"prompts": [[1] * 2040]}, "context of 2048"),
    "stop string without a tokenizer": ({"stop": "x"}, "tokenizer"),
    "unknown exits": ({"exits": "trained"}, "exits"),
    "more samples than memory": ({"num_samples": 10**12}, "4096 sequences"),
    "rows without bound": ({"method": Dex(explorers=4, rows=10**9, draft=False)}, "1 to 4096"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name: str) -> None:
    options, words = BAD[name]
    options = {"prompts": [[1, 2]], "method": UNEVEN, "exits": "shared", **options}
    with pytest.raises(DexError) as error:
        list(dex_jax.stream(model(), **options))
    sentence = str(error.value)
    assert words in sentence
    assert "\n" not in sentence
    assert len(sentence) < 250
