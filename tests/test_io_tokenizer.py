"""The tokenizer, its chat template, and text as it streams."""

from __future__ import annotations

import datetime
import itertools
import json
import pathlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference.checkpoints import write_checkpoint
from tokenizers import pre_tokenizers

from dex_jax.errors import DexError
from dex_jax.io.gguf_tokenizer import gguf_tokenizer
from dex_jax.io.opening import open_checkpoint
from dex_jax.io.tokenizer import TextStream, Tokenizer

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens" / "tokenizer_smollm2.json").read_text(encoding="utf-8"))
MESSAGE = [{"role": "user", "content": "<ü>"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    """Return the default model's tokenizer."""
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    assert tokenizer is not None
    return tokenizer


def gguf_metadata(pre="llama-bpe", **changes):
    """Return a vocabulary of bytes, some words and three special tokens, as GGUF metadata."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "Ġa", "12", "123", "<s>", "<|im_start|>", "<|im_end|>", "<tool>"]
    meta = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": ["Ġ a", "1 2"],
        "token_type": [1] * 259 + [3, 3, 3, 4],
        "bos_token_id": 259,
        "eos_token_id": 259,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items()}


@pytest.mark.parametrize("entry", GOLDEN["texts"], ids=lambda entry: repr(entry["text"])[:30])
def test_texts_as_transformers_encodes_them(smollm2, entry):
    assert smollm2.encode(entry["text"]) == entry["ids"]
    assert smollm2.decode(entry["ids"], skip_special=False) == entry["text"]


@pytest.mark.parametrize("entry", GOLDEN["chats"])
def test_chats_as_transformers_encodes_them(smollm2, entry):
    assert smollm2.chat(entry["messages"], entry["add_generation_prompt"]) == entry["ids"]


# SmolLM2's vocabulary has no token for the bytes of these characters, and passes them over.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF)
)


@given(text=TEXT)
def test_any_text_survives_a_round_trip(smollm2, text):
    assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


def test_what_the_default_tokenizer_knows(smollm2):
    assert smollm2.has_chat_template
    assert smollm2.eos_ids == (2,)
    assert smollm2.decode([2], skip_special=False) == "<|im_end|>"
    assert smollm2.decode(smollm2.encode(" sky")[:1], skip_special=False) == " sky"
    assert smollm2.decode([1, *smollm2.encode("hi"), 2]) == "hi"
    assert smollm2.decode([49152, 10**6]) == ""
    assert 2 in smollm2.special_ids
    with pytest.raises(DexError, match=r"Character 3 of the text"):
        smollm2.encode("ab\udcff")


@pytest.mark.parametrize(
    ("pre", "pieces"), [("llama-bpe", ["x", "123", "12"]), ("qwen2", ["x", "1", "2", "3", "1", "2"])]
)
def test_gguf_pre_tokenizers(pre, pieces):
    tokenizer = gguf_tokenizer(gguf_metadata(pre, add_bos_token=False), (), "here")
    assert [tokenizer.decode([i], skip_special=False) for i in tokenizer.encode("x12312")] == pieces
    text = "I'LL say: été\n\n  12 <tool> ok\t!?\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_special_tokens():
    tokenizer = gguf_tokenizer(gguf_metadata(), (7,), "here")
    ids = tokenizer.encode("<|im_start|> a<tool>")
    assert ids == [259, 260, 256, 262]
    assert tokenizer.encode(" a", add_special=False) == [256]
    assert tokenizer.decode(ids) == " a<tool>"
    assert tokenizer.eos_ids == (7,)
    assert not tokenizer.has_chat_template
    with pytest.raises(DexError, match=r"here has no chat template"):
        tokenizer.chat([{"role": "user", "content": "hi"}])
    assert gguf_tokenizer({}, (), "here") is None
    without = gguf_tokenizer(gguf_metadata("smollm"), (), "here")
    assert without.encode(" a") == [256]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "t5"}, "'t5'"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"merges": []}, "merges"),
        ({"model": "llama", "scores": [0.0]}, "scores"),
    ],
)
def test_other_gguf_tokenizers_are_refused(changes, words):
    with pytest.raises(DexError, match=words):
        gguf_tokenizer(gguf_metadata(**changes), (), "here")


BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "▁▁", "ca", "cab"]


def sentencepiece_file(*worse: float, prefix: bool) -> Tokenizer:
    """Return a tokenizer of the pieces above; each scores less than the last by a value of `worse`."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<tool>"]
    scores = [0.0] * 259 + (-np.cumsum(worse)).tolist() + [0.0]
    own = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": [2, 3, 3] + [6] * 256 + [1] * 12 + [4]}
    own |= {"bos_token_id": 1, "unknown_token_id": 0, "add_space_prefix": prefix}
    return gguf_tokenizer({f"tokenizer.ggml.{key}": value for key, value in own.items()}, (2,), "here")


@settings(deadline=None)
@given(
    text=st.text("abc dé", min_size=1, max_size=12),
    worse=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    prefix=st.booleans(),
)
def test_sentencepiece_joins_what_scores_best(text: str, worse: list[int], prefix: bool) -> None:
    tokenizer = sentencepiece_file(*map(float, worse), prefix=prefix)
    scores = dict(zip(PIECES, -np.cumsum(worse), strict=True))
    parts = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while joined := [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]:
        # Nothing defines which of two that score alike is joined first.
        assume(len({parts[-i] + parts[1 - i] for score, i in joined if score == max(joined)[0]}) == 1)
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = [1]
    for part in parts:
        ids += [259 + PIECES.index(part)] if part in scores else [3 + byte for byte in part.encode()]
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(f"{text}<tool>", add_special=False)[-1] == 271


def write_tokenizer(directory, template=None, **settings):
    """Write a checkpoint with tokenizer.json, and return its directory."""
    write_checkpoint(directory, "smollm2")
    backend = gguf_tokenizer(gguf_metadata(add_bos_token=True), (), "here").backend
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | settings))
    return directory


def test_a_directorys_tokenizer(tmp_path):
    directory = write_tokenizer(tmp_path, CHATML)
    tokenizer = open_checkpoint(str(directory)).tokenizer
    assert len(tokenizer.encode("no truncation, no padding")) == 1 + len("no truncation, no padding")
    assert tokenizer.eos_ids == (2, 261)
    assert tokenizer.chat([{"role": "user", "content": "x"}], False)[0] == 260
    # BOS comes once, and special tokens are encoded as such.
    ids = with_template("{{ bos_token }}" + CHATML).chat([{"role": "user", "content": "x"}])
    assert (ids[:2], ids.count(259), ids.count(261)) == ([259, 260], 1, 1)


def test_where_a_chat_template_and_a_tokenizer_may_stand(tmp_path):
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes {{ bos_token }}"}]
    write_tokenizer(tmp_path, named, bos_token={"content": "<s>", "lstrip": False})
    assert open_checkpoint(str(tmp_path)).tokenizer.render(MESSAGE) == "yes <s>"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert open_checkpoint(str(tmp_path)).tokenizer.render(MESSAGE) == "own file"
    (tmp_path / "tokenizer.json").unlink()
    assert open_checkpoint(str(tmp_path)).tokenizer is None
    (tmp_path / "tokenizer.model").write_text("")
    with pytest.raises(DexError, match=r"only as tokenizer\.model"):
        _ = open_checkpoint(str(tmp_path)).tokenizer


def with_template(template) -> Tokenizer:
    backend = gguf_tokenizer(gguf_metadata(add_bos_token=True), (), "here").backend
    return Tokenizer(backend, template=template, variables={"bos_token": "<s>"}, source="here")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, (261,)),
        ("{% for m in messages %}{{ m['content'] }} <s>{% endfor %}", (259,)),
        ("{% for m in messages %}{{ m['content'] | trim }}\n<|im_end|>{% endfor %}", (261,)),
        ("{% for m in messages %}{{ m['content'] }}<tool>{% endfor %}", ()),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", ()),
        ("{{ messages[0]['content'] }}<|im_end|>", ()),
        ("{{ raise_exception('never') }}", ()),
    ],
)
def test_the_token_after_an_assistant_message_ends_a_turn(template, ends):
    assert with_template(template).eos_ids == ends


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<ü>"}]'),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
        ("{% if tools is none %}\n  {% generation %}a{% endgeneration %}\n{% endif %}", "a\n"),
        ("{% for m in [1, 2] %}{% break %}{% endfor %}x", "x"),
        ("{{ messages[0].content.strip() + '!' * 2 ~ messages[0]['content'] | trim | length }}", "<ü>!!3"),
    ],
)
def test_what_templates_may_use(template, text):
    assert with_template(template).render(MESSAGE).strip() == text.strip()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Only user and assistant roles are supported!') }}", "refuses .* Only user"),
        ("{% for %}", "broken at line 1"),
        ("{{ messages[0]['content'] + 1 }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
    ],
)
def test_templates_that_refuse(template, words):
    with pytest.raises(DexError, match=words):
        with_template(template).chat(MESSAGE)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "length >= 1"),
        ({"role": "user", "content": "x"}, "give a list of messages like"),
        ([*MESSAGE, {"role": "user"}], r"\[1\].*content"),
        ([{"role": "user", "content": None}], "content.*null"),
    ],
)
def test_malformed_messages(messages, words):
    with pytest.raises(DexError, match=words):
        with_template(CHATML).chat(messages)


SPACES_AND_BYTES = st.one_of(st.integers(0, 2), st.integers(3 + 0x20, 3 + 0xFF), st.integers(259, 266))


@pytest.mark.parametrize("what", ["text", "any ids", "bytes and special tokens", "a sentencepiece vocabulary"])
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(smollm2, what, data):
    if what == "text":
        tokenizer, ids = smollm2, smollm2.encode(data.draw(st.text(max_size=40)))
    else:
        tokenizer, some = {
            "any ids": (smollm2, st.integers(0, 49_200)),
            "bytes and special tokens": (gguf_tokenizer(gguf_metadata(), (), "here"), st.integers(0, 265)),
            "a sentencepiece vocabulary": (sentencepiece_file(*[1.0] * 12, prefix=True), SPACES_AND_BYTES),
        }[what]
        ids = data.draw(st.lists(some, max_size=30))
    stream, whole, text = TextStream(tokenizer), tokenizer.decode(ids), ""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    for start, stop in itertools.pairwise([0, *cuts, len(ids)]):  # chunks of any length, empty ones too
        text += stream.push(ids[start:stop])
        assert whole.startswith(text)
    assert text + stream.flush() == whole


def test_text_comes_as_soon_as_it_is_settled_and_a_long_one_decodes_a_short_window(smollm2):
    stream = TextStream(smollm2)
    pieces = [stream.push([i]) for i in smollm2.encode("é 🎉 ok")]
    assert "".join(pieces) == "é 🎉 ok"
    assert (pieces[-1], "" in pieces, stream.flush()) == (" ok", True, "")
    party = smollm2.encode("🎉")
    assert (stream.push(party[:-1]), stream.flush(), stream.push(party)) == ("", "�", "🎉")
    for token_id in smollm2.encode("The sky is blue because of 🎉 scattering. " * 20):
        stream.push([token_id])
        assert len(stream._window) < 8
