"""Logits and greedy tokens against transformers' own, and models in half precision.

tests/reference/make_goldens.py wrote tests/goldens. Every margin of these is above 1e-4 of max |logit|, so no
difference in rounding excuses another token: tokens must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference import gemma3_file
from reference.checkpoints import FAMILIES, write_checkpoint

import dex_jax
from dex_jax.decoding.check import compare
from dex_jax.decoding.record import ticks_of
from dex_jax.nn import few_rows
from dex_jax.nn.forward import depth_states
from dex_jax.nn.weights import merge_model

GOLDENS = Path(__file__).parent / "goldens"
FAMILIES_GOLDEN = json.loads((GOLDENS / "families.json").read_text(encoding="utf-8"))
SMOLLM2_GOLDEN = json.loads((GOLDENS / "smollm2.json").read_text(encoding="utf-8"))
GEMMA3_GOLDEN = json.loads((GOLDENS / "gemma3_270m.json").read_text(encoding="utf-8"))
PROMPTS = [each["prompt"] for each in SMOLLM2_GOLDEN["prompts"]]
QUICK = ("llama3", "gemma3", "olmo3")


def assert_greedy_equals(lm, prompts: list[dict], method, max_new_tokens: int) -> None:
    """Assert that one ragged batch decodes to the goldens' tokens, EOS included."""
    ids = [prompt["prompt_ids"] for prompt in prompts]
    out = dex_jax.generate(lm, ids, method=method, exits="shared", max_new_tokens=max_new_tokens)
    assert [row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)] == [
        prompt["new_tokens"] for prompt in prompts
    ]


def last_logits(lm, prompts: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return logits [B, T, V] of a ragged batch, and those after each prompt's last token [B, V].

    Padding on the right cannot reach an earlier position through a causal mask.
    """
    lengths = [len(prompt["prompt_ids"]) for prompt in prompts]
    ids = np.zeros((len(prompts), max(lengths)), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt["prompt_ids"])] = prompt["prompt_ids"]
    logits = np.asarray(lm.logits(ids))
    return logits, logits[np.arange(len(prompts)), np.array(lengths) - 1]


def batches(lm, golden: dict) -> list[list[dict]]:
    """Return prompts by batch: one batch has all, unless RoPE has factors for long ones, which all would take."""
    prompts = golden["prompts"]
    return [prompts] if lm.config.at_length(lm.config.context) == lm.config else [prompts[:3], prompts[3:]]


@pytest.fixture(scope="module")
def checkpoint(request, tmp_path_factory) -> tuple[dict, str]:
    """Return (golden, directory) of one family, in one safetensors file."""
    directory = write_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    return FAMILIES_GOLDEN["families"][request.param], str(directory)


@pytest.fixture(scope="module")
def family(checkpoint):
    """Return (golden, model) of one family."""
    golden, directory = checkpoint
    return golden, dex_jax.load(directory, dtype="float32")


def families(names: Iterable[str], quick: Sequence[str]) -> pytest.MarkDecorator:
    """Return families as parameters of `checkpoint`, slow but for those of `quick`."""
    each = [name if name in quick else slow(name) for name in names]
    return pytest.mark.parametrize("checkpoint", each, indirect=True)


def test_the_goldens_leave_no_close_calls() -> None:
    goldens = [*FAMILIES_GOLDEN["families"].values(), SMOLLM2_GOLDEN, GEMMA3_GOLDEN]
    assert min(golden["min_margin"] for golden in goldens) > 1e-4
    assert set(FAMILIES_GOLDEN["families"]) == set(FAMILIES)


@families(FAMILIES, quick=QUICK)
def test_family_logits(checkpoint, family) -> None:
    """Logits in float32 are transformers' own; those in bfloat16 err less than 1.5 times as much as its own do."""
    golden, lm = family
    half = dex_jax.load(checkpoint[1], dtype="bfloat16")
    first = np.array(golden["all_logits_of_prompt_0"])
    whole, rounded = [], []
    for number, batch in enumerate(batches(lm, golden)):
        logits, last = last_logits(lm, batch)
        assert logits.dtype == np.float32
        expected = np.array([prompt["last_logits"] for prompt in batch])
        np.testing.assert_allclose(last, expected, rtol=0, atol=1e-4)
        if number == 0:
            np.testing.assert_allclose(logits[0, : len(first)], first, rtol=0, atol=1e-4)
        in_half, _ = last_logits(half, batch)
        for row, prompt in enumerate(batch):
            length = len(prompt["prompt_ids"])
            whole.append(logits[row, :length])
            rounded.append(in_half[row, :length])
    expected, found = np.concatenate(whole), np.concatenate(rounded)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < 1.5 * golden["bfloat16_error"]


# These families depend on the length of a text: scaled queries, windows and caps, YaRN, factors for long texts. The
# logits have shown the others.
@families(("qwen3", "ministral3", "gemma2", "olmo3", "phi4"), quick=["qwen3"])
def test_family_greedy_ar(family) -> None:
    golden, lm = family
    for batch in batches(lm, golden):
        assert_greedy_equals(lm, batch, dex_jax.AR(), FAMILIES_GOLDEN["max_new_tokens"])


# Compiling takes time here, and AR and the logits have shown what the other families add.
@pytest.mark.parametrize(
    ("checkpoint", "explorers", "draft"),
    [
        slow("llama3", 2, False),
        # Its windows end within prompts, and trees straddle their edges.
        ("gemma3", 1, True),
        slow("smollm3", 2, True),
    ],
    indirect=["checkpoint"],
)
def test_family_greedy_dex(family, explorers, draft) -> None:
    golden, lm = family
    method = dex_jax.Dex(explorers=explorers, draft=draft)
    assert_greedy_equals(lm, golden["prompts"], method, FAMILIES_GOLDEN["max_new_tokens"])


@pytest.mark.reference
def test_gemma3_270m(tmp_path) -> None:
    """The file has blocks of four formats and a SentencePiece vocabulary, which encodes as transformers does."""
    path = gemma3_file.assembled(tmp_path)
    if path is None:
        pytest.skip("the dependency group gemma is not installed")
    lm, prompts = dex_jax.load(str(path), dtype="float32"), GEMMA3_GOLDEN["prompts"]
    assert [lm.encode(prompt["prompt"], chat=False) for prompt in prompts] == [each["prompt_ids"] for each in prompts]
    assert [lm.tokenizer.decode(prompt["new_tokens"]) for prompt in prompts] == [each["text"] for each in prompts]
    for method in (dex_jax.AR(), dex_jax.Dex(explorers=1)):
        assert_greedy_equals(lm, prompts, method, GEMMA3_GOLDEN["max_new_tokens"])


def test_smollm2_logits() -> None:
    """Logits agree to 1e-5 of max |logit|, as transformers in float32 is itself 2e-6 away from its float64."""
    goldens, dense = SMOLLM2_GOLDEN["last_logits"], dex_jax.load("smollm2-135m", dtype="float32", weights="dense")
    _, found = last_logits(dense, [SMOLLM2_GOLDEN["prompts"][golden["prompt"]] for golden in goldens])
    for golden, last in zip(goldens, found, strict=True):
        tolerance = 1e-5 * golden["max_abs"]
        np.testing.assert_allclose(last[golden["ids"]], golden["logits"], rtol=0, atol=tolerance)
        figures = [last.mean(dtype=np.float64), last.std(dtype=np.float64), np.abs(last).max()]
        expected = [golden["mean"], golden["std"], golden["max_abs"]]
        np.testing.assert_allclose(figures, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_smollm2_greedy(smollm2) -> None:
    """AR decodes the model as it is loaded, with short and long prompts; tests/test_default_exits.py has DEX."""
    prompts = [SMOLLM2_GOLDEN["prompts"][number] for number in (1, 6, 7, 11)]
    assert_greedy_equals(smollm2, prompts, dex_jax.AR(), SMOLLM2_GOLDEN["max_new_tokens"])


@pytest.mark.slow
def test_no_layer_overflows() -> None:
    half = dex_jax.load("smollm2-135m", dtype="bfloat16")
    ids = max(map(half.encode, PROMPTS), key=len)
    depths = tuple(range(1, half.config.num_layers + 1))

    @jax.jit
    def run(weights, tokens):
        model = merge_model(half.config, weights)
        states = depth_states(model, tokens, depths)
        return states, model.logits(states[-1])

    states, logits = run(half.weights, jnp.asarray([ids], jnp.int32))
    assert states.dtype == half.dtype
    assert logits.dtype == jnp.float32
    largest = np.abs(np.asarray(states, np.float32)).max(axis=(1, 2, 3))
    told = ", ".join(f"{depth}: {value:.0f}" for depth, value in zip(depths, largest, strict=True))
    assert np.isfinite(largest).all(), f"largest |hidden| after each layer: {told}"
    # SmolLM2's largest activation, 24,912 after layer 12, takes 38% of what float16 holds.
    assert largest.max() < 0.5 * float(jnp.finfo(jnp.float16).max), f"largest |hidden| after each layer: {told}"
    assert np.isfinite(np.asarray(logits)).all()


@pytest.mark.slow
def test_depth_exploration_parts_from_ar_only_at_close_calls(tmp_path) -> None:
    """In half precision XLA rounds a row differently among other rows; only tokens with a small margin may differ."""
    half = dex_jax.load(str(write_checkpoint(tmp_path, "llama3")), dtype="bfloat16")
    prompts = [prompt["prompt_ids"] for prompt in FAMILIES_GOLDEN["families"]["llama3"]["prompts"]]
    options = {"exits": "shared", "max_new_tokens": 24}
    explored = dex_jax.generate(half, prompts, method=dex_jax.Dex(depths=(3, 6), draft=False), **options)
    plain = dex_jax.generate(half, prompts, method=dex_jax.AR(), **options)
    checks = compare(half, explored, plain)
    assert all(check.is_tie(str(half.dtype)) for check in checks), checks
    # Ticks follow from exits in any arithmetic.
    expected = [
        ticks_of(exits, int(length), 2) for exits, length in zip(explored.stats.exits, explored.lengths, strict=True)
    ]
    assert explored.stats.ticks.tolist() == expected


@pytest.mark.slow
@pytest.mark.skipif(few_rows.language() == "XLA", reason="XLA rounds a row differently among other rows")
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "ministral3"])
def test_in_bfloat16_trees_and_batches_give_the_tokens_of_ar(name: str, tmp_path) -> None:
    """These families do more between their products than Llama, and have heads that the C++ takes."""
    lm = dex_jax.load(str(write_checkpoint(tmp_path, name)), dtype="bfloat16")
    prompts = [prompt["prompt_ids"] for prompt in FAMILIES_GOLDEN["families"][name]["prompts"]]
    options = {"max_new_tokens": 24, "exits": "shared"}
    batch = dex_jax.generate(lm, prompts, method=dex_jax.Dex(explorers=1), **options)
    for row, prompt in enumerate(prompts):
        alone = dex_jax.generate(lm, [prompt], method=dex_jax.AR(), **options)
        assert batch.tokens[row, : batch.lengths[row]].tolist() == alone.tokens[0, : alone.lengths[0]].tolist()
