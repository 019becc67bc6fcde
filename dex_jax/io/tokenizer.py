"""One tokenizer for every checkpoint: text to ids and back, at once or as ids come, and chat messages to ids."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from dex_jax.errors import DexError
from dex_jax.foreign import reading, reason, typed
from dex_jax.io.templates import rendered

# tokenizers, jinja2, gguf, safetensors and huggingface_hub are imported where they are used, here and in the rest of
# this folder, so that `import dex_jax` costs little more than jax and flax.
if TYPE_CHECKING:
    import tokenizers

_MARK = "dexmarker"
_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Message(Struct):
    role: str
    content: str


_Chat = Annotated[list[_Message], Meta(min_length=1)]


class Tokenizer:
    """A wrapper of `tokenizers.Tokenizer` with a chat template and the ids that end a turn."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        template: str | None = None,
        variables: dict[str, Any] | None = None,
        eos_ids: Sequence[int] = (),
        source: str = "this tokenizer",
    ):
        """Wrap `backend`; `template` is jinja2 text and may also use the names in `variables`, such as bos_token.

        `eos_ids` end a sequence by the model's own configuration; `source` is where it came from, for error messages.
        """
        self.backend = backend
        self._template = template
        self._variables = dict(variables or {})
        self._config_eos_ids = tuple(eos_ids)
        self._source = source
        backend.no_truncation()
        backend.no_padding()

    @property
    def has_chat_template(self) -> bool:
        """True if there is a chat template, which `chat` needs."""
        return self._template is not None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which `decode` skips by default."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a chat turn, ascending: the configuration's and the one that the template writes there."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            text = self.render(turn, add_generation_prompt=False)
        except DexError:
            text = ""
        after = text.rpartition(_MARK)[2] if _MARK in text else ""
        following = self.encode(after.lstrip(), add_special=False)[:1]
        return tuple(sorted({*self._config_eos_ids, *self.special_ids.intersection(following)}))

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Turn text into ids; a special token's name in the text becomes that token.

        Args:
          text: any Unicode text.
          add_special: whether to add what the tokenizer puts around a sequence, such as BOS.

        Raises:
          DexError: the text holds half of a surrogate pair, as text that was read with the wrong encoding does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            where = f"Character {error.start + 1} of the text, {text[error.start]!r}"
            raise DexError(f"{where}, is no Unicode character: save the text as UTF-8.") from error
        with reading(f"the tokenizer of {self._source}"):
            return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Turn ids into text; unknown ids give nothing, and bytes that are no UTF-8 give U+FFFD."""
        with reading(f"the tokenizer of {self._source}"):
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Turn chat messages, dictionaries with strings "role" and "content", into ids; only the template adds BOS.

        With `add_generation_prompt` they end with what opens the assistant's answer. Raise DexError if there is no chat
        template, or it does not accept the messages.
        """
        return self.encode(self.render(messages, add_generation_prompt), add_special=False)

    def render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return the text that `chat` encodes, with the same arguments and errors."""
        if self._template is None:
            raise DexError(f"{self._source} has no chat template: give plain text and turn chat off.")
        typed(messages, _Chat, "the chat", 'give a list of messages like {"role": "user", "content": "Hello"}')
        import jinja2

        given = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": None}
        try:
            return rendered(self._template, given | {"documents": None} | self._variables)
        except jinja2.TemplateSyntaxError as error:
            where = f"The chat template of {self._source} is broken at line {error.lineno}"
            raise DexError(f"{where}: {error.message}.") from error
        # Whatever a program can raise: templates index, divide and concatenate what they are given.
        except Exception as error:
            raise DexError(f"The chat template of {self._source} refuses these messages: {reason(error)}") from error


class TextStream:
    """A stream that turns ids into text piece by piece; all pieces together are one `decode` of all ids.

    >>> stream = TextStream(tokenizer)  # doctest: +SKIP
    >>> print(stream.push([504]), stream.push([2234, 314]), stream.flush())  # doctest: +SKIP
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._decode = tokenizer, tokenizer.decode
        self._byte_fallback = tokenizer.backend.token_to_id("<0x00>") is not None
        # The ids to decode together: those not settled, after one that is, as decoders drop a space at the beginning.
        self._window: list[int] = []
        self._emitted = 0

    def push(self, ids: Iterable[int]) -> str:
        """Take more ids and return the text that no later id can change."""
        self._window += [int(i) for i in ids if self._visible(int(i))]
        settled = len(self._window) - self._open_bytes()
        text = self._decode(self._window[:settled])
        stable = text.rstrip(_REPLACEMENT)
        new = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        if settled == len(self._window) and stable == text:
            # Only the last token is kept, if that token alone shows where its text ends.
            alone = self._decode(self._window[-1:])
            if alone and not alone.endswith(_REPLACEMENT):
                self._window, self._emitted = self._window[-1:], len(alone)
        return new

    def flush(self) -> str:
        """Return what was held back, bytes that are no UTF-8 as U+FFFD, and start afresh."""
        new = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return new

    def _visible(self, token_id: int) -> bool:
        known = self._tokenizer.backend.id_to_token(token_id) is not None
        return known and token_id not in self._tokenizer.special_ids

    def _open_bytes(self) -> int:
        """Return the number of tokens at the end that are single bytes of a SentencePiece vocabulary.

        A run of those decodes to characters only if all of it is UTF-8, so nothing of it is settled before it ends.
        """
        if not self._byte_fallback:
            return 0
        backwards = (self._tokenizer.backend.id_to_token(token_id) or "" for token_id in reversed(self._window))
        return sum(1 for _ in itertools.takewhile(_BYTE.fullmatch, backwards))
