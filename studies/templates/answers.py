"""Which option a generated answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHORTEST_MENTION = 2
"""Letters and digits that an option must have to be found inside a text; a shorter one must be all of it."""


def parse_choice(text: str, labels: Sequence[str], options: Sequence[str]) -> int | None:
    """The option that an answer names, None where it names none or does not settle on one.

    Tried in this order: a label after words such as "the answer is", the last such; a label that the answer begins with
    or consists of; the one option whose text the answer begins with, or else contains, the longest if they contain one
    another. A bare letter counts as a label only where nothing but a mark or the end follows it, as "A" and "I" are
    words too; what is said after "not" is no answer.

    Args:
      text: generated.
      labels: of the options, bare ("A", "1", "iv"); none where they have none.
      options: texts as the prompt shows them.

    Examples:
      >>> parse_choice("The answer is (B), as two is even.", "ABCD", ["one", "two", "three", "five"])
      1
      >>> parse_choice("A man runs.", "AB", ["A man sits.", "He runs."]) is None
      True
    """
    stripped = text.strip().lstrip("*_`\"'")
    lowered = [label.lower() for label in labels]
    if labels:
        one = "|".join(re.escape(label) for label in sorted(lowered, key=len, reverse=True))
        wrapped = rf"[\(\[<]\s*({one})\s*[\)\]>]"
        marked = rf"({one})(?=\s*(?:[.,:](?!\d)|[);\]\n*]|$))"
        said = re.findall(
            rf"\b(?:answer|option|choice|ending|continuation|pick)\b(?:\s+(?:is|would be|number))?\s*:?\s*[*_`\"']*"
            rf"(?:{wrapped}|{marked})",
            stripped.lower(),
        )
        if said:
            return lowered.index(next(part for part in said[-1] if part))
        start = re.match(rf"(?:{wrapped}|{marked})", stripped.lower())
        if start:
            return lowered.index(next(part for part in start.groups() if part))
    plain, shown = _plain(stripped), [_plain(option) for option in options]
    begins = [i for i, option in enumerate(shown) if option and _starts(plain, option)]
    if begins:
        return _longest(begins, shown)
    held = [i for i, option in enumerate(shown) if len(option) >= SHORTEST_MENTION and _holds(plain, option)]
    longest = _longest(held, shown)
    # Of several that are mentioned none is settled on, unless the others are parts of the longest.
    return longest if longest is not None and all(_holds(shown[longest], shown[i]) for i in held) else None


def _longest(among: Sequence[int], shown: Sequence[str]) -> int | None:
    if not among:
        return None
    best = max(among, key=lambda i: len(shown[i]))
    return None if any(shown[i] == shown[best] for i in among if i != best) else best


def _plain(text: str) -> str:
    """Words alone: lower case, one space between, marks only where they stand inside of numbers."""
    return " ".join(re.findall(r"[^\W_]+(?:[.,/^'-][^\W_]+)*|[-+*/=<>]", text.lower()))


def _starts(text: str, option: str) -> bool:
    return text == option or text.startswith(option + " ")


def _holds(text: str, option: str) -> bool:
    return f" {option} " in f" {text} "
