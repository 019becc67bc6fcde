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
from reference.small_models import LLAMA, random_exits
from safetensors.numpy import load_file, save
from test_io_gguf import write_gguf
from test_io_tokenizer import CHATML, gguf_metadata, with_template, write_tokenizer

from dex_jax.cli.train_arguments import read_config
from dex_jax.decoding.dex.trees import known_trees, with_trees
from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading
from dex_jax.io import open_checkpoint, templates
from dex_jax.io.exits_file import load_exits, save_exits
from dex_jax.io.gguf_tokenizer import gguf_tokenizer
from dex_jax.io.save import save_model
from dex_jax.prompt_files import read_prompts, read_texts

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


def use_prompts(path: Path) -> None:
    for read in (read_prompts, read_texts):
        read(str(path))


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


ROWS = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "a"}]}, {"question": "q", "choices": [1]}]


@many
@given(data=st.data(), value=st.sampled_from(NASTY), damage=DAMAGE, suffix=st.sampled_from([".jsonl", ".json", ".txt"]))
def test_prompt_files(tmp_path, data, value, damage, suffix) -> None:
    text = edited(json.dumps(ROWS), data.draw(st.sampled_from(places(ROWS))), value)
    text = text if suffix == ".json" else "\n".join(map(json.dumps, json.loads(text)))
    file = tmp_path / f"prompts{suffix}"
    for content in (text.encode(), damaged(text.encode(), damage)):
        file.write_bytes(content)
        check(use_prompts, file)


PIECES = st.sampled_from(
    ["{{", "}}", "{%", "%}", " for m in messages ", " endfor ", " if ", " endif ", "messages", "[0]", "['content']",
     " ~ ", " * ",
     " ** ", " / ", "0", "10", "99999999", "-1", "'x'", "'%9d'", " % ", " | ", "join", "center(9)", "length",
     "range(99999)",
     " set x = ", "x", "x.y", "(", ")", " recursive ", "loop(messages)", "namespace(a=1)", " macro f() ",
     " endmacro ", "f()",
     "raise_exception('no')", "strftime_now('%Y')", "''.__class__", "<|im_end|>", "\n", "tojson(indent=9)", "\ud800"]
)  # fmt: skip


@settings(max_examples=150)
@given(pieces=st.lists(PIECES, max_size=14))
def test_templates_of_any_pieces(pieces) -> None:
    said = check(lambda _: with_template("".join(pieces)).chat([{"role": "user", "content": "x"}]), Path("here"))
    assert "Traceback" not in said


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = (
    "{%% set n = namespace(x='x') %%}{%% for a in range(99) %%}{%% set n.x = n.x %s n.x %%}{%% endfor %%}{{ n.x }}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}", "{{ 1 % 0 }}", "{{ '%c' % 99999999999 }}", "{{ 10 ** 10 ** 10 }}", "{{ 'x' * 10 ** 12 }}",
        ENDLESS,
        DOUBLED % "~", DOUBLED % "+", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ '%999999999d' % 1 }}",
        "{{ 'x'.ljust(999999999) }}", "{{ 'x' | center(999999999) }}", "{{ '{:999999999}'.format(1) }}",
        "{{ range(10 ** 9) }}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if x %}" * 3000 + "{% endif %}" * 3000,
        "{{ strftime_now(3) }}",
        "{% set n = namespace(x=99) %}{% for a in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
        "{% include 'x' %}", "{{ '%999999999d' | format(1) }}", "{{ lipsum(n=99999) }}",
        "{{ messages[0].content.x.y }}",
    ],
    ids=lambda template: template[:30],
)  # fmt: skip
def test_templates_that_fail_in_their_own_ways(template, monkeypatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    assert refused(lambda _: with_template(template).chat([{"role": "user", "content": "x"}]), Path("here"))


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".jsonl", "[" * DEEP), (".json", "[" * DEEP), (".jsonl", '{"prompt":' + "[" * 900 + "]" * 900 + "}"),
     (".jsonl", "\xff"),
     (".json", '[{"prompt": 3}]'), (".json", "3"), (".jsonl", '{"messages": [3]}'), (".jsonl.gz", "x"), (".txt", "")],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_prompt_files_that_hold_no_prompts(tmp_path, suffix, content) -> None:
    file = tmp_path / f"prompts{suffix}"
    file.write_bytes(content.encode("latin-1"))
    refused(use_prompts, file)


@pytest.mark.parametrize(
    "content",
    ["", "config = 3", "(" * 9999,
     "config = (", "raise SystemExit(1)", "def f(): f()\nf()", "1 / 0", "\xff", "x = '\0'",
     "import dex_jax.config as c; config = c.ModelConfig('llama', 9, 1, 8, 2, 0, 4, 8, 8)",
     "raise ValueError('a\\nb')"],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_training_configurations_that_are_none(tmp_path, content) -> None:
    file = tmp_path / "config.py"
    file.write_bytes(content.encode("latin-1"))
    refused(lambda path: read_config(str(path)), file)


def use_exits(path: Path) -> None:
    exits = load_exits(path)
    known_trees(exits)
    assert exits.digest


@pytest.fixture(scope="module")
def exits(tmp_path_factory) -> Path:
    """A drafter with a draft vocabulary and trees."""
    path = tmp_path_factory.mktemp("exits") / "exits.safetensors"
    drafter = random_exits("mlp", fused=True, draft=30, depths=(0,))
    about = {"data": ["a=1"], "held_out": {"mean": {"grids": [{"explorers": 2, "depth_side_speedup": 1.5}]}}}
    drafter = with_trees(drafter, known_trees(drafter))
    drafter.metadata.update(about)
    save_exits(path, drafter)
    return path


def exits_with(path: Path, metadata: dict[str, str], **tensors: np.ndarray) -> bytes:
    return save(load_file(path) | tensors, metadata)


def metadata_of(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


@many
@given(data=st.data(), key=st.sampled_from(["config", "about"]), value=st.sampled_from(NASTY))
def test_metadata_of_exits_with_one_value_changed(exits, data, key, value) -> None:
    metadata = metadata_of(exits)
    place = data.draw(st.sampled_from(places(json.loads(metadata[key]))))
    with changed(exits, exits_with(exits, metadata | {key: edited(metadata[key], place, value)})):
        check(use_exits, exits)


@many
@given(damage=DAMAGE)
def test_exits_with_bytes_changed(exits, damage) -> None:
    with changed(exits, damaged(exits.read_bytes(), damage, within=3000)):
        check(use_exits, exits)


@pytest.mark.parametrize(
    ("key", "content"),
    [
        *(("config", content) for content in ("", "[]", "{", "[" * DEEP, '{"kind": "mlp", "depths": 3, "width": 64}')),
        *(("about", content) for content in ("", "[]", "[" * DEEP, '{"trees": 3}', '{"held_out": 3}', '{"data": 3}')),
        ("about", '{"held_out": {"mean": {"grids": [{"explorers": 2, "depth_side_speedup": -1}]}}}'),
        ("about", '{"held_out": {"mean": []}}'), ("format", "other"),
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_exits_whose_metadata_lie(exits, key, content) -> None:
    with changed(exits, exits_with(exits, metadata_of(exits) | {key: content})):
        refused(use_exits, exits)


OF_EXITS = [
    {"width": 10**12}, {"width": 63}, {"hidden": 0}, {"hidden": 2**40}, {"window": 2**40}, {"depths": [0] * 2},
    {"depths": ["x"]}, {"depths": list(range(100_000))}, {"kind": 3}, {"fused": "x"}, {"draft_size": 29},
    {"draft_size": -1}, {"norm_eps": -1.0}, {"kind": "attn", "fused": False, "head_dim": 7},
]  # fmt: skip
OF_TREES = [
    {"widths": []}, {"widths": [10**9]}, {"widths": [100] * 60}, {"widths": [1] * 10**5}, {"widths": "x"},
    {"drafted": 9}, {"drafted": -1}, {"lookup": [2.0] * 8}, {"lookup": []}, {"tokens_per_round": 0},
    {"tokens_per_round": "x"}, {"tokens_per_round": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("change", [*OF_EXITS, *OF_TREES], ids=lambda change: str(change)[:40])
def test_exits_whose_shapes_or_trees_lie(exits, change) -> None:
    metadata = metadata_of(exits)
    if change in OF_EXITS:
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | change)
    else:
        about = json.loads(metadata["about"])
        about["trees"][0] |= change
        metadata["about"] = json.dumps(about)
    with changed(exits, exits_with(exits, metadata)):
        refused(use_exits, exits)


def test_exits_whose_tensors_lie(exits) -> None:
    metadata, tensors = metadata_of(exits), load_file(exits)
    vocabulary, gate_up = tensors["draft_vocabulary"], tensors["gate_up"]
    spoilt = gate_up.copy()
    spoilt.flat[0] = np.nan
    for change in (
        # Integers and steps that would multiply to 231 GiB.
        {"gate_up": np.zeros((310_000, 1), np.int8), "gate_up.steps": np.zeros((1, 200_000), np.float32)},
        {"gate_up": gate_up.astype(np.int8), "gate_up.steps": np.ones(gate_up.shape, np.float32)},
        {"gate_up": gate_up.astype(np.int8)},
        {"gate_up": gate_up.astype(np.float64)},
        {"gate_up": gate_up[:, :-1].copy()},
        {"gate_up": spoilt},
        {"draft_vocabulary": vocabulary[::-1].copy()},
        {"draft_vocabulary": vocabulary - 1000},
        {"draft_vocabulary": vocabulary.astype(np.float32)},
        {"draft_vocabulary": np.zeros_like(vocabulary)},
        {"draft_vocabulary": vocabulary[:, None].copy()},
    ):
        with changed(exits, exits_with(exits, metadata, **change)):
            refused(use_exits, exits)
