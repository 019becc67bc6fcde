"""Trained exits as one safetensors file: parameters, draft vocabulary and what they were trained on.

Letters: X exits, D width, V' draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.config import ExitsConfig
from dex_jax.errors import DexError
from dex_jax.io.object_store import on_disk
from dex_jax.io.whole_files import write_whole

FORMAT = "dex_jax exits 1"
FILE_NAME = "exits.safetensors"
"""What `--exits FOLDER` looks for."""

_VOCABULARY = "draft_vocabulary"
_STEPS = ".steps"


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedExits:
    """Exits ready to be used with the model that they were trained for.

    Attributes:
      config: shapes.
      parameters: name -> float32 array, as `nn.exits.exit_parameters` lists them.
      vocabulary: [V'] int32, ascending token ids of the draft vocabulary; None for the full one.
      fingerprint: of the backbone they were trained on.
      metadata: what else is known, such as data, tokens and held-out figures; JSON-able.
      source: where they came from.
    """

    config: ExitsConfig
    parameters: dict[str, np.ndarray]
    vocabulary: np.ndarray | None
    fingerprint: str
    metadata: dict[str, Any]
    source: str

    @property
    def count(self) -> int:
        """X."""
        return len(self.config.depths)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with any parameter, shape or token of the draft vocabulary."""
        found = hashlib.sha256(repr(self.config).encode())
        arrays = dict(sorted(self.parameters.items())) | ({} if self.vocabulary is None else {"": self.vocabulary})
        for name, array in arrays.items():
            found.update(name.encode() + np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]


def check_exits_path(path: str | os.PathLike) -> None:
    """Refuses to write exits under another ending than the one that `load_exits` asks for.

    Raises:
      DexError: `path` does not end in .safetensors.
    """
    if Path(path).suffix != ".safetensors":
        raise DexError(f"exits are written to a .safetensors file, not to {path}: name it so")


def save_exits(path: str | os.PathLike, exits: TrainedExits, *, int8: bool = False) -> None:
    """Writes one file, whole or not at all.

    Args:
      path: ends in .safetensors.
      exits: what to write; `source` is not written.
      int8: store matrices as 8-bit integers with one step per output row, a quarter of the size; otherwise float32.

    Raises:
      DexError: another ending, or the file cannot be written.
    """
    from safetensors.numpy import save

    check_exits_path(path)
    tensors: dict[str, np.ndarray] = {}
    for name, value in exits.parameters.items():
        matrix = int8 and value.ndim >= 2 and value.shape[-1] > 1 and value.size >= 2**14
        if matrix:
            tensors[name], tensors[name + _STEPS] = quantize(value)
        else:
            tensors[name] = np.ascontiguousarray(value, np.float32)
    if exits.vocabulary is not None:
        tensors[_VOCABULARY] = np.ascontiguousarray(exits.vocabulary, np.int32)
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(exits.config)),
        "fingerprint": exits.fingerprint,
        "about": json.dumps(exits.metadata),
    }
    write_whole(path, save(tensors, metadata))


def load_exits(path: str | os.PathLike) -> TrainedExits:
    """Reads trained exits.

    Args:
      path: a .safetensors file that `train_exits.py export` wrote, or a folder that holds exits.safetensors; either may
        be on an object store (gs://...).

    Raises:
      DexError: no such file, or no exits in it.
    """
    with on_disk(path, FILE_NAME) as file:
        return _read(file, path)


def _read(file: Path, path: str | os.PathLike) -> TrainedExits:
    from safetensors import SafetensorError, safe_open

    if file.is_dir():
        file = file / FILE_NAME
    if not file.is_file():
        raise DexError(f"there are no exits at {path}: give a .safetensors file or a folder that holds {FILE_NAME}")
    try:
        with safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DexError(f"{file} cannot be read as exits ({error}): export them again") from error
    if metadata.get("format") != FORMAT:
        raise DexError(f"{file} holds no exits of this version ({FORMAT}): export them with train_exits.py")
    try:
        fields = json.loads(metadata["config"])
        config = ExitsConfig(**(fields | {"depths": tuple(fields["depths"])}))
        about = json.loads(metadata["about"])
        fingerprint = metadata["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise DexError(f"{file} says nothing that can be read about its exits ({error}): export them again") from error
    vocabulary = tensors.pop(_VOCABULARY, None)
    parameters = {}
    for name, value in tensors.items():
        if name.endswith(_STEPS):
            continue
        steps = tensors.get(name + _STEPS)
        parameters[name] = value if steps is None else value.astype(np.float32) * steps
    _check(config, parameters, vocabulary, file)
    return TrainedExits(config, parameters, vocabulary, fingerprint, about, str(path))


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [..., in], float32 steps [..., 1]): each row times its step is the matrix to within half a step."""
    steps = np.maximum(np.abs(matrix).max(axis=-1, keepdims=True), 1e-12).astype(np.float32) / 127
    return np.rint(matrix / steps).astype(np.int8), steps


def _check(config: ExitsConfig, parameters: dict, vocabulary: np.ndarray | None, file: Path) -> None:
    from dex_jax.nn.exits import exit_parameters

    expected = {name: shape for name, (shape, _) in exit_parameters(config).items()}
    for name, shape in expected.items():
        found = parameters.get(name)
        if found is None or found.shape != shape:
            has = "none" if found is None else f"shape {found.shape}"
            raise DexError(f"{file} should hold {name} of shape {shape} and has {has}: export the exits again")
    size = None if vocabulary is None else len(vocabulary)
    if size != config.draft_size:
        raise DexError(f"{file} should hold a draft vocabulary of {config.draft_size} tokens and has {size}")
