"""EAGLE-3 heads (Li et al., arXiv 2503.01840): one decoder layer over tokens and earlier hidden states of a model.

Letters: B sequences, R rows of each, D width of the model, D' width of the head, V' draft vocabulary, n states.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dex_jax.config import EagleConfig
from dex_jax.nn.kinds import kind_table
from dex_jax.nn.layers import DecoderLayer, Init, linear, recorded, rms_norm
from dex_jax.nn.transformer import module_list


class EagleLayer(DecoderLayer):
    """A decoder layer over token embeddings beside features, [B, R, 2 D']; it returns features [B, R, D']."""

    def __init__(self, config: EagleConfig, init: Init):
        width = config.layer.width

        def wider(name: str, shape: tuple[int, ...], kind: str) -> jax.Array:
            return init(name, (shape[0], 2 * width) if name == "qkv" else shape, kind)

        super().__init__(config.layer, wider)
        self.token_norm = nnx.Param(init("token_norm", (width,), "scale"))
        self.norm_before_residual = config.norm_before_residual

    def entered(self, x: jax.Array) -> jax.Array:
        token, features = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([self._normed(token, self.token_norm), self._normed(features, self.attention_norm)], -1)

    def residual(self, x: jax.Array) -> jax.Array:
        features = jnp.split(x, 2, axis=-1)[1]
        return self._normed(features, self.attention_norm) if self.norm_before_residual else features


class Eagle(nnx.Module):
    """An EAGLE-3 head; `config`, `kinds` and `layers` are those of a model of one layer (nn/forward.py)."""

    def __init__(self, config: EagleConfig, init: Init):
        layer, states = config.layer, len(config.reads) * config.state_width
        self.eagle, self.config = config, layer
        self.kinds = kind_table(layer)
        self.fc = nnx.Param(init("fc", (layer.width, states), "kernel"))
        self.layers = module_list([EagleLayer(config, lambda name, *rest: init(f"layer.{name}", *rest))])
        self.norm = nnx.Param(init("norm", (layer.width,), "scale"))
        self.unembed = nnx.Param(init("unembed", (config.draft_size, layer.width), "kernel"))
        own = config.own_embedding
        self.embed = nnx.Param(init("embed", (layer.vocab_size, layer.width), "kernel")) if own else None
        normed = config.norm_states is not None
        self.states_norm = nnx.Param(init("states_norm", (states,), "scale")) if normed else None

    def joined(self, states: jax.Array) -> jax.Array:
        """Join states of the model at the depths `reads`, side by side, to features: [..., n D] -> [..., D']."""
        if self.states_norm is not None:
            count = len(self.eagle.reads) if self.eagle.norm_states == "each" else 1
            parts = zip(jnp.split(states, count, -1), jnp.split(self.states_norm[...], count), strict=True)
            states = jnp.concatenate([rms_norm(part, scale, self.config.norm_eps) for part, scale in parts], axis=-1)
        return linear(states, self.fc[...])

    def normed(self, features: jax.Array) -> jax.Array:
        """Apply the last norm: [..., D'] -> [..., D']."""
        return rms_norm(features, self.norm[...], self.config.norm_eps)

    def logits(self, normed: jax.Array) -> jax.Array:
        """Return the logits of normed features: [..., D'] -> [..., V'] float32."""
        return linear(normed, self.unembed[...], out_dtype=jnp.float32)


def eagle_parameters(config: EagleConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return (shape, kind) of every parameter, by name."""
    return recorded(functools.partial(Eagle, config))


def eagle_of(config: EagleConfig, parameters: dict[str, np.ndarray], dtype: jnp.dtype) -> Eagle:
    """Build the head over given parameters (name -> array), in `dtype`."""
    return Eagle(config, lambda name, shape, kind: jax.device_put(np.asarray(parameters[name], dtype)))


@functools.lru_cache(maxsize=16)
def eagle_graph(config: EagleConfig) -> Any:
    """Return the nnx graph definition of a head, without any array."""
    return nnx.split(nnx.eval_shape(lambda: Eagle(config, lambda name, shape, kind: jnp.zeros(shape))))[0]
