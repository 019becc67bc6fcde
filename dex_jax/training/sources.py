"""The sources of the items to learn from: what the model writes itself, prompts, given texts, and mixtures.

Every source is a sequence without end that is the same in every run: item i follows from i and a seed alone, so a
position in the data is one number. Letters: S tokens of the longest item.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dex_jax.errors import DexError
from dex_jax.language_model import LanguageModel, Outline
from dex_jax.prompt_files import Prompt, parse_dataset, read_dataset, read_prompts, read_texts, standard_library_prompts
from dex_jax.training.items import Item, Turn

Model = LanguageModel | Outline

SHORTEST_ANSWER = 16
"""A prompt that leaves no room for this many tokens of answer is skipped."""

PROMPT_TEMPERATURE, PROMPT_TOP_P = 1.0, 0.95
"""The temperature and top-p of prompts that the model writes itself, and of texts without a chat template."""

HELD_OUT_SHARE = 0.02

_MARK = "dexmarker"

BLOCK = 256
"""Number of items over which a mixture keeps its shares; then the same turns begin anew."""


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """The options for making items.

    Attributes:
      length: S; longer prompts are skipped, answers end there.
      seed: of shuffles and choices between kinds of items.
      answer_limit: most tokens of an answer, which is greedy.
      prompt_limit: most tokens of a prompt that the model writes itself.
      starts: texts that such prompts begin with, one of them each; "" for none.
      prompt_weight: how much predicting a token of a prompt counts. Tokens of given texts count 1.
      held_out_least: at least so many prompts of a source are never trained on, HELD_OUT_SHARE of them if that is more,
        and half of them at most.
    """

    length: int
    seed: int = 0
    answer_limit: int = 160
    prompt_limit: int = 64
    starts: tuple[str, ...] = ("",)
    prompt_weight: float = 0.0
    held_out_least: int = 32


class SelfSource:
    """A source of prompts that the model writes and answers, or of texts after its BOS if it has no chat template.

    Held-out items have the same scripts and differ by what is sampled, so run them with another seed.

    Raises:
      DexError: the chat template leaves no room in S, hides the user's text, or there is no token to begin with.
    """

    name = "self"

    def __init__(self, model: Model, options: SourceOptions):
        self._options, tokenizer = options, model.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            self._scripts = [_text_script(model, options)]
            return
        parts = tokenizer.render([{"role": "user", "content": _MARK}]).split(_MARK)
        if len(parts) != 2:
            raise DexError(
                f"the chat template of {model.source} does not show the user's text once: give prompts with --data"
            )
        rest = tuple(tokenizer.encode(parts[1], add_special=False))
        headers = [tuple(tokenizer.encode(parts[0] + start, add_special=False)) for start in options.starts or ("",)]
        self._scripts = [self._chat_script(header, rest) for header in headers]

    def _chat_script(self, header: tuple[int, ...], rest: tuple[int, ...]) -> tuple[Turn, ...]:
        o = self._options
        room = o.length - len(header) - len(rest)
        if room < 2:
            raise DexError(f"a length of {o.length} tokens leaves no room beside the chat template: raise it")
        limit = min(o.prompt_limit, room // 2)
        prompt = Turn(header, limit, PROMPT_TEMPERATURE, PROMPT_TOP_P, o.prompt_weight)
        return prompt, Turn(rest, min(o.answer_limit, room - limit), forced_weight=o.prompt_weight)

    def item(self, number: int) -> Item:
        """Return the item of one of the starts, drawn with the seed and the number."""
        return Item(self._scripts[np.random.default_rng([self._options.seed, number]).integers(len(self._scripts))])

    @property
    def held_out(self) -> list[Item]:
        """The held-out items, `held_out_least` of them."""
        return [self.item(number) for number in range(self._options.held_out_least)]

    @property
    def digest(self) -> str:
        """The digest of the scripts."""
        return digest_of(repr(self._scripts))


class ListSource:
    """A source of the entries of a list, each once an epoch, shuffled anew for every epoch.

    Args:
      name: what users write.
      entries: prompts or windows of tokens.
      make: (entry, item number) -> item, or None when it is too long.
      held_out: digests (`entry_digest`) of entries never to be trained on.
      seed: of the shuffles.
      tell: called once, with a sentence, when an entry is skipped.

    Raises:
      DexError: nothing is left to train on, here or, when all that is left is too long, from `item`.
    """

    def __init__(
        self,
        name: str,
        entries: Sequence[Any],
        make: Callable[[Any, int], Item | None],
        held_out: frozenset[str],
        seed: int,
        tell: Callable[[str], None],
    ):
        self.name, self._make, self._seed, self._tell = name, make, seed, tell
        digests = [entry_digest(entry) for entry in entries]
        self.digest = digest_of("".join(digests))
        self._held_out = [entry for entry, digest in zip(entries, digests, strict=True) if digest in held_out]
        self._entries = [entry for entry, digest in zip(entries, digests, strict=True) if digest not in held_out]
        self._too_long: set[int] = set()
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)
        if not self._entries:
            raise DexError(f"{name} has nothing left to train on beside what is held out: give it more prompts")

    def item(self, number: int) -> Item:
        """Return the item at that place in the shuffled epochs, or the next that fits; raise DexError if none fits."""
        count = len(self._entries)
        epoch, place = divmod(number, count)
        order = self._order(epoch)
        for step in range(count):
            index = int(order[(place + step) % count])
            item = None if index in self._too_long else self._make(self._entries[index], number)
            if item is not None:
                return item
            if not self._too_long:
                self._tell(f"{self.name}: prompts too long for a row are skipped")
            self._too_long.add(index)
        raise DexError(f"every entry of {self.name} is too long for a row: raise the length or give shorter ones")

    @property
    def held_out(self) -> list[Item]:
        """The items of held-out entries that are not too long."""
        made = [self._make(entry, number) for number, entry in enumerate(self._held_out)]
        return [item for item in made if item is not None]

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._entries))


class Mixture:
    """A sequence of items without end from several sources in given shares.

    `weights` are relative shares, one a source; `seed` decides the order in which sources take turns.

    Raises:
      DexError: no sources, equal names, or weights that are missing, not above 0 or far too small.
    """

    def __init__(self, sources: Sequence[SelfSource | ListSource], weights: Sequence[float], seed: int = 0):
        if not sources or len(weights) != len(sources):
            raise DexError(f"a mixture takes sources with a weight each, not {len(sources)} with {len(weights)}")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise DexError(f"the weights of data must be above 0, not {', '.join(map(str, weights))}")
        names = [source.name for source in sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise DexError(f"{twice[0]} is given twice: give it once, with a larger weight")
        turns = np.searchsorted(np.cumsum(weights) / sum(weights), (np.arange(BLOCK) + 0.5) / BLOCK)
        self._counts = np.bincount(turns, minlength=len(sources))
        if not self._counts.all():
            raise DexError(f"{names[self._counts.argmin()]} is less than 1/{BLOCK} of the data: raise its weight")
        self.sources, self._seed = tuple(sources), seed
        self._turns = np.random.default_rng(seed).permutation(turns)  # of each block of items, by the source
        self._ranks = [int(np.sum(self._turns[:i] == source)) for i, source in enumerate(self._turns)]

    def item(self, number: int) -> Item:
        """Return the item of a number from 0, the same at every call."""
        block, within = divmod(number, BLOCK)
        source = self._turns[within]
        return self.sources[source].item(block * int(self._counts[source]) + self._ranks[within])

    @property
    def held_out(self) -> dict[str, list[Item]]:
        """The items that are never trained on, by the name of their source."""
        return {source.name: source.held_out for source in self.sources}

    def fingerprint(self) -> str:
        """Return a short hexadecimal digest of the data, their shares and their order."""
        shares = zip(self.sources, self._counts.tolist(), strict=True)
        parts = [(source.name, source.digest, count) for source, count in shares]
        return digest_of(json.dumps([parts, self._seed]))[:16]


def open_mixture(data: Sequence[str], model: Model, options: SourceOptions, tell: Callable[[str], None]) -> Mixture:
    """Open the mixture that --data names, in the tokens of a model; `tell` is called with what users should know.

    `data` names each source: "self", FILE (.jsonl, .json, .txt, also with .gz: prompts), "text:FILE" (given texts),
    "datasets:NAME[:CONFIG][:SPLIT]" or "python-stdlib", with "=WEIGHT" after it or the weight 1. Prompts held out of
    one source are held out of all.

    Raises:
      DexError: a source is not understood, cannot be read, or does not fit the model.
    """
    specs = [parse_data(text) for text in data]
    read = {name: _read_entries(name, model, options) for name, _ in specs if name != "self"}
    held_out = frozenset(
        digest for entries in read.values() for digest in held_out_digests(entries, options.held_out_least)
    )
    sources: list[SelfSource | ListSource] = []
    for name, _ in specs:
        if name == "self":
            sources.append(SelfSource(model, options))
            continue
        given = name.startswith("text:")
        make = _given_item if given else functools.partial(_prompt_item, model, options)
        sources.append(ListSource(name, read[name], make, held_out, options.seed, tell))
    mixture = Mixture(sources, [weight for _, weight in specs], options.seed)
    for source in sources:
        source.item(0)  # raises now, before the training, where nothing can be encoded
    return mixture


def parse_data(text: str) -> tuple[str, float]:
    """Split "NAME[=WEIGHT]" into (name, weight), with the weight 1 by default."""
    found = re.fullmatch(r"(.+)=([0-9]*\.?[0-9]+)", text)
    return (found[1], float(found[2])) if found else (text, 1.0)


def entry_digest(entry: Any) -> str:
    """Return the digest of a prompt (text or messages) or a window of tokens, which decides whether it is held out."""
    return digest_of(entry if isinstance(entry, str) else json.dumps(entry, sort_keys=True))


def held_out_digests(entries: Sequence[Any], least: int) -> list[str]:
    """Return the smallest digests of the entries, so that the held-out split depends on the prompts alone."""
    digests = sorted({entry_digest(entry) for entry in entries})
    return digests[: min(max(least, math.ceil(HELD_OUT_SHARE * len(digests))), len(digests) // 2)]


def _read_entries(name: str, model: Model, options: SourceOptions) -> Sequence[Any]:
    if name == "python-stdlib":
        return standard_library_prompts()
    if name.startswith("datasets:"):
        return read_dataset(*parse_dataset(name.removeprefix("datasets:")))
    if name.startswith("text:"):
        return _windows(_encoded(read_texts(name.removeprefix("text:")), model), model, options.length)
    return read_prompts(name)


def _encoded(texts: Sequence[str], model: Model) -> list[list[int]]:
    if model.tokenizer is None:
        raise DexError(f"{model.source} has no tokenizer, so texts cannot be used: use self")
    return [model.tokenizer.encode(text, add_special=False) for text in texts]


def _windows(texts: Sequence[list[int]], model: Model, length: int) -> list[tuple[int, ...]]:
    """Cut texts into windows of at most `length` tokens, each after what the tokenizer puts before a sequence."""
    before = [] if model.tokenizer is None else model.tokenizer.encode("")
    room = length - len(before)
    windows = []
    for text in texts:
        tokens = text[len(before) :] if text[: len(before)] == before else text
        windows += [(*before, *tokens[at : at + room]) for at in range(0, len(tokens), room)]
    return windows


def _given_item(window: tuple[int, ...], number: int) -> Item:
    del number
    return Item((Turn(window, forced_weight=1.0),))


def _prompt_item(model: Model, options: SourceOptions, prompt: Prompt, number: int) -> Item | None:
    tokens = tuple(model.encode(prompt))
    room = options.length - len(tokens)
    if room < min(SHORTEST_ANSWER, options.answer_limit):
        return None
    return Item((Turn(tokens, min(options.answer_limit, room), forced_weight=options.prompt_weight),))


def _text_script(model: Model, options: SourceOptions) -> tuple[Turn, ...]:
    begins = model.config.bos_id if model.config.bos_id is not None else next(iter(model.eos_ids), None)
    if begins is None:
        raise DexError(f"{model.source} has no BOS and no EOS to begin a text with: give prompts with --data")
    return (Turn((begins,), options.length - 1, PROMPT_TEMPERATURE, PROMPT_TOP_P),)


def digest_of(text: str) -> str:
    """Return the hexadecimal SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
