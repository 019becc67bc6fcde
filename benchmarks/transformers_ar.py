"""Time transformers' greedy `generate` on SmolLM2 (float32, batch 1, CPU): the baseline of this project's figures.

    python benchmarks/transformers_ar.py                # tokens/s, for people
    python benchmarks/transformers_ar.py --json         # the same as one JSON object
    python benchmarks/transformers_ar.py --serve        # stays alive: each line "run N" on stdin gives one JSON line,
                                                        # "run N [1, 2, 3]" likewise after these token ids;
                                                        # {"new_tokens": N, "ids": [..], "exit": D, "draft_length": G}
                                                        # too, with assistant_early_exit unless exit is null

With --serve another process can interleave its own measurements with these, so that both see the same machine load.
Needs torch and transformers (the `reference` group).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import smollm2_torch

PROMPT = "Tell me a short story about a clockmaker who is afraid of silence."


def load(threads: int = 2) -> transformers.LlamaForCausalLM:
    """The model in float32 on `threads` CPU threads, never stopping at EOS, warmed up by one short generate."""
    model = smollm2_torch.load_model(threads)
    # Every run then does the same work, without the logits processor that min_new_tokens would add to each step.
    model.generation_config.eos_token_id = None
    time_generate(model, prompt_ids(), 4)
    return model


def prompt_ids() -> list[int]:
    """The fixed prompt in the chat template."""
    return smollm2_torch.Tokenizer().encode_chat(PROMPT)


def time_generate(
    model: transformers.LlamaForCausalLM,
    ids: list[int],
    n: int,
    exit: int | None = None,
    draft_length: int | None = None,
) -> dict:
    """Time one generate of exactly n >= 2 new tokens after `ids`, with `assistant_early_exit=exit` if one is given.

    The prefill, which gives the first token, is timed apart by a generate of one token, so tokens_per_second is
    (n - 1) / decode_seconds.
    """
    prefill, _ = _timed(model, ids, 1)
    options = {}
    if exit is not None:
        config = model.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft_length, "constant"
        config.assistant_confidence_threshold = 0.0
        options = {"assistant_early_exit": exit}
    total, tokens = _timed(model, ids, n, **options)
    return {
        "new_tokens": n,
        "prompt_tokens": len(ids),
        "prefill_seconds": prefill,
        "decode_seconds": total - prefill,
        "tokens_per_second": (n - 1) / (total - prefill),
        "tokens": tokens,
    }


def _timed(model: transformers.LlamaForCausalLM, ids: list[int], n: int, **options) -> tuple[float, list[int]]:
    """Seconds and new tokens of one greedy generate."""
    prompt = torch.tensor([ids])
    start = time.perf_counter()
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=n, **options)
    return time.perf_counter() - start, out[0, len(ids) :].tolist()


def _serve(model: transformers.LlamaForCausalLM) -> None:
    """Answer "run N" and "run N IDS" lines until stdin closes; anything else gets a JSON line with `error`."""
    default = prompt_ids()
    print(json.dumps({"ready": True, **_versions()}), flush=True)
    for line in sys.stdin:
        if line.startswith("{"):
            asked = json.loads(line)
            found = time_generate(model, asked["ids"], asked["new_tokens"], asked["exit"], asked["draft_length"])
            print(json.dumps(found), flush=True)
            continue
        words = line.split(maxsplit=2)
        if len(words) >= 2 and words[0] == "run" and words[1].isdecimal() and int(words[1]) >= 2:
            ids = json.loads(words[2]) if len(words) == 3 else default
            print(json.dumps(time_generate(model, ids, int(words[1]))), flush=True)
        else:
            print(json.dumps({"error": 'expected "run N" with N >= 2, or "run N [ids]"'}), flush=True)


def _versions() -> dict:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens a run, at least 2 (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median is told (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--serve", action="store_true", help='answer "run N" lines on stdin with JSON lines')
    arguments = parser.parse_args()
    if arguments.new_tokens < 2 or arguments.repeats < 1:
        parser.error("--new-tokens must be at least 2 and --repeats at least 1")
    model = load(arguments.threads)
    if arguments.serve:
        _serve(model)
        return
    ids = prompt_ids()
    runs = [time_generate(model, ids, arguments.new_tokens) for _ in range(arguments.repeats)]
    speeds = [run["tokens_per_second"] for run in runs]
    if arguments.json:
        summary = {"tokens_per_second": statistics.median(speeds), "runs": runs}
        print(json.dumps(_versions() | summary))
    else:
        print(
            f"{statistics.median(speeds):.1f} tokens/s (median of {len(speeds)}: {min(speeds):.1f}-{max(speeds):.1f})"
        )


if __name__ == "__main__":
    main()
