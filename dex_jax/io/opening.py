"""From a model's name to an opened checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dex_jax.errors import DexError
from dex_jax.foreign import local_path, reading
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.folders import Directory, Store, is_url
from dex_jax.io.gguf_file import GGUFFile
from dex_jax.io.gguf_model import GGUFWeights, gguf_config
from dex_jax.io.gguf_tokenizer import gguf_tokenizer
from dex_jax.io.hub import ALIASES, download, is_hub_id, packaged_file
from dex_jax.io.huggingface import open_folder, read_config


def open_checkpoint(source: str) -> Checkpoint:
    """Opens a model's checkpoint: reads configuration and headers, no weights.

    `source` is an alias (a key of `ALIASES`), a folder on an object store (gs://...), a `.gguf` file, a Hugging Face
    directory, or a hub id "owner/name", tried in this order. A hub id that is not in the hub's cache is downloaded,
    after a line on stderr that says how much.

    A DexError: nothing of that name, an architecture or a quantisation that is not covered, or incomplete files.
    """
    with reading(source):
        return _open(str(source))


def _open(source: str) -> Checkpoint:
    target = ALIASES.get(source.lower(), source)
    if target.startswith("package:"):
        return _open_gguf(packaged_file(target))
    if is_url(target):
        if target.lower().endswith(".gguf"):
            raise DexError(f"A .gguf file is read from a disk: copy {target} and give the path of the copy.")
        store = Store(target)
        if not store.sizes:
            raise DexError(f"There is nothing at {target}: check the address.")
        return open_folder(store, target)
    path = local_path(target)
    if target.lower().endswith(".gguf"):
        if not path.is_file():
            raise DexError(f"There is no file {path}: check the path.")
        return _open_gguf(path)
    if target and path.is_dir():
        return open_folder(Directory(path), str(path))
    if is_hub_id(target):
        return open_folder(download(target, partial(read_config, source=target)), target)
    kind = "a file, but no .gguf file," if path.is_file() else "no alias, .gguf file, directory or hub id (owner/name)"
    raise DexError(f"{source!r} is {kind} and so names no model: use one of those, or an alias: {', '.join(ALIASES)}.")


def _open_gguf(path: Path) -> Checkpoint:
    file = GGUFFile(path)
    config = gguf_config(file)
    build = partial(gguf_tokenizer, file.metadata, config.eos_ids, str(path))
    return Checkpoint(config, str(path), GGUFWeights(file, config), gguf=True, build_tokenizer=build)
