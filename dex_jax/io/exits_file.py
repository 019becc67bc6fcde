"""Trained exits as one safetensors file: parameters, draft vocabulary and what they were trained on.

Letters: X exits, V' draft vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.config import ExitsConfig
from dex_jax.errors import DexError
from dex_jax.foreign import local_path, parsed, reading, refuse
from dex_jax.io.whole_files import write_whole

DEFAULTS = Path(__file__).resolve().parents[1] / "default_exits"
"""The folder of the exits and drafters that ship, in files named by the fingerprint of the model."""

FORMAT = "dex_jax exits 1"
FILE_NAME = "exits.safetensors"
"""The name of the file that `--exits FOLDER` looks for."""

_VOCABULARY = "draft_vocabulary"
_STEPS = ".steps"


class StoredParameters(Mapping[str, np.ndarray]):
    """Float32 parameters by name, kept as a file has them: those in 8 bits are unpacked at each access."""

    def __init__(self, arrays: dict[str, np.ndarray], steps: dict[str, np.ndarray]):
        self._arrays, self._steps = arrays, steps

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        return array.astype(np.float32) * self._steps[name] if name in self._steps else array

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedExits:
    """Exits ready to be used with the model that they were trained for.

    Attributes:
      config: shapes.
      parameters: name -> float32 array, as `nn.exits.exit_parameters` lists them.
      vocabulary: [V'] int32, ascending token ids of the draft vocabulary; None for the full one.
      fingerprint: that of the backbone they were trained on.
      metadata: what else is known, such as data, tokens and held-out figures; JSON-able.
      source: where they came from.
    """

    config: ExitsConfig
    parameters: Mapping[str, np.ndarray]
    vocabulary: np.ndarray | None
    fingerprint: str
    metadata: dict[str, Any]
    source: str

    @property
    def count(self) -> int:
        """Number of exits, X."""
        return len(self.config.depths)


def check_exits_path(path: str | os.PathLike) -> None:
    """Raise DexError for a path that does not end in .safetensors, as `load_exits` expects it."""
    if Path(path).suffix != ".safetensors":
        raise DexError(f"exits are written to a .safetensors file, not to {path}: name it so")


def save_exits(path: str | os.PathLike, exits: TrainedExits, *, int8: bool = False) -> None:
    """Write one .safetensors file, whole or not at all; raise DexError for another ending, or where that fails.

    `int8` stores matrices as 8-bit integers with one step per output row, a quarter of the size of float32.
    """
    from safetensors.numpy import save

    check_exits_path(path)
    tensors: dict[str, np.ndarray] = {}
    for name, value in exits.parameters.items():
        if int8 and value.ndim >= 2 and value.shape[-1] > 1 and value.size >= 2**14:
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
    """Read trained exits from a .safetensors file of `train_exits.py export`, or a folder with exits.safetensors.

    Raise DexError where there is no such file, or no exits in it.
    """
    from safetensors import safe_open

    from dex_jax.nn.exits import exit_parameters

    file, advice = local_path(path), "export the exits again"
    with reading(path):
        file = file / FILE_NAME if file.is_dir() else file
        if not file.is_file():
            raise DexError(f"there are no exits at {path}: give a .safetensors file or a folder that holds {FILE_NAME}")
    with reading(file, advice), safe_open(file, framework="np") as opened:
        metadata = opened.metadata() or {}
        other = metadata.get("format") != FORMAT
        refuse(file, (other, f"holds no exits of this version ({FORMAT}): export them with train_exits.py"))
        config = parsed(metadata.get("config", ""), ExitsConfig, f"the configuration in {file}", advice)
        about = parsed(metadata.get("about", ""), dict[str, Any], f"what is said about the exits in {file}", advice)
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        stored = {name: (view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()}
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, (shape, _) in exit_parameters(config).items():
            packed = name + _STEPS in stored
            wanted[name] = ("I8" if packed else "F32", shape)
            if packed:
                wanted[name + _STEPS] = ("F32", (*shape[:-1], 1))
        if config.draft_size is not None:
            wanted[_VOCABULARY] = ("I32", (config.draft_size,))
        # This comes before anything is read: wrong shapes would take more memory than there is.
        for name, kept in wanted.items():
            found = stored.get(name)
            refuse(file, (found != kept, f"should hold {name} as {kept} and has {found}: {advice}"))
        arrays = {name: opened.get_tensor(name) for name in wanted}
    for name, value in arrays.items():
        refuse(file, (not np.isfinite(value).all(), f"holds {name} that is not finite: {advice}"))
    vocabulary = arrays.pop(_VOCABULARY, None)
    if vocabulary is not None:
        falls = vocabulary[0] < 0 or not (np.diff(vocabulary) > 0).all()
        refuse(file, (falls, f"holds a draft vocabulary that does not ascend: {advice}"))
    steps = {name.removesuffix(_STEPS): arrays.pop(name) for name in list(arrays) if name.endswith(_STEPS)}
    fingerprint = metadata.get("fingerprint", "")
    return TrainedExits(config, StoredParameters(arrays, steps), vocabulary, fingerprint, about, str(path))


def quantize(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (int8 [..., in], float32 steps [..., 1]): each row times its step is the matrix to within half a step."""
    steps = np.maximum(np.abs(matrix).max(axis=-1, keepdims=True), 1e-12).astype(np.float32) / 127
    return np.rint(matrix / steps).astype(np.int8), steps


@functools.lru_cache(maxsize=2)
def default_exits(fingerprint: str) -> TrainedExits | None:
    """Return the exits that ship for a model, by its fingerprint; None if there are none."""
    return _shipped(f"{fingerprint}.safetensors")


@functools.lru_cache(maxsize=2)
def default_drafter(fingerprint: str) -> TrainedExits | None:
    """Return the drafter that ships for a model, by its fingerprint; None if there is none."""
    return _shipped(f"{fingerprint}.drafter.safetensors")


def _shipped(name: str) -> TrainedExits | None:
    file = DEFAULTS / name
    return load_exits(file) if file.is_file() else None
