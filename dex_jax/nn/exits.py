"""Exit heads, which turn hidden states at intermediate depths into features for the model's own unembedding.

All exits of a model are of one kind and stacked, so that they run as one vmapped call. Letters: X exits, N rows,
D width, V' columns of the (draft) vocabulary, C = 2 D inputs of the context layer, S window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import ExitsConfig, ModelConfig
from dex_jax.nn.attention import KeyValues, attend
from dex_jax.nn.layers import DecoderLayer, Init, linear, names_in, recorded, rms_norm
from dex_jax.nn.packed import Packed, as_products_read, to_int8
from dex_jax.nn.rotary import rope_table


class ExitHeads(nnx.Module):
    """The heads of X exits, stacked along the first axis of every parameter but the context layer's.

    At the start (maps zero, scales the model's final norm) every kind gives what "shared" gives, but at depth 0.

    Args:
      config: shapes.
      init: (name, shape, kind) -> array; kinds are "norm" (the model's final norm, repeated), "scale", "zero" and
        "kernel" (as in nn.transformer).
    """

    def __init__(self, config: ExitsConfig, init: Init):
        c, count = config, len(config.depths)

        def stacked(name: str, *shape: int, kind: str = "zero") -> nnx.Param:
            return nnx.Param(init(name, (count, *shape), kind))

        self.config = config
        self.norm = stacked("norm", c.width, kind="norm")
        self.map = stacked("map", c.width, c.width) if c.kind in ("linear", "mlp", "attn") else None
        self.previous_norm = stacked("previous_norm", c.width, kind="scale") if c.fused else None
        self.previous_map = stacked("previous_map", c.width, c.width) if c.fused else None
        inputs = c.width * (2 if c.fused else 1)
        mlp = c.kind == "mlp"
        self.gate_up = stacked("gate_up", 2 * c.hidden, inputs, kind="kernel") if mlp else None
        self.down = stacked("down", c.width, c.hidden) if mlp else None
        self.rest = stacked("rest", c.width) if c.draft_size is not None else None
        self.rest_bias = stacked("rest_bias", kind="zero") if c.draft_size is not None else None
        self.context = Context(c, init) if c.kind == "attn" else None
        self.context_map = stacked("context_map", c.width, c.width) if c.kind == "attn" else None

    def base(self, states: jax.Array) -> jax.Array:
        """Return the features from a node's own state alone: [X, N, D] -> [X, N, D] in the states' dtype.

        They estimate what the final norm gives at depth L, and stand in for it where a parent has not got there yet.
        """
        normed = self._normed(states)
        scaled = normed * self.norm[...][:, None].astype(normed.dtype)
        return scaled + self._own_map(normed)

    def features(
        self, states: jax.Array, previous: jax.Array | None, context: jax.Array | None, base: jax.Array | None = None
    ) -> jax.Array:
        """Return the features of states [X, N, D] at the exits' depths, and a logit behind them: [X, N, D + 1].

        The logit is that of all tokens outside the draft vocabulary together (-inf without one). `previous` [X, N, D]
        are features after the final norm at the position before, or their estimate, None without `needs_previous`;
        `context` [X, N, D] comes from `Context.output`, None unless the kind is "attn"; `base` is `base(states)` where
        the caller has it already.
        """
        normed = self._normed(states)
        out = self.base(states) if base is None else base
        inputs = normed
        if self.previous_norm is not None:
            assert previous is not None
            before = self._normed(previous) * self.previous_norm[...][:, None].astype(previous.dtype)
            out = out + _stacked_linear(before, self.previous_map)
            inputs = jnp.concatenate([normed, before], axis=-1)
        if self.gate_up is not None:
            gate, up = jnp.split(_stacked_linear(inputs, self.gate_up), 2, axis=-1)
            out = out + _stacked_linear(jax.nn.silu(gate) * up, self.down)
        if context is not None:
            out = out + _stacked_linear(context, self.context_map)
        return jnp.concatenate([out, self._rest(out)[..., None]], axis=-1)

    def _normed(self, states: jax.Array) -> jax.Array:
        return rms_norm(states, jnp.ones(states.shape[-1:], states.dtype), self.config.norm_eps)

    def _own_map(self, normed: jax.Array) -> jax.Array:
        return jnp.zeros_like(normed) if self.map is None else _stacked_linear(normed, self.map)

    def _rest(self, features: jax.Array) -> jax.Array:
        if self.rest is None or self.rest_bias is None:
            return jnp.full(features.shape[:-1], -jnp.inf, features.dtype)
        weight = self.rest[...].astype(features.dtype)
        return jnp.einsum("xnd,xd->xn", features, weight) + self.rest_bias[...][:, None].astype(features.dtype)


class Context(nnx.Module):
    """A light decoder layer that reads (token embedding, previous position's features), for exits of kind "attn".

    All names that it passes to `init` begin with "context.".
    """

    def __init__(self, config: ExitsConfig, init: Init):
        self.enter = nnx.Param(init("context.enter", (config.width, 2 * config.width), "kernel"))
        self.leave = nnx.Param(init("context.leave", (config.width,), "scale"))
        layer = _layer_config(config)
        self.layer = DecoderLayer(layer, lambda name, shape, kind: init(f"context.layer.{name}", shape, kind))
        self.config = config

    def enter_rows(self, embedded: jax.Array, previous: jax.Array) -> jax.Array:
        """Return the layer's input [B, R, D] from token embeddings and previous features, both [B, R, D]."""
        ones = jnp.ones(embedded.shape[-1:], embedded.dtype)
        both = [rms_norm(x, ones, self.config.norm_eps) for x in (embedded, previous)]
        return linear(jnp.concatenate(both, axis=-1), self.enter[...])

    def keys_values(self, entered: jax.Array, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return keys and values of rows [B, R, D] at absolute positions [B, R]: two of [B, G, R, d]."""
        _, keys, values = self.layer.project(entered, rope_table(position, self.layer.config))
        return keys, values

    def output(self, entered: jax.Array, position: jax.Array, before: KeyValues | None, among: jax.Array) -> jax.Array:
        """Run the layer over rows [B, R, D] from `enter_rows` at positions [B, R] int32: [B, R, D] for the exits.

        `before` are keys and values of committed positions with the rows' mask; `among` [B, R, R] bool says which rows
        see which, and every row sees itself.
        """
        queries, keys, values = self.layer.project(entered, rope_table(position, self.layer.config))
        sources = [KeyValues(keys, values, among)]
        if before is not None:
            sources.insert(0, before)
        hidden = self.layer.finish(entered, attend(queries, sources))
        return rms_norm(hidden, self.leave[...], self.config.norm_eps)


class ContextMemory(NamedTuple):
    """Keys and values of the last S committed positions in a ring: position n is at n mod S."""

    keys: jax.Array  # [B, G, S, d]
    values: jax.Array  # [B, G, S, d]
    position: jax.Array  # [B, S] int32, the position that each entry holds, -1 for none


def _layer_config(config: ExitsConfig) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=1,
        num_layers=1,
        width=config.width,
        num_heads=config.heads,
        num_kv_heads=config.heads,
        head_dim=config.head_dim,
        mlp_width=config.hidden,
        context=config.window,
        norm_eps=config.norm_eps,
    )


def _stacked_linear(x: jax.Array, kernel: nnx.Param | None) -> jax.Array:
    """Multiply x [X, N, in] by the transposes of kernels [X, out, in]: [X, N, out]."""
    assert kernel is not None
    return jax.vmap(linear)(x, kernel[...])


def exit_parameters(config: ExitsConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, kind) of every parameter, by name."""
    return recorded(functools.partial(ExitHeads, config))


def initial_heads(config: ExitsConfig, final_norm: np.ndarray | jax.Array, seed: int = 0) -> ExitHeads:
    """Return untrained heads in float32: every exit gives what the model's own final norm, of scale [D], would.

    At depth 0 that would be the token itself again, with certainty where embeddings are tied, which takes a long
    training to unlearn; an exit there starts from zero. `seed` draws the kernels that do not start at zero.
    """
    order = {name: i for i, name in enumerate(exit_parameters(config))}

    def init(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
        if kind == "norm":
            opinion = jnp.asarray([depth > 0 for depth in config.depths], jnp.float32)[:, None]
            return jnp.broadcast_to(jnp.asarray(final_norm, jnp.float32), shape) * opinion
        if kind == "scale":
            return jnp.ones(shape, jnp.float32)
        if kind == "zero":
            return jnp.zeros(shape, jnp.float32)
        rng = np.random.default_rng([seed, order[name]])
        return jnp.asarray(rng.standard_normal(shape) * shape[-1] ** -0.5, jnp.float32)

    return ExitHeads(config, init)


def select_exits(
    config: ExitsConfig, parameters: Mapping[str, np.ndarray], depths: tuple[int, ...]
) -> tuple[ExitsConfig, dict[str, np.ndarray]]:
    """Return (config, parameters) of the heads at some trained depths, ascending, and of the context layer."""
    rows = [config.depths.index(depth) for depth in depths]
    kept = {name: value if name.startswith("context.") else value[rows] for name, value in parameters.items()}
    return dataclasses.replace(config, depths=depths), kept


def head_at(config: ExitsConfig, parameters: dict[str, jax.Array], place: jax.Array) -> ExitHeads:
    """Return the exit at a place (int32) that only the running program knows, as the one exit of a module."""
    own = {name: value if name.startswith("context.") else value[place][None] for name, value in parameters.items()}
    return ExitHeads(dataclasses.replace(config, depths=(1,)), lambda name, shape, kind: own[name])


def heads_of(config: ExitsConfig, parameters: Mapping[str, np.ndarray | Packed], dtype: jnp.dtype) -> ExitHeads:
    """Build the module over given parameters (name -> array), in `dtype` where they are not packed."""

    def given(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
        found = parameters[name]
        return jax.tree.map(jnp.asarray, found) if isinstance(found, Packed) else jnp.asarray(found, dtype)

    return ExitHeads(config, given)


def in_int8(parameters: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray | Packed]:
    """Round the kernels [1, out, in] among a drafter's parameters to 8 bits."""
    return {
        name: jax.tree.map(lambda part: part[None], as_products_read(to_int8(value[0]))) if value.ndim == 3 else value
        for name, value in parameters.items()
    }


def parameters_of(heads: ExitHeads) -> dict[str, np.ndarray]:
    """Return every parameter as a float32 array on the host, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(heads))
    return {".".join(names_in(path)): np.asarray(leaf, np.float32) for path, leaf in leaves}


@functools.lru_cache(maxsize=64)
def exit_graph(config: ExitsConfig) -> Any:
    """Return the nnx graph definition of the heads, without any array."""
    return nnx.split(nnx.eval_shape(lambda: ExitHeads(config, lambda name, shape, kind: jnp.zeros(shape))))[0]
