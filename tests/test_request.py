"""Options: one dataclass makes signatures, help, flags and a page, and says in a sentence what is wrong."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
from reference.small_models import small_model

import dex_jax
from dex_jax.cli.arguments import method_of, options_of, parser
from dex_jax.decoding.request import AR, Dex, Request, table

ROOT = Path(__file__).resolve().parents[1]
FIELDS = dataclasses.fields(Request)


@pytest.mark.parametrize("function", [dex_jax.generate, dex_jax.stream])
def test_signatures_and_help_name_every_option_with_its_default_and_its_sentence(function) -> None:
    signature = inspect.signature(function)
    assert [*signature.parameters] == ["lm", "prompts", *(field.name for field in FIELDS)]
    words = " ".join(function.__doc__.split())
    for field in FIELDS:
        assert signature.parameters[field.name].default == field.default
        assert " ".join(f"{field.name}: {field.metadata['says']}".split()) in words


def test_flags_are_the_options() -> None:
    given = [
        "--max-new-tokens",
        "7",
        "--temperature",
        "0.5",
        "--stop",
        "a",
        "--stop",
        "b",
        "--no-chat",
        "--rows",
        "full",
    ]
    args = parser().parse_args([*given, "--no-draft", "--depths", "6,12,30"])
    assert method_of(args) == Dex(depths=(6, 12, 30), rows="full", draft=False)
    wanted = Request(max_new_tokens=7, temperature=0.5, stop=["a", "b"], chat=False)
    assert Request.of(options_of(args)) == wanted
    none = parser().parse_args([])
    assert (Request.of(options_of(none)), method_of(none)) == (Request(), Dex())
    assert method_of(parser().parse_args(["--method", "ar"])) == AR()
    shown = " ".join(parser().format_help().split())
    assert all(field.metadata["says"].split(" In Python")[0] in shown for field in FIELDS if _is_said(field))
    assert "In Python" not in shown


def _is_said(field: dataclasses.Field) -> bool:
    return field.metadata["flag"] is not None and field.metadata["off"] is None and "-" not in field.metadata["says"]


def test_the_page_of_options_is_the_fields() -> None:
    """`python -c "from dex_jax.decoding.request import table; print(*table(), sep=chr(10))"` writes it anew."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page


WRONG = [
    ({"max_tokens": 3}, "no option max_tokens: did you mean max_new_tokens"),
    ({"zzz": 3}, "no option zzz: there are method, max_new_tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
    ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
    ({"num_samples": True}, "num_samples must be a whole number"),
    ({"ticks_per_update": "4"}, "ticks_per_update must be a whole number"),
    ({"method": "dex"}, "a method is an object such as dex_jax.Dex"),
    ({"method": Dex}, "a method is an object such as dex_jax.Dex"),
    ({"method": Dex(depths=(10.7, 30))}, "depths are whole numbers"),
    ({"method": Dex(depths="6,12,30")}, "depths are whole numbers"),
    ({"method": Dex(draft="yes")}, "draft must be True, False or a TreeShape"),
    ({"method": Dex(decs="no")}, "decs must be True or False"),
    ({"exits": 3}, "exits are .* not 3"),
    ({"draft_model": "smollm2-135m"}, "draft_model is a loaded model, not 'smollm2-135m'"),
    ({"temperature": "hot"}, "temperature must be 0 .* not 'hot'"),
    ({"temperature": -1}, "temperature must be 0"),
    ({"temperature": float("nan")}, "temperature must be 0"),
    ({"temperature": 1e-9}, "too small to divide by"),
    ({"top_k": 0}, "top_k must be a whole number"),
    ({"top_p": 0}, r"top_p must lie in \(0, 1\]"),
    ({"top_p": "1"}, r"top_p must lie in \(0, 1\]"),
    ({"seed": 1.5}, "a seed is a whole number"),
    ({"seed": 2**63}, "a seed is a whole number"),
    ({"seed": [1, 2]}, "2 seeds for 1 sequences"),
    ({"stop": ""}, "stop is a text that is not empty"),
    ({"stop": ["a", 3]}, "stop is a text that is not empty"),
    ({"chat": "no"}, "chat is True or False"),
]


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda each: str(each)[:40])
def test_what_is_wrong_with_an_option_is_one_sentence(options, words) -> None:
    with pytest.raises(dex_jax.DexError, match=words):
        dex_jax.generate(small_model(), [[1, 2, 3]], **{"exits": "shared"} | options)


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (None, "prompts is a list of prompts, not NoneType"),
        (b"abc", "prompts is a list of prompts, not bytes"),
        (3, "prompts is a list of prompts, not int"),
        ({"role": "user"}, "prompts is a list of prompts, not dict"),
        ([], "there is no prompt"),
        ([1, 2, 3], "a list of its own"),
        (np.array([1, 2, 3]), "a list of its own"),
        ([None], "a prompt is a string.* not NoneType"),
        ([b"abc"], "a prompt is a string.* not bytes"),
        ([3.5], "a prompt is a string.* not float"),
        ([[1, "a"]], "not a mixture"),
    ],
)
def test_so_is_what_is_wrong_with_prompts(prompts, words) -> None:
    with pytest.raises(dex_jax.DexError, match=words):
        dex_jax.generate(small_model(), prompts, exits="shared")


def test_arrays_of_token_ids_are_prompts() -> None:
    options = {"exits": "shared", "max_new_tokens": 2, "method": AR()}
    wanted = dex_jax.generate(small_model(), [[1, 2, 3]], **options).tokens
    for prompts in (np.array([[1, 2, 3]]), [np.array([1, 2, 3])], [(1, 2, 3)]):
        np.testing.assert_array_equal(dex_jax.generate(small_model(), prompts, **options).tokens, wanted)
