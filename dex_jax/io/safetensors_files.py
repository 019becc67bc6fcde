"""Weights in the safetensors files of one folder, one tensor at a time."""

# ruff: noqa: D102 (`checkpoint.TensorSource` says what each method gives)

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dex_jax.errors import DexError
from dex_jax.foreign import reading

_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold a model's weights, chosen as transformers chooses them."""
    for pattern in ("model.safetensors", "model*.safetensors", "*.safetensors"):
        # Some folders hold the same weights once more under another name, and adapters are no model.
        if found := sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_")):
            return found
    return []


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with reading(file), safe_open(file, framework="np") as opened:
        yield opened


class SafetensorsFiles:
    """The tensors of a folder's safetensors files."""

    def __init__(self, folder: Path):
        """Reads headers; a DexError if a file is truncated or damaged."""
        # Name -> the file, the tensor's name there, format and shape.
        self._tensors: dict[str, tuple[Path, str, str, tuple[int, ...]]] = {}
        for file in weight_files(folder):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    view = tensors.get_slice(name)
                    # As a model of text alone has it, where what reads images stands beside that.
                    known = re.sub(r"^(model\.)?language_model\.", r"\1", name)
                    self._tensors[known] = file, name, view.get_dtype(), tuple(view.get_shape())
        self.names = tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._tensors[name][3] if name in self._tensors else None

    def dtype(self, name: str) -> np.dtype:
        format = self.format_of(name)
        if format not in _DTYPES:
            raise DexError(
                f"{self.file_of(name)} stores {name} as {format}, and only {', '.join(_DTYPES)} are covered: use the "
                "unquantised model."
            )
        return np.dtype(_DTYPES[format])

    def file_of(self, name: str) -> Path:
        return self._tensors[name][0]

    def format_of(self, name: str) -> str:
        return self._tensors[name][2]

    def blocks(self, name: str) -> np.ndarray:
        raise ValueError(f"{name} is not packed in blocks")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        file, stored, *_ = self._tensors[name]
        # Opened anew: the pages that were read leave this process with the map.
        with _opened(file) as tensors:
            return tensors.get_slice(stored)[start:stop]
