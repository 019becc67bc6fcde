"""Weights in the safetensors files of one folder, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dex_jax.foreign import reading
from dex_jax.io.checkpoint import Stored, Tensors

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


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


class SafetensorsFiles(Tensors):
    """The tensors of a folder's safetensors files."""

    def __init__(self, folder: Path):
        """Reads headers; a DexError if a file is truncated or damaged."""
        self.stored = {}
        for file in weight_files(folder):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    view = tensors.get_slice(name)
                    # As a model of text alone has it, where what reads images stands beside that.
                    known = re.sub(r"^(model\.)?language_model\.", r"\1", name)
                    format = view.get_dtype()
                    self.stored[known] = Stored(file, tuple(view.get_shape()), format, _DTYPES.get(format), name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`."""
        found = self.stored[name]
        # Opened anew: the pages that were read leave this process with the map.
        with _opened(found.file) as tensors:
            return tensors.get_slice(found.place)[start:stop]
