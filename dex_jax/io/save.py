"""The export of a model to a Hugging Face directory that `dex_jax.load` and transformers read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import local_path, refuse
from dex_jax.io.families import FAMILIES
from dex_jax.io.huggingface_config import ROPE_KEYS, SCALINGS, SHARED_KEYS, huggingface_config
from dex_jax.io.tensor_names import canonical_parts, stacked_shape
from dex_jax.io.tokenizer import Tokenizer

_STORED = ("float32", "float16")


def save_model(
    folder: str | Path, config: ModelConfig, weights: Mapping[str, Any], tokenizer: Tokenizer | None = None
) -> Path:
    """Write config.json, model.safetensors and tokenizer.json, all of them or nothing, and return the folder.

    Args:
      folder: the one to make.
      config: that of a model of the families that `load` reads.
      weights: canonical name ("embed", "layers.0.qkv", ...) -> array of the shape that `config` means. float32 and
        float16 are stored as they are, other floats as float32.
      tokenizer: written without its chat template; None for none.

    Raises:
      DexError: a weight is missing, misshapen or unknown, config.json cannot say the configuration, the folder is
        there and not empty, or there is no room on the disk.
    """
    import safetensors.numpy

    folder = local_path(folder)
    content = config_json(config)
    tensors = _file_tensors(config, weights)
    content["torch_dtype"] = str(tensors["model.embed_tokens.weight"].dtype)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DexError(f"{folder} is there already: give a new folder to save the model in")
    # In the same folder as the target: a rename is atomic within one file system only.
    fresh = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    try:
        fresh.mkdir(parents=True)
        (fresh / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # transformers requires the metadata entry.
        safetensors.numpy.save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            (fresh / "tokenizer.json").write_text(tokenizer.backend.to_str(pretty=True), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        fresh.rename(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise DexError(f"{folder} cannot hold the model ({error}): make room or choose another folder") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def config_json(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json that `huggingface_config` reads as `config`; raise DexError where it cannot say that."""
    unknown = config.family not in FAMILIES
    refuse(config.family, (unknown, f"is no family of models: choose one of {', '.join(FAMILIES)}"))
    family = FAMILIES[config.family]
    content = {
        "architectures": [family.class_name],
        "model_type": config.family,
        "hidden_act": {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[config.activation],
        **{key: getattr(config, name) for name, key in SHARED_KEYS.items() if family.knows(key)},
        **_layer_types(config),
        "rope_scaling": _rope_scaling(config),
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.out_bias,
        "mlp_bias": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
    }
    content |= {theirs: content[ours] for ours, theirs in family.keys.items()}
    read_back = huggingface_config(content, {}, "this configuration")
    for name, value in vars(config).items():
        wrong = getattr(read_back, name) != value
        refuse(
            f"config.json of a {config.family} model", (wrong, f"cannot say {name}={value!r}: choose another family")
        )
    return content


def _layer_types(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of config.json on windows and on layers that do not rotate."""
    windows = {kind.window for kind in config.kinds if kind.window is not None}
    content: dict[str, Any] = {
        "layer_types": ["full_attention" if kind.window is None else "sliding_attention" for kind in config.kinds],
        "sliding_window": max(windows, default=None),
        "use_sliding_window": bool(windows),
        "max_window_layers": sum(kind.window is None for kind in config.kinds),
        "no_rope_layers": [int(kind.rope != "none") for kind in config.kinds],
        "position_embedding_type": None if any(kind.rope == "none" for kind in config.kinds) else "rope",
        "num_local_experts": 0,
    }
    if config.attention_scale is not None:
        content["query_pre_attn_scalar"] = round(config.attention_scale**-2, 6)
    return content


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    share = {} if config.rotated is None else {"partial_rotary_factor": config.rotated / config.head_dim}
    if scaling is None:
        return {"rope_type": "default"} | share if share else None
    needed, others = SCALINGS[scaling.kind]
    return {"rope_type": scaling.kind} | {ROPE_KEYS[name]: getattr(scaling, name) for name in needed + others} | share


def _file_tensors(config: ModelConfig, weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return every tensor of the file by its published name: the fused canonical tensors are cut into their parts."""
    parts = canonical_parts(config, gguf=False)
    for name in weights.keys() ^ parts.keys():
        raise DexError(f"the weights {'hold' if name in weights else 'lack'} {name}, unlike this configuration")
    tensors = {}
    for name, pieces in parts.items():
        tensor, wanted = np.asarray(weights[name]), stacked_shape([piece.shape for piece in pieces])
        wrong = tensor.shape != wanted
        refuse(f"the weight {name}", (wrong, f"has the shape {tensor.shape}, and its configuration means {wanted}"))
        if tensor.dtype.name not in _STORED:
            tensor = tensor.astype(np.float32)
        bounds = np.cumsum([piece.shape[0] for piece in pieces])[:-1]
        for piece, rows in zip(pieces, np.split(tensor, bounds), strict=True):
            tensors[piece.name] = np.ascontiguousarray(rows)
    return tensors
