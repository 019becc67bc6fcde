"""The texts to learn from, which a frozen model writes from items in large batches, in files of token ids.

A folder holds about.json, which names the model and the data, and shards of SHARD texts each, in the order of the data.
A shard follows from its number alone, so processes may add to one folder side by side, and what is there is used again.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dex_jax.decoding.generate import generate
from dex_jax.decoding.request import AR
from dex_jax.errors import DexError
from dex_jax.io.whole_files import lock, write_json, write_whole
from dex_jax.language_model import LanguageModel
from dex_jax.training.items import Item, Turn

SHARD = 64
"""Number of texts in a file: some ten thousand tokens."""

BATCH = 32
"""Number of sequences that are decoded at a time."""

WAIT = 0.5
"""Seconds between two looks for a shard that another process makes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """One text, and how much each of its tokens counts.

    Attributes:
      token: [n] int32.
      weight: [n] float32, how much predicting the token after each one counts. After the last one that is what an
        end token, or a further token of the same turn, would count.
      answer: index of the first token that the model wrote in the last turn; 1 in a given text.
    """

    token: np.ndarray
    weight: np.ndarray
    answer: int

    @property
    def learnt(self) -> int:
        """The number of tokens with a weight above 0."""
        return int(np.sum(self.weight > 0))


def write_texts(
    lm: LanguageModel, items: Sequence[Item], seeds: Sequence[int], heard: Callable[[], None] = lambda: None
) -> list[Text]:
    """Let the model write the free tokens of each item; others of its batch change a text only by the order of sums.

    Args:
      lm: the model.
      items: at least one.
      seeds: of each item's sampled tokens.
      heard: called after every batch.
    """
    tokens: list[list[int]] = [[] for _ in items]
    weights: list[list[float]] = [[] for _ in items]  # how much predicting each of these tokens counts
    answers = [1] * len(items)
    for number in range(max(len(item.turns) for item in items)):
        asked: dict[tuple[float, float], list[int]] = {}
        for i, item in enumerate(items):
            if number < len(item.turns):
                turn = item.turns[number]
                tokens[i] += turn.forced
                weights[i] += [turn.forced_weight] * len(turn.forced)
                if turn.limit:
                    answers[i] = len(tokens[i])
                    asked.setdefault((turn.temperature, turn.top_p), []).append(i)
        for how, members in asked.items():
            limits = [items[i].turns[number].limit for i in members]
            prompts, own = [tokens[i] for i in members], [seeds[i] for i in members]
            for i, free in zip(members, _continued(lm, prompts, limits, how, own, heard), strict=True):
                tokens[i] += free
                weights[i] += [1.0] * len(free)
    return [
        Text(np.array(token, np.int32), np.array([*weight[1:], _after(item.turns[-1])], np.float32), answer)
        for item, token, weight, answer in zip(items, tokens, weights, answers, strict=True)
    ]


def _after(turn: Turn) -> float:
    return 1.0 if turn.limit else turn.forced_weight


def _continued(
    lm: LanguageModel,
    prompts: list[list[int]],
    limits: list[int],
    how: tuple[float, float],
    seeds: Sequence[int],
    heard: Callable[[], None],
) -> list[list[int]]:
    """Let the model go on after each prompt; an end token is left out."""
    temperature, top_p = how
    found: list[list[int]] = []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p} if temperature else {}
        out = generate(
            lm, prompts[part], method=AR(), max_new_tokens=max(limits[part]), seed=list(seeds[part]), **options
        )
        rows = zip(out.tokens, out.lengths, limits[part], strict=True)
        said = [[int(token) for token in row[: min(length, limit)]] for row, length, limit in rows]
        found += [each[:-1] if each and each[-1] in lm.eos_ids else each for each in said]
        heard()
    return found


class Answers:
    """The texts of a folder, which are written when they are requested.

    Args:
      lm: the model.
      item: the item of each number from 0, the same at every call.
      folder: made if need be.
      about: plain JSON that decides the texts beside the model.
      seed: of what the model samples.
      heard: called after every batch that is decoded.

    Raises:
      DexError: the folder holds texts of another model or other data, or cannot be written.
    """

    def __init__(
        self,
        lm: LanguageModel,
        item: Callable[[int], Item],
        folder: str | Path,
        about: dict[str, Any],
        seed: int,
        heard: Callable[[], None] = lambda: None,
    ):
        self._lm, self._item, self._seed, self.folder, self._heard = lm, item, seed, Path(folder), heard
        about = {"model": lm.fingerprint, "weights": lm.weights_kind, "seed": seed, "shard": SHARD, **about}
        file = self.folder / "about.json"
        if not file.is_file():
            write_json(file, about)
        try:
            there = json.loads(file.read_text("utf-8"))
        except ValueError as error:
            raise DexError(f"{file} is damaged: remove {self.folder}, and its texts are made again") from error
        if changed := [name for name in about if there.get(name) != about[name]]:
            raise DexError(
                f"{self.folder} holds texts of another model or other data (another {', '.join(changed)}): name "
                "another folder for them"
            )

    def at_least(self, tokens: int, tell: Callable[[int], None] = lambda there: None) -> list[Text]:
        """Return the first shards of texts with so many tokens in all; `tell` is called with how many are there."""
        texts: list[Text] = []
        there = 0
        for shard in self.shards():
            texts += shard
            there += sum(len(text.token) for text in shard)
            tell(min(there, tokens))
            if there >= tokens:
                return texts
        raise AssertionError("shards never end")

    def shards(self) -> Iterator[list[Text]]:
        """Yield one shard after the other without end.

        Raises:
          DexError: the first one holds nothing to learn from.
        """
        number = ahead = 0
        while True:
            file = self._file(number)
            if not file.is_file() and not self._made(number):
                # Another process makes this one: meanwhile this one makes a later shard.
                ahead = max(ahead, number) + 1
                if not self._made(ahead):
                    time.sleep(WAIT)
                continue
            texts = _read(file)
            if not number and not any(text.learnt for text in texts):
                raise DexError("the model's answers hold nothing to learn from: give other prompts with --data")
            yield texts
            number += 1

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.npz"

    def _made(self, number: int) -> bool:
        """Make a shard unless it is there, and return whether it is there now: not if another process makes it."""
        with (self.folder / f"{number:06}.lock").open("w") as opened:
            try:
                lock(opened)
            except BlockingIOError:
                return False
            if not self._file(number).is_file():
                numbers = range(number * SHARD, (number + 1) * SHARD)
                items, seeds = [self._item(i) for i in numbers], [(self._seed << 32) + i for i in numbers]
                write_whole(self._file(number), _packed(write_texts(self._lm, items, seeds, self._heard)))
        (self.folder / f"{number:06}.lock").unlink(missing_ok=True)
        return True


def _packed(texts: Sequence[Text]) -> bytes:
    file = io.BytesIO()
    fields: Any = {name: np.concatenate([getattr(text, name) for text in texts]) for name in ("token", "weight")}
    fields["lengths"] = np.array([len(text.token) for text in texts], np.int32)
    fields["answers"] = np.array([text.answer for text in texts], np.int32)
    np.savez_compressed(file, **fields)
    return file.getvalue()


def _read(file: Path) -> list[Text]:
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
            ends = np.cumsum(found["lengths"])[:-1]
            parts = (np.split(found["token"], ends), np.split(found["weight"], ends), found["answers"])
            return [Text(token, weight, int(answer)) for token, weight, answer in zip(*parts, strict=True)]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DexError(f"{file} is damaged: remove it, and its texts are made again") from error
