"""Runs whose counts come of an answer that is known instead of a loop, and the exits that are asked along it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from dex_jax.decoding.methods import Dex
from dex_jax.decoding.resolve import resolve
from dex_jax.errors import DexError
from dex_jax.forced.counts import LayerSkipCount
from dex_jax.forced.run import shared_exits
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.sharding import device_name
from studies.bench.runs import Run, repeated, versions


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


def answer_fields(tokens: list[int], prompt_tokens: int, batch: int, max_new_tokens: int) -> dict[str, Any]:
    """What all lines of an answer have in common: fields of Run."""
    return {
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "batch": batch,
        "max_new_tokens": max_new_tokens,
        "repeated": repeated(tokens),
        "device": device_name(jax.devices()[0]),
        "versions": versions(),
    }


def layerskip_run(count: LayerSkipCount, depth: int, draft_length: int, layers: int, **given: Any) -> Run:
    """The line of LayerSkip(depth, draft_length) on an answer to a model of so many layers; `given`: other fields."""
    return Run(
        "depth",
        "layerskip",
        setting={"exit": depth, "draft_length": draft_length},
        counted="forced",
        exits=count.exits.tolist(),
        depths=[depth, layers],
        rows=draft_length + 1,
        layer_steps=count.layer_steps,
        rounds=count.rounds,
        **given,
    )
