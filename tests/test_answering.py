"""Answers in batches, and the counts that follow from them without a loop."""

from __future__ import annotations

import numpy as np
import pytest
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax.config import ExitsConfig
from dex_jax.decoding.output import ticks_of
from dex_jax.evaluation.answering import answer, batches
from dex_jax.evaluation.forced_counts import dex_asks, dex_count, layerskip_asks, layerskip_count
from dex_jax.io.exits_file import TrainedExits
from dex_jax.nn.exits import exit_parameters

TOKENS = 24
DEPTHS = (1, 2, 3, 4)
TIE = 1e-4


def random_exits(kind: str, **more) -> TrainedExits:
    """Exits that have learnt nothing, but whose every part matters."""
    config = ExitsConfig(kind, DEPTHS[:-1], LLAMA.width, heads=2, head_dim=8, hidden=16, rank=4, window=5, **more)
    rng = np.random.default_rng(1)
    parameters = {}
    for name, (shape, role) in exit_parameters(config).items():
        noise = rng.standard_normal(shape).astype(np.float32)
        parameters[name] = (
            1 + 0.1 * noise if role in ("norm", "scale") else noise * 0.3 / max(shape[-1:], default=1) ** 0.5
        )
    vocabulary = None if config.draft_size is None else np.arange(0, LLAMA.vocab_size, 2, dtype=np.int32)
    return TrainedExits(config, parameters, vocabulary, "0", {}, "random")


def prompts(count: int = 6) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, LLAMA.vocab_size, length).tolist() for length in rng.integers(2, 14, count)]


KINDS = {
    "shared": {},
    "linear": {"fused": True},
    "attn": {},
    "attn with a draft vocabulary": {"draft_size": LLAMA.vocab_size // 2},
}


@pytest.mark.parametrize("name", KINDS)
def test_counts_are_those_of_the_loops(name):
    lm, exits, ids = small_model(), random_exits(name.split()[0], **KINDS[name]), prompts()
    asks = dex_asks(DEPTHS, exits.config)
    ours = [a for d, g in ((1, 3), (2, 2), (3, 6)) for a in layerskip_asks(d, g, exits.config, DEPTHS[-1])]
    asks = tuple(sorted({*asks, *ours}))
    found = answer(lm, ids, TOKENS, exits=exits, asks=asks, count=len(DEPTHS) - 1, batch=8)
    plain = dex_jax.generate(lm, ids, method=dex_jax.AR(), max_new_tokens=TOKENS)
    for row, each in enumerate(found):
        assert each.tokens.tolist() == plain.tokens[row, : plain.lengths[row]].tolist()
    options = {"max_new_tokens": TOKENS, "exits": exits}
    dex = dex_jax.generate(lm, ids, method=dex_jax.Dex(depths=DEPTHS, rows="full"), **options)
    early = 0
    for row, each in enumerate(found):
        count = dex_count(each.forced, DEPTHS)
        assert count.exits.tolist() == dex.stats.exits[row, : dex.lengths[row]].tolist()
        assert ticks_of(count.exits, len(each.tokens), len(DEPTHS)) == dex.stats.ticks[row]
        early += int((count.exits[1:] < len(DEPTHS)).sum())
    assert early > 10
    for depth, length in ((1, 3), (2, 2), (3, 6)):
        skip = dex_jax.generate(lm, ids, method=dex_jax.LayerSkip(depth, length), **options)
        for row, each in enumerate(found):
            count = layerskip_count(each.forced, depth, length, TOKENS, lm.eos_ids)
            assert count.rounds == skip.stats.rounds[row]
            assert count.layer_steps == skip.stats.layer_steps[row]
            assert count.exits.tolist() == skip.stats.exits[row, : skip.lengths[row]].tolist()


def test_an_end_of_text_is_never_drafted():
    lm = small_model()
    exits = random_exits("shared")
    asks = layerskip_asks(2, 3, exits.config, DEPTHS[-1])
    (free,) = answer(lm, prompts(1), TOKENS, exits=exits, asks=asks)
    drafted = layerskip_count(free.forced, 2, 3, TOKENS, ())
    at = int(np.flatnonzero(drafted.exits == 1)[0])
    none = layerskip_count(free.forced, 2, 3, TOKENS, (int(free.tokens[at]),))
    assert none.exits[at] == 2
    assert none.rounds >= drafted.rounds


def test_batches_hold_prompts_of_one_padded_length():
    lengths = [5, 300, 17, 16, 200, 31, 16, 2]
    found = list(batches(lengths, 3))
    assert sorted(i for members in found for i in members) == list(range(len(lengths)))
    assert [[lengths[i] for i in members] for members in found] == [[2, 5, 16], [16], [17, 31], [200], [300]]
