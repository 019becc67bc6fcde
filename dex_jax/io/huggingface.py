"""A Hugging Face directory as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msgspec import Struct, defstruct

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading, typed
from dex_jax.io.checkpoint import Checkpoint, TensorSource
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.safetensors_files import Directory, SafetensorsFiles
from dex_jax.io.tokenizer import Tokenizer

_QUANTISED = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}


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


def open_directory(directory: Path, source: str) -> Checkpoint:
    """Opens a directory with config.json, safetensors and a tokenizer, as `save_pretrained` writes it.

    Args:
      directory: the directory.
      source: what to call it in reports and errors.

    Returns:
      The checkpoint.

    Raises:
      DexError: files are missing or not covered.
    """

    def tensors() -> TensorSource:
        if _has_weights(directory):
            return SafetensorsFiles(Directory(directory))
        other = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (only {other[0]})" if other else ""
        raise DexError(f"{source} holds no safetensors weights{found}: convert or get them as model.safetensors.")

    return checkpoint_of(directory, source, tensors)


def checkpoint_of(
    directory: Path,
    source: str,
    tensors: Callable[[], TensorSource],
    keep: object = None,
    weights: bool | None = None,
) -> Checkpoint:
    """The checkpoint whose configuration and tokenizer lie in a directory, and its weights where `tensors` opens them.

    Args:
      directory: the directory.
      source: what to call it in reports and errors.
      tensors: called once the configuration is found to be covered.
      keep: lives as long as the tokenizer may be asked for.
      weights: as of `read_config`.

    Raises:
      DexError: files are missing or not covered.
    """
    config = read_config(directory, source, weights)

    def build(_: object = keep) -> Tokenizer | None:
        return _tokenizer(directory, config.eos_ids, source)

    return Checkpoint(config, source, tensors(), gguf=False, build_tokenizer=build)


def read_config(directory: Path, source: str, weights: bool | None = None) -> ModelConfig:
    """Reads a directory's configuration; weights need not be there.

    Args:
      directory: the directory.
      source: what to call it in reports and errors.
      weights: whether the model has weights of its own, where they lie elsewhere; None looks for them here.

    Raises:
      DexError: files are missing or not covered.
    """
    adapter = directory / "adapter_config.json"
    # A merged model may have kept its adapter's description.
    if adapter.is_file() and not (_has_weights(directory) if weights is None else weights):
        base = str(read_json(adapter).get("base_model_name_or_path", "its base model"))
        raise DexError(
            f"{source} holds a LoRA adapter and no model of its own: merge it into {base:.100} (merge_and_unload in "
            "peft), save that and open the result."
        )
    if not (directory / "config.json").is_file():
        raise DexError(f"{source} has no config.json: it is not a Hugging Face model directory.")
    for name, method in _QUANTISED.items():
        if (directory / name).is_file():
            raise DexError(
                f"{source} is quantised by {method}, which is not covered: use the unquantised model or a GGUF."
            )
    return huggingface_config(
        read_json(directory / "config.json"), read_json(directory / "generation_config.json"), source
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file is an empty one.

    Raises:
      DexError: the file is not a JSON object.
    """
    with reading(path):
        return parsed(path.read_bytes(), dict[str, Any], path) if path.is_file() else {}


def names_weights(names: Iterable[str]) -> bool:
    """Whether files of these names in one folder hold a model's weights, and not an adapter's alone."""
    return any(".safetensors" in name and "/" not in name and not name.startswith("adapter_") for name in names)


def _has_weights(directory: Path) -> bool:
    return names_weights(path.name for path in directory.iterdir())


def _tokenizer(directory: Path, eos_ids: tuple[int, ...], source: str) -> Tokenizer | None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        for other in ("tokenizer.model", "vocab.json"):
            if (directory / other).is_file():
                raise DexError(
                    f"{source} has its tokenizer only as {other}: save it once with transformers' AutoTokenizer, "
                    "which writes tokenizer.json."
                )
        return None
    import tokenizers

    with reading(path, "get it again, or update tokenizers"):
        backend = tokenizers.Tokenizer.from_file(str(path))
    settings = directory / "tokenizer_config.json"
    read: Any = typed(read_json(settings), _TokenizerConfig, settings)
    special = {name: token for name in _SPECIAL_NAMES if (token := getattr(read, name))}
    return Tokenizer(
        backend,
        template=_template(directory, read.chat_template),
        variables={name: token if isinstance(token, str) else token.content for name, token in special.items()},
        eos_ids=eos_ids,
        source=source,
    )


def _template(directory: Path, template: str | list[_Template] | None) -> str | None:
    own_file = directory / "chat_template.jinja"
    with reading(own_file):
        if own_file.is_file():
            return own_file.read_text(encoding="utf-8")
    if isinstance(template, list):
        return next((each.template for each in template if each.name == "default"), None)
    return template
