"""Training exit heads on what a frozen model says: the task that the trainer runs.

Letters: X exits, B rows, n steps of a chunk, H steps of history, D width, S window of the context layer or draft steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
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
from dex_jax.nn.layers import rms_norm
from dex_jax.nn.weights import merge_model
from dex_jax.training.losses import exit_losses
from dex_jax.training.stream import Activations, Stream
from dex_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """How exits learn.

    Attributes:
      own_outputs: share of the steps in which exits that read the position before see an estimate by a deeper exit, as
        in the lattice, instead of the true final state, as at the root.
      draft_steps: above 1, the one exit is a drafter at depth 0, and learns to go on from its own outputs for so many
        tokens (`read_drafts`); `own_outputs` then says nothing.
    """

    own_outputs: float = 0.5
    draft_steps: int = 1


def check_fit(lm: LanguageModel, exits: ExitsConfig, options: DistillationOptions) -> None:
    """Refuses a model or exits that cannot be trained so, with a DexError."""
    if options.draft_steps > 1 and not exits.is_drafter:
        raise DexError(
            "draft steps need one fused exit at depth 0 without attention (kind mlp, for example), not "
            f"{'fused ' * exits.fused}{exits.kind} at {exits.depths}"
        )
    if lm.packing:
        raise DexError(
            f"exits are trained on dense weights, and those of {lm.source} are {lm.weights_kind}: load it with "
            "weights='dense'"
        )


class Distillation(Task):
    """The task: exits of one frozen model, learnt from a stream of its activations.

    Args:
      lm, vocabulary, data: as of Task.
      exits: shapes of the heads; model, exits and options have passed `check_fit`.
      options: how exits learn.
      stream: of lm's activations at exits.depths, with at least `history_for(exits)` steps of history.
      evaluate: figures of exits on held-out data; None evaluates nothing.
      initial: exits to start from; None starts from the model's own head.
    """

    name = "exits"

    def __init__(
        self,
        lm: LanguageModel,
        exits: ExitsConfig,
        vocabulary: np.ndarray | None,
        stream: Stream,
        data: str,
        options: DistillationOptions,
        evaluate: Callable[[TrainedExits], dict[str, Any]] | None,
        initial: TrainedExits | None,
    ):
        settings = {"exits": dataclasses.asdict(exits), "options": dataclasses.asdict(options)}
        super().__init__(lm, vocabulary, stream, data, settings)
        self.exits, self.options, self._evaluate, self._initial = exits, options, evaluate, initial

    def init(self, key: jax.Array) -> Any:
        """The heads' parameters, float32."""
        if self._initial is not None:
            return nnx.state(heads_of(self.exits, self._initial.parameters, jnp.float32))
        seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
        model = merge_model(self.lm.config, self.lm.weights)
        return nnx.state(initial_heads(self.exits, model.final_scale, seed))

    def loss(
        self, params: Any, constants: dict[str, Any], batch: Activations, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean divergence over exits, with each exit's agreement."""
        del step
        heads = nnx.merge(exit_graph(self.exits), params)
        normed = rms_norm(batch.final, constants["final_norm"], self.lm.config.norm_eps)
        weight, names = batch.weight, [f"agreement_{depth}" for depth in self.exits.depths]
        if self.options.draft_steps > 1:
            features, valid = read_drafts(heads, batch, normed, self.options.draft_steps)
            weight = weight[None] * valid
            names = [f"agreement_draft_{step}" for step in range(1, len(features) + 1)]
        else:
            features = read_chunk_for_training(heads, batch, normed, constants["embed"], self.options.own_outputs, key)
        now = normed[:, -batch.weight.shape[1] :]
        losses, agreement, coverage = exit_losses(
            features.reshape(len(features), -1, features.shape[-1]),
            now.reshape(-1, now.shape[-1]),
            weight.reshape(*weight.shape[:-2], -1),
            constants["vocabulary"],
        )
        return jnp.mean(losses), dict(zip(names, agreement, strict=True)) | {"coverage": coverage}

    def evaluate(self, params: Any) -> dict[str, Any]:
        """Figures on held-out data, {} without any."""
        return {} if self._evaluate is None else self._evaluate(self.trained(params))

    def decayed(self, params: Any) -> Any:
        """Weight decay pulls maps towards zero, which is the model's own head; nothing else decays."""

        def decays(path: tuple[Any, ...], leaf: jax.Array) -> bool:
            text = jax.tree_util.keystr(path)
            return leaf.ndim >= 2 and "norm" not in text and any(n in text for n in ("map", "up", "down", "kernel"))

        return jax.tree_util.tree_map_with_path(decays, params)

    def trained(self, params: Any, metadata: dict[str, Any] | None = None) -> TrainedExits:
        """Parameters in training as exits to decode with."""
        parameters = parameters_of(nnx.merge(exit_graph(self.exits), params))
        return TrainedExits(
            self.exits, parameters, self.vocabulary, self.lm.fingerprint, metadata or {}, "exits in training"
        )


def history_for(exits: ExitsConfig) -> int:
    """H: how many steps before a chunk its exits read."""
    return exits.window + 1 if exits.kind == "attn" else 1


def read_chunk_for_training(
    heads: ExitHeads, batch: Activations, normed: jax.Array, embed: jax.Array, own_outputs: float, key: jax.Array
) -> jax.Array:
    """Features of every exit at every step of a chunk: [X, B, n, D + 1].

    For a share of the steps (`own_outputs`) one deeper exit's estimate stands for the position before, drawn anew for
    each step; exits that are not below it see the true final state there. An estimate gets no gradient. `normed`
    [B, H + n, D] is batch.final after the final norm, `embed` [V, D].
    """
    config = heads.config
    count, rows, steps, width = batch.states.shape
    flat = batch.states.reshape(count, rows * steps, width)
    if not config.needs_previous:
        return heads.features(flat, None, None).reshape(count, rows, steps, width + 1)
    position = batch.position[:, -steps:]
    first = position <= 0
    truth = jnp.where(first[..., None], 0, normed[:, -steps - 1 : -1])
    base = heads.base(flat)
    below, estimate = _estimates(base, batch, own_outputs, key)
    previous = jnp.where(below[..., None], estimate[None], truth[None]).reshape(flat.shape)
    context = None
    if heads.context is not None:
        of_truth, of_estimate = _contexts(heads, batch, normed, embed, truth, estimate, key)
        context = jnp.where(below[..., None], of_estimate[None], of_truth[None]).reshape(flat.shape)
    return heads.features(flat, previous, context, base).reshape(count, rows, steps, width + 1)


def read_drafts(
    heads: ExitHeads, batch: Activations, normed: jax.Array, draft_steps: int
) -> tuple[jax.Array, jax.Array]:
    """What a drafter, an exit at depth 0, makes of every step of a chunk when it goes on from its own outputs.

    At draft step s the position before is known by the features of draft step s - 1 there, the true final state only at
    step 1; the tokens in between are right, as those that matter are. (The idea of training on several steps of one's
    own outputs: EAGLE-3, arXiv 2503.01840, section 3.1.) `normed` [B, H + n, D] is batch.final after the final norm.

    Returns:
      (features [S, B, n, D + 1], valid [S, B, n] bool: whether the item and the chunk reach back far enough).
    """
    _, rows, steps, width = batch.states.shape
    position = batch.position[:, -steps:]
    state = batch.states[0].reshape(1, rows * steps, width)
    previous = jnp.where((position <= 0)[..., None], 0, normed[:, -steps - 1 : -1])
    found, valid = [], []
    for step in range(1, draft_steps + 1):
        features = heads.features(state, previous.reshape(state.shape), None)
        found.append(features.reshape(rows, steps, width + 1))
        valid.append((position >= step - 1) & (jnp.arange(steps)[None] >= step - 1))
        own = found[-1][..., :-1]
        previous = jnp.concatenate([jnp.zeros_like(own[:, :1]), own[:, :-1]], axis=1)
    return jnp.stack(found), jnp.stack(valid)


def _estimates(base: jax.Array, batch: Activations, own_outputs: float, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(which exits see an estimate [X, B, n], the estimate [B, n, D]), from what the heads' base gives."""
    count, rows, steps, width = batch.states.shape
    base = jax.lax.stop_gradient(base).reshape(count, rows, steps, width)
    base = jnp.concatenate([jnp.zeros_like(base[:, :, :1]), base[:, :, :-1]], axis=2)
    draw, which = jax.random.split(key)
    # The state before a chunk's first step is not at hand, nor is there one before an item's first.
    possible = (jnp.arange(steps)[None, :] > 0) & (batch.position[:, -steps:] > 0)
    owned = possible & (jax.random.uniform(draw, (rows, steps)) < own_outputs)
    source = jax.random.randint(which, (rows, steps), 0, count)
    estimate = jnp.take_along_axis(base, source[None, :, :, None], axis=0)[0]
    return owned[None] & (jnp.arange(count)[:, None, None] < source[None]), estimate


def _contexts(
    heads: ExitHeads,
    batch: Activations,
    normed: jax.Array,
    embed: jax.Array,
    truth: jax.Array,
    estimate: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The context layer at every step, with the true position before and with its estimate: two of [B, n, D].

    With an estimate the last few positions are not visible, as they are not committed yet.
    """
    layer, config = heads.context, heads.config
    assert layer is not None
    rows, steps, _ = truth.shape
    tokens = jnp.maximum(batch.token[:, 1:], 0)
    where = batch.position[:, 1:]
    seen = jnp.maximum(where, 0)
    before = jnp.where((where <= 0)[..., None], 0, normed[:, :-1])
    keys, values = layer.keys_values(layer.enter_rows(jnp.take(embed, tokens, axis=0), before), seen)
    here = jnp.take(embed, tokens[:, -steps:], axis=0)
    entered = jnp.concatenate([layer.enter_rows(here, truth), layer.enter_rows(here, estimate)], axis=1)
    own = jnp.concatenate([seen[:, -steps:]] * 2, axis=1)
    length = where.shape[1]
    step_of = jnp.arange(length - steps, length)
    distance = step_of[None, :, None] - jnp.arange(length)[None, None, :]
    same_item = (where[:, None, :] >= 0) & (where[:, -steps:, None] - where[:, None, :] == distance)
    visible = same_item & (distance > 0) & (distance <= config.window)
    hidden = jax.random.randint(jax.random.fold_in(key, 1), (rows, steps, 1), 1, 4)
    mask = jnp.concatenate([visible, visible & (distance > hidden)], axis=1)
    among = jnp.broadcast_to(jnp.eye(2 * steps, dtype=bool)[None], (rows, 2 * steps, 2 * steps))
    out = layer.output(entered, own, KeyValues(keys, values, mask), among)
    return out[:, :steps], out[:, steps:]


def draft_vocabulary(lm: LanguageModel, stream: Stream, size: int, tokens: int) -> np.ndarray:
    """The `size` tokens that the model gives most probability to, on so many `tokens` of what the stream makes.

    The stream is restarted where it stood.

    Returns:
      [V'] int32, ascending. EOS tokens are always among them; of tokens never expected the lower ids come first.
    """
    begin = stream.cursor
    expected, counted = np.zeros(lm.config.vocab_size), 0
    while counted < tokens and not stream.done:
        activations, learnt = stream.next()
        expected += np.asarray(_expected(lm.config, stream.weights, activations.final, activations.weight))
        counted += learnt
    stream.restart(begin)
    expected[list(lm.eos_ids)] = np.inf
    # Rounded, so that which of two rare tokens is in does not hang on the last bit.
    order = np.lexsort((np.arange(len(expected)), -np.round(expected, 3)))
    return np.sort(order[:size]).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _expected(config: Any, weights: Any, final: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over the steps of a chunk of the final distribution: [V]."""
    model = merge_model(config, weights)
    now = final[:, -weight.shape[1] :]

    def one_step(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, weight = part
        return total + jnp.sum(jax.nn.softmax(model.logits(hidden)) * weight[:, None], axis=0), None

    zero = jnp.zeros(config.vocab_size)
    return jax.lax.scan(one_step, zero, (jnp.swapaxes(now, 0, 1), jnp.swapaxes(weight, 0, 1)))[0]
