"""The eighteen prompts of SmolLM2's goldens, written for this project; nothing is trained or tuned on them.

Short and long ones alternate, so that any six in a row make a ragged batch. One was reworded because its two best
tokens once lay within 5e-6 of max |logit|, close to where float32 itself errs (2e-6): either is a right answer there.
"""

from __future__ import annotations

import json
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "goldens" / "smollm2.json"
PROMPTS: tuple[str, ...] = tuple(each["prompt"] for each in json.loads(FILE.read_text(encoding="utf-8"))["prompts"])
