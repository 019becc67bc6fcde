"""A Hugging Face directory as a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.io.checkpoint import Checkpoint, TensorSource
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.safetensors_files import SafetensorsFiles
from dex_jax.io.tokenizer import Tokenizer

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_QUANTISED = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}


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
            return SafetensorsFiles(directory)
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
        base = read_json(adapter).get("base_model_name_or_path", "its base model")
        raise DexError(
            f"{source} holds a LoRA adapter and no model of its own: merge it into {base} (merge_and_unload in peft), "
            "save that and open the result."
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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DexError(f"{path} is not valid JSON ({error}): get it again.") from error
    if not isinstance(content, dict):
        raise DexError(f"{path} holds no JSON object: get it again.")
    return content


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

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise DexError(f"{path} cannot be read ({error}): get it again, or update tokenizers.") from error
    settings = read_json(directory / "tokenizer_config.json")
    return Tokenizer(
        backend,
        template=_template(directory, settings),
        variables={name: _content(settings[name]) for name in _SPECIAL_NAMES if settings.get(name)},
        eos_ids=eos_ids,
        source=source,
    )


def _template(directory: Path, settings: dict[str, Any]) -> str | None:
    own_file = directory / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]
