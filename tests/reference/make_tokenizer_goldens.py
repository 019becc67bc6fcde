"""Writes tests/goldens/tokenizer_smollm2.json with transformers' tokenizer, for the texts and chats that it holds.

    uv run --group reference python tests/reference/make_tokenizer_goldens.py

`transformers_differs` lists the texts on which the step that splits digits off matters (see smollm2_torch).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import smollm2_torch

TARGET = Path(__file__).resolve().parents[1] / "goldens" / "tokenizer_smollm2.json"


def golden() -> dict:
    """The file's content, encoded anew."""
    kept = json.loads(TARGET.read_text(encoding="utf-8"))
    as_converted, tokenizer = (smollm2_torch.load_tokenizer(digits) for digits in (False, True))
    texts = [{"text": each["text"], "ids": tokenizer(each["text"]).input_ids} for each in kept["texts"]]
    chats = []
    for chat in kept["chats"]:
        asked = {name: chat[name] for name in ("messages", "add_generation_prompt")}
        ids = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        chats.append(asked | {"ids": ids["input_ids"]})
    differ = [each["text"] for each in texts if as_converted(each["text"]).input_ids != each["ids"]]
    return {"transformers": transformers.__version__, "texts": texts, "chats": chats, "transformers_differs": differ}


def _value(value: object) -> str:
    """JSON with one entry a line."""
    if isinstance(value, list):
        return "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    lines = [f'"{key}": {_value(value)}' for key, value in golden().items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
