"""The conversion of prompts, as users give them, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dex_jax.errors import DexError
from dex_jax.io.tokenizer import Tokenizer

Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]

WHAT_A_PROMPT_IS = "a prompt is a string, a list of messages or a list of token ids"


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, source: str, chat: bool = True
) -> list[int]:
    """Return the token ids, all below `vocab_size`, of a prompt: a string, a list of messages, or a list of token ids.

    A string becomes a user message of the chat template if there is one and `chat` is set; messages are dictionaries
    with "role" and "content". Token ids stay as they are. `source` names the checkpoint in errors.

    Raise DexError where the prompt is empty, of another type, has ids outside the vocabulary, or needs a tokenizer or
    chat template that is missing.
    """
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1:
        prompt = prompt.tolist()
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise DexError(f"{WHAT_A_PROMPT_IS}, not {type(prompt).__name__}")
    items: list[Any] = [prompt] if isinstance(prompt, str) else list(prompt)
    if not items:
        raise DexError("the prompt is empty: give it at least one token or message")
    if all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items):
        ids = [int(item) for item in items]
        wrong = [i for i in ids if not 0 <= i < vocab_size]
        if wrong:
            raise DexError(f"token id {wrong[0]} is outside the vocabulary: ids go from 0 to {vocab_size - 1}")
        return ids
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DexError("the prompt is empty: give it at least one word")
    elif not all(isinstance(item, dict) for item in items):
        raise DexError(f"{WHAT_A_PROMPT_IS}, not a mixture")
    if tokenizer is None:
        raise DexError(f"{source} has no tokenizer: pass prompts as lists of token ids")
    if not isinstance(prompt, str):
        if not tokenizer.has_chat_template:
            raise DexError(f"{source} has no chat template, so messages cannot be rendered: pass a string")
        ids = tokenizer.chat(items)
    elif chat and tokenizer.has_chat_template:
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt)
    if max(ids, default=0) >= vocab_size:
        raise DexError(
            f"the tokenizer of {source} writes token {max(ids)}, and its model knows 0 to {vocab_size - 1}: they "
            "belong to different models, or the embedding was not enlarged when tokens were added"
        )
    return ids
