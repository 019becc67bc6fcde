"""Training all parameters of a model on text, plainly or by the LayerSkip recipe: the trainer's Task.

What comes out is an ordinary model. One trained by the recipe is decoded with exits="shared".

Letters: B sequences, S tokens of a window, L layers, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

from dex_jax.config import ModelConfig
from dex_jax.errors import DexError
from dex_jax.forced.figures import ExitFigures, figures_of
from dex_jax.forced.run import measure, shared_exits
from dex_jax.foreign import Size, check_fields
from dex_jax.io.save import save_model
from dex_jax.language_model import LanguageModel
from dex_jax.nn.attention import KeyValues, attend, causal_rows
from dex_jax.nn.kinds import kind_table, sight_at, sights
from dex_jax.nn.layers import DecoderLayer
from dex_jax.nn.packed import Packed
from dex_jax.nn.transformer import Transformer, Unrolled, layer_parameters, parameter_shapes
from dex_jax.nn.weights import merge_model
from dex_jax.training.config import TrainConfig
from dex_jax.training.corpus import Corpus, read_corpus
from dex_jax.training.layerskip import LayerSkip, exit_weights, kept_layers

Params = dict[str, jax.Array]
"""Canonical name ("embed", "layers.3.qkv", ...) -> float32 array: what optax updates and what `save_model` takes."""


@dataclasses.dataclass(frozen=True)
class WholeModelConfig:
    """One training of a whole model.

    Attributes:
      model: shapes; its vocab_size also bounds the vocabulary learnt from the text.
      train: optimiser, batch, steps, checkpoints. The recipe's schedules stretch to its end. With dtype bfloat16 layers
        run on rounded copies of the float32 parameters; float16 is refused, as small gradients vanish in it.
      data: path of a UTF-8 text file.
      window: S, tokens of one training sequence, at most the model's context.
      held_out: the share of the text, at its end, that is only evaluated on.
      recipe: None (next-token loss of the last layer) or "layerskip".
      layerskip: what that recipe leaves to choose.
      explorers: each K for which the depth-side speedup is predicted.
      evaluation_windows: at most so many windows are evaluated on.
    """

    model: ModelConfig
    train: TrainConfig
    data: str
    window: int = 128
    held_out: float = 0.1
    recipe: Literal["layerskip"] | None = None
    layerskip: LayerSkip = dataclasses.field(default_factory=LayerSkip)
    explorers: tuple[int, ...] = (2, 3, 4)
    evaluation_windows: Size = 64

    def __post_init__(self):
        check_fields(self)
        if not 1 <= self.window <= self.model.context:
            raise DexError(f"a window has from 1 to the context's {self.model.context} tokens, not {self.window}")
        if not self.explorers or not all(1 <= k <= self.model.num_layers for k in self.explorers):
            raise DexError(f"explorers must be from 1 to the model's {self.model.num_layers} layers: {self.explorers}")
        if self.train.dtype == "float16":
            raise DexError(
                "a whole model is not trained in float16, where small gradients vanish: use bfloat16 or float32"
            )

    @property
    def total_steps(self) -> int:
        """Steps until training ends, by steps or by tokens, whichever comes first."""
        train = self.train
        by_tokens = math.inf if train.tokens is None else math.ceil(train.tokens / (train.batch * self.window))
        return int(min(train.steps, by_tokens))


class WholeModel:
    """The Task of training a whole model; see `dex_jax.training.task.Task`.

    Its cursor is {"seed", "batch"}: batch n is drawn from (seed, n) alone.
    """

    name = "whole_model"

    def __init__(self, config: WholeModelConfig, corpus: Corpus, start_from: LanguageModel | None = None):
        """Takes what is to be trained, from the weights of `start_from`, a model of `config.model`, or random ones.

        Raises:
          DexError: `start_from` is another model, or a part of the text is shorter than a window.
        """
        if start_from is not None and start_from.config != config.model:
            raise DexError(f"{start_from.source} is no model of the given configuration: open() takes over its own")
        for part, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
            if len(tokens) <= config.window:
                raise DexError(
                    f"the {part} part of {config.data} has {len(tokens)} tokens, and a window takes "
                    f"{config.window + 1}: give a longer text or a shorter window"
                )
        self.config = config
        self.corpus = corpus
        self._start_from = start_from

    @classmethod
    def open(cls, config: WholeModelConfig, start_from: LanguageModel | None = None) -> WholeModel:
        """Reads the text and learns a vocabulary from it.

        With `start_from`, both the vocabulary and the model's configuration are those of that model.
        """
        tokenizer = None
        if start_from is not None:
            config, tokenizer = dataclasses.replace(config, model=start_from.config), start_from.tokenizer
        corpus = read_corpus(config.data, config.model.vocab_size, config.held_out, tokenizer)
        return cls(config, corpus, start_from)

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters to start from."""
        if self._start_from is not None:
            return canonical_weights(self._start_from)
        return random_parameters(self.config.model, key)

    def constants(self) -> tuple[()]:
        """Nothing is frozen."""
        return ()

    def start(self, seed: int) -> dict[str, int]:
        """The cursor of the first batch."""
        return {"seed": seed, "batch": 0}

    def next_batch(self, cursor: dict[str, int]) -> tuple[jax.Array, dict[str, int], int]:
        """([B, S + 1] int32 windows at random places of the training text, next cursor, B S)."""
        size, window = self.config.train.batch, self.config.window
        rng = np.random.default_rng([cursor["seed"], cursor["batch"]])
        starts = rng.integers(0, len(self.corpus.train) - window, size)
        tokens = self.corpus.train[starts[:, None] + np.arange(window + 1)]
        return jnp.asarray(tokens), {**cursor, "batch": cursor["batch"] + 1}, size * window

    def loss(
        self, params: Params, constants: tuple[()], batch: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch [B, S + 1] and {"final_loss": the last layer's cross-entropy}, scalars in nats."""
        del constants
        config, steps = self.config.model, self.config.total_steps
        params = {name: value.astype(self.config.train.dtype) for name, value in params.items()}
        if self.config.recipe is None:
            (loss,) = exit_losses(config, params, hidden_states(config, params, batch[:, :-1])[-1:], batch[:, 1:])
            return loss, {"final_loss": loss}
        recipe = self.config.layerskip
        kept = kept_layers(recipe, key, config.num_layers, batch.shape[0], step, steps)
        weights = exit_weights(recipe, config.num_layers, step, steps)
        states = hidden_states(config, params, batch[:, :-1], kept)
        losses = exit_losses(config, params, states, batch[:, 1:], weights)
        return jnp.dot(weights, losses), {"final_loss": losses[-1]}

    def evaluate(self, params: Params) -> dict[str, Any]:
        """Figures over held-out text, teacher-forced and without dropout.

        Returns:
          {"held_out_loss": of the last layer in nats, "groups": {"held-out": ExitFigures as JSON}}, of the model's own
          head at depth 1 .. L-1, for tokens that are the last layer's best and not the text's; none for L = 1.
        """
        model, windows = self.config.model, self._held_out_batches()
        loss = float(np.mean([_held_out_loss(model, params, each) for each in windows]))
        groups = {"held-out": self._figures(params, windows).to_json()} if model.num_layers > 1 else {}
        return {"held_out_loss": loss, "groups": groups}

    def _figures(self, params: Params, windows: list[jax.Array]) -> ExitFigures:
        # Windows go over ends of texts, and may be as long as the context.
        config = dataclasses.replace(self.config.model, eos_ids=(), context=self.config.window + 1)
        lm = LanguageModel(transformer(config, params), None, "the model in training", "")
        texts = [(ids[:1], ids[1:]) for each in windows for ids in each.tolist()]
        exits = shared_exits(lm, tuple(range(1, config.num_layers)))
        forced = measure(lm, exits, texts, explorers=self.config.explorers, batch=len(windows[0]))
        return figures_of(dataclasses.replace(forced, target=forced.said.greedy))

    def boundary(self) -> None:
        """Nothing is kept between batches."""

    def settings(self) -> dict[str, Any]:
        """Plain JSON: what decides the training beside TrainConfig. The text counts, not its path."""
        names = ("model", "window", "held_out", "recipe", "layerskip")
        fields = dataclasses.asdict(self.config)
        return json.loads(json.dumps({name: fields[name] for name in names} | {"text": self.corpus.fingerprint}))

    def batch_sharding(self, mesh: jax.sharding.Mesh) -> jax.sharding.PartitionSpec:
        """Sequences are spread over the axis "data"."""
        del mesh
        return jax.sharding.PartitionSpec("data")

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the shapes, the text and its vocabulary, and the model that training starts from."""
        start = None if self._start_from is None else self._start_from.fingerprint
        return hashlib.sha256(f"{self.config.model};{self.corpus.fingerprint};{start}".encode()).hexdigest()[:16]

    def save(self, folder: str | Path, params: Params) -> Path:
        """Writes a directory that `dex_jax.load` reads; see `dex_jax.io.save.save_model`."""
        return save_model(folder, self.config.model, params, self.corpus.tokenizer)

    def _held_out_batches(self) -> list[jax.Array]:
        """Windows [B, S + 1] that do not overlap, from the start of the held-out text, in batches of one size."""
        window = self.config.window
        count = min(self.config.evaluation_windows, (len(self.corpus.held_out) - 1) // window)
        size = min(self.config.train.batch, count)
        starts = np.arange(count // size * size).reshape(-1, size, 1) * window
        return [jnp.asarray(self.corpus.held_out[batch + np.arange(window + 1)]) for batch in starts]


def random_parameters(config: ModelConfig, key: jax.Array) -> Params:
    """Float32 parameters to train from: normal kernels, zero biases, unit norms.

    Deviations are 0.02 for embeddings and 1 / sqrt(in) for kernels, the ones that write to the residual stream divided
    by sqrt(2 L), so that its size at depth L does not grow with L.
    """
    fields = {name: kind for name, (_, kind) in layer_parameters(config).items()}
    params = {}
    for number, (name, shape) in enumerate(parameter_shapes(config).items()):
        field = name.split(".")[-1]
        kind = fields.get(field, "scale" if field == "final_norm" else "kernel")
        if kind == "kernel":
            deviation = 0.02 if field in ("embed", "unembed") else shape[-1] ** -0.5
            if field in ("out", "down"):
                deviation /= (2 * config.num_layers) ** 0.5
            params[name] = deviation * jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
        else:
            params[name] = jnp.full(shape, 1.0 if kind == "scale" else 0.0, jnp.float32)
    return params


def canonical_weights(lm: LanguageModel) -> Params:
    """Float32 copies of a model's weights by canonical name; DexError in any layout but the unrolled one."""
    if not isinstance(lm.layout, Unrolled):
        raise DexError(
            f"{lm.source} is not in the unrolled layout: load it without a layout, or arrange(Unrolled()) first"
        )
    model = merge_model(lm.config, lm.layout, lm.weights)

    def read(name: str) -> jax.Array:
        owner, _, field = name.rpartition(".")
        module = model.layers[int(owner.split(".")[1])] if owner else model
        found = getattr(module, field)[...]
        return found.dense() if isinstance(found, Packed) else jnp.array(found, jnp.float32)

    return {name: read(name) for name in parameter_shapes(lm.config)}


def transformer(config: ModelConfig, params: Params) -> Transformer:
    """The module over `params`, under a trace or not."""
    return Transformer(config, Unrolled(), lambda name, shape, kind: params[name])


def hidden_states(config: ModelConfig, params: Params, tokens: jax.Array, kept: jax.Array | None = None) -> jax.Array:
    """A causal forward of tokens [B, S] without caches: hidden states at depth 1 .. L, [L, B, S, D].

    `kept` [L, B] bool says which layers each sequence runs, the others being the identity; None runs all.
    """
    batch, length = tokens.shape
    kinds = kind_table(config, [range(config.num_layers)])
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    found = sights(config, kinds, positions, jnp.zeros(batch, jnp.int32), [0], causal_rows(batch, length))
    # One body for all layers: compiling is then as fast for eight layers as for one.
    fields = layer_parameters(config)
    stacked = {name: jnp.stack([params[f"layers.{i}.{name}"] for i in range(config.num_layers)]) for name in fields}
    if kept is None:
        kept = jnp.ones((config.num_layers, batch), bool)

    def run_layer(x: jax.Array, inputs: tuple[jax.Array, Params, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, weights, kept = inputs
        layer, sight = DecoderLayer(config, lambda name, shape, kind: weights[name]), sight_at(kinds, found, (i, 0))
        queries, keys, values = layer.project(x, sight.rotation)
        own = [KeyValues(keys, values, sight.among)]
        done = layer.finish(x, attend(queries, own, cap=config.attention_cap))
        x = jnp.where(kept[:, None, None], done, x)
        return x, x

    embedded = transformer(config, params).embed_tokens(tokens)
    return jax.lax.scan(run_layer, embedded, (jnp.arange(config.num_layers), stacked, kept))[1]


def exit_losses(
    config: ModelConfig, params: Params, states: jax.Array, targets: jax.Array, weights: jax.Array | None = None
) -> jax.Array:
    """Mean cross-entropy [X] float32 at each exit through the shared final norm and unembedding, in nats.

    No array of the size [X, B, S, V] ever exists, forwards or backwards.

    Args:
      config, params: of the model, by canonical name.
      states: [X, B, S, D].
      targets: [B, S] int32.
      weights: [X]; an exit of weight 0 is not computed and gives 0. None computes all.
    """
    head = transformer(config, params)
    wanted = jnp.ones(states.shape[0], bool) if weights is None else weights > 0

    @jax.checkpoint
    def loss_at(hidden: jax.Array) -> jax.Array:
        return cross_entropy(head.logits(hidden), targets).mean()

    def run_exit(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        hidden, wanted = inputs
        return None, jax.lax.cond(wanted, loss_at, lambda hidden: jnp.float32(0.0), hidden)

    return jax.lax.scan(run_exit, None, (states, wanted))[1]


@functools.partial(jax.jit, static_argnums=0)
def _held_out_loss(config: ModelConfig, params: Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy of the last layer over windows [B, S + 1]."""
    return exit_losses(config, params, hidden_states(config, params, windows[:, :-1])[-1:], windows[:, 1:])[0]
