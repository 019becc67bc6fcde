"""The template study: as a command on a small model, its prompts and the answers to them, and its statistics."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.small_models import LLAMA, small_model

import dex_jax
from dex_jax import language_model
from dex_jax.errors import DexError
from studies.bench.results import read_results, read_study
from studies.bench.runs import Run
from studies.templates import __main__ as templates
from studies.templates import report as template_report
from studies.templates import runs as template_runs
from studies.templates import statistics as s
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


class ByteTokenizer:
    """A token for each of the text's bytes, several bytes to a token."""

    has_chat_template = False
    eos_ids = ()

    def encode(self, text: str) -> list[int]:
        return [byte % LLAMA.vocab_size for byte in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(ord("A") + token % 26) + " ."[token % 2] for token in tokens)


OPTIONS = ["up", "down", "left", "right"]
BODIES = ["Q {question} {options}", "{options} {question}?", "{question} ({options}) so"]
FLAGS = ["--items", "3", "--tune-items", "1", "--max-new-tokens", "12", "--loop-share", "0.4", "--batch", "4"]
FLAGS += ["--explorers", "2", "--exit-depths", "1,2", "--draft-lengths", "2", "--exits", "shared", "--tasks", "mmlu"]


@pytest.fixture(scope="module")
def lm():
    return small_model(tokenizer=ByteTokenizer())


@pytest.fixture
def command(tmp_path, monkeypatch, lm):
    """(arguments) -> exit code, for a folder of data, a file of templates and a folder of results."""
    monkeypatch.setattr(language_model, "load", lambda source, dtype=None: lm)
    folder = tmp_path / "data" / "mmlu"
    folder.mkdir(parents=True)
    rows = [
        {"subject": "moves", "idx": n, "question": f"Where to {n}?", "choices": OPTIONS, "answer": n % 4}
        for n in range(5)
    ]
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bodies.json").write_text(json.dumps(BODIES))
    fixed = ["--data", str(tmp_path / "data"), "--templates", str(tmp_path / "bodies.json")]
    return lambda *more: templates.main([*FLAGS, *fixed, "--output", str(tmp_path / "out"), *more])


@pytest.mark.slow
def test_the_study_runs_goes_on_and_notices_what_is_wrong(command, tmp_path, monkeypatch, capsys, lm):
    pytest.importorskip("matplotlib", reason="the report draws a picture")
    assert command() == 0
    said = capsys.readouterr()
    out = tmp_path / "out"
    assert (out / template_report.PLOT).stat().st_size > 5000
    runs = read_results(out)
    plain = [run for run in runs if run.method == "ar" and run.split == "report"]
    assert len(plain) == 9
    assert {run.template for run in plain} == {"01", "02", "03"}
    for name in ("dex", "layerskip"):
        forced = [run for run in runs if run.method == name and run.counted == "forced" and run.split == "report"]
        loops = [run for run in runs if run.method == name and run.counted == "loop"]
        assert len(forced) == 9
        assert len(loops) == 4  # 40% of nine
        assert all(run.match for run in loops)
        found = {(run.template, run.prompt_id): run for run in forced}
        for run in loops:
            same = found[run.template, run.prompt_id]
            assert all(getattr(run, x) == getattr(same, x) for x in ("exits", "layer_steps", "ticks", "rounds"))
    tuned = {run.prompt_id for run in runs if run.split == "tune"}
    assert len(tuned) == 1
    assert not tuned & {run.prompt_id for run in plain}  # settings are chosen elsewhere
    ids = ByteTokenizer().encode("Q Where to 0? A. up\nB. down\nC. left\nD. right")
    theirs = dex_jax.generate(lm, [ids], method=dex_jax.AR(), max_new_tokens=12)
    ours = next(run for run in plain if run.template == "01" and run.prompt_id.endswith("-0"))
    assert ours.tokens == theirs.tokens[0].tolist()
    assert all(words in said.out for words in ("median [min, max]", "cannot settle", "no evidence", "chance 0.25"))

    # Again, after a kill that took the last lines: only what is missing is made, and the end is the same.
    whole = (out / "results.jsonl").read_bytes()
    lines = whole.split(b"\n")
    (out / "results.jsonl").write_bytes(b"\n".join(lines[:-4]) + b'\n{"kind": "dep')
    monkeypatch.setattr(template_runs, "answers", lambda *a, **k: pytest.fail("an answer was made twice"))
    assert command() == 0
    assert (out / "results.jsonl").read_bytes() == whole
    assert (out / "summary.md").read_text() == said.out.removesuffix("\n")
    monkeypatch.undo()

    # A loop that does not agree with what was counted fails the run.
    monkeypatch.setattr(language_model, "load", lambda source, dtype=None: lm)
    at = next(i for i, line in enumerate(lines) if b'"dex"' in line and b'"loop"' in line)
    wrong = json.loads(lines[at])
    wrong["exits"][3] = 3 - wrong["exits"][3]
    (out / "results.jsonl").write_bytes(b"\n".join([*lines[:at], json.dumps(wrong).encode(), *lines[at + 1 :]]))
    assert command() == 1
    assert "dex explorers=2 on mmlu" in capsys.readouterr().err

    # Another study does not mix with it.
    assert command("--max-new-tokens", "13") == 2
    assert "max_new_tokens was 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--items", "0"], "--items"),
        (["--items", "9"], "5 are left where 9 are asked"),
        (["--longest-prompt", "10"], "5 of them too long"),
        (["--tasks", "chess"], "chess"),
        (["--methods", "ar,del"], "--methods ar,del"),
        (["--methods", "dex"], "needs ar"),
        (["--explorers", "9"], "--explorers"),
        (["--formats", "3"], "--formats"),
        (["--exit-depths", "4"], "--exit-depths"),
        (["--templates", "none.json"], "none.json"),
        (["--second-dtype", "float32"], "--second-dtype"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_refused_and_nothing_is_written(command, tmp_path, capsys, more, said):
    assert command(*more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert template_report.main([str(tmp_path)]) == 2


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


AR_STEPS = 30.0


def grid(
    items: int = 40, templates: int = 5, *, worst: float = 1.0, rival: float = 1.4, seed: int = 0, noise=0.1
) -> s.Grid:
    """Simulated counts: DEX is 2 times as fast as AR, `worst` times that in the last template; the rival is `rival`
    times slower than DEX."""
    rng = np.random.default_rng(seed)
    new_tokens = rng.integers(10, 49, (items, templates)).astype(float)
    ar = AR_STEPS * (new_tokens - 1)
    speed = np.full(templates, 2.0)
    speed[-1] *= worst
    ease = np.exp(noise * rng.standard_normal((items, 1)))  # an item is easy in every template
    dex = ar / speed / ease / np.exp(noise * rng.standard_normal(ar.shape))
    other = dex * rival * np.exp(noise * rng.standard_normal(ar.shape))
    correct = (rng.random(ar.shape) < 0.4).astype(float)
    return s.Grid(
        "mmlu",
        tuple(f"t{i}" for i in range(templates)),
        tuple(f"i{i}" for i in range(items)),
        {"ar": ar, "dex": dex, "layerskip": other},
        prompt_tokens=rng.integers(50, 200, ar.shape).astype(float),
        new_tokens=new_tokens,
        repeated=rng.random(ar.shape) * 0.4,
        parsed=np.ones(ar.shape),
        correct=correct,
        chance=0.25,
        dtype="float32",
    )


def runs_of(found: s.Grid) -> list[Run]:
    """The runs that a grid is made of."""
    runs = []
    for (i, item), (t, template) in itertools.product(enumerate(found.items), enumerate(found.templates)):
        fields = {name: float(getattr(found, name)[i, t]) for name in ("repeated", "parsed", "correct")}
        shared = {"task": found.task, "prompt_id": item, "model": "random", "template": template, "device": "cpu"}
        shared |= {"tokens": [1] * int(found.new_tokens[i, t]), "prompt_tokens": int(found.prompt_tokens[i, t])}
        for method, cost in found.costs.items():
            own = {"setting": {"exit": 3, "draft_length": 2} if method == "layerskip" else {}}
            own |= {"counted": "loop" if method == "ar" else "forced"}
            own |= {"layer_steps": None if np.isnan(cost[i, t]) else cost[i, t]}
            runs.append(Run("depth", method, chance=found.chance, dtype=found.dtype, **fields, **shared, **own))
    return runs


STUDY = {
    "benchmark": "templates",
    "model": "random",
    "parameters": 2e9,
    "dtype": "float32",
    "max_new_tokens": 48,
    "longest_prompt": 512,
    "too_long": {"mmlu": 2},
    "exits": "shared",
}


ALONE = {name: grid().costs[name] for name in ("ar", "dex")}


@pytest.mark.parametrize(
    ("found", "holds", "keeps", "beats"),
    [
        (grid(), True, (0.85, 1), (1, 2)),
        (grid(worst=0.7), False, (0, 0.75), (1, 2)),  # one bad template is enough
        (grid(rival=1.0), False, (0.85, 1), (0, 1)),
        (grid(items=8, rival=1.05, noise=0.3), False, (0, 1), (0, 1)),  # not surely above 1 in every template
        (dataclasses.replace(grid(), costs=ALONE), False, (0.85, 1), None),
    ],
)
def test_a_gain_holds_or_not(found, holds, keeps, beats):
    judged = s.verdict(found)
    assert judged.holds == holds
    assert keeps[0] < judged.keeps < keeps[1]
    assert judged.beats is None if beats is None else beats[0] < judged.beats < beats[1]
    said = template_report.summary(runs_of(found), STUDY)
    assert ("**Holds across templates**, depth-side" in said) == holds
    assert ("nothing is claimed" in said) == (beats is None)
    spread = s.spread(found, "dex", 10)
    headline = next(line for line in said.split("\n") if line.startswith("- **DEX over AR"))
    assert f"{spread.median:.2f} [{spread.lowest:.2f}, {spread.highest:.2f}]" in headline


def test_the_committed_page_is_that_of_the_committed_runs():
    folder = Path(__file__).resolve().parents[1] / "results" / "templates_study"
    found = template_report.summary(read_results(folder), read_study(folder))
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith(found.rstrip())
