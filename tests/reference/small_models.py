"""Small random models of the library's own architecture, and the same models as the twin sees them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import dex_jax
from dex_jax.config import ExitsConfig, LayerKind, ModelConfig
from dex_jax.decoding.check import compare
from dex_jax.decoding.program import CompiledFunction
from dex_jax.decoding.session import Session
from dex_jax.io.exits_file import TrainedExits
from dex_jax.io.tokenizer import Tokenizer
from dex_jax.language_model import LanguageModel, Outline
from dex_jax.nn.exits import exit_parameters
from dex_jax.nn.transformer import Transformer, build, layer_parameters, parameter_shapes
from dex_jax.nn.weights import Packing, canonical_weights

LLAMA = ModelConfig(
    family="llama",
    vocab_size=48,
    num_layers=4,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_width=48,
    context=2048,
    tied=True,
)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", tied=False, qkv_bias=True, qk_norm=True, head_dim=12)
# It sets every switch that a Gemma 2 has, with a window shorter than the prompts.
GEMMA = dataclasses.replace(
    LLAMA,
    family="gemma2",
    layer_kinds=(LayerKind(5), LayerKind()) * 2,
    norms="both",
    norm_offset=1.0,
    activation="gelu",
    embed_scale=2.0,
    attention_scale=0.3,
    attention_cap=4.0,
    logit_cap=2.0,
)
TWIN_LENGTH = 64


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Return a byte-level byte-pair tokenizer that is trained on a text, with at most `vocab_size` ids."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text], trainer)
    return Tokenizer(backend, source="the text")


def weights_of(lm: LanguageModel) -> dict[str, np.ndarray]:
    """Return the weights of a model by canonical name."""
    return canonical_weights(lm.config, lm.weights)


class LetterTokenizer:
    """A tokenizer of one letter per token; ids from 26 on stand for a lower-case letter twice."""

    has_chat_template = False

    fingerprint = "letters"

    def __init__(self, eos_ids: tuple[int, ...] = ()):
        self.eos_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.letters(token) for token in tokens if token not in self.eos_ids)

    @staticmethod
    def letters(token: int) -> str:
        return chr(ord("A") + token) if token < 26 else chr(ord("a") + token - 26) * 2


def random_transformer(config: ModelConfig, seed: int, dtype=jnp.float32) -> Transformer:
    """Return a transformer of random weights: normal kernels of standard deviation 1 / sqrt(in), and unit norms."""
    return build(config, random_reader(config, seed), dtype)


def random_reader(config: ModelConfig, seed: int) -> Callable[[str], np.ndarray]:
    """Return a function that maps a canonical name to `random_transformer`'s float32 array."""
    kinds = {"embed": "kernel", "unembed": "kernel", "final_norm": "scale"}
    kinds |= {name: kind for name, (_, kind) in layer_parameters(config).items()}
    shapes = parameter_shapes(config)
    order = {name: i for i, name in enumerate(shapes)}

    def read(name: str) -> np.ndarray:
        rng = np.random.default_rng([seed, order[name]])
        shape, kind = shapes[name], kinds[name.split(".")[-1]]
        if kind == "scale":
            return np.ones(shape, np.float32)
        deviation = 0.02 if kind == "bias" else shape[-1] ** -0.5
        return (rng.standard_normal(shape) * deviation).astype(np.float32)

    return read


def small_model(
    config: ModelConfig = LLAMA, seed: int = 0, tokenizer: LetterTokenizer | Tokenizer | None = None
) -> LanguageModel:
    """Return a random language model."""
    model = random_transformer(config, seed)
    return LanguageModel(model, tokenizer=tokenizer, source="random", fingerprint="0")


def outline_of(config: ModelConfig, dtype="float32", packing=(), mesh=None, layout=None) -> Outline:
    """Return the outline of a model that has no weights."""
    about: Any = SimpleNamespace(config=config, source="random", tokenizer=None, fingerprint=lambda: "0")
    return Outline(about, jnp.dtype(dtype), packing, mesh, layout)


def programs_of(session: Session) -> dict[str, tuple[CompiledFunction, tuple, dict]]:
    """Return name -> (program, arguments, statics) of all programs that a session compiles."""
    found = {}

    def recorded(program: CompiledFunction, *arguments: Any, **statics: Any) -> Any:
        found[program.name] = program, arguments, statics
        return jax.eval_shape(functools.partial(program.jitted, **statics), *arguments)

    session.compile_by(recorded)
    return found


def random_parameters(
    config: ExitsConfig, seed: int | np.random.Generator = 1, spread: float = 0.3
) -> dict[str, np.ndarray]:
    """Return random parameters of untrained exits in which every part matters."""
    rng, made = np.random.default_rng(seed), {}
    for name, (shape, start) in exit_parameters(config).items():
        scale = spread / np.sqrt(shape[-1]) if len(shape) > 1 else 0.1
        made[name] = (rng.standard_normal(shape) * scale + (start in ("norm", "scale"))).astype(np.float32)
    return made


def random_exits(kind: str, *, fused: bool = False, draft: int | None = None, depths=(1, 2, 3), seed=0) -> TrainedExits:
    """Return exits of LLAMA near the model's own head, so that proposals are sometimes right."""
    sizes = {"hidden": 12, "heads": 2, "head_dim": 8, "window": 5}
    config = ExitsConfig(kind, depths, LLAMA.width, fused, **sizes, draft_size=draft)
    rng = np.random.default_rng([seed, len(kind)])
    parameters = random_parameters(config, rng)
    vocabulary = None if draft is None else np.sort(rng.permutation(LLAMA.vocab_size)[:draft]).astype(np.int32)
    return TrainedExits(config, parameters, vocabulary, "0", {}, "random")


@functools.cache
def random_drafter(kind: str = "mlp") -> TrainedExits:
    """Return an exit at depth 0."""
    return random_exits(kind, fused=True, draft=40, depths=(0,))


class SmallModel:
    """A small model for the twin: exit k is a model of its own, cut off after x_k layers.

    It uses neither the decode loop nor a cache: every prefix runs from its first token.
    """

    def __init__(self, config: ModelConfig, depths: tuple[int, ...], seed: int = 0):
        self.models = [small_model(dataclasses.replace(config, num_layers=depth), seed=seed) for depth in depths]
        self._known: dict = {}

    def vocabulary(self, stage: int) -> range:
        return range(self.models[stage - 1].config.vocab_size)

    def logits(self, tokens: tuple[int, ...], stage: int) -> np.ndarray:
        if (tokens, stage) not in self._known:
            padded = np.zeros((1, TWIN_LENGTH), np.int32)  # padding cannot reach back
            padded[0, : len(tokens)] = tokens
            rows = np.asarray(self.models[stage - 1].logits(padded))[0]
            for length in range(1, len(tokens) + 1):
                self._known[tokens[:length], stage] = rows[length - 1]
        return self._known[tokens, stage]


@functools.cache
def ragged_prompts(count: int = 8) -> list[list[int]]:
    """Return prompts of 1 to 16 tokens, all in one length bucket."""
    rng = np.random.default_rng(1)
    lengths = [1, 16, *rng.integers(2, 16, count - 2).tolist()]
    return [rng.integers(0, LLAMA.vocab_size, length).tolist() for length in lengths]


def assert_same_tokens(lm: LanguageModel, output: dex_jax.Output, reference: dex_jax.Output, **options) -> None:
    """Assert that tokens are equal; in one sequence they may part where floating point cannot tell two apart.

    Batches of other shapes add in other orders, so an exact tie of a random model may fall either way. `options` are
    those of both decodings.
    """
    filters = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
    checks = compare(lm, output, reference, **filters)
    wrong = [check for check in checks if not check.is_tie(str(lm.dtype))]
    assert not wrong, wrong
    assert sum(not check.identical for check in checks) <= 1


def packed_alike(config: ModelConfig, format: str) -> Packing:
    """Return the packing of a model with every kernel in one format."""
    shapes = parameter_shapes(config).items()
    return tuple((name, ((format, shape[0]),)) for name, shape in shapes if len(shape) == 2)
