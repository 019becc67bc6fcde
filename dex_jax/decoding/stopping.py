"""Stop strings, which are found in the text on the host, and cut from it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from dex_jax.errors import DexError
from dex_jax.io.tokenizer import Tokenizer


class StopStrings:
    """A decoder of tokens that cuts the text at the first stop string; without a tokenizer texts are empty.

    It raises DexError where a stop string is empty, or there is no tokenizer to find one with.
    """

    def __init__(self, stop: str | Sequence[str] | None, tokenizer: Tokenizer | None):
        self.strings = [stop] if isinstance(stop, str) else list(stop or [])
        if any(not string for string in self.strings):
            raise DexError("a stop string must not be empty")
        if self.strings and tokenizer is None:
            raise DexError("stop strings need a tokenizer, and this checkpoint has none")
        self.tokenizer = tokenizer

    def apply(self, tokens: list[int]) -> tuple[str, int | None]:
        """Return the text of `tokens`, and the number of tokens to keep: None when no stop string occurs.

        The last token to keep is the one that completes the stop string, so the result does not depend on how many
        tokens came after it in the same update.
        """
        if self.tokenizer is None:
            return "", None
        text = self.tokenizer.decode(tokens)
        if self._first(text) is None:
            return text, None
        decode = self.tokenizer.decode
        sizes = range(1, len(tokens))  # where none of these completes it, all tokens do
        kept = 1 + bisect.bisect_left(sizes, True, key=lambda size: self._first(decode(tokens[:size])) is not None)
        text = decode(tokens[:kept])
        return text[: self._first(text)], kept

    def _first(self, text: str) -> int | None:
        found = [at for at in (text.find(string) for string in self.strings) if at >= 0]
        return min(found) if found else None
