"""Models of billions of weights: the memory that loading takes, and activations that float16 holds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from reference.checkpoints import tensor_shapes

from dex_jax.nn import cache
from dex_jax.nn.forward import extend_rows
from dex_jax.nn.transformer import build, parameter_shapes
from dex_jax.planner import SHAPES

# This model has 1.5 billion weights.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 8192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


def directory(folder: Path, config: dict) -> Path:
    """Write a Hugging Face directory in bfloat16; all weights are zero, as they are a hole in the file."""
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


def test_the_file_of_the_large_one_has_the_bytes_that_its_header_says(tmp_path) -> None:
    file = directory(tmp_path / "large", CONFIG) / "model.safetensors"
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    begun = file.stat().st_size - max(about["data_offsets"][1] for about in header.values())
    assert begun == 8 + len(json.dumps(header).encode())
    assert 2.9e9 < file.stat().st_size < 3.2e9


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory of a process")
def test_loading_into_8_bits_holds_little_more_than_these(tmp_path) -> None:
    """3 GB in bfloat16 become 1.5 GB, tensor by tensor."""
    large = directory(tmp_path / "large", CONFIG)
    small = directory(tmp_path / "small", CONFIG | {"num_hidden_layers": 1, "vocab_size": 100})
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
