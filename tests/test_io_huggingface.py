"""Hugging Face directories: configuration, shards, canonical tensors, and what is refused."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from reference.checkpoints import checkpoint_tensors, write_checkpoint
from reference.refusals import refusal
from safetensors.numpy import load_file, save_file

from dex_jax.io.opening import open_checkpoint


def edit_json(path, **changes):
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen25_untied", (10000.0, 1e-6, 32768, False, (2, 34), None)),
        ("ministral", (10000.0, 1e-6, 131072, False, (2,), 1)),
        ("olmo3", (500000.0, 1e-5, 2048, False, (50279,), None)),
    ],
)
def test_left_out_keys_mean_the_familys_defaults(tmp_path, family, expected):
    write_checkpoint(tmp_path, family)
    keys = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "hidden_act")
    edit_json(tmp_path / "config.json", **dict.fromkeys((*keys, "eos_token_id", "bos_token_id")))
    config = open_checkpoint(str(tmp_path)).config
    assert (config.rope_theta, config.norm_eps, config.context, config.tied, config.eos_ids, config.bos_id) == expected


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_narrow_floats_stay_as_stored(tmp_path, dtype, expected):
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path, "qwen3", 2, dtype)))
    for name in ("embed", "layers.0.qkv", "layers.1.q_norm"):
        assert checkpoint.read(name).dtype == expected
    raw = checkpoint_tensors("qwen3")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(checkpoint.read("embed"), raw.astype(expected))


def test_parts_of_different_types_meet_in_float32(tmp_path):
    path = write_checkpoint(tmp_path, "smollm2") / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.v_proj.weight"
    save_file(tensors | {name: tensors[name].astype(np.float16)}, path)
    qkv = open_checkpoint(str(tmp_path)).read("layers.0.qkv")
    assert qkv.dtype == np.float32
    np.testing.assert_array_equal(qkv[-24:], tensors[name].astype(np.float16).astype(np.float32))


def test_a_head_beside_tied_embeddings_is_ignored(tmp_path):
    path = write_checkpoint(tmp_path, "smollm2") / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    assert "unembed" not in open_checkpoint(str(tmp_path)).shapes()


def test_fingerprint_knows_the_weights_and_not_the_files(tmp_path):
    one = open_checkpoint(str(write_checkpoint(tmp_path / "one", "smollm2", 1, "bfloat16")))
    many = open_checkpoint(str(write_checkpoint(tmp_path / "many", "smollm2", 3, "bfloat16")))
    edit_json(tmp_path / "many" / "config.json", max_position_embeddings=999, eos_token_id=[2, 3])
    wide = load_file(tmp_path / "one" / "model.safetensors")
    assert one.fingerprint() == many.fingerprint() == open_checkpoint(str(tmp_path / "many")).fingerprint()
    assert len(one.fingerprint()) == 16
    for name in ("model.layers.3.self_attn.v_proj.weight", "model.layers.6.mlp.down_proj.weight", "model.norm.weight"):
        changed = wide | {name: wide[name] * 2}
        save_file(changed, tmp_path / "one" / "model.safetensors")
        assert open_checkpoint(str(tmp_path / "one")).fingerprint() != many.fingerprint()
    edit_json(tmp_path / "many" / "config.json", rope_theta=5.0)
    assert open_checkpoint(str(tmp_path / "many")).fingerprint() != one.fingerprint()


ROPES = [
    ({"type": "dynamic", "factor": 4.0}, ["'dynamic'", "yarn"]),
    ({"type": "yarn", "factor": 4.0}, ["original_max_position_embeddings"]),
    ({"rope_type": "longrope"}, ["short_factor"]),
    ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, ["1 RoPE factors"]),
    ({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}, ["sliding window"]),
    ({"rope_type": "llama3", "factor": 4.0}, ["low_freq_factor", "llama3"]),
]
UNCOVERED = [
    *(({"rope_scaling": rope}, words) for rope, words in ROPES),
    ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 8}}, ["YaRN"]),
    ({"model_type": "mixtral"}, ["'mixtral'", "llama, qwen2, qwen3"]),
    ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", "causal"]),
    ({"mlp_bias": True}, ["mlp_bias"]),
    ({"hidden_act": "gelu"}, ["'gelu'", "silu"]),
    ({"layer_types": ["linear_attention", "full_attention"]}, ["linear_attention"]),
    ({"partial_rotary_factor": float("inf"), "model_type": "phi3"}, ["partial_rotary_factor"]),
    ({"use_bidirectional_attention": True, "model_type": "gemma3_text"}, ["causal"]),
    ({"model_type": "granitemoehybrid", "shared_intermediate_size": 8}, ["mixture of experts"]),
    ({"model_type": "gemma3"}, ["text_config"]),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ({"hidden_size": None}, ["hidden_size", "config.json"]),
    ({"num_key_value_heads": 2}, ["9 heads", "2 key-value heads"]),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["GPTQ", "unquantised"]),
]


@pytest.mark.parametrize(("changes", "words"), UNCOVERED)
def test_uncovered_configurations_are_refused(tmp_path, changes, words):
    write_checkpoint(tmp_path, "smollm2")
    edit_json(tmp_path / "config.json", **changes)
    sentence = refusal(tmp_path)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("changes", "slides"),
    [
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}, [3, 4, 5]),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 6}, range(6)),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 6}, []),
        ({"use_sliding_window": True, "sliding_window": 256, "max_window_layers": 3}, []),
        ({"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 3}, []),
        ({"use_sliding_window": True, "sliding_window": 64, "layer_types": ["full_attention"] * 6}, []),
    ],
)
def test_windows_are_where_the_configuration_means_them(tmp_path, changes, slides):
    write_checkpoint(tmp_path, "qwen2")
    edit_json(tmp_path / "config.json", **changes)
    kinds = open_checkpoint(str(tmp_path)).config.kinds
    assert {layer: kind.window for layer, kind in enumerate(kinds) if kind.window} == dict.fromkeys(slides, 64)


def test_the_text_of_a_model_of_images_and_text(tmp_path):
    """Its configuration is one of two, and its tensors have longer names, beside those of the vision tower."""
    plain = open_checkpoint(str(write_checkpoint(tmp_path / "plain", "gemma3")))
    folder = write_checkpoint(tmp_path / "both", "gemma3")
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 9]}
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": text, "vision_config": {}}))
    tensors, sight = load_file(folder / "model.safetensors"), {"vision_tower.patch.weight": np.ones((2, 2), np.float32)}
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
        save_file(renamed | sight, folder / "model.safetensors")
        both = open_checkpoint(str(folder))
        assert both.config == plain.config
        assert both.fingerprint() == plain.fingerprint()


def test_directories_of_other_kinds_are_refused(tmp_path):
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA adapter" in refusal(tmp_path)
    (write_checkpoint(tmp_path, "smollm2") / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(tmp_path)


def test_missing_misshapen_mistyped_and_unused_tensors_are_named(tmp_path):
    (write_checkpoint(tmp_path, "llama3", 3) / "model-00003-of-00003.safetensors").unlink()
    assert "lacks the tensor model.norm.weight" in refusal(tmp_path)
    path = write_checkpoint(tmp_path, "smollm2") / "model.safetensors"
    tensors, name = load_file(path), "model.layers.2.mlp.down_proj.weight"
    for changed, words in (
        ({name: tensors[name][:, :-1].copy()}, [str(path), f"{name} in the shape [72, 191]", "[72, 192]"]),
        ({name: tensors[name].astype(np.int8)}, [f"{name} as I8"]),
        ({"model.layers.2.mlp.down_proj.bias": tensors["model.norm.weight"]}, ["model.layers.2.mlp.down_proj.bias"]),
    ):
        save_file(tensors | changed, path)
        sentence = refusal(tmp_path)
        assert all(word in sentence for word in words), sentence
    path.write_bytes(path.read_bytes()[:-40])
    assert str(path) in refusal(tmp_path)
