"""transformers as a contender: how its process is asked, and what is told when that fails."""

from __future__ import annotations

import sys

import pytest
from outside import Outside

from dex_jax.errors import DexError

WORKER = """
import json, sys
print(json.dumps({"ready": True, "torch": "9.9", "transformers": "8.8", "threads": 2, "dtype": "float32"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["new_tokens"] > 50:
        print(json.dumps({"error": "too many"}), flush=True)
        continue
    tokens = [7] * asked["new_tokens"]
    print(json.dumps({"tokens": tokens, "prefill_seconds": 0.5, "decode_seconds": 2.0}), flush=True)
"""


def test_it_is_asked_for_tokens_and_gives_a_line(tmp_path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER, encoding="utf-8")
    outside = Outside(sys.executable, "smollm2-135m", worker)
    answer = outside.run([1, 2], 5)
    assert (answer["tokens"], answer["prefill_seconds"], answer["decode_seconds"]) == ([7] * 5, 0.5, 2.0)
    assert (outside.versions["torch"], outside.versions["transformers"]) == ("9.9", "8.8")
    assert outside.run([1], 3)["tokens"] == [7] * 3
    with pytest.raises(DexError, match="too many"):
        outside.run([1], 51)
    outside.close()


def test_what_cannot_run_is_told(tmp_path) -> None:
    with pytest.raises(DexError, match="compares with smollm2-135m alone, not with other"):
        Outside(sys.executable, "other")
    with pytest.raises(DexError, match="needs a checkout of the repository"):
        Outside(sys.executable, "smollm2-135m", tmp_path / "none.py")
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit(3)", encoding="utf-8")
    with pytest.raises(DexError, match="ended with code 3: does that Python have torch and transformers"):
        Outside(sys.executable, "smollm2-135m", worker)
    with pytest.raises(DexError, match="does not start"):
        Outside(str(tmp_path / "python"), "smollm2-135m", worker)
