"""Files that others wrote, wrong in every way: each is read, or refused soon in one sentence that names it."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.checkpoints import FAMILIES
from reference.eagle_heads import MODEL, head_tensors, write_head
from reference.small_models import LLAMA, random_exits
from safetensors.numpy import load_file, save
from test_io_gguf import write_gguf
from test_io_tokenizer import CHATML, gguf_metadata, with_template, write_tokenizer

from dex_jax.cli.train_arguments import read_config
from dex_jax.errors import DexError
from dex_jax.foreign import parsed, reading
from dex_jax.io import templates
from dex_jax.io.eagle import fit_eagle, load_eagle
from dex_jax.io.exits_file import load_exits, save_exits
from dex_jax.io.gguf_tokenizer import gguf_tokenizer
from dex_jax.io.huggingface_config import huggingface_config
from dex_jax.io.opening import open_checkpoint
from dex_jax.io.save import save_model
from dex_jax.prompt_files import read_prompts, read_texts

SECONDS = 8.0
"""Seconds of a core, of which a busy machine gives few in a second, that a file may take: most take milliseconds."""
DEEP = 200_000
NASTY = [
    None, True, "", "x", "9", "\ud800", "a\nb\x1b[31m", 0, 1, -1, 1.5, float("nan"), float("inf"), 2**31, 2**63,
    10**30, 10**9, [], [0], ["x"], [[1]], {}, {"a": 1}, "../../x", "~nouser",
]  # fmt: skip
PROMPTS = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "a"}]}, {"question": "q", "choices": [1]}]


def use_model(path: Path) -> None:
    """Read all of a checkpoint, and encode and decode a text with its tokenizer."""
    checkpoint = open_checkpoint(str(path))
    for name in checkpoint.shapes():
        checkpoint.read(name)
    checkpoint.fingerprint()
    if (tokenizer := checkpoint.tokenizer) is not None:
        _ = tokenizer.eos_ids
        tokenizer.decode(tokenizer.encode("a 12 <s> é"))
        if tokenizer.has_chat_template:
            tokenizer.chat([{"role": "user", "content": "a"}])


def use_head(folder: Path) -> None:
    fit_eagle(load_eagle(folder), huggingface_config(FAMILIES[MODEL], {}, "model"))


def use_prompts(path: Path) -> None:
    for read in (read_prompts, read_texts):
        read(str(path))


class Kind(NamedTuple):
    """One file, the function and path that read it, and the JSON in it or None, with the way back to bytes."""

    file: Path
    use: Callable[[Path], object]
    root: Path
    text: str | None
    whole: Callable[[str], bytes] = lambda text: text.encode("utf-8", "surrogatepass")


JSON_FILES = ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"]
KINDS = [*JSON_FILES, "model.safetensors", "model.gguf", "config", "about", "head", "head tensors", "prompts"]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory) -> dict[str, Kind]:
    """Return whole files of every kind, by the names above."""
    folder = tmp_path_factory.mktemp("files")
    model = write_tokenizer(folder / "model", CHATML, bos_token={"content": "<s>"}, eos_token="<s>")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    found = {name: Kind(model / name, use_model, model, (model / name).read_text()) for name in JSON_FILES}
    weights = (model / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(weights[:8], "little")
    found["model.safetensors"] = Kind(
        model / "model.safetensors", use_model, model, weights[8:begin].decode(),
        lambda text: len(text.encode()).to_bytes(8, "little") + text.encode() + weights[begin:],
    )  # fmt: skip
    fields = {key.replace(".", "__"): value for key, value in gguf_metadata().items() if "token_id" not in key}
    gguf = write_gguf(folder / "model.gguf", "smollm2", tokenizer__chat_template=CHATML, **fields)
    found["model.gguf"] = Kind(gguf, use_model, gguf, None)
    exits, drafter = folder / "exits.safetensors", random_exits("mlp", fused=True, draft=30, depths=(0,))
    drafter.metadata.update(data=["a=1"])
    save_exits(exits, drafter)
    tensors, metadata = load_file(exits), metadata_of(exits)
    for key in ("config", "about"):
        found[key] = Kind(
            exits, use_exits, exits, metadata[key], lambda text, key=key: save(tensors, metadata | {key: text})
        )
    head = write_head(folder / "head", "safeailab")
    found["head"] = Kind(head / "config.json", use_head, head, (head / "config.json").read_text())
    found["head tensors"] = Kind(head / "model.safetensors", use_head, head, None)
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(PROMPTS))
    found["prompts"] = Kind(prompts, use_prompts, prompts, prompts.read_text())
    return found


def use_exits(path: Path) -> None:
    assert load_exits(path).config


def metadata_of(path: Path) -> dict[str, str]:
    size = int.from_bytes(path.read_bytes()[:8], "little")
    return json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]


def check(use: Any, path: Path) -> str:
    """Return the sentence that refuses a file, empty if none does; other errors fail, and so does taking long."""
    began, said = time.process_time(), ""
    try:
        use(path)
    except DexError as error:
        said = str(error)
        assert str(path) in said, said
        assert said.isprintable(), said
        assert len(said) < 1500, said
    assert time.process_time() - began < SECONDS
    return said


@contextlib.contextmanager
def changed(path: Path, content: bytes):
    """Give a file other content within this context."""
    kept = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(kept)


def refused(kind: Kind, content: str | bytes) -> None:
    """Assert that a file with such JSON in it, or such bytes, is refused."""
    with changed(kind.file, kind.whole(content) if isinstance(content, str) else content):
        assert check(kind.use, kind.root), f"{content[:300]!r} was accepted"


def edited(text: str, place: tuple, value: Any) -> str:
    """Return JSON with one value replaced."""
    content = inner = json.loads(text)
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(content)


def places(content: Any, place: tuple = ()) -> list[tuple]:
    """Return the places of all values in JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [found for key, value in items for found in ((*place, key), *places(value, (*place, key)))]


def damaged(whole: bytes, share: float, how: str, new: bytes) -> bytes:
    """Return bytes with one change, within the first few thousand."""
    at = int(share * min(len(whole), 6000))
    put = {"nest": b"[" * 5000, "numbers": b"\xff" * 8}.get(how, new)
    return whole[:at] + (b"" if how == "cut" else put + whole[at + len(put) * (how in ("flip", "numbers")) :])


@pytest.mark.parametrize("name", KINDS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    data=st.data(), share=st.floats(0, 1), how=st.sampled_from(["cut", "flip", "insert", "nest", "numbers", "value"]),
    new=st.binary(max_size=9), value=st.sampled_from(NASTY),
)  # fmt: skip
def test_files_of_every_kind_are_read_or_refused(kinds, name, data, share, how, new, value) -> None:
    kind = kinds[name]
    if how == "value" and kind.text is not None:
        found = places(json.loads(kind.text))
        # The places between these are the many entries of a vocabulary.
        content = kind.whole(edited(kind.text, data.draw(st.sampled_from(found[:40] + found[-20:])), value))
    else:
        content = damaged(kind.file.read_bytes(), share, how, new)
    with changed(kind.file, content):
        check(kind.use, kind.root)


LIES = [
    *(("config.json", ("num_attention_heads",), value) for value in ("9", 0, -3, 10**30)),
    *(("config.json", ("rope_scaling",), value) for value in ([1], {"type": "linear", "factor": 0})),
    ("config.json", ("quantization_config",), {"quant_method": ["x"]}), ("config.json", ("architectures",), [3]),
    ("config.json", ("eos_token_id",), 2**40), ("config.json", ("model_type",), ["llama"]),
    ("config.json", ("num_hidden_layers",), 10**9), ("config.json", ("vocab_size",), 10**15),
    ("config.json", ("head_dim",), 7), ("config.json", ("rms_norm_eps",), float("nan")),
    ("tokenizer_config.json", ("bos_token",), 3), ("tokenizer_config.json", ("chat_template",), [{"name": 1}]),
    ("tokenizer.json", ("model", "merges"), [["no", "such"]]), ("tokenizer.json", ("model", "vocab"), {"x": -1}),
    *(("model.safetensors", ("model.norm.weight", "shape"), value) for value in ([-1], [2**62, 2**62], [])),
    *(("model.safetensors", ("model.norm.weight", "data_offsets"), value) for value in ([0, 2**60], [8, 0])),
    *(("config", ("width",), value) for value in (10**12, 63)), ("config", ("depths",), [0] * 2),
    ("config", ("kind",), 3), ("config", ("draft_size",), 29), ("config", ("norm_eps",), -1.0),
    ("head", ("intermediate_size",), 95), ("head", ("model_type",), "x"),
    ("prompts", (0, "prompt"), 3), ("prompts", (1, "messages"), [3]),
]  # fmt: skip
"""A file, a place in its JSON, and the wrong value that stands there instead."""


def test_json_that_lies_or_is_no_description(kinds) -> None:
    for name, place, value in LIES:
        refused(kinds[name], edited(kinds[name].text, place, value))
    for kind in kinds.values():
        if kind.text is not None:
            for content in ("[" * DEEP, '{"a":' * DEEP, "3", "", "{]"):
                refused(kind, content)
            refused(kind, b"\xff")


def test_tensors_that_lie(kinds) -> None:
    metadata, exits, head = metadata_of(kinds["config"].file), kinds["config"], kinds["head tensors"]
    tensors = load_file(exits.file)
    vocabulary, gate_up = tensors["draft_vocabulary"], tensors["gate_up"]
    for change in (
        # These integers and steps would multiply to 231 GiB.
        {"gate_up": np.zeros((310_000, 1), np.int8), "gate_up.steps": np.zeros((1, 200_000), np.float32)},
        {"gate_up": gate_up.astype(np.int8)}, {"gate_up": np.full_like(gate_up, np.nan)},
        {"draft_vocabulary": vocabulary[::-1].copy()}, {"draft_vocabulary": vocabulary - 1000},
    ):  # fmt: skip
        refused(exits, save(tensors | change, metadata))
    for name, value in {
        "d2t": np.zeros(60, np.float32), "d2t ": np.full(60, 211), "lm_head.weight": np.zeros((60, 95), np.float32),
        "fc.weight": np.zeros(96, np.float32), "fc.weight ": np.full((96, 288), np.nan, np.float32),
    }.items():  # fmt: skip
        refused(head, save(head_tensors("safeailab") | {name.strip(): value}))
    for name in ("d2t", "fc.weight", "lm_head.weight", "midlayer.self_attn.k_proj.weight"):
        refused(head, save({each: value for each, value in head_tensors("safeailab").items() if each != name}))


def test_gguf_files_that_lie(kinds, tmp_path) -> None:
    gguf = kinds["model.gguf"]
    for key, value in {
        "ARCH__attention__head_count": "9", "ARCH__attention__head_count ": [9, 8], "ARCH__block_count": 10**9,
        "ARCH__rope__freq_base": float("nan"), "ARCH__rope__scaling__type": 3, "general__alignment": 0,
        "ARCH__attention__key_length": 7, "tokenizer__ggml__eos_token_id": 2**32 - 1,
        "extra": {"rope_freqs.weight": np.zeros((4, 2), np.float32)},
    }.items():  # fmt: skip
        assert check(use_model, write_gguf(tmp_path / "model.gguf", "smollm2", **{key.strip(): value}))
    for change in (
        {"tokens": [1, 2, 3]}, {"merges": ["alone"]}, {"token_type": ["x"]}, {"bos_token_id": 10**6}, {"pre": [1]},
    ):  # fmt: skip
        assert check(lambda _, it=change: gguf_tokenizer(gguf_metadata(**it), (), "here").encode("a"), Path("here"))
    whole = gguf.file.read_bytes()
    at = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    begins = {"rank": (at, "<I", 2**32 - 1), "axis": (at + 4, "<Q", 2**63), "offset": (at + 24, "<Q", 2**64 - 32)}
    for place, code, value in (*begins.values(), (8, "<Q", 2**64 - 1), (16, "<Q", 2**64 - 1)):
        data = bytearray(whole)
        struct.pack_into(code, data, place, value)
        refused(gguf, bytes(data))
    nested = struct.pack("<4sIQQQ1sI", b"GGUF", 3, 0, 1, 1, b"a", 9) + struct.pack("<IQ", 9, 1) * DEEP
    refused(gguf, nested)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}", "{{ '%c' % 99999999999 }}", "{{ range(10 ** 9) }}", "{{ messages[0].content.x.y }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{% include 'x' %}",
        "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "{% if x %}" * 3000 + "{% endif %}" * 3000, "{{ f(",
    ],
    ids=lambda template: template[:30],
)  # fmt: skip
def test_templates_that_fail_in_their_own_ways(template, monkeypatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    assert check(lambda _: with_template(template).chat([{"role": "user", "content": "x"}]), Path("here"))


@pytest.mark.parametrize("content", ["", "config = 3", "(" * 9999, "raise SystemExit(1)", "1 / 0", "\xff", "x = '\0'"])
def test_training_configurations_that_are_none(tmp_path, content) -> None:
    file = tmp_path / "config.py"
    file.write_bytes(content.encode("latin-1"))
    assert check(lambda path: read_config(str(path)), file)


def test_homes_that_nobody_has_and_names_that_are_too_long() -> None:
    for use in (use_model, load_exits, lambda path: read_prompts(f"{path}.txt")):
        assert "home" in check(use, Path("~nouser/x"))
        with pytest.raises(DexError):
            use(Path("/" + "x" * 5000))
    assert "home" in check(lambda path: save_model(path, LLAMA, {}), Path("~nouser/x"))


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
