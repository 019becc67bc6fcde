"""A Hugging Face folder as a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct, defstruct

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading, typed
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.safetensors_files import SafetensorsFiles, weight_files
from dex_jax.io.tokenizer import Tokenizer


class _Special(Struct):
    content: str


class _Template(Struct):
    name: str
    template: str


_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TokenizerConfig = defstruct(
    "_TokenizerConfig",
    [
        ("chat_template", str | list[_Template] | None, None),
        *((n, str | _Special | None, None) for n in _SPECIAL_NAMES),
    ],
)


def open_folder(folder: Path, source: str) -> Checkpoint:
    """The checkpoint in a folder with config.json, safetensors and a tokenizer, as `save_pretrained` writes it.

    The tokenizer's files are read when it is asked for; `source` is what reports and errors call the folder. A
    DexError where files are missing or not covered.
    """
    config = read_config(folder, source)
    if not weight_files(folder):
        raise DexError(f"{source} holds no safetensors weights: convert or get them as model.safetensors.")
    tokenizer = partial(_tokenizer, folder, config.eos_ids, source)
    return Checkpoint(config, source, SafetensorsFiles(folder), gguf=False, build_tokenizer=tokenizer)


def read_config(folder: Path, source: str) -> ModelConfig:
    """Reads a folder's configuration; weights need not be there. A DexError where it is missing or not covered."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise DexError(
                f"{source} holds a LoRA adapter and no model of its own: merge it into its base model "
                "(merge_and_unload in peft), save that and open the result."
            )
        raise DexError(f"{source} has no config.json: it is not a Hugging Face model directory.")
    return huggingface_config(json_of(folder, "config.json"), json_of(folder, "generation_config.json"), source)


def json_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    file = folder / name
    with reading(file):
        return parsed(file.read_bytes(), dict[str, Any], file) if file.is_file() else {}


def _tokenizer(folder: Path, eos_ids: tuple[int, ...], source: str) -> Tokenizer | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        for other in ("tokenizer.model", "vocab.json"):
            if (folder / other).is_file():
                raise DexError(
                    f"{source} has its tokenizer only as {other}: save it once with transformers' AutoTokenizer, "
                    "which writes tokenizer.json."
                )
        return None
    import tokenizers

    with reading(file, "get it again, or update tokenizers"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    described = "tokenizer_config.json"
    read: Any = typed(json_of(folder, described), _TokenizerConfig, folder / described)
    special = {name: token for name in _SPECIAL_NAMES if (token := getattr(read, name))}
    template = read.chat_template
    if isinstance(template, list):
        template = next((each.template for each in template if each.name == "default"), None)
    own_file = folder / "chat_template.jinja"
    with reading(own_file):
        template = own_file.read_text("utf-8") if own_file.is_file() else template
    return Tokenizer(
        backend,
        template=template,
        variables={name: token if isinstance(token, str) else token.content for name, token in special.items()},
        eos_ids=eos_ids,
        source=source,
    )
