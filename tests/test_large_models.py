"""Models of billions of weights: what a dry run says of devices that could hold them, and what loading takes.

Their files are written as shapes alone: what they would hold is a hole, which takes no place on a disk.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import chex
import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import slow
from reference.checkpoints import tensor_shapes
from test_io_gguf import NAMES, NAMES_OF

from dex_jax.cli.decode import main
from dex_jax.hardware import DEVICES, USABLE
from dex_jax.nn import cache
from dex_jax.nn.forward import extend_rows
from dex_jax.nn.transformer import build, parameter_shapes
from dex_jax.planner import SHAPES


def llama(vocabulary: int, width: int, layers: int, heads: int, groups: int, mlp: int, **more: object) -> dict:
    """A config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    } | more


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "tie_word_embeddings": True,
}
# From the config.json of each model's release.
MODELS = {
    "Llama 3 8B": llama(128256, 4096, 32, 32, 8, 14336),
    "Qwen3 8B": llama(151936, 4096, 36, 32, 8, 12288, **QWEN3),
    "Gemma 3 4B": llama(262208, 2560, 34, 8, 4, 10240, **GEMMA3),
}
# The smallest of these devices that holds one sequence of 2,048 positions beside the weights.
SMALLEST = {
    "Llama 3 8B": {"dense": "l4", "int8": "t4", "stored": "t4"},
    "Qwen3 8B": {"dense": "l4", "int8": "t4", "stored": "t4"},
    "Gemma 3 4B": {"dense": "t4", "int8": "t4", "stored": "t4"},
}
BY_MEMORY = ("t4", "v5e", "l4", "a100-40")


def directory(folder: Path, config: dict) -> Path:
    """A Hugging Face directory in bfloat16 whose numbers are a hole in its file: zeros."""
    header, end = {}, 0
    for name, shape in tensor_shapes(config).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def q4_k_file(path: Path, config: dict) -> Path:
    """A GGUF file in Q4_K whose blocks are a hole in it."""
    family = config["model_type"].removesuffix("_text")
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if "sliding_window" in config:
        writer.add_sliding_window(config["sliding_window"])
    names = NAMES | NAMES_OF.get(family.rstrip("3"), {})
    end = 0
    for name, shape in tensor_shapes(config).items():
        stem, _, suffix = name.rpartition(".")
        for theirs, ours in names.items():
            stem = stem.replace(theirs, ours)
        format = gguf.GGMLQuantizationType.Q4_K if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        columns, block = gguf.GGML_QUANT_SIZES[format]
        size = math.prod(shape) // columns * block
        stored = shape if len(shape) == 1 else (shape[0], size // shape[0])
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.uint8)
        writer.add_tensor_info(f"{stem.replace('model.layers', 'blk')}.{suffix}", stored, dtype, size, format)
        end += size + -size % 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        file.truncate(file.tell() + -file.tell() % 32 + end)
    return path


@pytest.mark.parametrize("name", ["Gemma 3 4B", slow("Llama 3 8B"), slow("Qwen3 8B")])
def test_a_dry_run_says_what_holds_them(name, tmp_path, capsys) -> None:
    config = MODELS[name]
    dense = directory(tmp_path / "model", config)
    files = {"dense": dense, "int8": dense, "stored": q4_k_file(tmp_path / "model.gguf", config)}
    numbers = sum(map(math.prod, tensor_shapes(config).values()))
    per_weight = {"dense": (2.0, 2.0), "int8": (1.0, 1.005), "stored": (0.5625, 0.57), "in planes": (0.75, 0.76)}
    beside: dict[str, int] = {}
    for kind, file in files.items():
        fits = []
        for device in BY_MEMORY:
            flags = ["--method", "ar", "--max-new-tokens", "2000", "--weights", kind]
            assert main(["--model", str(file), "--dry-run", "--json", "--hardware", device, *flags]) == 0
            said = json.loads(capsys.readouterr().out)
            least, most = per_weight["in planes" if (kind, device) == ("stored", "v5e") else kind]
            assert least * numbers <= said["weights_bytes"] <= most * numbers
            rest = said["total_bytes"] - said["weights_bytes"]
            assert beside.setdefault(device, rest) == rest, "only the weights differ"
            fits.append(said["verdict"].startswith("fits"))
            assert fits[-1] == (said["total_bytes"] < USABLE * DEVICES[device].memory)
        assert BY_MEMORY[fits.index(True)] == SMALLEST[name][kind]


LOADING = """
import sys, threading, time
import jax, dex_jax

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

dex_jax.load(sys.argv[2], weights="int8")  # imports, and what is built once
before, most = held(), [0]

def watch():
    while True:
        most[0] = max(most[0], held())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
lm = dex_jax.load(sys.argv[1], weights="int8")
print(most[0] - before, sum(leaf.nbytes for leaf in jax.tree.leaves(lm.weights)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of a process")
def test_loading_into_8_bits_holds_little_more_than_these(tmp_path) -> None:
    """3 GB in bfloat16 become 1.5 GB, tensor by tensor."""
    config = llama(32000, 2048, 23, 16, 4, 8192)
    assert 2.9e9 < 2 * sum(map(math.prod, tensor_shapes(config).values())) < 3.2e9
    large = directory(tmp_path / "large", config)
    small = directory(tmp_path / "small", config | {"num_hidden_layers": 1, "vocab_size": 100})
    run = subprocess.run(
        [sys.executable, "-c", LOADING, str(large), str(small)], env=os.environ, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    most, packed = map(int, run.stdout.split())
    assert packed == pytest.approx(1.5e9, rel=0.05)
    assert most < 1.2 * packed


@pytest.mark.slow
def test_a_layer_of_8b_in_float16_holds_activations_as_large_as_real_ones() -> None:
    """A few channels of the residual stream grow to tens of thousands: SmolLM2's to 24,912 (tests/test_golden.py)."""
    config = dataclasses.replace(SHAPES["llama-3-8b"], num_layers=1, vocab_size=64)
    tile = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float16)

    def read(name: str) -> np.ndarray:
        shape = parameter_shapes(config)[name]
        if len(shape) == 1:
            return np.ones(shape, np.float16)
        return np.tile(tile, (-(-shape[0] // 512), shape[1] // 512))[: shape[0]] * np.float16(shape[1] ** -0.5)

    rows = np.random.default_rng(1).standard_normal((1, 4, config.width)).astype(np.float16)
    rows[..., [17, 1000, 3210]] = [24_912, -30_000, 9_000]
    found = {}
    for dtype in (jnp.float16, jnp.float32):
        model = build(config, read, dtype)
        memory = cache.allocate(config, 1, 16, 0, dtype)
        states, memory = extend_rows(model, memory, jnp.asarray(rows, dtype), jnp.zeros(1, jnp.int32))
        found[str(jnp.dtype(dtype))] = np.asarray(states[0], np.float32)
    half, wide = found["float16"], found["float32"]
    assert np.isfinite(half).all()
    # Numbers as large as these are 16 apart in float16.
    chex.assert_trees_all_close(half, wide, atol=0.05, rtol=2**-10)
