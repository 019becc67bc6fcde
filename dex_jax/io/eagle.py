"""EAGLE-3 heads as SafeAILab, vLLM and speculators read and write them: folders with config.json and safetensors."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from dex_jax.config import EagleConfig, ModelConfig
from dex_jax.errors import DexError
from dex_jax.foreign import Size, TokenId, local_path, reading, typed
from dex_jax.io.huggingface import json_of
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.opening import from_hub, is_hub_id
from dex_jax.io.safetensors_files import SafetensorsFiles
from dex_jax.io.tensor_names import LAYER_NAMES
from dex_jax.io.whole_files import write_json, write_whole

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "head_dim": 128},
}
"""What transformers means by keys that speculators leaves out of its config.json."""

_NAMES = {f"layer.{name}": huggingface for name, (huggingface, _) in LAYER_NAMES.items()} | {
    "layer.token_norm": ("input_layernorm.weight",),
    "layer.attention_norm": ("hidden_norm.weight",),
    "fc": ("fc.weight",),
    "norm": ("norm.weight",),
    "unembed": ("lm_head.weight",),
    "embed": ("embed_tokens.weight",),
}


class _Aux(Struct):
    eagle_aux_hidden_state_layer_ids: list[TokenId] | None = None
    use_aux_hidden_state: bool = True


class _Head(_Aux):
    """What is read of config.json beside the layer."""

    architectures: list[str] | None = None
    speculators_model_type: str | None = None
    transformer_layer_config: dict[str, Any] | None = None
    eagle_config: _Aux | None = None
    draft_vocab_size: Size | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class EagleHead:
    """An EAGLE-3 head ready to be used with the model that it was trained for.

    Attributes:
      config: shapes and switches; it reads no depths where they are left to the model (`fit_eagle`).
      parameters: name -> array, as `nn.eagle.eagle_parameters` lists them.
      vocabulary: [V'] int32, the model's id of each token that the head can draft; None for the model's own order.
      source: where it came from.
    """

    config: EagleConfig
    parameters: dict[str, np.ndarray]
    vocabulary: np.ndarray | None
    source: str

    def __repr__(self) -> str:
        return f"EagleHead({self.source}: width {self.config.layer.width}, {self.config.draft_size} tokens)"


def find_eagle(path: str | os.PathLike) -> EagleHead | None:
    """The EAGLE-3 head of a path or hub id; None where the path names exits of this package.

    A DexError: a hub id of something else, or files that are missing or damaged.
    """
    source = str(path)
    if (local := local_path(path)).exists():
        return _read(local, source) if (local / "config.json").is_file() else None
    if isinstance(path, str) and is_hub_id(path) and not path.endswith(".safetensors"):
        return from_hub(path, functools.partial(_check, source=path), functools.partial(_read, source=path))
    return None


def load_eagle(path: str | os.PathLike) -> EagleHead:
    """Reads an EAGLE-3 head, in the forms of SafeAILab, vLLM and speculators.

    Args:
      path: a folder, or a hub id "owner/name".

    Raises:
      DexError: no EAGLE-3 head, a kind that is not covered, or files that are missing or damaged.
    """
    found = find_eagle(path)
    if found is None:
        raise DexError(f"there is no EAGLE-3 head at {path}: give a folder with config.json, or a hub id")
    return found


def _read(folder: Path, source: str) -> EagleHead:
    head, raw = _check(folder, source)
    with reading(source):
        files = SafetensorsFiles(folder)
        if not files.names:
            raise DexError(f"{source} holds no safetensors weights: save its pytorch_model.bin as model.safetensors.")
        config = _config(head, raw, files, source)
        prefix = "midlayer." if _has(files, "midlayer.") else "layers.0."
        return EagleHead(config, _parameters(config, files, prefix, source), _vocabulary(config, files, source), source)


def _check(folder: Path, source: str) -> tuple[_Head, dict[str, Any]]:
    """config.json of a folder, as what is read of it and whole; a DexError unless it is of an EAGLE-3 head."""
    raw = json_of(folder, "config.json")
    head = typed(raw, _Head, folder / "config.json")
    kinds = [*filter(None, [head.speculators_model_type, *(head.architectures or [])])]
    # SafeAILab's own heads are called what their layer is called.
    if head.draft_vocab_size is None and not any("eagle3" in kind.lower().replace("-", "") for kind in kinds):
        raise DexError(
            f"{source} holds no EAGLE-3 head and no exits (config.json says {', '.join(kinds) or 'nothing':.60}): give "
            "an EAGLE-3 folder, exits of train_exits.py, or a small model with --draft-model."
        )
    return head, raw


def _has(files: SafetensorsFiles, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in files.names)


def _shape(files: SafetensorsFiles, name: str, source: str) -> tuple[int, ...]:
    shape = files.shape(name)
    if shape is None or len(shape) != 2:
        raise DexError(f"{source} lacks the matrix {name} of an EAGLE-3 head: this variant is not covered.")
    return shape


def _config(head: _Head, raw: dict[str, Any], files: SafetensorsFiles, source: str) -> EagleConfig:
    own = head.transformer_layer_config
    given = raw if own is None else own
    kind = given.get("model_type", "llama" if own is None else "qwen3")
    if kind not in _DEFAULTS:
        raise DexError(f"{source} has a layer of type {kind!r:.60}, and only {', '.join(_DEFAULTS)} are covered.")
    if given.get("num_hidden_layers", 1) != 1 or _has(files, "layers.1."):
        raise DexError(f"{source} has more than one layer, and EAGLE-3 heads of one are covered.")
    known = {} if own is None else _DEFAULTS[kind]
    layer = huggingface_config(
        known | given | {"model_type": kind, "num_hidden_layers": 1, "architectures": None}, {}, source
    )
    if layer.layer_kinds:
        raise DexError(f"{source} has a sliding window, which is not covered in an EAGLE-3 head.")
    aux = head.eagle_config or head
    if not aux.use_aux_hidden_state:
        raise DexError(f"{source} reads the last layer alone (use_aux_hidden_state), which is not covered.")
    reads = tuple(aux.eagle_aux_hidden_state_layer_ids or ())
    width, states = _shape(files, "fc.weight", source)
    if states % (len(reads) or 3):
        raise DexError(f"{source} reads {states} numbers of {len(reads) or 3} states: it does not fit together.")
    return EagleConfig(
        layer=dataclasses.replace(layer, width=width, tied=True),
        reads=reads,
        state_width=states // (len(reads) or 3),
        draft_size=_shape(files, "lm_head.weight", source)[0],
        own_embedding="embed_tokens.weight" in files.names,
        norm_before_residual=head.norm_before_residual,
        norm_states="all" if head.norm_before_fc else "each" if head.fc_norm else None,
        norm_output=head.norm_output,
    )


def _parts(name: str, prefix: str) -> list[str]:
    """The tensors that a parameter is stacked from; what belongs to the layer begins with `prefix`."""
    return [prefix + part if name.startswith("layer.") else part for part in _NAMES[name]]


def _parameters(config: EagleConfig, files: SafetensorsFiles, prefix: str, source: str) -> dict[str, np.ndarray]:
    from dex_jax.nn.eagle import eagle_parameters

    found = {}
    # While it is not known which depths are read, they are three.
    reads = config.reads or (0, 0, 0)
    norms = ["input_norm.weight"] if config.norm_states == "all" else [f"fc_norm.{i}.weight" for i in range(len(reads))]
    for name, (shape, _) in eagle_parameters(dataclasses.replace(config, reads=reads)).items():
        parts = norms if name == "states_norm" else _parts(name, prefix)
        for part in parts:
            if files.shape(part) is None:
                raise DexError(f"{source} lacks the tensor {part} of an EAGLE-3 head: this variant is not covered.")
            files.dtype(part)
        shapes = [files.shape(part) or () for part in parts]
        rows = sum(each[0] for each in shapes)
        if any((rows, *each[1:]) != shape for each in shapes):
            raise DexError(
                f"{source} holds {parts[0]} in the shape {list(shapes[0])}, which its configuration does not mean: "
                "weights and configuration do not belong together."
            )
        value = np.concatenate([files.read(part) for part in parts])
        if not np.isfinite(value).all():
            raise DexError(f"{parts[0]} of {source} is not finite: get it again.")
        found[name] = value
    return found


def _vocabulary(config: EagleConfig, files: SafetensorsFiles, source: str) -> np.ndarray | None:
    """The model's id of each token of the draft vocabulary, from `d2t`, which says how far it is from its own."""
    size, last = config.draft_size, config.layer.vocab_size
    if files.shape("d2t") is None:
        if size != last:
            raise DexError(f"{source} drafts {size} of {last} tokens and lacks d2t, which says which: get it again.")
        return None
    if files.shape("d2t") != (size,) or files.format_of("d2t") not in ("I32", "I64"):
        raise DexError(f"d2t of {source} has no {size} integers, one for each token: get it again.")
    ids = files.read("d2t").astype(np.int64) + np.arange(size)
    if ids.min() < 0 or ids.max() >= last or len({*ids.tolist()}) != size:
        raise DexError(f"d2t of {source} does not name {size} of {last} tokens: get it again.")
    return ids.astype(np.int32)


def fit_eagle(head: EagleHead, model: ModelConfig) -> EagleHead:
    """The head as a model's drafter: where it does not say which depths it reads, those of EAGLE-3.

    A DexError: a head of another model.
    """
    config, layers = head.config, model.num_layers
    reads = config.reads or (2, layers // 2, layers - 3)
    fits = [
        (config.state_width == model.width, f"reads states of width {config.state_width}"),
        (all(0 <= depth <= layers for depth in reads), f"reads depths {', '.join(map(str, reads))}"),
        (config.layer.vocab_size == model.vocab_size, f"has a vocabulary of {config.layer.vocab_size} tokens"),
        (
            config.own_embedding or config.layer.width == model.width,
            f"has the width {config.layer.width} and no embeddings",
        ),
    ]
    for fit, what in fits:
        if not fit:
            raise DexError(
                f"the EAGLE-3 head {head.source} is for another model: it {what}, and this model has {layers} layers "
                f"of width {model.width} and {model.vocab_size} tokens"
            )
    return dataclasses.replace(head, config=dataclasses.replace(config, reads=reads))


def save_eagle(folder: str | os.PathLike, head: EagleHead) -> None:
    """Writes a head as SafeAILab's are, which vLLM reads too: config.json and model.safetensors, float32.

    A DexError: a head with norms or a residual that this form has no word for, or a folder that cannot be written.
    """
    from safetensors.numpy import save

    config, layer = head.config, head.config.layer
    if config.norm_states is not None or config.norm_before_residual or config.norm_output:
        raise DexError(f"{head.source} has norms that SafeAILab's form of EAGLE-3 lacks: keep the form that it came in")
    about = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": layer.vocab_size,
        "draft_vocab_size": config.draft_size,
        "hidden_size": layer.width,
        "intermediate_size": layer.mlp_width,
        "num_hidden_layers": 1,
        "num_attention_heads": layer.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "max_position_embeddings": layer.context,
        "rms_norm_eps": layer.norm_eps,
        "rope_theta": layer.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": list(config.reads),
    }
    size = layer.head_dim
    rows = {"layer.qkv": [layer.num_heads * size, layer.num_kv_heads * size], "layer.gate_up": [layer.mlp_width]}
    tensors: dict[str, np.ndarray] = {}
    for name, value in head.parameters.items():
        bounds = np.cumsum(rows.get(name, []), dtype=int).tolist()
        tensors |= zip(_parts(name, "midlayer."), np.split(np.asarray(value, np.float32), bounds), strict=True)
    if head.vocabulary is not None:
        tensors["d2t"] = head.vocabulary.astype(np.int64) - np.arange(len(head.vocabulary))
        tensors["t2d"] = np.isin(np.arange(layer.vocab_size), head.vocabulary)
    Path(folder).mkdir(parents=True, exist_ok=True)
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_whole(Path(folder) / "model.safetensors", save(whole, {"format": "pt"}))
    write_json(Path(folder) / "config.json", about)
