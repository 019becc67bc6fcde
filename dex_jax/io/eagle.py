"""EAGLE-3 heads as SafeAILab, vLLM and speculators read and write them: folders with config.json and safetensors."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from dex_jax.config import EagleConfig, ModelConfig, Size, TokenId
from dex_jax.errors import DexError
from dex_jax.foreign import local_path, reading, refuse, typed
from dex_jax.io.huggingface import SafetensorsFiles, json_of
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.opening import from_hub, is_hub_id
from dex_jax.io.tensor_names import LAYER_NAMES, stacked_shape

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "head_dim": 128},
}
"""The values that transformers assumes for keys that speculators leaves out of its config.json."""

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
    """The keys that are read from config.json beside the layer's own."""

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
    """Return the EAGLE-3 head of a path or hub id; None where the path names exits of this package.

    Raise DexError for a hub id of something else, or files that are missing or damaged.
    """
    source = str(path)
    if (local := local_path(path)).exists():
        return _read(local, source) if (local / "config.json").is_file() else None
    if isinstance(path, str) and is_hub_id(path) and not path.endswith(".safetensors"):
        return from_hub(path, functools.partial(_check, source=path), functools.partial(_read, source=path))
    return None


def load_eagle(path: str | os.PathLike) -> EagleHead:
    """Read an EAGLE-3 head of a folder or a hub id "owner/name", in the forms of SafeAILab, vLLM and speculators.

    Raise DexError if there is no EAGLE-3 head, if its kind is not covered, or if files are missing or damaged.
    """
    if (found := find_eagle(path)) is None:
        raise DexError(f"there is no EAGLE-3 head at {path}: give a folder with config.json, or a hub id")
    return found


def _read(folder: Path, source: str) -> EagleHead:
    head, raw = _check(folder, source)
    with reading(source):
        files = SafetensorsFiles(folder)
        refuse(source, (not files.stored, "holds no safetensors weights: save pytorch_model.bin as model.safetensors"))
        config = _config(head, raw, files, source)
        return EagleHead(config, _parameters(config, files, source), _vocabulary(config, files, source), source)


def _check(folder: Path, source: str) -> tuple[_Head, dict[str, Any]]:
    """Return config.json of a folder, as a _Head and whole; raise DexError unless it is of an EAGLE-3 head."""
    raw = json_of(folder, "config.json")
    head = typed(raw, _Head, folder / "config.json")
    kinds = [*filter(None, [head.speculators_model_type, *(head.architectures or [])])]
    # SafeAILab's own heads are named like their layer.
    other = head.draft_vocab_size is None and not any("eagle3" in kind.lower().replace("-", "") for kind in kinds)
    said = f"(config.json says {', '.join(kinds) or 'nothing':.60}): a small model drafts with --draft-model"
    refuse(source, (other, f"holds no EAGLE-3 head and no exits {said}"))
    return head, raw


def _config(head: _Head, raw: dict[str, Any], files: SafetensorsFiles, source: str) -> EagleConfig:
    own = head.transformer_layer_config
    given = raw if own is None else own
    kind = given.get("model_type", "llama" if own is None else "qwen3")
    many = given.get("num_hidden_layers", 1) != 1 or any(name.startswith("layers.1.") for name in files.stored)
    aux, shapes = head.eagle_config or head, {name: each.shape for name, each in files.stored.items()}
    fc, lm_head = shapes.get("fc.weight", ()), shapes.get("lm_head.weight", ())
    reads = tuple(aux.eagle_aux_hidden_state_layer_ids or ())
    count = len(reads) or 3
    refuse(
        source,
        (kind not in _DEFAULTS, f"has a layer of type {kind!r:.60}, and only {', '.join(_DEFAULTS)} are covered"),
        (many, "has more than one layer, and EAGLE-3 heads of one are covered"),
        (not aux.use_aux_hidden_state, "reads the final layer alone (use_aux_hidden_state), which is not covered"),
        (len(fc) != 2, "lacks the matrix fc.weight of an EAGLE-3 head"),
        (len(lm_head) != 2, "lacks the matrix lm_head.weight of an EAGLE-3 head"),
    )
    known = {} if own is None else _DEFAULTS[kind]
    one = {"model_type": kind, "num_hidden_layers": 1, "architectures": None}
    layer = huggingface_config(known | given | one, {}, source)
    width, states = fc
    refuse(
        source,
        (layer.layer_kinds, "has a sliding window, which is not covered in an EAGLE-3 head"),
        (states % count, f"reads {states} numbers of {count} states: it does not fit together"),
    )
    return EagleConfig(
        layer=dataclasses.replace(layer, width=width, tied=True),
        reads=reads,
        state_width=states // count,
        draft_size=lm_head[0],
        own_embedding="embed_tokens.weight" in files.stored,
        norm_before_residual=head.norm_before_residual,
        norm_states="all" if head.norm_before_fc else "each" if head.fc_norm else None,
        norm_output=head.norm_output,
    )


def _parts(name: str, prefix: str) -> list[str]:
    """Return the tensors that a parameter is stacked from; the names of the layer's begin with `prefix`."""
    return [prefix + part if name.startswith("layer.") else part for part in _NAMES[name]]


def _parameters(config: EagleConfig, files: SafetensorsFiles, source: str) -> dict[str, np.ndarray]:
    from dex_jax.nn.eagle import eagle_parameters

    found = {}
    prefix = "midlayer." if any(name.startswith("midlayer.") for name in files.stored) else "layers.0."
    # Until it is known which depths are read, there are three.
    reads = config.reads or (0, 0, 0)
    norms = ["input_norm.weight"] if config.norm_states == "all" else [f"fc_norm.{i}.weight" for i in range(len(reads))]
    for name, (shape, _) in eagle_parameters(dataclasses.replace(config, reads=reads)).items():
        parts = norms if name == "states_norm" else _parts(name, prefix)
        absent = [part for part in parts if part not in files.stored or files.stored[part].dtype is None]
        refuse(source, (absent, f"lacks floats under the name {absent[:1]} of an EAGLE-3 head"))
        # This comes before anything is read: wrong shapes would take more memory than there is.
        shapes = [files.stored[part].shape for part in parts]
        fits = all(len(each) == len(shape) for each in shapes) and stacked_shape(shapes) == shape
        wrong = f"holds {parts[0]} in the shape {shapes[0]}: weights and configuration do not belong together"
        refuse(source, (not fits, wrong))
        found[name] = np.concatenate([files.read(part) for part in parts])
        refuse(source, (not np.isfinite(found[name]).all(), f"holds {parts[0]} that is not finite: get it again"))
    return found


def _vocabulary(config: EagleConfig, files: SafetensorsFiles, source: str) -> np.ndarray | None:
    """Return the model's id of each token of the draft vocabulary, from `d2t`, the difference of both ids."""
    size, last = config.draft_size, config.layer.vocab_size
    if "d2t" not in files.stored and size == last:
        return None
    stored = files.stored.get("d2t")
    whole = stored is not None and stored.shape == (size,) and stored.format in ("I32", "I64")
    ids = files.read("d2t").astype(np.int64) + np.arange(size) if whole else np.full(size, -1)
    wrong = ids.min() < 0 or ids.max() >= last or len({*ids.tolist()}) != size
    refuse(source, (wrong, f"does not say by d2t which {size} of {last} tokens it drafts: get it again"))
    return ids.astype(np.int32)


def fit_eagle(head: EagleHead, model: ModelConfig) -> EagleHead:
    """Return the head as a model's drafter: where it does not say which depths it reads, those of EAGLE-3.

    Raise DexError for a head of another model.
    """
    config, layers = head.config, model.num_layers
    reads = config.reads or (2, layers // 2, layers - 3)
    width, size = config.layer.width, config.layer.vocab_size
    where = f"and is for another model than this of {layers} layers, width {model.width}, {model.vocab_size} tokens"
    refuse(
        f"the EAGLE-3 head {head.source}",
        (config.state_width != model.width, f"reads states of width {config.state_width} {where}"),
        (not all(0 <= depth <= layers for depth in reads), f"reads depths {', '.join(map(str, reads))} {where}"),
        (size != model.vocab_size, f"has a vocabulary of {size} tokens {where}"),
        (not config.own_embedding and width != model.width, f"has the width {width} and no embeddings {where}"),
    )
    return dataclasses.replace(head, config=dataclasses.replace(config, reads=reads))
