"""What LayerSkip counts on answers that are known, without its loop, and the exits that are asked along them.

Letters: n tokens of a text, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dex_jax.config import ExitsConfig
from dex_jax.decoding.methods import Dex
from dex_jax.decoding.record import PREFILL_EXIT
from dex_jax.decoding.resolve import resolve
from dex_jax.errors import DexError
from dex_jax.forced.asks import Ask, known_as
from dex_jax.forced.run import Forced, shared_exits
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class LayerSkipCount:
    """LayerSkip on one text.

    Attributes:
      rounds: verifications.
      layer_steps: layers run one after the other. Drafts that follow a wrong one are counted as if none of them were
        an EOS, which would end the drafting: never less than the loop counts, and with rounds of g tokens nearly always
        the same.
      exits: [n] as Stats.exits, 1 for a drafted token and 2 for others.
      closest: [n] float as of DexCount.
    """

    rounds: int
    layer_steps: int
    exits: np.ndarray
    closest: np.ndarray


def layerskip_asks(depth: int, draft_length: int, exits: ExitsConfig, layers: int) -> tuple[Ask, ...]:
    """All that LayerSkip's exit can be asked: the row of the i-th draft lies i behind the root, at the same depth."""
    found = {known_as(layerskip_ask(depth, i, layers), exits, layers) for i in range(draft_length)}
    return tuple(sorted(found))


def layerskip_ask(depth: int, drafted: int, layers: int) -> Ask:
    """What LayerSkip's exit is asked behind so many drafts."""
    return Ask(depth, depth if drafted else layers, drafted + 1)


def layerskip_counts(
    forced: Forced, depth: int, draft_length: int, max_new_tokens: int, eos_ids: Sequence[int]
) -> list[LayerSkipCount]:
    """LayerSkip(depth, draft_length) on each text.

    `forced` has the asks of `layerskip_asks`. Rounds near `max_new_tokens` draft less; `eos_ids` are never drafted.
    """
    places = [forced.place(layerskip_ask(depth, i, forced.layers)) for i in range(draft_length)]
    counts, start = [], 0
    for count in forced.lengths:
        own = slice(start, start + count)
        best, gap, text = forced.said.best[own, :, 0], forced.said.gap[own, :, 0], forced.target[own]
        start += count
        exits, closest = np.full(count, PREFILL_EXIT, np.int32), np.ones(count)
        emitted, rounds, steps = 1, 0, 0
        while emitted < count:
            rounds += 1
            room = min(draft_length, max_new_tokens - emitted - 1)
            drafted = accepted = 0
            while drafted < room:
                at, place = emitted + drafted, places[drafted]
                closest[at] = gap[at, place]
                if best[at, place] in eos_ids:
                    break
                drafted += 1
                if best[at, place] != text[at]:
                    drafted = room  # of what follows a wrong draft the text knows nothing
                    break
                accepted += 1
                if at + 1 == count:
                    drafted = room  # past the text's end likewise
                    break
            exits[emitted : emitted + accepted] = 1
            exits[emitted + accepted : emitted + accepted + 1] = 2
            emitted += accepted + 1
            steps += drafted * depth + forced.layers
        counts.append(LayerSkipCount(rounds, steps, exits, closest))
    return counts


def exits_at(lm: LanguageModel, exits: Any, depths: Sequence[int]) -> tuple[TrainedExits, str]:
    """(exits at all of these depths, where they are from); "shared" are the model's own head.

    Raises:
      DexError: exits that cannot be read, or that do not stand at all of these depths, ascending and below L.
    """
    method = Dex(depths=(*depths, lm.config.num_layers), draft=False)
    found = resolve(method, exits, lm.config, lm.fingerprint)
    if found.exits is not None:
        return found.exits, str(found.source)
    if exits != "shared":
        raise DexError(f"the exits do not serve the depths {', '.join(map(str, depths))}: {' '.join(found.remarks)}")
    return shared_exits(lm, tuple(depths)), "shared"
