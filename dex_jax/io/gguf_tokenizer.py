"""A tokenizer from the vocabulary that a GGUF file carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec import Struct, field

from dex_jax.config import TokenId
from dex_jax.foreign import reading, refuse, typed
from dex_jax.io.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"  # what SentencePiece writes for a space
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# The patterns that Llama 3 and Qwen2 publish in their tokenizer.json; they differ in how many digits make one word.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _PATTERN.format(digits=r"\p{N}{1,3}"), "qwen2": _PATTERN.format(digits=r"\p{N}")}
_KNOWN = ("smollm", *_PATTERNS)


class _Vocabulary(Struct):
    """The keys that are read of those that begin with "tokenizer.ggml."."""

    tokens: list[str] = []
    merges: list[str] = []
    token_type: list[int] = []
    scores: list[float] = []
    model: str = ""
    pre: str = ""
    add_bos_token: bool | None = None
    add_space_prefix: bool = True
    bos_token: TokenId | None = field(name="bos_token_id", default=None)
    eos_token: TokenId | None = field(name="eos_token_id", default=None)
    unk_token: TokenId | None = field(name="unknown_token_id", default=None)
    pad_token: TokenId | None = field(name="padding_token_id", default=None)


def gguf_tokenizer(metadata: dict[str, Any], eos_ids: tuple[int, ...], source: str) -> Tokenizer | None:
    """Build the tokenizer that a GGUF file's metadata describe; return None where they have no vocabulary.

    `eos_ids` end a sequence by the model's configuration; `source` is the file, for errors. Raise DexError for a
    vocabulary of another kind than BPE on bytes or SentencePiece's, or one split by unknown rules.
    """
    prefix, elsewhere = "tokenizer.ggml.", "use the Hugging Face directory of this model"
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    vocabulary = typed(own, _Vocabulary, f"the tokenizer of {source}")
    template = typed(metadata.get("tokenizer.chat_template", ""), str, f"the chat template of {source}") or None
    tokens, model, pre = vocabulary.tokens, vocabulary.model, vocabulary.pre
    if not tokens:
        return None
    on_bytes, known = model == "gpt2", ", ".join(_KNOWN)
    scored = vocabulary.merges if on_bytes else len(vocabulary.scores) == len(tokens)
    kinds = "'gpt2' (BPE on bytes) and 'llama' (SentencePiece)"
    refuse(
        source,
        (model not in ("gpt2", "llama"), f"has a tokenizer of kind {model!r:.60}, and not {kinds}: {elsewhere}"),
        (on_bytes and pre not in _KNOWN, f"splits text by the rules {pre!r:.60}, and not {known}: {elsewhere}"),
        (not scored, f"has a vocabulary without {'merges' if on_bytes else 'scores'}: {elsewhere}"),
    )
    named = {name: getattr(vocabulary, name) for name in _NAMED}
    with reading(f"the tokenizer of {source}", elsewhere):
        return Tokenizer(
            _byte_level_bpe(vocabulary) if on_bytes else _sentencepiece(vocabulary),
            template=template,
            variables={name: tokens[i] for name, i in named.items() if i is not None and i < len(tokens)},
            eos_ids=eos_ids,
            source=source,
        )


def _byte_level_bpe(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, pre = vocabulary.tokens, vocabulary.pre
    backend = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in vocabulary.merges],
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
    # Files older than the flag leave it out for Llama 3, whose tokenizer always begins with BOS.
    return _with_added(backend, vocabulary, begins=pre == "llama-bpe")


def _sentencepiece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """Build SentencePiece's BPE, which first joins the two neighbours that make the token with the best score."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = vocabulary.tokens
    ids = {token: i for i, token in enumerate(tokens)}
    normal = [i for i, kind in enumerate(vocabulary.token_type) if kind == _NORMAL and i < len(tokens)]
    normal.sort(key=lambda i: -vocabulary.scores[i])
    halves = ((tokens[i][:cut], tokens[i][cut:]) for i in normal for cut in range(1, len(tokens[i])))
    merges = [(left, right) for left, right in halves if left in ids and right in ids]
    unknown = None if vocabulary.unk_token is None else tokens[vocabulary.unk_token]
    backend = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    if vocabulary.add_space_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), backend.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return _with_added(backend, vocabulary, begins=True)


def _with_added(backend: tokenizers.Tokenizer, vocabulary: _Vocabulary, begins: bool) -> tokenizers.Tokenizer:
    """Return the tokenizer with special tokens, and with BOS before texts if the file, or else `begins`, says so."""
    from tokenizers import AddedToken, processors

    kinds = list(zip(vocabulary.tokens, vocabulary.token_type, strict=False))
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, kind in kinds if kind == _CONTROL])
    # SentencePiece's are written as normalised text is: with its sign for a space.
    backend.add_tokens([AddedToken(t, normalized=_SPACE in t) for t, kind in kinds if kind == _USER_DEFINED])
    begins = begins if vocabulary.add_bos_token is None else vocabulary.add_bos_token
    if begins and vocabulary.bos_token is not None:
        bos = vocabulary.tokens[vocabulary.bos_token]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary.bos_token)]
        )
    return backend
