"""Prompts, chat templates and configurations that others wrote, wrong in every way: as in test_foreign_files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_foreign_files import DAMAGE, DEEP, NASTY, check, damaged, edited, many, places, refused
from test_io_tokenizer import with_template

from dex_jax.cli.train_arguments import read_config
from dex_jax.io import templates
from dex_jax.prompt_files import read_prompts, read_texts

ROWS = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "a"}]}, {"question": "q", "choices": [1]}]


def use_prompts(path: Path) -> None:
    for read in (read_prompts, read_texts):
        read(str(path))


@many
@given(data=st.data(), value=st.sampled_from(NASTY), damage=DAMAGE, suffix=st.sampled_from([".jsonl", ".json", ".txt"]))
def test_prompt_files(tmp_path, data, value, damage, suffix) -> None:
    text = edited(json.dumps(ROWS), data.draw(st.sampled_from(places(ROWS))), value)
    text = text if suffix == ".json" else "\n".join(map(json.dumps, json.loads(text)))
    file = tmp_path / f"prompts{suffix}"
    for content in (text.encode(), damaged(text.encode(), damage)):
        file.write_bytes(content)
        check(use_prompts, file)


PIECES = st.sampled_from(
    ["{{", "}}", "{%", "%}", " for m in messages ", " endfor ", " if ", " endif ", "messages", "[0]", "['content']",
     " ~ ", " * ",
     " ** ", " / ", "0", "10", "99999999", "-1", "'x'", "'%9d'", " % ", " | ", "join", "center(9)", "length",
     "range(99999)",
     " set x = ", "x", "x.y", "(", ")", " recursive ", "loop(messages)", "namespace(a=1)", " macro f() ",
     " endmacro ", "f()",
     "raise_exception('no')", "strftime_now('%Y')", "''.__class__", "<|im_end|>", "\n", "tojson(indent=9)", "\ud800"]
)  # fmt: skip


@settings(max_examples=150)
@given(pieces=st.lists(PIECES, max_size=14))
def test_templates_of_any_pieces(pieces) -> None:
    said = check(lambda _: with_template("".join(pieces)).chat([{"role": "user", "content": "x"}]), Path("here"))
    assert "Traceback" not in said


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{%% set n = namespace(x='x') %%}{%% for a in range(99) %%}{%% set n.x = n.x %s n.x %%}{%% endfor %%}{{ n.x }}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}", "{{ 1 % 0 }}", "{{ '%c' % 99999999999 }}", "{{ 10 ** 10 ** 10 }}", "{{ 'x' * 10 ** 12 }}",
        ENDLESS,
        DOUBLED % "~", DOUBLED % "+", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '%999999999d' % 1 }}",
        "{{ 'x'.ljust(999999999) }}", "{{ 'x' | center(999999999) }}", "{{ '{:999999999}'.format(1) }}",
        "{{ range(10 ** 9) }}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if x %}" * 3000 + "{% endif %}" * 3000,
        "{{ strftime_now(3) }}",
        "{% set n = namespace(x=99) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% include 'x' %}", "{{ '%999999999d' | format(1) }}", "{{ lipsum(n=99999) }}",
        "{{ messages[0].content.x.y }}",
    ],
    ids=lambda template: template[:30],
)  # fmt: skip
def test_templates_that_fail_in_their_own_ways(template, monkeypatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    assert refused(lambda _: with_template(template).chat([{"role": "user", "content": "x"}]), Path("here"))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".jsonl", "[" * DEEP), (".json", "[" * DEEP), (".jsonl", '{"prompt":' + "[" * 900 + "]" * 900 + "}"),
     (".jsonl", "\xff"),
     (".json", '[{"prompt": 3}]'), (".json", "3"), (".jsonl", '{"messages": [3]}'), (".jsonl.gz", "x"), (".txt", "")],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_prompt_files_that_hold_no_prompts(tmp_path, suffix, content) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(content.encode("latin-1"))
    refused(use_prompts, file)


@pytest.mark.parametrize(
    "content",
    ["", "config = 3", "(" * 9999,
     "config = (", "raise SystemExit(1)", "def f(): f()\nf()", "1 / 0", "\xff", "x = '\0'",
     "import dex_jax.config as c; config = c.ModelConfig('llama', 9, 1, 8, 2, 0, 4, 8, 8)",
     "raise ValueError('a\\nb')"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_training_configurations_that_are_none(tmp_path, content) -> None:
    file = tmp_path / "config.py"
    file.write_bytes(content.encode("latin-1"))
    refused(lambda path: read_config(str(path)), file)
