"""Prompt templates: one item put into words in many ways.

Built in are twelve a task (templates.json). Others are read from files in the layouts of promptsource (YAML with
jinja2), of FLAN (JSON, pairs of input and target) or plain JSON, or drawn from the grammar of FormatSpread (Sclar et
al., arXiv 2310.11324).
"""

from __future__ import annotations

import functools
import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import jinja2.sandbox
import msgspec

from dex_jax.errors import DexError
from studies.templates.items import Item


def _title(text: str) -> str:
    # string.capwords would put single spaces for the line breaks of a prompt.
    return re.sub(r"\S+", lambda word: word[0].capitalize(), text)


CASINGS: dict[str, Callable[[str], str]] = {"": str, "upper": str.upper, "lower": str.lower, "title": _title}
ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
UNICODE_ROMAN = "ⅠⅡⅢⅣⅤⅥⅦⅧⅨⅩ"
LABELS: dict[str, Sequence[str]] = {
    "A": string.ascii_uppercase,
    "a": string.ascii_lowercase,
    "1": tuple(map(str, range(1, 27))),
    "I": ROMAN,
    "i": tuple(map(str.lower, ROMAN)),
    "Ⅰ": UNICODE_ROMAN,
    "": (),
}
"""How options are labelled, by the label of the first; "" not at all."""

SLOTS = ("question", "subject", "options")
Labelling = Literal["A", "a", "1", "I", "i", "Ⅰ", ""]
BUILT_IN = Path(__file__).parent / "templates.json"


class Template(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to ask.

    Attributes:
      name: unique among those of a study.
      body: with slots {question}, {subject}, {options}; a jinja2 text over the item's own fields for `jinja`.
      chat: whether it is made a message of the chat template.
      options: how options are labelled, of LABELS.
      wrapper: of a label, "({x})".
      label_gap: between label and option.
      between: between options.
      casing: of the whole prompt, of CASINGS.
      shots: solved examples before the item, which are other items.
      reply: of such an example, with slots {label}, {answer}.
      jinja: whether the body is jinja2, as promptsource writes it: what follows ||| is left out.
      answer_choices: jinja2 text of the options as such a body shows them, ||| between them; None for the item's own.
    """

    name: Annotated[str, msgspec.Meta(pattern=r"\S")]
    body: Annotated[str, msgspec.Meta(pattern=r"\S")]
    chat: bool = True
    options: Labelling = "A"
    wrapper: str = "{x}."
    label_gap: str = " "
    between: str = "\n"
    casing: Literal["", "upper", "lower", "title"] = ""
    shots: Annotated[int, msgspec.Meta(ge=0)] = 0
    reply: str = " {label} {answer}"
    jinja: bool = False
    answer_choices: str | None = None

    def labels(self, item: Item) -> tuple[str, ...]:
        """The labels of an item's options, bare; () for none."""
        return tuple(LABELS[self.options][: len(item.options)])


def built_in(task: str) -> list[Template]:
    """The twelve templates of a task that come with the study. DexError: a task without any."""
    return read_templates(str(BUILT_IN), task)


def render(template: Template, item: Item, examples: Sequence[Item] = ()) -> str:
    """The prompt of an item, whose answer is never read, after as many solved examples as template.shots.

    Raises:
      DexError: the item among its examples, or a template that does not fit the item.
    """
    if any(same_item(item, example) for example in examples):
        raise DexError(f"item {item.id} is among its own examples: leave it out of them")
    if len(examples) != template.shots:
        raise DexError(f"template {template.name} takes {template.shots} examples, not {len(examples)}")
    parts = []
    for example in examples:
        labels = template.labels(example)
        label = template.wrapper.replace("{x}", labels[example.answer]) if labels else ""
        answer = example.options[example.answer]
        parts.append(_asked(template, example) + _filled(template.reply, {"label": label, "answer": answer}))
    text = "\n\n".join([*parts, _asked(template, item)])
    return CASINGS[template.casing](text)


def same_item(one: Item, other: Item) -> bool:
    """Whether two items are one: by their id, or because they ask the same."""
    return one.id == other.id or (one.question, one.options) == (other.question, other.options)


def choose_examples(template: Template, item: Item, pool: Sequence[Item], seed: int = 0) -> list[Item]:
    """The solved examples of an item, drawn from `pool` without the item; the same whenever they are drawn.

    Raises:
      DexError: too few others.
    """
    if not template.shots:
        return []
    others = [other for other in pool if not same_item(item, other)]
    if len(others) < template.shots:
        raise DexError(f"template {template.name} needs {template.shots} other items as examples, not {len(others)}")
    return random.Random(f"{seed} {template.name} {item.id}").sample(others, template.shots)


def shown_options(template: Template, item: Item) -> tuple[str, ...]:
    """The options as the prompt of a template shows them, in the order of the item's."""
    shown = item.options
    if template.answer_choices is not None:
        text = _rendered(template.answer_choices, item, template.name, ())
        shown = tuple(part.strip() for part in text.split("|||"))
        if len(shown) != len(item.options):
            raise DexError(f"template {template.name} shows {len(shown)} options of item {item.id}, which has others")
    return tuple(CASINGS[template.casing](option) for option in shown)


def listed(template: Template, item: Item) -> str:
    """All options of an item with their labels, as {options} stands for."""
    labels = template.labels(item)
    if labels and len(labels) < len(item.options):
        raise DexError(f"template {template.name} has {len(labels)} labels for {len(item.options)} options")
    lines = [
        template.wrapper.replace("{x}", labels[number] if labels else "") + template.label_gap + option.strip()
        for number, option in enumerate(item.options)
    ]
    return template.between.join(lines)


def _asked(template: Template, item: Item) -> str:
    if template.jinja:
        options = () if template.answer_choices is None else shown_options(template, item)
        return _rendered(template.body, item, template.name, options).split("|||")[0].strip()
    subject = item.subject.replace("_", " ")
    return _filled(template.body, {"question": item.question, "subject": subject, "options": listed(template, item)})


def _filled(body: str, slots: Mapping[str, str]) -> str:
    """Fills {slots}; other braces stay, and what is filled in is not looked at again."""
    return re.sub("{(" + "|".join(slots) + ")}", lambda slot: slots[slot[1]], body)


def _rendered(text: str, item: Item, name: str, options: Sequence[str]) -> str:
    try:
        return _compiled(text).render(**{**item.row, "answer_choices": list(options)})
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError) as error:
        raise DexError(f"template {name} does not fit item {item.id}: {error}") from error


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> Any:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    # promptsource draws one at random; the same one here each time.
    environment.filters["choice"] = lambda values: next(iter(values))
    environment.globals["range"] = range
    return environment.from_string(text)


def read_templates(path: str, task: str) -> list[Template]:
    """Templates of a file: promptsource YAML (.yaml), or JSON as FLAN has it or plain.

    Args:
      path: FILE or FILE:NAME, where NAME is the list to take from a JSON file that holds several; the task's own
        otherwise. A plain list holds texts with slots, or objects with the fields of Template.
      task: that they are for. What asks for something else than the answer is left out.

    Raises:
      DexError: no such file, another content, or nothing for the task; names file and place.
    """
    name, _, group = path.partition(":") if not Path(path).exists() else (path, "", "")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DexError(f"templates {name} cannot be read: {error}") from error
    entries = _promptsource(text, name) if name.endswith((".yaml", ".yml")) else _json(text, name, group or task)
    found = []
    for number, entry in enumerate(entries, 1):
        try:
            fields = _fields(entry, number)
            if fields is not None:
                found.append(_checked(msgspec.convert(fields, Template)))
        except (msgspec.ValidationError, jinja2.TemplateError, DexError) as error:
            raise DexError(f"template {number} of {name} is none: {error}") from error
    if not found:
        raise DexError(f"{name} has no template that asks for the answer of {task}: give another file")
    if len({template.name for template in found}) < len(found):
        raise DexError(f"{name} has two templates of one name: give each its own")
    return found


def _json(text: str, path: str, group: str) -> list[Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DexError(f"{path} is no JSON ({error}): mend it") from error
    if isinstance(content, dict):
        if group not in content:
            held = ", ".join(content) or "nothing"
            raise DexError(f"{path} has no templates for {group}, only {held}: write {path}:NAME to take one of these")
        content = content[group]
    if not isinstance(content, list):
        raise DexError(f"{path}: the templates are no list: give one")
    return content


def _promptsource(text: str, path: str) -> list[Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """promptsource tags its mappings with Python classes; they are read as the mappings that they are."""

    for tag in ("!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        return list(yaml.load(text, Loader)["templates"].values())
    except (yaml.YAMLError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = " ".join(str(error).split())
        raise DexError(f"{path} is no promptsource file ({why}): it needs `templates`") from error


def _fields(entry: Any, number: int) -> Any:
    """What a file has for one template as the fields of Template; None for what asks for something else."""
    match entry:
        case str():
            return {"name": f"{number:02d}", "body": entry}
        case [str() as body, str() as target]:  # FLAN's input and target
            if target != "{answer}" or "{options_}" not in body:
                return None
            for theirs, ours in (("{context}", "{question}"), ("{goal}", "{question}"), ("{options_}", FLAN_OPTIONS)):
                body = body.replace(theirs, ours)
            return {"name": f"flan_{number:02d}", "body": body, "options": "", "wrapper": "-"}
        case {"jinja": str() as body, "name": str() as name}:
            # Others ask for a topic, or whether an ending is right: what they want is no option.
            about, choices = entry.get("metadata") or {}, entry.get("answer_choices")
            if not (about.get("original_task") and about.get("choices_in_prompt") and choices):
                return None
            name = name.strip().replace(" ", "_")
            return {"name": name, "body": body, "jinja": True, "answer_choices": choices}
    return entry


FLAN_OPTIONS = "OPTIONS:\n{options}"


def _checked(template: Template) -> Template:
    if template.jinja:
        _compiled(template.body)
        return template
    slots = re.findall(r"{(\w*)}", template.body)
    if "question" not in slots or not set(slots) <= set(SLOTS):
        raise DexError(f"its slots are {slots}: give it {{question}}, and of {', '.join(SLOTS)} what it needs")
    return template


# The lists of the paper's grammar of plausible formats.
SEPARATORS = ("", "::: ", ":: ", ": ", " \n\t", "\n    ", " : ", " - ", " ", "\n ", "\n\t", ":", "::", "- ", "\t")
SPACES = ("", " ", "\n", " \n", " -- ", "  ", "; \n", " || ", " <sep> ", ", ", " \n ", " , ", "\n ", ". ", " ,  ")
LABEL_GAPS = ("", " ", "  ", "\t")
WRAPPERS = ("({x})", "{x}.", "{x})", "{x} )", "[{x}]", "<{x}>")
ENUMERATIONS: tuple[Labelling, ...] = ("1", "A", "a", "Ⅰ", "i", "I")
DESCRIPTOR_CASINGS = ("", "title", "upper", "lower")
DESCRIPTORS = {"hellaswag": ("Passage", "Endings", "Best ending"), "mmlu": ("Question", "Options", "Answer")}


def sample_formats(task: str, count: int, seed: int = 0) -> list[Template]:
    """`count` different formats drawn from the grammar, each choice even; the same for the same seed.

    A format is: descriptor, separator, question, space, descriptor, separator, options, space, descriptor, separator.
    What would run into one another is left out, as in the paper: no separator without a space on either side of it.

    Args:
      task: whose descriptors are used.
      count: of formats.
      seed: of the draw.

    Raises:
      DexError: a count below 1.
    """
    if count < 1:
        raise DexError(f"the number of formats must be at least 1, not {count}")
    question, options, answer = DESCRIPTORS.get(task, DESCRIPTORS["mmlu"])
    draw = random.Random(f"{seed} {task}")
    found: dict[tuple[str, ...], Template] = {}
    while len(found) < count:
        separator, space = draw.choice(SEPARATORS), draw.choice(SPACES)
        if not separator and not space:
            continue
        casing = CASINGS[draw.choice(DESCRIPTOR_CASINGS)]
        enumeration, wrapper = draw.choice(ENUMERATIONS), draw.choice(WRAPPERS)
        gap, between = draw.choice(LABEL_GAPS), draw.choice([s for s in SPACES if s])
        body = (
            f"{casing(question)}{separator}{{question}}{space}{casing(options)}{separator}{{options}}{space}"
            f"{casing(answer)}{separator}"
        )
        fields = (body.rstrip(), enumeration, wrapper, gap, between)
        if fields not in found:
            name = f"format_{len(found) + 1:02d}"
            found[fields] = Template(name, fields[0], False, enumeration, wrapper, gap, between)
    return list(found.values())
