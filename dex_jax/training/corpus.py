"""One text file as token ids: a byte-pair vocabulary learnt from it, and a split into training and held-out text."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from dex_jax.errors import DexError
from dex_jax.foreign import local_path, reading
from dex_jax.io import Tokenizer

BYTES = 256
"""Every vocabulary holds the 256 bytes, so that any text can be encoded; this size alone is a byte-level one."""

LARGEST_VOCABULARY = 2**16


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens of a text.

    Attributes:
      train: [N] int32.
      held_out: [M] int32, the end of the text, which neither the model nor the vocabulary is made from.
      tokenizer: text to ids and back.
      fingerprint: short hexadecimal digest of the text, the split and the vocabulary.
    """

    train: np.ndarray
    held_out: np.ndarray
    tokenizer: Tokenizer
    fingerprint: str


def read_corpus(path: str | Path, vocab_size: int, held_out: float = 0.1, tokenizer: Tokenizer | None = None) -> Corpus:
    """Reads a UTF-8 text file; the same file and arguments give the same tokens.

    Args:
      path: the file.
      vocab_size: at most so many token ids; 256 are the bytes, further ones are pairs learnt from the training part.
      held_out: the share of the text, counted in characters from its end, in (0, 1).
      tokenizer: used instead of learning a vocabulary.

    Raises:
      DexError: no such file, not UTF-8, too short to split, or a vocabulary size or share out of range.
    """
    if tokenizer is None and not BYTES <= vocab_size <= LARGEST_VOCABULARY:
        raise DexError(f"a vocabulary has from {BYTES} (bytes) to {LARGEST_VOCABULARY} tokens, not {vocab_size}")
    if not 0 < held_out < 1:
        raise DexError(f"the held-out share must lie between 0 and 1, not {held_out}")
    with reading(path, "give a text file in UTF-8 with --data"):
        text = local_path(path).read_text(encoding="utf-8")
    split = round(len(text) * (1 - held_out))
    if not 0 < split < len(text):
        raise DexError(f"{path} holds {len(text)} characters, too few to hold any out: give a longer text")
    train, kept_back = text[:split], text[split:]
    tokenizer = tokenizer or train_tokenizer(train, vocab_size)
    digest = hashlib.sha256(f"{split};{tokenizer.backend.to_str()};{text}".encode())
    return Corpus(_ids(tokenizer, train), _ids(tokenizer, kept_back), tokenizer, digest.hexdigest()[:16])


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer learnt from a text, of `vocab_size` ids, or fewer where it has too few pairs."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return Tokenizer(backend, source="the vocabulary learnt from the text")


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.asarray(tokenizer.encode(text, add_special=False), np.int32)
