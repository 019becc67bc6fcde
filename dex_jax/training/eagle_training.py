"""Training an EAGLE-3 head for a frozen model, on the texts that exits learn from.

It learns to go on from its own outputs for several tokens (EAGLE-3, arXiv 2503.01840, section 3.1), whose tokens in
between are right, as those that matter are.

Letters: B rows, n tokens of a row, D width, V' draft vocabulary, s draft steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import EagleConfig, ModelConfig
from dex_jax.errors import DexError
from dex_jax.io.eagle import EagleHead, save_eagle
from dex_jax.language_model import LanguageModel
from dex_jax.nn.attention import KeyValues, attend
from dex_jax.nn.eagle import Eagle, eagle_graph, eagle_parameters
from dex_jax.nn.layers import names_in
from dex_jax.nn.packed import Packed
from dex_jax.nn.rotary import rope_table
from dex_jax.nn.targets import targets
from dex_jax.nn.weights import merge_model
from dex_jax.training.config import TrainConfig
from dex_jax.training.distillation import draft_vocabulary
from dex_jax.training.exit_training import texts_of
from dex_jax.training.packing import Activations, Epochs
from dex_jax.training.sources import SourceOptions, open_mixture
from dex_jax.training.task import Task
from dex_jax.training.trainer import train


@dataclasses.dataclass(frozen=True)
class EagleTraining:
    """What `train_exits.py` reads from a configuration file, as its `config`, to train an EAGLE-3 head."""

    train: TrainConfig  # optimizer, batch (rows), length, checkpoints
    model: str = "smollm2-135m"  # as `dex_jax.load` takes it
    reads: tuple[int, ...] | None = None  # depths whose states the head reads; None: those of EAGLE-3, 2, L // 2, L - 3
    mlp_width: int = 1536  # of its layer; heads are the model's
    draft_size: int = 8192  # V'
    draft_steps: int = 3  # how many tokens it learns to go on for
    data: tuple[str, ...] = ("self",)  # as of ExitTraining, like what follows
    sources: SourceOptions = dataclasses.field(default_factory=lambda: SourceOptions(length=256))
    tokens: int | None = None


class EagleTask(Task):
    """The task that the trainer runs, of a head with a draft vocabulary.

    `data` names the texts in `rows`, for checkpoints; `draft_steps` is s.
    """

    name = "eagle3"

    def __init__(
        self,
        lm: LanguageModel,
        config: EagleConfig,
        vocabulary: np.ndarray,
        rows: Epochs,
        data: Any,
        draft_steps: int,
    ):
        settings = {"head": dataclasses.asdict(config), "draft_steps": draft_steps, "data": data}
        super().__init__(lm, config.reads, vocabulary, rows, settings)
        self.config, self._draft_steps = config, draft_steps

    def init(self, key: jax.Array) -> Any:
        """The head's parameters, float32: at the start it says what the deepest state that it reads would."""
        model = merge_model(self.lm.config, self.lm.weights)
        seed, width = int(jax.random.randint(key, (), 0, 2**31 - 1)), self.lm.config.width
        order = {name: i for i, name in enumerate(eagle_parameters(self.config))}

        def init(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
            if name == "fc":
                return jnp.eye(width, shape[1], shape[1] - width)
            if name == "norm":
                return model.final_scale.astype(jnp.float32)
            if name == "unembed":
                rows = model.vocabulary_kernel[jnp.asarray(self.vocabulary)]
                return (rows.dense() if isinstance(rows, Packed) else rows).astype(jnp.float32)
            if kind == "scale":
                return jnp.ones(shape)
            if name in ("layer.out", "layer.down"):
                return jnp.zeros(shape)
            rng = np.random.default_rng([seed, order[name]])
            return jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, jnp.float32)

        return nnx.state(Eagle(self.config, init))

    def loss(
        self, params: Any, constants: dict[str, Any], batch: Activations, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean cross-entropy over draft steps, with each one's agreement. The unembedding stays the model's."""
        del key, step
        head = nnx.merge(eagle_graph(self.config), params)
        normed = merge_model(self.lm.config, constants["weights"]).normed(batch.final)
        flat = normed.reshape(-1, normed.shape[-1])
        target = jax.lax.stop_gradient(targets(flat, constants["vocabulary"]))
        features, valid = read_chains(head, batch, self._draft_steps)
        head.unembed = nnx.Param(jax.lax.stop_gradient(head.unembed[...]))
        losses, figures, size = [], {}, normed.shape[1]
        for number in range(self._draft_steps):
            logits = jax.nn.log_softmax(head.logits(features[number]).reshape(flat.shape[0], -1))
            inside, best = (
                later(x.reshape(-1, size, *x.shape[1:]), number).reshape(x.shape) for x in (target.inside, target.best)
            )
            weight = (later(batch.weight, number) * valid[number]).reshape(-1)
            total = jnp.maximum(jnp.sum(weight), 1e-6)
            losses.append(-jnp.sum(weight * jnp.sum(inside * logits, axis=-1)) / total)
            agree = jnp.argmax(logits, axis=-1) == best
            figures[f"agreement_draft_{number + 1}"] = jnp.sum(weight * agree) / total
        return jnp.mean(jnp.stack(losses)), figures

    def decayed(self, params: Any) -> Any:
        """Matrices, but for the unembedding."""

        def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
            return leaf.ndim >= 2 and "unembed" not in names_in(path)

        return jax.tree_util.tree_map_with_path(decays, params)


def read_chains(head: Eagle, batch: Activations, draft_steps: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Run a head at every token, and let it go on from its own outputs.

    For token i and draft step s it is what is said below token i + s, s tokens below the root i: as in decoding it sees
    the true states before the root, and its own outputs after that.

    Returns:
      (features after the last norm, s of [B, n, D]; whether the text reaches so far, s of [B, n] bool).
    """
    layer, config = head.layers[0], head.config
    _, rows, steps, _ = batch.states.shape
    states = jnp.moveaxis(batch.states, 0, 2).reshape(rows, steps, -1)
    before = jnp.pad(head.joined(states)[:, :-1], ((0, 0), (1, 0), (0, 0)))
    step, position = jnp.arange(steps), batch.position
    apart = step[:, None] - step[None]
    together = (position[:, None] >= 0) & (position[:, :, None] - position[:, None] == apart[None])
    known = (position >= 1) & (step >= 1)[None] & (position - jnp.roll(position, 1, axis=1) == 1)
    seen = together & (apart >= 0)[None] & known[:, None] | jnp.eye(steps, dtype=bool)[None]
    sources: list[KeyValues] = []
    found, valid = [], []
    for number in range(draft_steps):
        at = later(position, number)
        x = jnp.concatenate([later(batch.embedded, number), before], axis=-1)
        queries, keys, values = layer.project(x, rope_table(jnp.maximum(at, 0), config))
        own = jnp.broadcast_to(jnp.eye(steps, dtype=bool)[None], seen.shape)
        sources = [*sources, KeyValues(keys, values, own if sources else seen)]
        hidden = layer.finish(x, attend(queries, sources))
        found.append(head.normed(hidden))
        valid.append(known & (step < steps - number)[None] & (at == position + number))
        before = found[-1] if head.eagle.norm_output else hidden
    return found, valid


def later(x: jax.Array, steps: int) -> jax.Array:
    """What stands `steps` further on along the second axis, and zeros at its end: [B, n, ...]."""
    return jnp.pad(x[:, steps:], ((0, 0), (0, steps), *[(0, 0)] * (x.ndim - 2)))


def train_eagle(
    config: EagleTraining,
    lm: LanguageModel,
    folder: str | Path,
    *,
    answers: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> EagleHead:
    """Trains a head, or goes on where the folder of the run has got to, and writes it to the folder "head" within it.

    `answers` and `tell` are as of `train_exits`. DexError: data, depths or a folder that do not fit.
    """
    folder, layers = Path(folder), lm.config.num_layers
    reads = config.reads or (2, layers // 2, layers - 3)
    if not all(0 <= depth <= layers for depth in reads) or len(set(reads)) < len(reads):
        raise DexError(f"an EAGLE-3 head cannot read depths {reads} of {layers} layers: give others as `reads`")
    if config.draft_size > lm.config.vocab_size:
        raise DexError(f"a draft vocabulary of {config.draft_size} of {lm.config.vocab_size} tokens: lower draft_size")
    mixture = open_mixture(config.data, lm, config.sources, tell)
    made = texts_of(config, lm, mixture, folder, answers)
    vocabulary = draft_vocabulary(lm, made.texts, config.draft_size)
    shapes = EagleConfig(_layer(lm.config, config.mlp_width), tuple(reads), lm.config.width, config.draft_size)
    task = EagleTask(lm, shapes, vocabulary, made.rows, made.about, config.draft_steps)
    trained = train(task, config.train, folder)
    leaves = jax.tree_util.tree_leaves_with_path(trained.params)
    named = {".".join(names_in(path)).replace("layers.0.", "layer."): leaf for path, leaf in leaves}
    parameters = {name: np.asarray(named[name], np.float32) for name in eagle_parameters(shapes)}
    head = EagleHead(shapes, parameters, vocabulary, str(folder / "head"))
    save_eagle(folder / "head", head)
    return head


def _layer(model: ModelConfig, mlp_width: int) -> ModelConfig:
    """One plain layer with the heads of a model."""
    names = ("vocab_size", "width", "num_heads", "num_kv_heads", "head_dim", "context", "rope_theta", "norm_eps")
    same: dict[str, Any] = {name: getattr(model, name) for name in names}
    return ModelConfig(family="llama", num_layers=1, mlp_width=mlp_width, tied=True, **same)
