"""Prompt templates: one item put into words in many ways.

Built in are twelve a task (templates.json). Others are read from files in the layouts of promptsource (YAML with
jinja2), of FLAN (JSON, pairs of input and target) or plain JSON, or drawn from the grammar of FormatSpread (Sclar et
al., arXiv 2310.11324).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


@dataclasses.dataclass(frozen=True)
class Template:
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

    name: str
    body: str
    chat: bool = True
    options: str = "A"
    wrapper: str = "{x}."
    label_gap: str = " "
    between: str = "\n"
    casing: str = ""
    shots: int = 0
    reply: str = " {label} {answer}"
    jinja: bool = False
    answer_choices: str | None = None

    def labels(self, item: Item) -> tuple[str, ...]:
        """The labels of an item's options, bare; () for none."""
        return tuple(LABELS[self.options][: len(item.options)])


def built_in(task: str) -> list[Template]:
    """The twelve templates of a task that come with this package.

    Raises:
      DexError: a task without any.
    """
    file = importlib.resources.files("studies.templates") / "templates.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content.get(task), list):
        raise DexError(f"no templates come with task {task!r}: choose hellaswag or mmlu, or give --templates")
    return [_plain(entry, f"template {number} of {task}") for number, entry in enumerate(content[task], 1)]


def render(template: Template, item: Item, examples: Sequence[Item] = ()) -> str:
    """The prompt of an item.

    Args:
      template: how.
      item: what; its answer is never read.
      examples: solved before it, as many as template.shots; see `choose_examples`.

    Raises:
      DexError: the item among its examples, or a template that does not fit the item.
    """
    if any(same_item(item, example) for example in examples):
        raise DexError(f"item {item.id} is among its own examples: leave it out of them")
    if len(examples) != template.shots:
        raise DexError(f"template {template.name} takes {template.shots} examples, not {len(examples)}")
    parts = []
    for example in examples:
        assert example.answer is not None
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
    found: list[str] = []
    rest = body
    while rest:
        at, name = min(
            ((rest.find("{" + name + "}"), name) for name in slots if "{" + name + "}" in rest), default=(-1, "")
        )
        if at < 0:
            break
        found += [rest[:at], slots[name]]
        rest = rest[at + len(name) + 2 :]
    return "".join([*found, rest])


def _rendered(text: str, item: Item, name: str, options: Sequence[str]) -> str:
    import jinja2

    try:
        return _compiled(text).render(**{**item.row, "answer_choices": list(options)})
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, IndexError) as error:
        raise DexError(f"template {name} does not fit item {item.id}: {error}") from error


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> Any:
    import jinja2
    import jinja2.sandbox

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
    found = _promptsource(text, name) if name.endswith((".yaml", ".yml")) else _from_json(text, name, group or task)
    if not found:
        raise DexError(f"{name} has no template that asks for the answer of {task}: give another file")
    repeated = [t.name for i, t in enumerate(found) if t.name in {other.name for other in found[:i]}]
    if repeated:
        raise DexError(f"{name} has two templates named {repeated[0]}: give each its own name")
    return found


def _from_json(text: str, path: str, group: str) -> list[Template]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DexError(f"{path} is no JSON ({error}): mend it") from error
    entries = content
    if isinstance(content, dict):
        if group not in content:
            held = ", ".join(content) or "nothing"
            raise DexError(f"{path} has no templates for {group}, only {held}: write {path}:NAME to take one of these")
        entries = content[group]
    if not isinstance(entries, list) or not entries:
        raise DexError(f"{path}: the templates are no list, or an empty one: give at least one")
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"template {number} of {path}"
        if isinstance(entry, str):
            entry = {"name": f"{number:02d}", "body": entry}
        if isinstance(entry, list):
            flan = _flan(entry, number, where)
            found += [] if flan is None else [flan]
            continue
        found.append(_plain(entry, where))
    return found


def _flan(pair: list[Any], number: int, where: str) -> Template | None:
    """One of FLAN's pairs; None if it asks for something else than the answer."""
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise DexError(f"{where} is no pair of texts, input and target")
    body, target = pair
    if target != "{answer}" or "{options_}" not in body:
        return None
    body = (
        body.replace("{context}", "{question}")
        .replace("{goal}", "{question}")
        .replace("{options_}", "OPTIONS:\n{options}")
    )
    _check_slots(body, where)
    return Template(f"flan_{number:02d}", body, options="", wrapper="-")


def _plain(entry: Any, where: str) -> Template:
    fields = {field.name: field for field in dataclasses.fields(Template)}
    if not isinstance(entry, dict):
        raise DexError(f"{where} is {type(entry).__name__}: give a text with slots, or an object")
    unknown = [name for name in entry if name not in fields]
    if unknown:
        raise DexError(f'{where} has a field "{unknown[0]}": fields are {", ".join(fields)}')
    for name in ("name", "body"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise DexError(f'{where} needs a text as "{name}"')
    for name, value in entry.items():
        wanted = bool if name in ("chat", "jinja") else int if name == "shots" else str
        if type(value) is not wanted:
            raise DexError(f'{where}: "{name}" is {value!r}, not {wanted.__name__}')
    for name, known in (("options", LABELS), ("casing", CASINGS)):
        if entry.get(name, "") not in known:
            raise DexError(f'{where}: "{name}" is {entry[name]!r}, not one of {", ".join(map(repr, known))}')
    if entry.get("shots", 0) < 0:
        raise DexError(f'{where}: "shots" must be at least 0')
    template = Template(**entry)
    if not template.jinja:
        _check_slots(template.body, where)
    return template


def _check_slots(body: str, where: str) -> None:
    if "{question}" not in body:
        raise DexError(f"{where} has no slot {{question}}: slots are {', '.join('{' + s + '}' for s in SLOTS)}")
    for _, name, _, _ in _parsed(body, where):
        if name is not None and name not in SLOTS:
            raise DexError(f"{where} has a slot {{{name}}}: slots are {', '.join('{' + s + '}' for s in SLOTS)}")


def _parsed(body: str, where: str) -> list[Any]:
    try:
        return list(string.Formatter().parse(body))
    except ValueError as error:
        raise DexError(f"{where} has a brace without its other half ({error})") from error


def _promptsource(text: str, path: str) -> list[Template]:
    import jinja2
    import yaml

    class Loader(yaml.SafeLoader):
        """promptsource tags its mappings with Python classes; they are read as the mappings that they are."""

    Loader.add_constructor("!Template", lambda loader, node: loader.construct_mapping(node, deep=True))
    Loader.add_constructor("!TemplateMetadata", lambda loader, node: loader.construct_mapping(node, deep=True))
    try:
        content = yaml.load(text, Loader)
        entries = list(content["templates"].values())
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise DexError(
            f"{path} is no promptsource file ({' '.join(str(error).split())}): it needs `templates`"
        ) from error
    found = []
    for number, entry in enumerate(entries, 1):
        where = f"template {number} of {path}"
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("jinja"), str)
            or not isinstance(entry.get("name"), str)
        ):
            raise DexError(f'{where} needs texts as "name" and "jinja"')
        metadata = entry.get("metadata") or {}
        # Others ask for a topic, or whether an ending is right: what they want is no option.
        if (
            not metadata.get("original_task")
            or not metadata.get("choices_in_prompt")
            or not entry.get("answer_choices")
        ):
            continue
        try:
            _compiled(entry["jinja"])
        except jinja2.TemplateError as error:
            raise DexError(f"{where} is no jinja2: {error}") from error
        choices = entry["answer_choices"]
        # Where the choices are letters or words of its own, the item's options are not what is shown.
        found.append(
            Template(entry["name"].strip().replace(" ", "_"), entry["jinja"], jinja=True, answer_choices=choices)
        )
    return found


# The lists of the paper's grammar of plausible formats.
SEPARATORS = ("", "::: ", ":: ", ": ", " \n\t", "\n    ", " : ", " - ", " ", "\n ", "\n\t", ":", "::", "- ", "\t")
SPACES = ("", " ", "\n", " \n", " -- ", "  ", "; \n", " || ", " <sep> ", ", ", " \n ", " , ", "\n ", ". ", " ,  ")
LABEL_GAPS = ("", " ", "  ", "\t")
WRAPPERS = ("({x})", "{x}.", "{x})", "{x} )", "[{x}]", "<{x}>")
ENUMERATIONS = ("1", "A", "a", "Ⅰ", "i", "I")
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
