"""A Hugging Face folder as a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from msgspec import Struct, defstruct

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading, typed
from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.folders import Folder, content_of
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.safetensors_files import SafetensorsFiles
from dex_jax.io.tokenizer import Tokenizer

QUANTISED = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
"""File that stands beside quantised weights -> the method."""


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


def open_folder(folder: Folder, source: str) -> Checkpoint:
    """The checkpoint in a folder with config.json, safetensors and a tokenizer, as `save_pretrained` writes it.

    The tokenizer's files are read when it is asked for; `source` is what reports and errors call the folder. A
    DexError where files are missing or not covered.
    """
    config = read_config(folder, source)
    if not names_weights(folder.sizes):
        other = sorted(name for name in folder.sizes if name.endswith((".bin", ".pt", ".pth", ".gguf")))
        found = f" (only {other[0]})" if other else ""
        raise DexError(f"{source} holds no safetensors weights{found}: convert or get them as model.safetensors.")
    tokenizer = partial(_tokenizer, folder, config.eos_ids, source)
    return Checkpoint(config, source, SafetensorsFiles(folder), gguf=False, build_tokenizer=tokenizer)


def read_config(folder: Folder, source: str, weights: bool | None = None) -> ModelConfig:
    """Reads a folder's configuration; weights need not be there.

    `weights` says whether the model has weights of its own, where they lie elsewhere; None looks for them here. A
    DexError where files are missing or not covered.
    """
    # A merged model may have kept its adapter's description.
    if "adapter_config.json" in folder.sizes and not (names_weights(folder.sizes) if weights is None else weights):
        base = str(json_of(folder, "adapter_config.json").get("base_model_name_or_path", "its base model"))
        raise DexError(
            f"{source} holds a LoRA adapter and no model of its own: merge it into {base:.100} (merge_and_unload in "
            "peft), save that and open the result."
        )
    if "config.json" not in folder.sizes:
        raise DexError(f"{source} has no config.json: it is not a Hugging Face model directory.")
    for name, method in QUANTISED.items():
        if name in folder.sizes:
            raise DexError(
                f"{source} is quantised by {method}, which is not covered: use the unquantised model or a GGUF."
            )
    return huggingface_config(json_of(folder, "config.json"), json_of(folder, "generation_config.json"), source)


def json_of(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one."""
    return parsed(content_of(folder, name), dict[str, Any], folder.address(name)) if name in folder.sizes else {}


def names_weights(names: Iterable[str]) -> bool:
    """Whether files of these names in one folder hold a model's weights, and not an adapter's alone."""
    return any(".safetensors" in name and "/" not in name and not name.startswith("adapter_") for name in names)


def _tokenizer(folder: Folder, eos_ids: tuple[int, ...], source: str) -> Tokenizer | None:
    if "tokenizer.json" not in folder.sizes:
        for other in ("tokenizer.model", "vocab.json"):
            if other in folder.sizes:
                raise DexError(
                    f"{source} has its tokenizer only as {other}: save it once with transformers' AutoTokenizer, "
                    "which writes tokenizer.json."
                )
        return None
    import tokenizers

    with reading(folder.address("tokenizer.json"), "get it again, or update tokenizers"):
        backend = tokenizers.Tokenizer.from_buffer(content_of(folder, "tokenizer.json"))
    described = "tokenizer_config.json"
    read: Any = typed(json_of(folder, described), _TokenizerConfig, folder.address(described))
    special = {name: token for name in _SPECIAL_NAMES if (token := getattr(read, name))}
    return Tokenizer(
        backend,
        template=_template(folder, read.chat_template),
        variables={name: token if isinstance(token, str) else token.content for name, token in special.items()},
        eos_ids=eos_ids,
        source=source,
    )


def _template(folder: Folder, template: str | list[_Template] | None) -> str | None:
    own_file = "chat_template.jinja"
    if own_file in folder.sizes:
        with reading(folder.address(own_file)):
            return content_of(folder, own_file).decode()
    if isinstance(template, list):
        return next((each.template for each in template if each.name == "default"), None)
    return template
