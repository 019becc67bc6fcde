"""Test where items come from: what users write, what files hold, and that item i is always the same."""

from __future__ import annotations

import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from test_prompt_files import write

from dex_jax.errors import DexError
from dex_jax.language_model import outline
from dex_jax.training.sources import BLOCK, Mixture, SelfSource, SourceOptions, open_mixture, parse_data

OPTIONS = SourceOptions(length=128, seed=3)


@pytest.fixture(scope="module")
def smol():
    """Return the default model without its weights, as only the tokenizer and chat template matter here."""
    return outline("smollm2-135m")


class PlainTokenizer:
    """A tokenizer of one letter per token, without a chat template."""

    has_chat_template = False
    eos_ids = ()
    fingerprint = "plain"

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [9] * add_special + [ord(letter) for letter in text]


def base_model(**changes):
    config = types.SimpleNamespace(bos_id=1, vocab_size=256)
    fields = {"tokenizer": PlainTokenizer(), "config": config, "eos_ids": (2,)} | changes
    model = types.SimpleNamespace(**fields, source="base")
    model.encode = lambda prompt: model.tokenizer.encode(prompt)
    return model


def questions(path: Path, count: int) -> str:
    return write(path, [{"question": f"What is {i} + {i}?"} for i in range(count)])


def quiet(*arguments):
    return open_mixture(*arguments, tell=lambda sentence: None)


def test_self_splits_the_chat_template_around_the_users_turn(smol) -> None:
    options = SourceOptions(length=256, starts=("", "Explain"), answer_limit=100, seed=1)
    source, seen = SelfSource(smol, options), set()
    for number in range(20):
        header, rest = source.item(number).turns
        start = "Explain" if smol.tokenizer.decode(header.forced).endswith("Explain") else ""
        text = smol.tokenizer.decode([*header.forced, 504, *rest.forced], skip_special=False)
        whole = smol.tokenizer.render([{"role": "user", "content": start + smol.tokenizer.decode([504])}])
        assert text == whole
        assert (header.limit, header.temperature, header.top_p, header.forced_weight) == (64, 1.0, 0.95, 0.0)
        assert (rest.limit, rest.temperature) == (100, 0.0)
        seen.add(start)
        assert source.item(number).longest <= options.length
    assert seen == set(options.starts)
    assert len(source.held_out) == 32
    assert SelfSource(smol, SourceOptions(length=40)).item(0).longest <= 40
    with pytest.raises(DexError, match="leaves no room"):
        SelfSource(smol, SourceOptions(length=31))


def test_self_of_a_base_model_begins_with_bos() -> None:
    (turn,) = SelfSource(base_model(), OPTIONS).item(5).turns
    assert (turn.forced, turn.limit, turn.temperature, turn.top_p) == ((1,), 127, 1.0, 0.95)
    without_bos = types.SimpleNamespace(bos_id=None)
    assert SelfSource(base_model(config=without_bos), OPTIONS).item(0).turns[0].forced == (2,)
    with pytest.raises(DexError, match="no BOS and no EOS"):
        SelfSource(base_model(config=without_bos, eos_ids=()), OPTIONS)


def test_texts_are_cut_into_windows_that_cover_them(tmp_path: Path) -> None:
    text = "".join(chr(32 + i % 90) for i in range(1000))
    options = SourceOptions(length=17, held_out_least=1)
    mixture = quiet(["text:" + write(tmp_path / "t.txt", text)], base_model(), options)
    (held_out,) = mixture.held_out.values()
    # The text has 1000 tokens in windows of 16.
    items = [mixture.item(number) for number in range(63 - len(held_out))]
    windows = [turn.forced for item in [*items, *held_out] for turn in item.turns]
    assert all(turn.limit == 0 and turn.forced_weight == 1.0 for item in items for turn in item.turns)
    assert all(window[0] == 9 and len(window) <= 17 for window in windows)
    assert Counter(token for window in windows for token in window[1:]) == Counter(map(ord, text))


def test_every_epoch_holds_every_prompt_once_in_an_order_of_its_own(tmp_path: Path, smol) -> None:
    path = questions(tmp_path / "q.jsonl", 100)
    options = SourceOptions(length=128, seed=3, answer_limit=500, prompt_weight=0.5)
    source = quiet([path], smol, options).sources[0]
    (turn,) = source.item(0).turns
    assert (len(turn.forced) + turn.limit, turn.temperature, turn.forced_weight) == (128, 0.0, 0.5)
    assert smol.tokenizer.decode(turn.forced, skip_special=False).endswith("<|im_start|>assistant\n")
    count = 68  # 32 are held out
    epochs = [[source.item(epoch * count + i).turns[0].forced for i in range(count)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    assert len(set(epochs[0])) == count
    assert set(epochs[0]) == set(epochs[1])
    again = quiet([path], smol, OPTIONS).sources[0]
    assert [again.item(i).turns[0].forced for i in reversed(range(count))] == epochs[0][::-1]
    other = quiet([path], smol, SourceOptions(length=128, seed=4)).sources[0]
    assert [other.item(i).turns[0].forced for i in range(count)] != epochs[0]


def test_held_out_prompts_are_never_trained_on_in_any_source(tmp_path: Path, smol) -> None:
    small = questions(tmp_path / "small.jsonl", 10)
    large = questions(tmp_path / "large.jsonl", 500)
    mixture = quiet([small, large], smol, OPTIONS)
    held_out = {item.turns[0].forced for items in mixture.held_out.values() for item in items}
    assert {name: len(items) for name, items in mixture.held_out.items()} == {small: 5, large: 37}
    trained = {source.item(number).turns[0].forced for source in mixture.sources for number in range(500)}
    assert not held_out & trained
    assert len(held_out | trained) == 500


def test_long_prompts_are_skipped_and_that_is_said_once(tmp_path: Path, smol) -> None:
    rows = [{"question": "word " * (200 if i % 2 else 1) + str(i)} for i in range(100)]
    said: list[str] = []
    mixture = open_mixture([write(tmp_path / "q.jsonl", rows)], smol, OPTIONS, said.append)
    source = mixture.sources[0]
    count = 68  # 32 are held out
    assert all(mixture.item(number).longest <= 128 for number in range(2 * count))
    long = count - len({source.item(number).turns[0].forced for number in range(count)})
    assert long > 20
    (line,) = said
    assert "skipped" in line
    with pytest.raises(DexError, match="too long for a row"):
        quiet([write(tmp_path / "l.jsonl", rows[1::2])], smol, OPTIONS)


class Counting:
    """A source that gives (its name, number) as items."""

    held_out = ()

    def __init__(self, name: str):
        self.name = self.digest = name

    def item(self, number: int):
        return self.name, number


def test_a_mixture_keeps_its_shares_and_uses_every_item_of_a_source_in_order() -> None:
    mixture = Mixture([Counting("a"), Counting("b"), Counting("c")], [1.0, 0.3, 0.005], seed=2)
    items = [mixture.item(number) for number in range(4 * BLOCK)]
    for name in "abc":
        assert [number for source, number in items if source == name] == list(range(sum(s == name for s, _ in items)))
    counts = Counter(name for name, _ in items)
    assert counts["c"] == 4
    assert counts["b"] / counts["a"] == pytest.approx(0.3, abs=0.02)
    assert [mixture.item(number) for number in reversed(range(4 * BLOCK))] == items[::-1]
    assert [Mixture([Counting("a")], [5.0]).item(number)[1] for number in range(600)] == list(range(600))
    with pytest.raises(DexError, match="b is less than 1/256 of the data"):
        Mixture([Counting("a"), Counting("b")], [1.0, 0.001])


def test_a_mixtures_fingerprint_is_of_data_shares_and_seed(tmp_path: Path, smol) -> None:
    path = questions(tmp_path / "q.jsonl", 100)
    one = quiet([path, "self=0.5"], smol, OPTIONS).fingerprint()
    assert one == quiet([path, "self=0.5"], smol, OPTIONS).fingerprint()
    others = [quiet([path, "self"], smol, OPTIONS), quiet([path, "self=0.5"], smol, SourceOptions(length=128, seed=4))]
    questions(tmp_path / "q.jsonl", 101)
    others.append(quiet([path, "self=0.5"], smol, OPTIONS))
    assert len({one, *(other.fingerprint() for other in others)}) == 4


def test_parse_data() -> None:
    parsed = {
        "self": ("self", 1.0),
        "self=0.3": ("self", 0.3),
        "a=b.jsonl": ("a=b.jsonl", 1.0),
        "text:a=b.txt=.5": ("text:a=b.txt", 0.5),
        "datasets:x:train[:10]=2": ("datasets:x:train[:10]", 2.0),
    }
    assert {text: parse_data(text) for text in parsed} == parsed


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ([], "takes sources"),
        (["self=0"], "above 0"),
        (["self", "self=2"], "self is given twice"),
        (["slef"], '"slef" is not understood'),
        (["nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    ],
)
def test_data_that_make_no_mixture(data, says, smol) -> None:
    with pytest.raises(DexError, match=says):
        quiet(data, smol, OPTIONS)


def test_datasets_are_loaded_by_name(monkeypatch, smol) -> None:
    def load_dataset(name, config, split):
        if (name, config, split) != ("owner/name", "main", "test"):
            raise FileNotFoundError("nothing of that name")
        return [{"question": f"Why {i}?"} for i in range(80)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    mixture = quiet(["datasets:owner/name:main:test=2"], smol, OPTIONS)
    assert "Why" in smol.tokenizer.decode(mixture.item(0).turns[0].forced)
    with pytest.raises(DexError, match=r"datasets cannot load gone \(config None, split train\): nothing"):
        quiet(["datasets:gone"], smol, OPTIONS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DexError, match=r"pip install datasets"):
        quiet(["datasets:squad"], smol, OPTIONS)
