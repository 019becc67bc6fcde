"""Files that others wrote, wrong in every way: each is read, or refused soon in one sentence that names it."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.checkpoints import write_checkpoint
from reference.small_models import LLAMA
from test_io_gguf import write_gguf
from test_io_tokenizer import CHATML, gguf_metadata, write_tokenizer

from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading
from dex_jax.io import open_checkpoint
from dex_jax.io.exits_file import load_exits
from dex_jax.io.gguf_tokenizer import gguf_tokenizer
from dex_jax.io.save import save_model
from dex_jax.prompt_files import read_prompts

SECONDS = 8.0
DEEP = 200_000
NASTY = [
    None, True, "", "x", "9", "\ud800", "a\nb\x1b[31m", 0, 1, -1, 1.5, float("nan"), float("inf"), 2**31, 2**63,
    10**30, 10**9,
    [], [0], ["x"], [[1]], {}, {"a": 1}, "../../x", "~nouser",
]  # fmt: skip


def use_model(path: Path) -> None:
    """Reads all of a checkpoint and says something with its tokenizer."""
    checkpoint = open_checkpoint(str(path))
    for name in checkpoint.shapes():
        checkpoint.read(name)
    checkpoint.fingerprint()
    if (tokenizer := checkpoint.tokenizer) is not None:
        _ = tokenizer.eos_ids
        tokenizer.decode(tokenizer.encode("a 12 <s> é"))
        if tokenizer.has_chat_template:
            tokenizer.chat([{"role": "user", "content": "a"}])


def check(use: Any, path: Path) -> str:
    """What is said of a file, empty for nothing; anything but one sentence fails, and so does taking long."""
    began, said = time.monotonic(), ""
    try:
        use(path)
    except DexError as error:
        said = str(error)
        assert str(path) in said, said
        assert said.isprintable(), said
        assert len(said) < 1500, said
    assert time.monotonic() - began < SECONDS
    return said


def refused(use: Any, path: Path) -> str:
    said = check(use, path)
    assert said, "it was accepted"
    return said


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A whole model as a directory, with shards, an index, a tokenizer and a chat template."""
    folder = write_tokenizer(tmp_path_factory.mktemp("model"), CHATML, bos_token={"content": "<s>"}, eos_token="<s>")
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return write_checkpoint(folder, "smollm2", 3)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    """A whole model as one file."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    fields = {key.replace(".", "__"): value for key, value in gguf_metadata().items() if "token_id" not in key}
    return write_gguf(path, "smollm2", tokenizer__chat_template=CHATML, **fields)


@contextlib.contextmanager
def changed(path: Path, content: bytes | str):
    """A file with other content, for a while."""
    kept = path.read_bytes()
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    try:
        yield
    finally:
        path.write_bytes(kept)


def edited(text: str, place: tuple, value: Any) -> str:
    """JSON with one value replaced."""
    content = inner = json.loads(text)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(content)


def places(content: Any, place: tuple = ()) -> list[tuple]:
    """Where values stand in JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in items for found in ((*place, key), *places(value, (*place, key)))]


KINDS = ["cut", "flip", "insert", "nest", "numbers"]
DAMAGE = st.tuples(st.floats(0, 1), st.sampled_from(KINDS), st.binary(max_size=9))


def damaged(whole: bytes, damage: tuple[float, str, bytes], within: int | None = None) -> bytes:
    """Bytes with one thing done to them, within the first so many."""
    share, kind, new = damage
    at = int(share * (within or len(whole)))
    if kind == "cut":
        return whole[:at]
    put = {"flip": new, "insert": new, "nest": b"[" * 5000, "numbers": b"\xff" * 8}[kind]
    return whole[:at] + put + whole[at + len(put) * (kind in ("flip", "numbers")) :]


many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
JSON_FILES = ["config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"]
JSON_FILES += ["tokenizer.json"]


@many
@given(data=st.data(), name=st.sampled_from(JSON_FILES), value=st.sampled_from(NASTY))
def test_json_of_a_directory_with_one_value_changed(directory, data, name, value) -> None:
    file = directory / name
    found = places(json.loads(file.read_text()))
    # The many entries of a vocabulary or an index count as one.
    place = data.draw(st.sampled_from(found[:40] + found[-20:]))
    with changed(file, edited(file.read_text(), place, value)):
        check(use_model, directory)


@many
@given(name=st.sampled_from([*JSON_FILES, "model-00002-of-00003.safetensors"]), damage=DAMAGE)
def test_files_of_a_directory_with_bytes_changed(directory, name, damage) -> None:
    file = directory / name
    with changed(file, damaged(file.read_bytes(), damage, within=4000)):
        check(use_model, directory)


@many
@given(damage=DAMAGE)
def test_gguf_files_with_bytes_changed(gguf, damage) -> None:
    whole = gguf.read_bytes()
    with changed(gguf, damaged(whole, damage, within=whole.index(b"output_norm.weight") + 60)):
        check(use_model, gguf)


OF_CONFIGURATIONS = [
    *(("num_attention_heads", value) for value in ("9", None, [9], 0, -3, True, 1.5, 10**30, {})),
    *(("rope_scaling", value) for value in ("linear", [1], 3, {"rope_type": 3}, {"type": "linear", "factor": "x"})),
    ("rope_scaling", {"type": "linear", "factor": 0}),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                      "original_max_position_embeddings": 32}),
    *(("quantization_config", value) for value in ("gptq", [1], 3, {"quant_method": ["x"]})),
    *(("architectures", value) for value in ("X", [3], {"a": 1}, 7)),
    *(("eos_token_id", value) for value in ("2", {"a": 1}, [["2"]], -1, 2**40, True)),
    *(("model_type", value) for value in (["llama"], {}, 3, "a\nb")),
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 0), ("vocab_size", 10**15), ("head_dim", 7), ("hidden_size", 1),
    ("num_key_value_heads", 10**9), ("tie_word_embeddings", "yes"), ("rope_theta", -1.0), ("bos_token_id", "x"),
    ("rms_norm_eps", float("nan")), ("max_position_embeddings", 10**18), ("sliding_window", "x"),
    ("hidden_act", ["silu"]),
]  # fmt: skip
OF_INDICES = [3, [], "../model-00001-of-00003.safetensors", "/dev/zero", "\ud800", "x" * 9999]
OF_SETTINGS = {"bos_token": 3, "eos_token": {"content": 3}}
LIES = [
    *(("config.json", (key,), value) for key, value in OF_CONFIGURATIONS),
    *(("model.safetensors.index.json", ("weight_map", "model.norm.weight"), value) for value in OF_INDICES),
    *(("tokenizer_config.json", (key,), value) for key, value in OF_SETTINGS.items()),
    *(("tokenizer_config.json", ("chat_template",), value) for value in (3, [{"name": 1}])),
    ("tokenizer.json", ("model", "merges"), [["no", "such"]]),
    ("tokenizer.json", ("model", "vocab"), {"x": -1}),
    ("tokenizer.json", ("model",), 3),
]
"""A JSON file of a model, a place in it, and what stands there instead."""


@pytest.mark.parametrize(("name", "place", "value"), LIES)
def test_json_that_lies(directory, name, place, value) -> None:
    file = directory / name
    with changed(file, edited(file.read_text(), place, value)):
        said = refused(use_model, directory)
    assert not name.startswith("tokenizer") or name in said or place[-1] in said


@pytest.mark.parametrize("name", [*JSON_FILES, "adapter_config.json"])
@pytest.mark.parametrize(
    "content", ["[" * DEEP, '{"a":' * DEEP, "[]", "3", '"x"', "", "\xff", "{]"], ids=lambda text: text[:6]
)
def test_json_that_is_no_description(directory, tmp_path, name, content) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if name == "adapter_config.json":
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    assert name in refused(use_model, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dtype", 3), ("dtype", "F64"), ("shape", "x"), ("shape", [-1]), ("shape", [2**62, 2**62]), ("shape", []),
     ("shape", None),
     ("data_offsets", [0, 2**60]), ("data_offsets", [8, 0]), ("data_offsets", []), ("data_offsets", "x")],
)  # fmt: skip
def test_headers_that_lie(tmp_path, key, value) -> None:
    file = write_checkpoint(tmp_path, "llama2") / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["model.norm.weight"][key] = value
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    assert str(file) in refused(use_model, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        *({"ARCH__attention__head_count": value} for value in ("9", 0, [9, 8], ["9"], 1.5)),
        *({"ARCH__block_count": value} for value in ("7", 0, 10**9)),
        {"ARCH__context_length": "x"}, {"ARCH__rope__freq_base": "x"}, {"ARCH__rope__freq_base": float("nan")},
        {"ARCH__rope__freq_base": 0.0}, {"ARCH__rope__scaling__type": 3}, {"ARCH__expert_count": "x"},
        {"ARCH__rope__scaling__type": "linear", "ARCH__rope__scaling__factor": 0.0}, {"split__count": "2"},
        {"ARCH__attention__layer_norm_rms_epsilon": float("inf")}, {"ARCH__attention__key_length": 7},
        {"general__alignment": 0}, {"general__alignment": "x"}, {"tokenizer__ggml__eos_token_id": "2"},
        {"tokenizer__ggml__eos_token_id": 2**32 - 1}, {"tokenizer__ggml__bos_token_id": [1, 2]},
        {"extra": {"rope_freqs.weight": np.zeros((4, 2), np.float32)}}, {"extra": {"rope_freqs.weight": np.zeros(4,
        np.float32)}},
    ],
    ids=lambda fields: " ".join(map(str, *fields.items()))[:50] if len(fields) == 1 else "",
)  # fmt: skip
def test_gguf_metadata_that_lie(tmp_path, fields) -> None:
    path = write_gguf(tmp_path / "model.gguf", "smollm2", **fields)
    refused(use_model, path)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [1, 2, 3]}, {"tokens": "x"}, {"merges": ["no such"]}, {"merges": ["alone"]}, {"merges": [1]},
        {"merges": "x"},
        {"token_type": "x"}, {"token_type": ["x"]}, {"bos_token_id": 10**6}, {"bos_token_id": "x"}, {"model": 3},
        {"pre": [1]},
        {"add_bos_token": "yes"}, {"unknown_token_id": -1},
    ],
)  # fmt: skip
def test_gguf_vocabularies_that_lie(change) -> None:
    def use(path: Path) -> None:
        gguf_tokenizer(gguf_metadata(**change), (), str(path)).encode("a")

    refused(use, Path("here"))


def test_gguf_tables_that_lie(gguf) -> None:
    whole = gguf.read_bytes()
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    begins = {"rank": (at, "<I", 2**32 - 1), "axis": (at + 4, "<Q", 2**63), "offset": (at + 24, "<Q", 2**64 - 32)}
    for place, code, value in (*begins.values(), (8, "<Q", 2**64 - 1), (16, "<Q", 2**64 - 1)):
        data = bytearray(whole)
        struct.pack_into(code, data, place, value)
        with changed(gguf, bytes(data)):
            refused(use_model, gguf)
    nested = (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9) + struct.pack("<IQ", 9, 1) * DEEP
    )
    with changed(gguf, nested):
        assert "nested" in refused(use_model, gguf)


def test_homes_that_nobody_has_and_names_that_are_too_long() -> None:
    for use in (use_model, load_exits, lambda path: read_prompts(f"{path}.txt")):
        assert "home" in refused(use, Path("~nouser/x"))
        with pytest.raises(DexError):
            use(Path("/" + "x" * 5000))
    assert "home" in refused(lambda path: save_model(path, LLAMA, {}), Path("~nouser/x"))


def test_what_reading_lets_through() -> None:
    for error in (KeyboardInterrupt(), SystemExit(), GeneratorExit()):
        with pytest.raises(type(error)), reading("here"):
            raise error
    panic = type("PanicException", (BaseException,), {})
    for error in (MemoryError(), OverflowError("big"), panic("rust"), UnicodeError("x"), OSError(13, "denied")):
        with pytest.raises(DexError, match="here"), reading("here"):
            raise error
    with pytest.raises(DexError, match=r"^here: no\.$"), reading("here"):
        raise DexError("no.")
    assert parsed("[1, NaN]", list[float], "here")[0] == 1
