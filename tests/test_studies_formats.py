"""Prompt templates and items: what comes built in, what files hold, what the grammar draws, and what answers name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dex_jax.errors import DexError
from studies.templates.answers import parse_choice
from studies.templates.formats import (
    Template,
    built_in,
    choose_examples,
    read_templates,
    render,
    same_item,
    shown_options,
)
from studies.templates.items import Item

DATA = Path(__file__).parents[2] / "shared" / "data" / "prompt_templates"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not here")
TASKS = ("hellaswag", "mmlu")


def item(number: int = 0, options: tuple[str, ...] = ("red fox", "blue owl", "green eel", "grey cat")) -> Item:
    row = {"ctx": f"Story {number}.", "ctx_a": f"Story {number}", "ctx_b": "then", "activity_label": "Animals"}
    row |= {"endings": list(options), "label": number % 4}
    return Item("hellaswag", f"item-{number}", "wild_animals", f"Story {number}.", options, number % 4, row=row)


POOL = [item(number) for number in range(8)]


@pytest.mark.parametrize("task", TASKS)
def test_twelve_come_built_in_and_cover_what_they_should(task):
    found = built_in(task)
    assert len({template.name for template in found}) == len(found) == 12
    assert {template.chat for template in found} == {True, False}
    assert {"A", "a", "1", "i", ""} <= {template.options for template in found}
    assert any(template.shots for template in found)
    texts = {render(t, POOL[0], choose_examples(t, POOL[0], POOL)).lower() for t in found}
    assert len(texts) == 12
    assert all(option in text for text in texts for option in POOL[0].options)
    assert all(POOL[0].question.lower() in text for text in texts)


@given(st.integers(0, 7), st.integers(0, 5), st.integers(0, 3), st.sampled_from(TASKS))
def test_examples_never_include_the_item(number, shots, seed, task):
    template = msgspec.structs.replace(next(t for t in built_in(task) if t.shots), shots=shots)
    asked = POOL[number]
    again = dataclasses.replace(asked, id="another id")  # the same question once more
    chosen = choose_examples(template, asked, [*POOL, again], seed)
    assert len({example.id for example in chosen}) == shots
    assert not any(same_item(asked, example) for example in chosen)
    assert choose_examples(template, asked, [*POOL, again], seed) == chosen
    assert render(template, asked, chosen).count(asked.question) == 1


def test_an_item_among_its_examples_is_refused():
    template = Template("t", "{question} {options}", shots=1)
    with pytest.raises(DexError, match="among its own examples"):
        render(template, POOL[0], [POOL[0]])
    with pytest.raises(DexError, match="takes 1 examples, not 0"):
        render(template, POOL[0])
    with pytest.raises(DexError, match="needs 1 other items"):
        choose_examples(template, POOL[0], POOL[:1])


@given(st.integers(0, 7), st.integers(0, 3))
def test_the_right_answer_cannot_be_read_from_a_prompt(number, other):
    changed = dataclasses.replace(POOL[number], answer=other)
    for template in (t for task in TASKS for t in built_in(task)):
        examples = choose_examples(template, POOL[number], POOL)
        assert render(template, POOL[number], examples) == render(template, changed, examples)


def test_options_are_labelled_as_the_template_says():
    shape = {"options": "i", "wrapper": "({x})", "between": "; ", "casing": "upper"}
    lettered = Template("t", "{question}|{options}|{subject}", **shape)
    shown = "STORY 0.|(I) RED FOX; (II) BLUE OWL; (III) GREEN EEL; (IV) GREY CAT|WILD ANIMALS"
    assert render(lettered, item()) == shown
    assert shown_options(lettered, item())[0] == "RED FOX"
    titled = Template("t", "{question}\n\n{options}", casing="title")
    assert render(titled, item(options=("RED fox", "o'neill"))) == "Story 0.\n\nA. Red Fox\nB. O'neill"
    odd = dataclasses.replace(item(), question="What is {options} or {x}?")
    assert render(Template("t", "{question} / {subject}"), odd) == "What is {options} or {x}? / wild animals"
    few = Template("t", "{question}{options}", shots=1)
    example = "Story 1.A. red fox\nB. blue owl\nC. green eel\nD. grey cat B. blue owl\n\n"
    assert render(few, item(0), [item(1)]).startswith(example)


@needs_data
def test_promptsource_yaml_is_read():
    found = read_templates(str(DATA / "promptsource_hellaswag.yaml"), "hellaswag")
    assert len(found) >= 2
    for template in found:
        text = render(template, item())
        assert "|||" not in text
        assert all(option in text for option in shown_options(template, item()))


YAML = """templates:
  1: !Template
    name: x
    answer_choices: 'a'
    jinja: '{}'
    metadata: !TemplateMetadata
      original_task: true
      choices_in_prompt: true
"""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "[", "is no JSON"),
        ("a.json", '{"mmlu": 3}', "no list"),
        ("a.json", '["no slot"]', "template 1 of .*question"),
        ("a.json", '[{"name": "x", "body": "{question}", "shots": "1"}]', "shots"),
        ("a.json", '[{"name": "x", "body": "{question}", "options": "Z"}]', "options"),
        ("a.json", '[["Write a question.", "{question}"]]', "has no template"),
        ("a.json", '[{"name": "x", "body": "{question}"}, {"name": "x", "body": "{question}!"}]', "one name"),
        ("a.yaml", "templates: [", "is no promptsource file"),
        ("a.yaml", YAML.format("{{ctx"), "template 1"),
    ],
)
def test_bad_templates_are_named(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(DexError, match=said):
        read_templates(str(file), "mmlu")
    with pytest.raises(DexError, match="item-0: 'goal'"):
        render(Template("p", "{{goal}}", jinja=True), item())


FOX = ("red fox", "blue owl", "green eel", "grey cat")


@pytest.mark.parametrize(
    ("text", "labels", "options", "found"),
    [
        ("B", "ABCD", FOX, 1),
        ("First I thought the answer is A. But the correct answer is (D).", "ABCD", FOX, 3),
        ("Answer: C\nAnd so on", "ABCD", FOX, 2),
        ("A fox runs.", "ABCD", FOX, None),
        ("I think it swims.", ["I", "II", "III", "IV"], FOX, None),
        ("The answer is 1.5 metres.", "1234", FOX, None),
        ("The answer is 1.", "1234", FOX, 0),
        ("It must be the green eel, of course.", "ABCD", FOX, 2),
        ("The red fox or the blue owl?", "", FOX, None),
        ("True, False", "", ("True, True", "True, False"), 1),
        ("about 12 of them", "", ("1", "2", "12", "121"), 2),
        ("", "ABCD", FOX, None),
        ("same", "", ("same", "same"), None),
    ],
)
def test_answers_name_an_option_or_none(text, labels, options, found):
    assert parse_choice(text, tuple(labels), options) == found
