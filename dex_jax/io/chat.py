"""Chat messages as the text that a model expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dex_jax.errors import DexError
from dex_jax.foreign import reason
from dex_jax.io.templates import rendered


def check_messages(messages: Sequence[dict[str, Any]]) -> None:
    """Raises DexError unless `messages` is a list, not empty, of dictionaries with strings "role" and "content"."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise DexError('A chat is a list of at least one message like {"role": "user", "content": "Hello"}.')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DexError(f'Message {number} is not a dictionary like {{"role": "user", "content": "Hello"}}.')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise DexError(f'Message {number} needs a string under "{key}", and it has {message.get(key)!r:.60}.')


def render(
    template: str,
    messages: Sequence[dict[str, Any]],
    add_generation_prompt: bool,
    variables: dict[str, Any],
    source: str,
) -> str:
    """Renders a chat template, jinja2 text, over messages that are checked; errors name its `source`.

    `add_generation_prompt` ends the text with what opens the assistant's answer; `variables` are further names, such as
    bos_token.

    Raises:
      DexError: the template does not compile, refuses the messages, or takes longer or writes more than it may.
    """
    import jinja2

    given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": None}
    try:
        return rendered(template, given | {"documents": None} | variables)
    except jinja2.TemplateSyntaxError as error:
        raise DexError(f"The chat template of {source} is broken at line {error.lineno}: {error.message}.") from error
    # Whatever a program can raise: templates index, divide and concatenate what they are given.
    except Exception as error:
        raise DexError(f"The chat template of {source} refuses these messages: {reason(error)}") from error
