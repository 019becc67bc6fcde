"""The conversion of config.json, in the forms of transformers 4 and 5, to a ModelConfig."""

from __future__ import annotations

import math
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict, fields

from dex_jax.config import ModelConfig, Positive, Size
from dex_jax.errors import DexError
from dex_jax.foreign import refuse, typed
from dex_jax.io.families import FAMILIES, WITH_TEXT, Family, Ids, Settings

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}
# No file holds the tensors of more layers; Checkpoint says that there are too few.
_MOST_LAYERS = 100_000
_ATTENTION = ("full_attention", "sliding_attention", "attention")


class _Generation(Struct):
    eos_token_id: Ids = None


class _Rope(Struct):
    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_context: Size | None = field(name="original_max_position_embeddings", default=None)
    fast: Positive | None = field(name="beta_fast", default=None)
    slow: Positive | None = field(name="beta_slow", default=None)
    truncate: bool | None = None
    magnitude: Positive | None = field(name="attention_factor", default=None)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    query_growth: float | None = field(name="llama_4_scaling_beta", default=None)
    short_factors: list[Positive] | None = field(name="short_factor", default=None)
    long_factors: list[Positive] | None = field(name="long_factor", default=None)


ROPE_KEYS = {each.name: each.encode_name for each in fields(_Rope)}
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_context"), ()),
    "yarn": (("original_context",), ("factor", "fast", "slow", "truncate", "magnitude", "query_growth")),
    "longrope": (("short_factors", "long_factors"), ("magnitude", "original_context")),
}
"""The fields of RopeScaling that config.json must have, and may have, by kind of scaling; their keys are above."""

_SAME = ModelConfig.__annotations__.keys() - {"rope_scaling", "activation"}
SHARED_KEYS = {each.name: each.encode_name for each in fields(Settings) if each.name in _SAME}
"""The key of config.json for each field of ModelConfig that has the same value in both."""


def huggingface_config(
    config: dict[str, Any], generation: dict[str, Any], source: str, told_by: str = "config.json"
) -> ModelConfig:
    """Return the configuration that a model's config.json and generation_config.json (or {}) mean; `source` names it.

    For a model of images and text, it is that of the text. Raise DexError for another architecture, a feature that the
    model here does not have, or values that no model has.
    """
    file = f"{told_by} of {source}"
    name = typed(config, dict[str, Any], file).get("model_type")
    if name in WITH_TEXT:
        inner = typed(config.get("text_config"), dict[str, Any], f"text_config in {file}")
        outer = {key: value for key in ("eos_token_id", "bos_token_id") if (value := config.get(key)) is not None}
        config, name = outer | inner | {"architectures": None}, inner.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise DexError(f"{source} is of model type {name!r:.60}, and only {', '.join(FAMILIES)} are covered.")
    family = FAMILIES[name]
    read = typed(family.settings(config), Settings, file)
    _refuse_uncovered(read, source)
    stops = typed(generation, _Generation, f"generation_config.json of {source}").eos_token_id
    head_dim = read.head_dim or read.width // read.num_heads
    biases = {"qkv_bias": bool(read.attention_bias), "out_bias": bool(read.attention_bias)}
    found = asdict(read) | biases | family.constants | _rope(read, family, head_dim, source, file)
    if family.scaled:
        found |= {"embed_scale": read.width**0.5, "attention_scale": read.query_size**-0.5}
    found |= {
        "family": name,
        "num_kv_heads": read.num_kv_heads or read.num_heads,
        "head_dim": head_dim,
        "tied": bool(read.tied),
        "activation": _ACTIVATIONS[read.activation],
        "eos_ids": sorted({*_ids(read.eos_token_id), *_ids(stops)}),
        "bos_id": next(iter(_ids(read.bos_token_id)), None),
        "layer_kinds": _layer_kinds(read, family),
    }
    return typed(found, ModelConfig, file)


def _refuse_uncovered(config: Settings, source: str) -> None:
    quantised, classes = config.quantization_config or {}, config.architectures or []
    method = str(quantised.get("quant_method", "an unnamed method"))
    method = {"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8"}.get(method, method)
    others = sorted({*(config.layer_types or [])} - {*_ATTENTION})
    causal = not classes or any(name.endswith("ForCausalLM") for name in classes)
    activations, activation = ", ".join(_ACTIVATIONS), config.activation
    refuse(
        source,
        (quantised, f"is quantised by {method:.60}, which is not covered: use the unquantised model or a GGUF"),
        (not causal, f"is a {' '.join(classes):.60}, and only causal language models are covered"),
        (config.use_bidirectional_attention, "attends to what follows, and only causal language models are covered"),
        (config.mlp_bias, "has biases in its MLP (mlp_bias), which are not covered"),
        (activation not in _ACTIVATIONS, f"uses the activation {activation!r:.60}, and {activations} are covered"),
        (config.num_experts or config.num_local_experts, "is a mixture of experts, which is not covered"),
        (others, f"has layers of type {' '.join(others):.60}, and only those with attention are covered"),
    )


def _layer_kinds(config: Settings, family: Family) -> list[dict[str, Any]]:
    """Return the kinds of the layers as ModelConfig takes them, [] where all are alike and see everything."""
    # A window as long as the longest sequence hides nothing.
    window = config.sliding_window if config.sliding_window and config.sliding_window < config.context else None
    kinds = []
    for layer in range(min(config.num_layers, _MOST_LAYERS)):
        here = config.sliding_window is not None and family.slides(config, layer)
        rope = "none" if not family.rotates(config, layer) else "local" if here and family.local_rope else "main"
        kinds.append({"window": window if here else None, "rope": rope})
    return [] if all(kind == {"window": None, "rope": "main"} for kind in kinds) else kinds


def _rope(config: Settings, family: Family, head_dim: int, source: str, file: str) -> dict[str, Any]:
    """Return the fields of ModelConfig that say how heads are rotated."""
    given, local_theta = config.rope_parameters or config.rope_scaling or {}, config.local_rope_theta
    told = f"RoPE in {file}"
    if given.keys() & {"full_attention", "sliding_attention"}:  # as transformers 5 writes it for layers of two kinds
        local = typed(given.get("sliding_attention", {}), _Rope, told)
        given = given.get("full_attention", {})
        scaled = (local.rope_type or "default") != "default"
        refuse(source, (scaled, "scales RoPE in layers with a sliding window, which is not covered"))
        local_theta = local.rope_theta or local_theta
    rope = typed(given, _Rope, told)
    share = rope.partial_rotary_factor or config.partial_rotary_factor or 1.0
    kind = rope.rope_type or rope.type or "default"
    if family.partial and kind in ("su", "yarn"):
        kind = "longrope"  # what the first Phi-3 called it
    part, unknown = share != 1 and not family.partial, kind not in ("default", *SCALINGS)
    refuse(
        source,
        (part, "rotates only part of each head (partial_rotary_factor), which is not covered"),
        (unknown, f"scales RoPE by {kind!r:.60}, and only {', '.join(SCALINGS)} are covered"),
    )
    found = {
        "rope_theta": rope.rope_theta or config.rope_theta or 10000.0,
        "local_rope_theta": local_theta,
        "rotated": None if share == 1 else int(head_dim * share),
        "rope_scaling": None,
    }
    if kind == "default":
        return found
    needed, others = SCALINGS[kind]
    scaling = {name: value for name, value in asdict(rope).items() if name in (*needed, *others) and value is not None}
    missing = [ROPE_KEYS[name] for name in needed if name not in scaling]
    refuse(source, (missing, f"scales RoPE by {kind} and does not say {' '.join(missing)}"))
    if kind == "yarn":
        factor = rope.factor or config.context / scaling["original_context"]
        magnitude = rope.magnitude or yarn_magnitude(factor)
        if rope.magnitude is None and rope.mscale and rope.mscale_all_dim:
            magnitude = yarn_magnitude(factor, rope.mscale) / yarn_magnitude(factor, rope.mscale_all_dim)
        scaling |= {"factor": factor, "magnitude": magnitude}
    if kind == "longrope":
        original = config.original_context or rope.original_context or 4096
        factor = config.context / original
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        scaling |= {"original_context": original, "factor": factor, "magnitude": rope.magnitude or grown}
    return found | {"rope_scaling": scaling | {"kind": kind}}


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """Return the growth of sines and cosines where `factor` stretches frequencies (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
