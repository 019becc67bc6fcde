"""llama.cpp's greedy decoding of a GGUF file on the CPU, as a process that others ask (benchmarks/outside.py).

    python benchmarks/llama_ar.py --serve FILE

Every line on stdin, {"new_tokens": N, "ids": [..]}, gives one JSON line. Needs llama-cpp-python; what it was built
with decides how fast it is: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import llama_cpp
import numpy as np
from serving import arguments, serve


def answer(model: llama_cpp.Llama, ids: list[int], new_tokens: int) -> dict[str, Any]:
    """One greedy answer, which no end of text ends; the first token is timed apart."""
    model.reset()
    begin = time.perf_counter()
    model.eval(ids)
    tokens = [best(model)]
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        model.eval(tokens[-1:])
        tokens.append(best(model))
    return {"tokens": tokens, "prefill_seconds": first - begin, "decode_seconds": time.perf_counter() - first}


def best(model: llama_cpp.Llama) -> int:
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, (model.n_vocab(),))))


def main() -> None:
    args = arguments(__doc__, metavar="FILE")
    threads = {"n_threads": args.threads, "n_threads_batch": args.threads}
    model = llama_cpp.Llama(args.serve, n_ctx=2048, verbose=False, flash_attn=False, **threads)
    answer(model, [1, 2, 3, 4], 4)
    about = {"llama-cpp-python": llama_cpp.__version__, "threads": args.threads}
    serve(about, functools.partial(answer, model))


if __name__ == "__main__":
    main()
