"""Small random checkpoints in Hugging Face's format, one of every supported family, written with NumPy alone.

Each holds config.json and one or many safetensors files, bit for bit the same on every machine, so that this project's
loader and transformers read the same file. Neither torch nor jax is needed.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32"}
_QWEN2 = _LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
_QWEN3 = _LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}


def _of(model_type: str, name: str, **more: object) -> dict:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type, "torch_dtype": "float32"} | more


_GELU = {"hidden_activation": "gelu_pytorch_tanh"}
_SIZES = {"max_position_embeddings": 256, "initializer_range": 0.02, "rms_norm_eps": 1e-5, "bos_token_id": 1}
# The published models stretch 8192 positions; 32 makes the same rule act on prompts of a few dozen tokens.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def _config(
    base: dict, vocab: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int | None, **more: object
) -> dict:
    """Return the content of a config.json; without `kv_heads` the key is left out, as in the oldest Llama files."""
    shape = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    if kv_heads is not None:
        shape["num_key_value_heads"] = kv_heads
    return base | _SIZES | shape | more


FAMILIES: dict[str, dict] = {
    "llama2": _config(_LLAMA, 101, 64, 160, 4, 4, None, eos_token_id=2, tie_word_embeddings=False),
    # A list of EOS ids, as Llama 3.1 has.
    "llama3": _config(
        _LLAMA, 211, 96, 192, 6, 6, 2,
        eos_token_id=[7, 150, 203], tie_word_embeddings=False, rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE,
    ),
    # transformers 5 writes one `rope_parameters` where older files have `rope_theta` and `rope_scaling`.
    "llama32_rope_parameters": _config(
        _LLAMA, 160, 64, 128, 5, 4, 2,
        eos_token_id=3, tie_word_embeddings=True, head_dim=16, rope_parameters=_LLAMA3_ROPE | {"rope_theta": 500000.0},
    ),
    # `type` is the older name of `rope_type`.
    "codellama": _config(
        _LLAMA, 112, 64, 176, 5, 4, 4,
        eos_token_id=2, tie_word_embeddings=False, rope_theta=1000000.0, rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "smollm2": _config(_LLAMA, 500, 72, 192, 7, 9, 3, eos_token_id=2, tie_word_embeddings=True, rope_theta=100000.0),
    "qwen2": _config(_QWEN2, 151, 56, 128, 6, 7, 1, eos_token_id=2, tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen25_untied": _config(
        _QWEN2, 136, 64, 144, 4, 4, 2, eos_token_id=2, tie_word_embeddings=False, rope_theta=1000000.0
    ),
    # Queries are 4 x 24 = 96 wide, the model 48.
    "qwen3": _config(
        _QWEN3, 139, 48, 96, 5, 4, 2,
        eos_token_id=2, tie_word_embeddings=True, head_dim=24, attention_bias=False, rope_theta=1000000.0,
    ),
    # Its epsilon is so large that a wrong one would show.
    "llama_attention_bias": _config(
        _LLAMA, 120, 48, 128, 4, 4, 2, rms_norm_eps=0.02,
        eos_token_id=2, tie_word_embeddings=False, attention_bias=True, mlp_bias=False, rope_theta=10000.0,
    ),
    # Windows are shorter than the prompts, here and below; the caps are low enough to show.
    "qwen2_sliding": _config(
        _QWEN2, 131, 48, 96, 4, 4, 2, eos_token_id=2, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=9, max_window_layers=2,
    ),
    "mistral": _config(
        _of("mistral", "Mistral"), 127, 48, 112, 3, 4, 2, eos_token_id=2, tie_word_embeddings=False, sliding_window=8,
    ),
    "ministral": _config(
        _of("ministral", "Ministral"), 113, 48, 96, 3, 4, 2, eos_token_id=2, tie_word_embeddings=False, head_dim=16,
        sliding_window=7, layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "ministral3": _config(
        _of("ministral3", "Ministral3"), 119, 48, 96, 4, 4, 2, eos_token_id=2, tie_word_embeddings=False, head_dim=16,
        rope_parameters=_YARN | {
            "rope_theta": 1e6, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4,
        },
    ),
    "gemma2": _config(
        _of("gemma2", "Gemma2", **_GELU), 143, 48, 96, 4, 4, 2, eos_token_id=1, tie_word_embeddings=True, head_dim=16,
        query_pre_attn_scalar=24, sliding_window=8, attn_logit_softcapping=2.0, final_logit_softcapping=0.5,
    ),
    "gemma3": _config(
        _of("gemma3_text", "Gemma3", **_GELU), 157, 48, 96, 7, 4, 1, eos_token_id=[1, 9], tie_word_embeddings=True,
        head_dim=16, query_pre_attn_scalar=32, sliding_window=6, sliding_window_pattern=3, rope_theta=1e6,
        rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "gemma3_rope_parameters": _config(
        _of("gemma3_text", "Gemma3", **_GELU), 109, 48, 80, 3, 4, 2, eos_token_id=1, tie_word_embeddings=True,
        head_dim=16, sliding_window=10, layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    ),
    "smollm3": _config(
        _of("smollm3", "SmolLM3"), 133, 48, 96, 5, 4, 2, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
        no_rope_layers=[1, 1, 1, 0, 1], rope_theta=5e6,
    ),
    "olmo2": _config(_of("olmo2", "Olmo2"), 141, 48, 96, 4, 4, 2, eos_token_id=2, tie_word_embeddings=False),
    "olmo3": _config(
        _of("olmo3", "Olmo3"), 142, 48, 96, 4, 4, None, eos_token_id=2, tie_word_embeddings=False, rope_theta=5e5,
        sliding_window=8, rope_scaling=_YARN | {"attention_factor": 1.2},
    ),
    "granite": _config(
        _of("granite", "Granite"), 121, 48, 96, 4, 4, 2, eos_token_id=2, tie_word_embeddings=True,
        embedding_multiplier=3.0, residual_multiplier=0.6, attention_multiplier=0.2, logits_scaling=0.7,
    ),
    "granite4": _config(
        _of("granitemoehybrid", "GraniteMoeHybrid"), 123, 48, 96, 3, 4, 2, eos_token_id=2, tie_word_embeddings=True,
        embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=0.5,
        num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=80, layer_types=["attention"] * 3,
        position_embedding_type="nope", mamba_n_heads=6, mamba_d_head=16,
    ),
    "phi3": _config(
        _of("phi3", "Phi3"), 126, 48, 96, 3, 4, 4, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
        sliding_window=11,
    ),
    # Prompts and their new tokens stay within the first 44 positions, or begin beyond them.
    "phi4": _config(
        _of("phi3", "Phi3"), 128, 64, 96, 4, 4, 2, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
        partial_rotary_factor=0.75, original_max_position_embeddings=44,
        rope_scaling={
            "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 2.0],
            "long_factor": [1.0, 1.5, 2.5, 4.0, 6.0, 9.0],
        },
    ),
}  # fmt: skip

# The prompts of some families have other lengths than the usual ones.
LENGTHS: dict[str, tuple[int, ...]] = {"phi4": (3, 9, 20, 50)}

# Some families have a generation_config.json: transformers' generate stops at these ids as well.
GENERATION_CONFIGS: dict[str, dict] = {"qwen25_untied": {"eos_token_id": [2, 34], "bos_token_id": 1}}


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of a checkpoint, in the order of the published files."""
    width, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", width // heads)
    queries, keys = heads * head_dim, config.get("num_key_value_heads", heads) * head_dim
    kind, bias = config["model_type"], config.get("attention_bias", False)
    olmo, gemma = kind.startswith("olmo"), kind.startswith("gemma")
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        if not olmo:
            shapes[layer + "input_layernorm.weight"] = (width,)
        if kind == "phi3":
            shapes[layer + "self_attn.qkv_proj.weight"] = (queries + 2 * keys, width)
        for name, rows in () if kind == "phi3" else (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
            if bias or kind == "qwen2":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (width, queries)
        if bias:
            shapes[layer + "self_attn.o_proj.bias"] = (width,)
        if kind in ("qwen3", "gemma3_text"):
            shapes[layer + "self_attn.q_norm.weight"] = shapes[layer + "self_attn.k_norm.weight"] = (head_dim,)
        if olmo:
            shapes[layer + "self_attn.q_norm.weight"] = (queries,)
            shapes[layer + "self_attn.k_norm.weight"] = (keys,)
        norms = {"post_attention": True, "pre_feedforward": gemma, "post_feedforward": gemma or olmo}
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name, there in norms.items() if there}
        if kind == "phi3":
            shapes[layer + "mlp.gate_up_proj.weight"] = (2 * mlp, width)
        elif kind == "granitemoehybrid":
            mlp = config["shared_intermediate_size"]
            shapes[layer + "shared_mlp.input_linear.weight"] = (2 * mlp, width)
            shapes[layer + "shared_mlp.output_linear.weight"] = (width, mlp)
            continue
        else:
            shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        shapes[layer + "mlp.down_proj.weight"] = (width, mlp)
    shapes["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], width)
    return shapes


def checkpoint_tensors(family: str) -> dict[str, np.ndarray]:
    """Return every float32 tensor of a family's checkpoint by its published name."""
    config = FAMILIES[family]
    tensors = {name: random_tensor(family, name, shape) for name, shape in tensor_shapes(config).items()}
    if family == "llama2":
        # The published Llama 2 files hold these constants beside the weights; a loader has to pass them over.
        exponents = np.arange(0, 16, 2, dtype=np.float32) / np.float32(16)
        for i in range(config["num_hidden_layers"]):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.float32(10000.0) ** -exponents
    return tensors


def random_tensor(family: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 values of one tensor, which depend only on the family, the name and the shape."""
    seed = zlib.crc32(f"{family}/{name}".encode())
    # Raw bits: NumPy promises the same ones in every release, which it does not for normal().
    bits = np.random.PCG64(seed).random_raw(int(np.prod(shape)))
    uniform = ((bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)).reshape(shape)
    unit = uniform * np.float32(3.0**0.5)
    if "norm" in name:
        # Gemma stores its norms' scales less one.
        one = 0.0 if FAMILIES[family]["model_type"].startswith("gemma") else 1.0
        return np.float32(one) + np.float32(0.2) * unit
    if name.endswith(".bias"):
        return np.float32(0.3) * unit
    if "embed_tokens" in name or "lm_head" in name:
        # Layers must outweigh the embedding they add to, or a tied model repeats its last token for ever.
        tied, kind = FAMILIES[family]["tie_word_embeddings"], FAMILIES[family]["model_type"]
        scaled = 0.1 if kind.startswith("granite") else 0.05  # for families that multiply the embedding
        return np.float32(scaled if kind.startswith(("gemma", "granite")) else 0.35 if tied else 0.5) * unit
    # Queries and keys are larger: attention then picks single positions, and an error in RoPE shows.
    gain = 1.6 if ("q_proj" in name or "k_proj" in name or "qkv_proj" in name) else 1.3
    return np.float32(gain / shape[-1] ** 0.5) * unit


def write_checkpoint(directory: str | Path, family: str, shards: int = 1, dtype: str = "float32") -> Path:
    """Write one family's checkpoint, with an index if it is in several shards, and return its directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = FAMILIES[family]
    _write_json(directory / "config.json", config | {"torch_dtype": dtype})
    if family in GENERATION_CONFIGS:
        _write_json(directory / "generation_config.json", GENERATION_CONFIGS[family])
    tensors = checkpoint_tensors(family)
    if shards == 1:
        _write_safetensors(directory / "model.safetensors", tensors, dtype)
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        _write_safetensors(directory / file, {name: tensors[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.size for array in tensors.values()) * (4 if dtype == "float32" else 2)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    return directory


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write a safetensors file: the header's length, the header in JSON, then the values one after another.

    The safetensors package has no bfloat16 for NumPy; here rounding is to nearest even.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, array in tensors.items():
        if dtype == "bfloat16":
            bits = array.view(np.uint32)
            data = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        else:
            data = array.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        blobs.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
