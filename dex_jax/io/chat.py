"""Chat templates: jinja2 in a sandbox, with what templates written for transformers expect to find."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn

from dex_jax.errors import DexError


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises DexError unless `messages` is a list, not empty, of dictionaries with strings "role" and "content"."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise DexError('A chat is a list of at least one message like {"role": "user", "content": "Hello"}.')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DexError(f'Message {number} is not a dictionary like {{"role": "user", "content": "Hello"}}.')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DexError(f'Message {number} needs a string under "{key}", and it has {message.get(key)!r}.')


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    variables: dict[str, Any],
    source: str,
) -> str:
    """Renders a chat template.

    Args:
      template: jinja2 text.
      messages: checked by `check_messages`.
      add_generation_prompt: end with what opens the assistant's answer.
      variables: further names, such as bos_token.
      source: where the template came from, for error messages.

    Returns:
      The prompt's text.

    Raises:
      DexError: the template does not compile, or refuses the messages.
    """
    import jinja2

    try:
        return _compile(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **variables,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DexError(f"The chat template of {source} is broken at line {error.lineno}: {error.message}.") from error
    # Templates index and concatenate what they are given, so messages of an unforeseen form surface as these.
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise DexError(f"The chat template of {source} refuses these messages: {error}") from error


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """Lets {% generation %} ... {% endgeneration %}, which marks text for training, pass through."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: jinja2's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
