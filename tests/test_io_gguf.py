"""GGUF files: written here with the gguf package, equal to the same model as a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import pytest
from reference.checkpoints import FAMILIES, checkpoint_tensors, write_checkpoint
from reference.refusals import refusal

from dex_jax.config import RopeScaling
from dex_jax.io.opening import open_checkpoint

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
# These are the names of norms after attention and MLP, and of fused projections.
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
NAMES_OF = {
    "gemma": AFTER | {"pre_feedforward_layernorm": "ffn_norm"},
    "olmo": AFTER,
    "phi3": {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"},
}
_SCALE = "rope__scaling__"
_LINEAR = {f"{_SCALE}type": "linear"}
_YARN = {f"{_SCALE}type": "yarn", f"{_SCALE}factor": 4.0, f"{_SCALE}original_context_length": 16}
_YARN |= {f"{_SCALE}yarn_beta_fast": 4.0}
_LONGROPE = {"rope__dimension_count": 12, f"{_SCALE}original_context_length": 44}
_LONGROPE |= {f"{_SCALE}attn_factor": math.sqrt(1 + math.log(256 / 44) / math.log(44))}
_LOCAL = {"attention__sliding_window_pattern": [True, True, False, True, True, False, True]}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5}
_MULTIPLIERS = {"embedding_scale": 3.0, "residual_scale": 0.6, "attention__scale": 0.2, "logit_scale": 0.7}
# The architecture of reference families, and the fields that llama.cpp's converter writes only for them.
GGUF_FIELDS = {
    "codellama": ("llama", _LINEAR | {f"{_SCALE}factor": 2.0}),
    "mistral": ("llama", {}),
    "ministral3": ("mistral3", _YARN | {f"{_SCALE}yarn_log_multiplier": 1.0, "attention__temperature_scale": 0.4}),
    "gemma2": ("gemma2", _CAPS | {"attention__sliding_window": 8}),
    "gemma3": ("gemma3", _LOCAL | _LINEAR | {"attention__sliding_window": 6, f"{_SCALE}factor": 8.0}),
    "smollm3": ("smollm3", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo2", _YARN | {"attention__sliding_window": 8}),
    "granite": ("granite", _MULTIPLIERS),
    "phi3": ("phi3", {"attention__sliding_window": 11}),
    "phi4": ("phi3", _LONGROPE | {"attention__sliding_window": 0}),
}
INTERLEAVED = ("llama", "mistral3", "smollm3", "granite")
# Such a file lacks these settings, or has others than the reference's configuration.
UNSAID: dict[str, dict] = {name: {"attention_scale": 16**-0.5} for name in ("gemma2", "gemma3")}
UNSAID["mistral"] = {"layer_kinds": (), "family": "llama"}


def interleave(rows, heads):
    """Permute q or k as llama.cpp's converter does for architecture llama, one row at a time."""
    width = len(rows) // heads
    places = itertools.product(range(heads), range(width // 2), range(2))
    return rows[[head * width + half * width // 2 + i for head, i, half in places]]


def write_gguf(path, family, kind="F32", extra=(), drop=(), kinds=None, **fields):
    """Write a reference family as a GGUF file, with matrices stored as `kind`, or as `kinds` has it for their part."""
    config, tensors = FAMILIES[family], checkpoint_tensors(family)
    architecture, told = GGUF_FIELDS.get(family, (config["model_type"], {}))
    architecture = fields.pop("architecture", architecture)
    fields = {f"ARCH__{key}": value for key, value in told.items()} | fields
    names = next((own for start, own in NAMES_OF.items() if config["model_type"].startswith(start)), {})
    names = NAMES | names
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if kv_heads != heads:
        writer.add_head_count_kv(kv_heads)
    theta = config.get("rope_theta", config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    writer.add_rope_freq_base(theta)
    if "longrope" in str(config.get("rope_scaling")):
        for length in ("long", "short"):
            factors = np.array(config["rope_scaling"][f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if head_dim != config["hidden_size"] // heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    for key, value in fields.items():
        key = key.replace("__", ".").replace("ARCH", architecture)
        {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[
            type(value)
        ](key, value)
    for name, array in tensors.items():
        if "rotary" in name or name in drop:
            continue
        if "gemma" in architecture and "norm" in name:
            array = array + np.float32(1)
        if architecture in INTERLEAVED and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, heads if "q_proj" in name else kv_heads)
        stem, _, suffix = name.rpartition(".")
        for theirs, ours in names.items():
            stem = stem.replace(theirs, ours)
        own = (kinds or {}).get(stem.split(".")[-1], kind)
        quantised = gguf.GGMLQuantizationType[own] if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(array, quantised)
        writer.add_tensor(f"{stem.replace('model.layers', 'blk')}.{suffix}", data, raw_dtype=quantised)
    for name, array in dict(extra).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "family", ["llama2", "smollm2", "qwen25_untied", "qwen3", "llama_attention_bias", *GGUF_FIELDS]
)
def test_a_gguf_file_equals_the_directory_it_was_made_from(tmp_path, family):
    ours = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", family)))
    theirs = open_checkpoint(str(write_checkpoint(tmp_path / "directory", family)))
    assert ours.shapes() == theirs.shapes()
    for name in ours.shapes():
        # The converter adds 1 to Gemma's norms, which rounds.
        atol = 1e-7 if "norm" in name and ours.config.norm_offset else 0
        np.testing.assert_allclose(ours.read(name), theirs.read(name), rtol=0, atol=atol, err_msg=name)
    # A GGUF file names one EOS id, generation_config.json may name more. llama.cpp leaves some settings out.
    expected = dataclasses.replace(theirs.config, eos_ids=(2,), bos_id=1, **UNSAID.get(family, {}))
    if expected.rope_scaling is not None:
        # llama.cpp computes the magnitude of YaRN; the reference's configuration has another one.
        magnitude = 0.1 * math.log(4) + 1 if family == "olmo3" else expected.rope_scaling.magnitude
        assert ours.config.rope_scaling.magnitude == pytest.approx(magnitude)
        scaling = dataclasses.replace(expected.rope_scaling, magnitude=ours.config.rope_scaling.magnitude)
        expected = dataclasses.replace(expected, rope_scaling=scaling)
    assert expected == ours.config
    if expected == theirs.config:
        assert ours.fingerprint() == theirs.fingerprint()
    assert ours.tokenizer is None


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_stored_types(tmp_path, kind):
    checkpoint = open_checkpoint(str(write_gguf(tmp_path / "model.gguf", "llama3", kind)))
    raw = checkpoint_tensors("llama3")
    quantised = gguf.GGMLQuantizationType[kind]
    expected_type = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind, np.float32)

    def stored(name):
        data = gguf.quants.quantize(raw[f"model.layers.1.{name}.weight"], quantised)
        return gguf.quants.dequantize(data, quantised)

    for name, parts in {
        "layers.1.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "layers.1.down": ["mlp.down_proj"],
    }.items():
        got = checkpoint.read(name)
        assert got.dtype == expected_type
        np.testing.assert_array_equal(got.astype(np.float32), np.concatenate([stored(part) for part in parts]))
    assert checkpoint.read("layers.1.mlp_norm").dtype == np.float32


def test_large_tensors_are_read_in_pieces_and_within_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("dex_jax.io.gguf_file._CHUNK_ELEMENTS", 7 * 96)
    path = write_gguf(tmp_path / "model.gguf", "llama3", "Q8_0")
    checkpoint = open_checkpoint(str(path))
    checkpoint.read("final_norm")
    total = sum(int(np.prod(shape)) * 4 for shape in checkpoint.shapes().values())
    tracemalloc.start()
    kept = {name: checkpoint.read(name) for name in checkpoint.shapes()}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.3 * total
    monkeypatch.undo()
    whole = open_checkpoint(str(path))
    for name, array in kept.items():
        np.testing.assert_array_equal(array, whole.read(name))


def llama3_factors(factor, head_dim, theta):
    """Return rope_freqs as llama.cpp's converter computes them, frequency by frequency."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_scaling_is_found_from_its_factors_and_others_are_refused(tmp_path):
    for factor in (8.0, 32.0):
        factors = llama3_factors(factor, 16, 500000.0)
        assert len(set(factors.tolist())) > 2
        path = write_gguf(tmp_path / "model.gguf", "llama3", extra={"rope_freqs.weight": factors})
        assert open_checkpoint(str(path)).config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    factors[3] = 2.0
    path = write_gguf(tmp_path / "model.gguf", "llama3", extra={"rope_freqs.weight": factors})
    assert "RoPE factors" in refusal(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "gemma3n"}, ["'gemma3n'", "llama, qwen2, qwen3"]),
        ({"ARCH__rope__scaling__type": "yarn"}, ["yarn", "original_max_position_embeddings"]),
        ({"ARCH__expert_count": 8}, ["mixture of experts"]),
        ({"ARCH__rope__dimension_count": 4}, ["only part of each head"]),
        ({"ARCH__attention__key_length": 16}, []),
        ({"ARCH__attention__value_length": 16}, ["values"]),
        ({"split__count": 2}, ["one of 2 parts"]),
        ({"ARCH__attention__head_count_kv": [3, 3, 3, 3, 3, 3, 9], "family": "llama2"}, ["layer to layer"]),
        ({"drop": ["model.layers.3.mlp.up_proj.weight"]}, ["blk.3.ffn_up.weight"]),
        ({"drop": ["model.embed_tokens.weight"]}, ["token_embd.weight"]),
        ({"extra": {"blk.0.ffn_up.bias": np.zeros(192, np.float32)}}, ["blk.0.ffn_up.bias"]),
    ],
)
def test_uncovered_files_are_refused(tmp_path, options, words):
    options = dict(options)
    path = write_gguf(tmp_path / "model.gguf", options.pop("family", "smollm2"), **options)
    sentence = refusal(path)
    assert all(word in sentence for word in words), sentence


def test_damaged_files_are_refused(tmp_path):
    whole = write_gguf(tmp_path / "model.gguf", "smollm2").read_bytes()
    path = tmp_path / "cut.gguf"
    kind = whole.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    for content, words in (
        (whole[:-40], "truncated: tensor output_norm.weight"),
        (b"PK\3\4" + whole[4:], "not a GGUF file"),
        (b"", "not a GGUF file"),
        (whole[:4] + (1).to_bytes(4, "little") + whole[8:], "version 1"),
        (whole[:4] + (3).to_bytes(4, "big") + whole[8:], "byte order"),
        (whole[:kind] + (250).to_bytes(4, "little") + whole[kind + 4 :], "250 is not a valid"),
    ):
        path.write_bytes(content)
        assert words in refusal(path)
    assert "no file" in refusal(tmp_path / "absent.gguf")
