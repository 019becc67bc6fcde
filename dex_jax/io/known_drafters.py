"""What others have published that drafts for models on the hub, as one table."""

from __future__ import annotations

import sys

from dex_jax.io.hub import ALIASES

KNOWN: dict[str, dict[str, str]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        "eagle3": "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
        "model": "meta-llama/Llama-3.2-1B-Instruct",
    },
    "meta-llama/Llama-3.2-3B-Instruct": {"model": "meta-llama/Llama-3.2-1B-Instruct"},
    "Qwen/Qwen3-1.7B": {"eagle3": "AngelSlim/Qwen3-1.7B_eagle3", "model": "Qwen/Qwen3-0.6B"},
    "Qwen/Qwen3-4B": {"eagle3": "AngelSlim/Qwen3-4B_eagle3", "model": "Qwen/Qwen3-0.6B"},
    "Qwen/Qwen3-8B": {"eagle3": "RedHatAI/Qwen3-8B-speculator.eagle3", "model": "Qwen/Qwen3-0.6B"},
    "Qwen/Qwen3-14B": {"eagle3": "RedHatAI/Qwen3-14B-speculator.eagle3", "model": "Qwen/Qwen3-0.6B"},
    "Qwen/Qwen3-32B": {"eagle3": "RedHatAI/Qwen3-32B-speculator.eagle3", "model": "Qwen/Qwen3-1.7B"},
    "Qwen/Qwen2.5-1.5B-Instruct": {"model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "Qwen/Qwen2.5-7B-Instruct": {"model": "Qwen/Qwen2.5-0.5B-Instruct"},
    "HuggingFaceTB/SmolLM2-360M-Instruct": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": {"model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "google/gemma-3-1b-it": {"model": "google/gemma-3-270m-it"},
    "google/gemma-3-4b-it": {"model": "google/gemma-3-270m-it"},
    "facebook/layerskip-llama2-7B": {"shared": "shared"},
    "facebook/layerskip-llama3-8B": {"shared": "shared"},
    "facebook/layerskip-llama3.2-1B": {"shared": "shared"},
    "facebook/layerskip-codellama-7B": {"shared": "shared"},
}
"""Hub id -> kind -> repository: an EAGLE-3 head, a small model of the same vocabulary, or the model's own head at every
depth, which it was trained for."""

_HOW = {
    "eagle3": "the EAGLE-3 head {} (exits=, --exits)",
    "model": "the small model {} (draft_model=, --draft-model)",
    "shared": "its own head at every depth (exits='{0}', --exits {0})",
}


def known_drafters(source: str) -> str | None:
    """One line on what drafts for a model by its hub id or alias, and how to use it; None where nothing is known."""
    name = ALIASES.get(str(source).lower(), str(source))
    found = KNOWN.get(name)
    if found is None:
        return None
    ways = [_HOW[kind].format(repository) for kind, repository in found.items()]
    return f"drafters known for {name}: {'; '.join(ways)}"


_SAID: set[str] = set()


def say_known_drafters(source: str) -> None:
    """Prints `known_drafters` on stderr, once in a process for a model."""
    line = known_drafters(source)
    if line is not None and line not in _SAID:
        _SAID.add(line)
        print(line, file=sys.stderr)
