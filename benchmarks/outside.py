"""The greedy decoding of other libraries on the CPU, in a process of another Python, on the same weights.

The process is this file, `PYTHON benchmarks/outside.py FILE`, and answers each line {"new_tokens": N, "ids": [..]} on
stdin with a JSON line. A .gguf file is llama.cpp's, best built with CMAKE_ARGS=-DGGML_NATIVE=ON pip install
llama-cpp-python; "smollm2-135m" is that of transformers on torch in float32. Neither stops at an EOS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Outside:
    """A worker process that runs one `generate` at a time; `versions` are of its libraries.

    Raises:
      DexError: the other Python cannot run it.
    """

    def __init__(self, python: str, model: str):
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([python, __file__, model], **pipes)
        self.versions = self._answer()

    def run(self, ids: list[int], new_tokens: int) -> Any:
        """Run one greedy `generate`: {"tokens", "prefill_seconds", "decode_seconds"}."""
        print(json.dumps({"new_tokens": new_tokens, "ids": ids}), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        from dex_jax.errors import DexError

        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("{"):
            self.process.communicate()  # ends it, and closes its pipes
            raise DexError(f"the other Python gives no answer ({line.strip()}): does it have what it should run?")
        return json.loads(line)


def llama(file: str, threads: int) -> tuple[dict[str, Any], Callable[[list[int], int], dict[str, Any]]]:
    """Return (versions, the function that decodes) of llama.cpp."""
    import llama_cpp
    import numpy as np

    model = llama_cpp.Llama(file, n_ctx=2048, verbose=False, n_threads=threads, n_threads_batch=threads)

    def step(ids: list[int]) -> int:
        model.eval(ids)
        logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        return int(np.argmax(np.ctypeslib.as_array(logits, (model.n_vocab(),))))

    def answer(ids: list[int], new_tokens: int) -> dict[str, Any]:
        model.reset()
        started = time.perf_counter()
        tokens = [step(ids)]
        first = time.perf_counter()
        while len(tokens) < new_tokens:
            tokens.append(step(tokens[-1:]))
        return {"tokens": tokens, "prefill_seconds": first - started, "decode_seconds": time.perf_counter() - first}

    return {"llama-cpp-python": llama_cpp.__version__}, answer


def transformers(threads: int) -> tuple[dict[str, Any], Callable[[list[int], int], dict[str, Any]]]:
    """Return (versions, the function that decodes) of transformers; a call of its own times the first token."""
    import torch
    import transformers

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from reference import smollm2_torch

    model = smollm2_torch.load_model(threads)
    model.generation_config.eos_token_id = None  # without the processor that min_new_tokens would add to each step

    def timed(ids: list[int], new_tokens: int) -> tuple[float, list[int]]:
        prompt, started = torch.tensor([ids]), time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens)
        return time.perf_counter() - started, out[0, len(ids) :].tolist()

    def answer(ids: list[int], new_tokens: int) -> dict[str, Any]:
        (prefill, _), (total, tokens) = timed(ids, 1), timed(ids, new_tokens)
        return {"tokens": tokens, "prefill_seconds": prefill, "decode_seconds": max(total - prefill, 1e-9)}

    return {"torch": torch.__version__, "transformers": transformers.__version__}, answer


if __name__ == "__main__":
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    versions, answer = transformers(cores) if sys.argv[1] == "smollm2-135m" else llama(sys.argv[1], cores)
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
