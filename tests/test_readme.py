"""The README's library example runs as it stands, on a smaller model, fewer tokens and stages than it names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax.language_model import outline

README = Path(__file__).resolve().parents[1] / "README.md"


def test_it_is_short_and_begins_with_what_a_reader_needs() -> None:
    text = README.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 150
    first = "\n".join(lines[:60])
    for needed in (
        "](docs/figures/",
        "pip install uv",
        "uv run decode.py --prompt",
        "uv run pytest",
        "```python",
        "tok/s",
    ):
        assert needed in first, needed
    title = "Depth Exploration for LLM Decoding"
    assert title in text.replace("\n", " ")
    assert title in (README.parent / "CITATION.cff").read_text(encoding="utf-8")


def test_the_library_example_runs(monkeypatch, capsys) -> None:
    tokenizer = outline("smollm2-135m").tokenizer
    lm = small_model(dataclasses.replace(LLAMA, num_layers=2, vocab_size=49152), tokenizer=tokenizer)
    real = dex_jax.generate

    def shortened(lm, prompts, method=None, **options):
        method = method if isinstance(method, dex_jax.AR) else dex_jax.Dex(explorers=2, draft=False)
        return real(lm, prompts, method=method, **(options | {"max_new_tokens": 4}))

    monkeypatch.setattr(dex_jax, "load", lambda source: lm)
    monkeypatch.setattr(dex_jax, "generate", shortened)
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 2


def test_public_names_are_documented() -> None:
    for name in dex_jax.__all__:
        documentation = getattr(dex_jax, name).__doc__
        assert documentation, name
        assert not documentation.startswith(f"{name}("), f"{name} has a generated docstring"
