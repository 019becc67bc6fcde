"""A checkpoint of either format as canonical tensors, one at a time."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import refuse
from dex_jax.io.tensor_names import canonical_parts, layer_prefix, stacked_shape
from dex_jax.io.tokenizer import Tokenizer

_SAMPLED_ROWS = 4
# Facts about the use of a backbone rather than about its function: a changed context length keeps trained exits valid.
_NOT_BACKBONE = ("family", "context", "eos_ids", "bos_id")
# These came later, and count only where they are not at their defaults, so that fingerprints stay what they were.
_FIELDS = dataclasses.fields(ModelConfig)
_LATER = {each.name: each.default for each in _FIELDS[[each.name for each in _FIELDS].index("layer_kinds") :]}


class Stored(NamedTuple):
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]  # rows first
    format: str  # what its numbers are stored as, such as "F32" or "Q4_1"
    dtype: np.dtype | None  # what they are read as; None where that is not covered
    place: Any  # where they lie, for the file's own kind of `Tensors`


class Tensors(abc.ABC):
    """The tensors of one checkpoint by the names of its files."""

    stored: dict[str, Stored]

    @abc.abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start` to `stop`, as an array of its own."""

    def blocks(self, name: str) -> np.ndarray:
        """Return the rows as they are stored, [rows, bytes] uint8; raise DexError where numbers are not in blocks."""
        raise DexError(f"{name} is not stored in blocks")


class Checkpoint:
    """An opened checkpoint: `config` and `tokenizer` at hand, weights read on request.

    `source` is what was opened, for reports: a path or a hub id.
    """

    def __init__(
        self, config: ModelConfig, source: str, tensors: Tensors, gguf: bool, tokenizer: Callable[[], Tokenizer | None]
    ):
        """Check the tensors without reading any; raise DexError for one that is missing, misshapen or not covered."""
        self.config = config
        self.source = source
        self._tensors = tensors
        few = config.num_layers > len(tensors.stored)
        refuse(source, (few, f"holds {len(tensors.stored)} tensors, too few for {config.num_layers} layers"))
        self._parts = canonical_parts(config, gguf=gguf)
        self._build_tokenizer = tokenizer
        self._check(gguf)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, built at first use; None if there is none.

        Raises:
          DexError: its kind is not supported.
        """
        return self._build_tokenizer()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that `read` can return, by its canonical name (io/tensor_names.py)."""
        return {name: stacked_shape([part.shape for part in parts]) for name, parts in self._parts.items()}

    def read(self, name: str) -> np.ndarray:
        """Return a canonical tensor, a key of `shapes()`: float16 or bfloat16 if stored so, else float32."""
        parts = self._parts[name]
        if len(parts) == 1:
            return self._tensors.read(parts[0].name)
        dtypes = {self._tensors.stored[part.name].dtype for part in parts}
        # np.result_type knows no common type of float16 and bfloat16.
        out = np.empty(stacked_shape([part.shape for part in parts]), dtypes.pop() if len(dtypes) == 1 else np.float32)
        at = 0
        for part in parts:
            out[at : at + part.shape[0]] = self._tensors.read(part.name)
            at += part.shape[0]
        return out

    def formats(self) -> dict[str, list[tuple[str, int]]]:
        """Return (storage format, number of rows) of each part of every matrix, by its canonical name."""
        return {
            name: [(self._tensors.stored[part.name].format, part.shape[0]) for part in parts]
            for name, parts in self._parts.items()
            if len(parts[0].shape) == 2
        }

    def blocks(self, name: str) -> list[np.ndarray]:
        """Return the parts of a canonical tensor packed in blocks, as they are stored: [rows, bytes] uint8 each."""
        return [self._tensors.blocks(part.name) for part in self._parts[name]]

    def fingerprint(self) -> str:
        """Return a short name of the backbone: 16 hex digits, equal for equal weights whatever they are stored in.

        It comes from the configuration and a few rows of the weights of three layers and of the ends, in milliseconds.
        """
        digest = hashlib.sha256()
        fields = dataclasses.asdict(self.config)
        for name in sorted(fields.keys() - set(_NOT_BACKBONE)):
            if name not in _LATER or fields[name] != _LATER[name]:
                digest.update(f"{name}={fields[name]!r};".encode())
        last = self.config.num_layers - 1
        sampled = tuple(f"layers.{layer}." for layer in (0, last // 2, last))
        for name in sorted(self._parts):
            # GGUF files keep q and k in another order, and undoing it would mean reading all of their rows.
            skipped = 2 if name.endswith((".qkv", ".qkv_bias")) else 0
            if name.startswith(sampled) or not name.startswith("layers."):
                for part in self._parts[name][skipped:]:
                    rows = self._tensors.read(part.name, 0, _SAMPLED_ROWS)
                    digest.update(np.ascontiguousarray(rows, np.float32).tobytes())
        return digest.hexdigest()[:16]

    def _check(self, gguf: bool) -> None:
        stored, wanted = self._tensors.stored, dict(part for parts in self._parts.values() for part in parts)
        for name, shape in wanted.items():
            absent = name not in stored
            refuse(self.source, (absent, f"lacks the tensor {name}: the checkpoint is incomplete, get it again"))
            found = stored[name]
            told = f"{list(found.shape)}, and its configuration means {list(shape)}: they do not belong together"
            refuse(
                found.file,
                (found.shape != shape, f"holds {name} in the shape {told}"),
                (found.dtype is None, f"stores {name} as {found.format}: use the unquantised model"),
            )
        layers = re.escape(layer_prefix(0, gguf=gguf)).replace("0", r"\d+")
        for name in stored.keys() - wanted.keys():
            unused = re.match(layers, name) and "rotary_emb" not in name
            told = f"for which a {self.config.family} model of {self.config.num_layers} layers has no use"
            refuse(stored[name].file, (unused, f"holds the tensor {name}, {told}: this variant is not covered"))
