"""The task that the trainer runs: it distils the final layer of a frozen model into exit heads.

Letters: X exits, B rows, S tokens of a row, D width, s draft steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import ExitsConfig
from dex_jax.errors import DexError
from dex_jax.io.exits_file import TrainedExits
from dex_jax.language_model import LanguageModel
from dex_jax.nn.attention import KeyValues
from dex_jax.nn.exits import ExitHeads, exit_graph, heads_of, initial_heads, parameters_of
from dex_jax.nn.packed import Packed
from dex_jax.nn.targets import Vocabulary
from dex_jax.nn.weights import merge_model
from dex_jax.training.answers import Text
from dex_jax.training.losses import exit_losses
from dex_jax.training.packing import Activations, Epochs, TextRows, read_rows
from dex_jax.training.sources import digest_of


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """The options of the distillation that trains exits.

    Attributes:
      own_outputs: share of the tokens at which exits that read the position before see an estimate by a deeper exit, as
        in the lattice, instead of the true final state, as at the root.
      draft_steps: above 1, the only exit is a drafter at depth 0 and learns to go on from its own outputs for so many
        tokens (`read_drafts`); `own_outputs` is then unused.
    """

    own_outputs: float = 0.5
    draft_steps: int = 1


def check_fit(exits: ExitsConfig, options: DistillationOptions) -> None:
    """Raise DexError where these exits cannot be trained with these options."""
    if options.draft_steps > 1 and not exits.is_drafter:
        raise DexError(
            "draft steps need one fused exit at depth 0 without attention (kind mlp, for example), not "
            f"{'fused ' * exits.fused}{exits.kind} at {exits.depths}"
        )


class Distillation:
    """The task that trains exits of one frozen model on its hidden states along texts.

    Args:
      lm: the model; never changed.
      exits: shapes of the heads; exits and options have passed `check_fit`.
      vocabulary: [V'] int32 ascending token ids of the draft vocabulary; None for the full one.
      rows: batches of texts.
      options: how exits learn.
      data: plain JSON that names the texts, for checkpoints.
      evaluate: measures exits on held-out data; None evaluates nothing.
      initial: exits to start from; None starts from the model's own head.
    """

    name = "exits"

    def __init__(
        self,
        lm: LanguageModel,
        exits: ExitsConfig,
        vocabulary: np.ndarray | None,
        rows: Epochs,
        data: Any,
        options: DistillationOptions,
        evaluate: Callable[[TrainedExits], dict[str, Any]] | None,
        initial: TrainedExits | None,
    ):
        self.lm, self.exits, self.vocabulary, self.options = lm, exits, vocabulary, options
        self._rows, self._data, self._evaluate, self._initial = rows, data, evaluate, initial

    def settings(self) -> dict[str, Any]:
        """Return what decides the training beside TrainConfig, as plain JSON; only equal settings resume a folder."""
        words = () if self.vocabulary is None else self.vocabulary.tolist()
        return {
            "exits": dataclasses.asdict(self.exits),
            "options": dataclasses.asdict(self.options),
            "data": self._data,
            "weights": self.lm.weights_kind,
            "vocabulary": digest_of(repr(words))[:16],
        }

    def fingerprint(self) -> str:
        """Return the fingerprint of the frozen model; checkpoints of another model are used with a warning."""
        return self.lm.fingerprint

    def init(self, key: jax.Array) -> Any:
        """Return the initial parameters of the heads in float32."""
        if self._initial is not None:
            return nnx.state(heads_of(self.exits, self._initial.parameters, jnp.float32))
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        model = merge_model(self.lm.config, self.lm.weights)
        return nnx.state(initial_heads(self.exits, model.final_scale, seed))

    def constants(self) -> dict[str, Any]:
        """Return the frozen arrays that the update takes as an argument: {"weights", "vocabulary"}."""
        model = merge_model(self.lm.config, self.lm.weights)
        kernel, draft = model.vocabulary_kernel, None
        own = kernel.dense() if isinstance(kernel, Packed) and self.vocabulary is None else None
        if self.vocabulary is not None:
            draft = jnp.asarray(self.vocabulary, jnp.int32)
            rows = kernel[draft]
            own = rows.dense() if isinstance(rows, Packed) else rows  # Gradients go through it.
        return {"weights": self.lm.weights, "vocabulary": Vocabulary(kernel, own, draft, self.lm.config.logit_cap)}

    def batch(self, step: int) -> tuple[TextRows, int]:
        """Return the rows of step `step` from 0, of the same shapes every time, and how many of their tokens count."""
        rows = self._rows.batch(step)
        return rows, int(np.sum(rows.weight > 0))

    def read(self, constants: dict[str, Any], batch: TextRows) -> Activations:
        """Compute the activations that the loss needs of a batch, under jit and without gradients."""
        return read_rows(merge_model(self.lm.config, constants["weights"]), batch, self.exits.depths)

    def loss(
        self, params: Any, constants: dict[str, Any], batch: Activations, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the mean divergence over exits, and the agreement of each exit and the coverage as scalars by name.

        `constants` and `batch` come from the methods `constants` and `read`, `key` is this step's own, `step` an int32
        scalar from 0.
        """
        del step
        heads = nnx.merge(exit_graph(self.exits), params)
        normed = merge_model(self.lm.config, constants["weights"]).normed(batch.final)
        weight, names = batch.weight, [f"agreement_{depth}" for depth in self.exits.depths]
        if self.options.draft_steps > 1:
            features, valid = read_drafts(heads, batch, normed, self.options.draft_steps)
            weight = weight[None] * valid
            names = [f"agreement_draft_{step}" for step in range(1, len(features) + 1)]
        else:
            features = read_for_training(heads, batch, normed, self.options.own_outputs, key)
        losses, agreement, coverage = exit_losses(
            features.reshape(len(features), -1, features.shape[-1]),
            normed.reshape(-1, normed.shape[-1]),
            weight.reshape(*weight.shape[:-2], -1),
            constants["vocabulary"],
        )
        return jnp.mean(losses), dict(zip(names, agreement, strict=True)) | {"coverage": coverage}

    def evaluate(self, params: Any) -> dict[str, Any]:
        """Measure the exits on held-out data; {} without any."""
        return {} if self._evaluate is None else self._evaluate(self.trained(params))

    def decayed(self, params: Any) -> Any:
        """Return which parameters decay, a pytree of bool: only matrices, as zeros there give the model's own head."""

        def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
            text = jax.tree_util.keystr(path)
            return leaf.ndim >= 2 and "norm" not in text and any(n in text for n in ("map", "up", "down", "kernel"))

        return jax.tree_util.tree_map_with_path(decays, params)

    def trained(self, params: Any, metadata: dict[str, Any] | None = None) -> TrainedExits:
        """Return parameters in training as exits to decode with."""
        parameters = parameters_of(nnx.merge(exit_graph(self.exits), params))
        return TrainedExits(
            self.exits, parameters, self.vocabulary, self.lm.fingerprint, metadata or {}, "exits in training"
        )


def before_each(x: jax.Array, position: jax.Array) -> jax.Array:
    """Shift `x` [B, S, D] by one token: each gets the values of the token before it, and a text's first gets zeros."""
    shifted = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.where((position <= 0)[..., None], 0, shifted)


def read_for_training(
    heads: ExitHeads, batch: Activations, normed: jax.Array, own_outputs: float, key: jax.Array
) -> jax.Array:
    """Return the features of every exit at every token: [X, B, S, D + 1].

    At a share of the tokens (`own_outputs`) one exit is drawn, and exits below it see its estimate of the position
    before instead of the true final state. An estimate gets no gradient. `normed` [B, S, D] is batch.final after the
    final norm.
    """
    config = heads.config
    count, rows, size, width = batch.states.shape
    flat = batch.states.reshape(count, rows * size, width)
    if not config.needs_previous:
        return heads.features(flat, None, None).reshape(count, rows, size, width + 1)
    truth = before_each(normed, batch.position)
    base = heads.base(flat)
    below, estimate = _estimates(base, batch, own_outputs, key)
    previous = jnp.where(below[..., None], estimate[None], truth[None]).reshape(flat.shape)
    context = None
    if heads.context is not None:
        of_truth, of_estimate = _contexts(heads, batch, truth, estimate, key)
        context = jnp.where(below[..., None], of_estimate[None], of_truth[None]).reshape(flat.shape)
    return heads.features(flat, previous, context, base).reshape(count, rows, size, width + 1)


def read_drafts(
    heads: ExitHeads, batch: Activations, normed: jax.Array, draft_steps: int
) -> tuple[jax.Array, jax.Array]:
    """Run a drafter, an exit at depth 0, at every token, and let it go on from its own outputs.

    At draft step s the position before is known by the features of draft step s - 1 there, the true final state only at
    step 1; the tokens in between are the text's, as drafts after a wrong token do not matter. EAGLE-3 has the idea of
    several steps (arXiv 2503.01840, section 3.1). `normed` [B, S, D] is batch.final after the final norm.

    Returns:
      (features [s, B, S, D + 1], valid [s, B, S] bool: whether the text reaches back far enough for the step).
    """
    _, rows, size, width = batch.states.shape
    state = batch.states[0].reshape(1, rows * size, width)
    previous = before_each(normed, batch.position)
    found, valid = [], []
    for step in range(draft_steps):
        features = heads.features(state, previous.reshape(state.shape), None)
        found.append(features.reshape(rows, size, width + 1))
        valid.append(batch.position >= step)
        previous = before_each(found[-1][..., :-1], batch.position)
    return jnp.stack(found), jnp.stack(valid)


def _estimates(base: jax.Array, batch: Activations, own_outputs: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (which exits see an estimate [X, B, S], the estimate [B, S, D]) from the heads' `base` of the states."""
    count, rows, size, width = batch.states.shape
    base = jax.lax.stop_gradient(base).reshape(count, rows, size, width)
    draw, which = jax.random.split(key)
    owned = (batch.position > 0) & (jax.random.uniform(draw, (rows, size)) < own_outputs)
    source = jax.random.randint(which, (rows, size), 0, count)
    base = jnp.pad(base[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    estimate = jnp.take_along_axis(base, source[None, :, :, None], axis=0)[0]
    return owned[None] & (jnp.arange(count)[:, None, None] < source[None]), estimate


def _contexts(
    heads: ExitHeads, batch: Activations, truth: jax.Array, estimate: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Run the context layer at every token, with the true position before and with its estimate: two of [B, S, D].

    With an estimate the last few positions are not visible, as they are not committed yet.
    """
    layer, config = heads.context, heads.config
    assert layer is not None
    rows, size, _ = truth.shape
    seen = jnp.maximum(batch.position, 0)
    of_truth, of_estimate = (layer.enter_rows(batch.embedded, before) for before in (truth, estimate))
    keys, values = layer.keys_values(of_truth, seen)
    distance = jnp.arange(size)[None, :, None] - jnp.arange(size)[None, None, :]
    position = batch.position
    same = (position[:, None, :] >= 0) & (position[:, :, None] - position[:, None, :] == distance)
    visible = same & (distance > 0) & (distance <= config.window)
    hidden = jax.random.randint(jax.random.fold_in(key, 1), (rows, size, 1), 1, 4)
    mask = jnp.concatenate([visible, visible & (distance > hidden)], axis=1)
    among = jnp.broadcast_to(jnp.eye(2 * size, dtype=bool)[None], (rows, 2 * size, 2 * size))
    entered, own = jnp.concatenate([of_truth, of_estimate], axis=1), jnp.concatenate([seen, seen], axis=1)
    out = layer.output(entered, own, KeyValues(keys, values, mask), among)
    return out[:, :size], out[:, size:]


def draft_vocabulary(lm: LanguageModel, texts: Sequence[Text], size: int) -> np.ndarray:
    """Return the `size` most frequent tokens of the texts, weighted by how much predicting them counts.

    Returns:
      [V'] int32, ascending. EOS tokens are always among them; of equally frequent tokens the lower ids come first.
    """
    counts = np.zeros(lm.config.vocab_size)
    for text in texts:
        np.add.at(counts, text.token[1:], text.weight[:-1])
    counts[list(lm.eos_ids)] = np.inf
    order = np.lexsort((np.arange(len(counts)), -counts))
    return np.sort(order[:size]).astype(np.int32)
