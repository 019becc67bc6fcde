"""A tokenizer from the vocabulary that a GGUF file carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dex_jax.errors import DexError
from dex_jax.io.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_CONTROL, _USER_DEFINED = 3, 4
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# The patterns that Llama 3 and Qwen2 publish in their tokenizer.json; they differ in how many digits make one word.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "llama-bpe": _PATTERN.format(digits=r"\p{N}{1,3}"),
    "qwen2": _PATTERN.format(digits=r"\p{N}"),
}
_KNOWN = ("smollm", *_PATTERNS)


def gguf_tokenizer(metadata: dict[str, Any], eos_ids: tuple[int, ...], source: str) -> Tokenizer | None:
    """Builds the tokenizer that a GGUF file describes.

    Args:
      metadata: the file's metadata.
      eos_ids: ids that end a sequence by the model's configuration.
      source: the file, for error messages.

    Returns:
      The tokenizer, or None when the file carries no vocabulary.

    Raises:
      DexError: a vocabulary of another kind than byte-level BPE, or split by rules that are not known.
    """
    meta = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if not meta.get("tokens"):
        return None
    if meta.get("model") != "gpt2":
        raise DexError(
            f"{source} carries a tokenizer of kind {meta.get('model')!r}, and only byte-level BPE ('gpt2') can be "
            "built from a GGUF file: use the Hugging Face directory of this model."
        )
    if meta.get("pre") not in _KNOWN:
        raise DexError(
            f"{source} splits text by the rules {meta.get('pre')!r}, and only {', '.join(_KNOWN)} are known: use the "
            "Hugging Face directory of this model."
        )
    if not meta.get("merges"):
        raise DexError(f"{source} carries a vocabulary without merges: use the Hugging Face directory of this model.")
    tokens = meta["tokens"]
    return Tokenizer(
        _byte_level_bpe(meta),
        template=metadata.get("tokenizer.chat_template"),
        variables={name: tokens[meta[key]] for name, key in _NAMED.items() if key in meta and meta[key] < len(tokens)},
        eos_ids=eos_ids,
        source=source,
    )


def _byte_level_bpe(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, pre = meta["tokens"], meta["pre"]
    merges = [tuple(merge.split(" ")) for merge in meta["merges"]]
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            # Llama 3 takes a word that is in the vocabulary whole, even where its merges would not lead there.
            ignore_merges=pre == "llama-bpe",
        )
    )
    split: pre_tokenizers.PreTokenizer
    if pre == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
    else:
        split = pre_tokenizers.Split(Regex(_PATTERNS[pre]), behavior="isolated")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, meta.get("token_type", ()), strict=False))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in kinds if kind == _USER_DEFINED])
    # Files older than the flag leave it out for Llama 3, whose tokenizer always begins with BOS.
    if meta.get("add_bos_token", pre == "llama-bpe") and "bos_token_id" in meta:
        bos = tokens[meta["bos_token_id"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, meta["bos_token_id"])]
        )
    return backend
