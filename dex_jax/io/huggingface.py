"""A Hugging Face folder as a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from msgspec import Struct
from msgspec.structs import asdict

from dex_jax.config import ModelConfig
from dex_jax.foreign import parsed, reading, refuse, typed
from dex_jax.io.checkpoint import Checkpoint, Stored, Tensors
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.tokenizer import Tokenizer

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


class _Special(Struct):
    content: str


class _Template(Struct):
    name: str
    template: str


class _TokenizerConfig(Struct):
    chat_template: str | list[_Template] | None = None
    bos_token: str | _Special | None = None
    eos_token: str | _Special | None = None
    unk_token: str | _Special | None = None
    pad_token: str | _Special | None = None


def open_folder(folder: Path, source: str) -> Checkpoint:
    """Open the checkpoint in a folder with config.json, safetensors and a tokenizer, as `save_pretrained` writes it.

    The tokenizer's files are read at its first use; `source` is what reports and errors call the folder. Raise
    DexError where files are missing or not covered.
    """
    config, files = read_config(folder, source), SafetensorsFiles(folder)
    refuse(source, (not files.stored, "holds no safetensors weights: convert or get them as model.safetensors"))
    tokenizer = partial(_tokenizer, folder, config.eos_ids, source)
    return Checkpoint(config, source, files, False, tokenizer)


def read_config(folder: Path, source: str) -> ModelConfig:
    """Read a folder's configuration, without its weights; raise DexError where it is missing or not covered."""
    absent, adapter = not (folder / "config.json").is_file(), (folder / "adapter_config.json").is_file()
    advice = "merge it into its base model (merge_and_unload in peft), save that and open the result"
    refuse(
        source,
        (absent and adapter, f"holds a LoRA adapter and no model of its own: {advice}"),
        (absent, "has no config.json: it is not a Hugging Face model directory"),
    )
    return huggingface_config(json_of(folder, "config.json"), json_of(folder, "generation_config.json"), source)


def json_of(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from a file; an absent file is an empty one."""
    file = folder / name
    with reading(file):
        return parsed(file.read_bytes(), dict[str, Any], file) if file.is_file() else {}


def _tokenizer(folder: Path, eos_ids: tuple[int, ...], source: str) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        for other in ("tokenizer.model", "vocab.json"):
            found = (folder / other).is_file()
            refuse(source, (found, f"has its tokenizer only as {other}: save it by transformers' AutoTokenizer"))
        return None
    import tokenizers

    with reading(file, "get it again, or update tokenizers"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    described = "tokenizer_config.json"
    read = typed(json_of(folder, described), _TokenizerConfig, folder / described)
    special = {
        name: getattr(token, "content", token) for name, token in asdict(read).items() if name != "chat_template"
    }
    template, own_file = read.chat_template, folder / "chat_template.jinja"
    if isinstance(template, list):
        template = next((each.template for each in template if each.name == "default"), None)
    with reading(own_file):
        template = own_file.read_text("utf-8") if own_file.is_file() else template
    return Tokenizer(
        backend,
        template=template,
        variables={name: token for name, token in special.items() if token},
        eos_ids=eos_ids,
        source=source,
    )


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with reading(file), safe_open(file, framework="np") as opened:
        yield opened


class SafetensorsFiles(Tensors):
    """The tensors of a folder's safetensors files."""

    def __init__(self, folder: Path):
        """Read the headers; raise DexError if a file is truncated or damaged."""
        self.stored = {}
        # transformers chooses like this: some folders hold the same weights once more under another name.
        found = [sorted(folder.glob(name)) for name in ("model.safetensors", "model*.safetensors", "*.safetensors")]
        for file in next(filter(None, found), []):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    view = tensors.get_slice(name)
                    # This is the name in a model of text alone; here what reads images stands beside that model.
                    known = re.sub(r"^(model\.)?language_model\.", r"\1", name)
                    format = view.get_dtype()
                    self.stored[known] = Stored(file, tuple(view.get_shape()), format, _DTYPES.get(format), name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return rows `start` to `stop`."""
        found = self.stored[name]
        # Opened anew: the pages that were read leave this process with the map.
        with _opened(found.file) as tensors:
            return tensors.get_slice(found.place)[start:stop]
