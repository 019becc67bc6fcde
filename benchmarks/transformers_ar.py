"""transformers' greedy `generate` on SmolLM2-135M (float32, batch 1, CPU), as a process that others ask.

    python benchmarks/transformers_ar.py --serve

Every line on stdin, {"new_tokens": N, "ids": [..]}, gives one JSON line. The process that asks measures in between, so
that both see the same machine: benchmarks/outside.py does. Needs torch and transformers (the `reference` group).
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import torch
import transformers
from serving import arguments, serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import smollm2_torch


def timed(model: transformers.LlamaForCausalLM, ids: list[int], n: int) -> tuple[float, list[int]]:
    """Seconds and new tokens of one greedy generate."""
    prompt = torch.tensor([ids])
    begin = time.perf_counter()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=n)
    return time.perf_counter() - begin, out[0, len(ids) :].tolist()


def answer(model: transformers.LlamaForCausalLM, ids: list[int], new_tokens: int) -> dict:
    """One generate; the prefill, which gives the first token, is timed apart by a generate of one token."""
    prefill, tokens = timed(model, ids, 1)
    total = prefill
    if new_tokens > 1:
        total, tokens = timed(model, ids, new_tokens)
    return {"tokens": tokens, "prefill_seconds": prefill, "decode_seconds": total - prefill}


def main() -> None:
    args = arguments(__doc__, action="store_true")
    model = smollm2_torch.load_model(args.threads)
    # Every run then does the same work, without the logits processor that min_new_tokens would add to each step.
    model.generation_config.eos_token_id = None
    timed(model, [1, 2, 3, 4], 4)
    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    serve({**about, "threads": torch.get_num_threads(), "dtype": "float32"}, functools.partial(answer, model))


if __name__ == "__main__":
    main()
