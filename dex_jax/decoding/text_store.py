"""Texts of earlier generations, kept for drafts: what a user asked and was answered often comes again.

In memory it is a row of tokens and, for a few lengths of gram, where each gram ended last. In a file it is one record a
text, appended under a lock, so that several processes may share it and one that is killed loses what it was writing.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from dex_jax.decoding.dex.lookup import GRAMS, StoredTexts, hashed
from dex_jax.errors import DexError, whole_number
from dex_jax.io.whole_files import lock
from dex_jax.lattice import NO_TOKEN

if TYPE_CHECKING:
    from dex_jax.language_model import LanguageModel, Outline

CAPACITY = 2**20
"""Tokens that are searched unless told otherwise: with where their grams ended 24 MB."""

FEW, STEP = 2**16, 4
"""Room begins with so many tokens and grows by this factor: every generation copies all arrays, and each size has
its own programs."""

MOST = 255
"""Texts that are counted as going on alike."""

MAGIC = b"dex_jax texts, version 1, tokenizer "
DIGITS = 32
HEADER = len(MAGIC) + DIGITS + 1
RECORD = struct.Struct("<II")  # tokens of the text, CRC-32 of their bytes


class TextStore:
    """Prompts and answers, which `generate(..., store=...)` drafts from and adds to; they never change a token.

    Args:
      path: a file to keep them in, made if it is not there, which only its owner may read; None for this process alone.
        It grows by 4 bytes a token.
      capacity: tokens that are searched; the oldest texts are forgotten first.

    Raises:
      DexError: a capacity below 64.

    Examples:
      >>> store = TextStore(capacity=1000)
      >>> store.add([[5, 6, 7], [8, 9]])
      >>> len(store)
      7
    """

    def __init__(self, path: str | os.PathLike | None = None, capacity: int = CAPACITY):
        whole_number(capacity=capacity)
        if capacity < 4 * max(GRAMS):
            raise DexError(f"a store of {capacity} tokens holds no text: give it at least {4 * max(GRAMS)}")
        self.path = None if path is None else Path(path)
        self._capacity, self._used = capacity, 0
        self._hold(np.zeros(0, np.int32), min(capacity, FEW))
        self._tokenizer: bytes | None = None
        self._read = HEADER  # the file is known up to here

    def __len__(self) -> int:
        """Tokens that are searched, and one more for each text."""
        return self._used

    def open(self, tokenizer: bytes) -> None:
        """Binds the store to a tokenizer (`tokenizer_of`) and reads what its file has got meanwhile.

        Raises:
          DexError: texts of another tokenizer, or a file that is no store, is damaged or cannot be read.
        """
        if self._tokenizer not in (None, tokenizer):
            raise DexError("the store holds texts of another tokenizer: give every tokenizer a store of its own")
        self._tokenizer = tokenizer
        if self.path is not None:
            with self._file() as file:
                self._catch_up(file)

    def arrays(self) -> StoredTexts:
        """What drafts search, as NumPy arrays that the next `add` changes."""
        return StoredTexts(self._tokens, self._ends, self._often)

    def texts(self) -> list[np.ndarray]:
        """The texts that are searched, oldest first, each as its token ids [T] int32."""
        borders = np.flatnonzero(self._tokens[: self._used] == NO_TOKEN)
        return [text[text != NO_TOKEN] for text in np.split(self._tokens[: self._used].copy(), borders + 1)[:-1]]

    def add(self, texts: Sequence[Sequence[int]]) -> None:
        """Keeps texts, each as its token ids, in the file too if there is one.

        Raises:
          DexError: as `open`, or the file cannot be written.
        """
        kept = [np.asarray(text, np.int32) for text in texts]
        if self.path is None:
            for text in kept:
                self._take(text)
            return
        with self._file() as file:
            self._catch_up(file)
            file.truncate(self._read)  # what a process that was killed had begun
            file.seek(self._read)
            for text in kept:
                content = text.astype("<i4").tobytes()
                file.write(RECORD.pack(len(text), zlib.crc32(content)) + content)
                self._take(text)
            self._read = file.tell()

    @contextlib.contextmanager
    def _file(self) -> Iterator[BinaryIO]:
        """The file, locked, with its header checked or written."""
        assert self.path is not None
        if self._tokenizer is None:
            raise DexError(f"{self.path} is not open: a store learns from `generate` which tokenizer it is for")
        header = MAGIC + self._tokenizer + b"\n"
        try:
            with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                lock(file, wait=True)
                found = file.read(HEADER)
                if len(found) < HEADER and header.startswith(found):  # new, or its writer was killed
                    file.seek(0)
                    file.write(header)
                    file.flush()
                elif not found.startswith(MAGIC):
                    raise DexError(f"{self.path} is no store of texts: name another file")
                elif found != header:
                    raise DexError(f"{self.path} holds texts of another tokenizer: name another file for this model")
                yield file
        except OSError as error:
            raise DexError(f"{self.path} cannot be used as a store: {error.strerror or error}") from error

    def _catch_up(self, file: BinaryIO) -> None:
        """Takes in the texts that the file has beyond what is known of it, up to one that is not finished."""
        if os.fstat(file.fileno()).st_size < self._read:  # the user has removed it meanwhile
            self._read = HEADER
        file.seek(self._read)
        content, at = file.read(), 0
        while at + RECORD.size <= len(content):
            count, checksum = RECORD.unpack_from(content, at)
            start, end = at + RECORD.size, at + RECORD.size + 4 * count
            if end > len(content):
                break
            if zlib.crc32(content[start:end]) != checksum:
                raise DexError(f"{self.path} is damaged at byte {self._read + at}: remove the file")
            self._take(np.frombuffer(content, "<i4", count, start))
            at = end
        self._read += at

    def _take(self, text: np.ndarray) -> None:
        text = text[-(self._capacity // 2) :]
        size, wanted = len(self._tokens), self._used + len(text) + 1
        if wanted > self._capacity:
            self._forget()
        elif wanted > size:
            while wanted > size:
                size *= STEP
            self._hold(self._tokens[: self._used], min(size, self._capacity))
        end = self._used + len(text)
        self._tokens[self._used : end] = text
        self._index(self._used, end)
        self._used = end + 1  # NO_TOKEN stands between texts

    def _forget(self) -> None:
        """Keeps the newest texts that fill less than half."""
        kept = self._tokens[self._used - self._capacity // 2 + 1 : self._used]
        borders = np.flatnonzero(kept == NO_TOKEN)
        self._hold(kept[borders[0] + 1 :] if len(borders) else kept[:0], self._capacity)

    def _hold(self, kept: np.ndarray, size: int) -> None:
        """Begins anew with room for `size` tokens and with texts, each with NO_TOKEN behind it."""
        places = 1 << (size - 1).bit_length()
        self._tokens = np.full(size, NO_TOKEN, np.int32)
        self._ends = np.full((len(GRAMS), places), NO_TOKEN, np.int32)
        self._often = np.zeros((len(GRAMS), places), np.uint8)
        self._tokens[: len(kept)] = kept
        self._used = len(kept)
        start = 0
        for border in np.flatnonzero(kept == NO_TOKEN).tolist():
            self._index(start, border)
            start = border + 1

    def _index(self, start: int, end: int) -> None:
        """Of grams that come several times in one text the last stays; those that end it lead nowhere."""
        text = self._tokens[start:end].astype(np.uint32)
        for ends, often, gram in zip(self._ends, self._often, GRAMS, strict=True):
            if len(text) <= gram:
                continue
            places = hashed(np.lib.stride_tricks.sliding_window_view(text[:-1], gram), len(ends))
            before = ends[places]
            alike = (before != NO_TOKEN) & (self._tokens[before + 1] == self._tokens[start + gram : end])
            often[places] = np.where(alike, np.minimum(often[places], MOST - 1) + 1, 0)
            ends[places] = np.arange(start + gram - 1, end - 1)


def opened_store(store: TextStore | str | os.PathLike | None, lm: LanguageModel | Outline) -> TextStore | None:
    """The store that a user gave, open for a model; a DexError for what is none, and as of `TextStore.open`."""
    if store is None:
        return None
    if not isinstance(store, (TextStore, str, os.PathLike)):
        raise DexError(f"store must be a TextStore or the path of one, not {type(store).__name__}")
    found = store if isinstance(store, TextStore) else TextStore(store)
    found.open(tokenizer_of(lm))
    return found


def tokenizer_of(lm: LanguageModel | Outline) -> bytes:
    """What tells tokenizers apart, DIGITS bytes. Without one, ids are the model's own."""
    return (lm.fingerprint if lm.tokenizer is None else lm.tokenizer.fingerprint).rjust(DIGITS).encode()
