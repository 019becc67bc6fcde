"""Text from token ids as they come."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from functools import partial

from dex_jax.io.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Turns ids into text piece by piece; all pieces together are what one `decode` of all ids gives.

    >>> stream = TextStream(tokenizer)  # doctest: +SKIP
    >>> print(stream.push([504]), stream.push([2234, 314]), stream.flush())  # doctest: +SKIP
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decode = partial(tokenizer.decode, skip_special=skip_special)
        self._byte_fallback = tokenizer.backend.token_to_id("<0x00>") is not None
        # Decoded together: at most one settled token and what came after it. The settled one keeps decoders that drop a
        # leading space from dropping it in mid-text.
        self._window: list[int] = []
        self._emitted = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes more ids and returns the text that no later id can change."""
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
        """Returns what was held back, bytes that are no UTF-8 as U+FFFD, and starts afresh."""
        new = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return new

    def _visible(self, token_id: int) -> bool:
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return False
        return self._tokenizer.backend.id_to_token(token_id) is not None

    def _open_bytes(self) -> int:
        """How many tokens at the end are single bytes of a SentencePiece vocabulary.

        A run of those reads as characters only if all of it is UTF-8, so nothing of it is settled before it ends.
        """
        if not self._byte_fallback:
            return 0
        backwards = (self._tokenizer.backend.id_to_token(token_id) or "" for token_id in reversed(self._window))
        return sum(1 for _ in itertools.takewhile(_BYTE.fullmatch, backwards))
