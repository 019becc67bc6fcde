"""The LayerSkip loss in NumPy and plain loops: one sequence, layer, head and position at a time, in float64."""

from __future__ import annotations

import numpy as np

from dex_jax.config import ModelConfig
from dex_jax.training.layerskip import LayerSkip


def depth_states(config: ModelConfig, params: dict, tokens: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """tokens [B, S], kept [L, B] -> hidden states at depth 1 .. L, [L, B, S, D]."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    states = []
    for b, row in enumerate(tokens):
        x, found = params["embed"][row], []
        for number in range(config.num_layers):
            if kept[number, b]:
                weights = {
                    name.split(".")[-1]: value for name, value in params.items() if name.startswith(f"layers.{number}.")
                }
                x = _run_layer(config, weights, x)
            found.append(x)
        states.append(found)
    return np.asarray(states).swapaxes(0, 1)


def exit_loss(config: ModelConfig, params: dict, hidden: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy of [B, S, D] through the final norm and unembedding."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    total = 0.0
    for x, target in zip(hidden.reshape(-1, config.width), targets.reshape(-1), strict=True):
        logits = params["embed" if config.tied else "unembed"] @ _norm(x, params["final_norm"], config.norm_eps)
        total -= np.log(_softmax(logits)[target])
    return total / targets.size


def exit_weights(recipe: LayerSkip, num_layers: int, step: int, steps: int) -> list[float]:
    """The paper's scale, layer by layer with its own index l, under a curriculum that always keeps the last layer."""
    last = num_layers - 1
    weights = []
    for number in range(num_layers):
        if number < last:
            weight = recipe.exit_scale * sum(range(number + 1))
        else:
            weight = last + recipe.exit_scale * sum(range(last))
        if recipe.curriculum == "rotational":
            active = step % recipe.period == number % recipe.period
        elif recipe.curriculum == "gradual":
            # One more layer from the top down every T / (2 L) steps.
            active = last - number <= step // int(np.ceil(steps / (2 * num_layers)))
        else:
            active = True
        weights.append(weight if active or number == last else 0.0)
    return [weight / sum(weights) for weight in weights]


def _run_layer(config: ModelConfig, weights: dict, x: np.ndarray) -> np.ndarray:
    length, groups, width = len(x), config.num_kv_heads, config.head_dim
    normed = np.stack([_norm(row, weights["attention_norm"], config.norm_eps) for row in x])
    heads = (normed @ weights["qkv"].T + weights.get("qkv_bias", 0.0)).reshape(length, -1, width)
    queries, keys, values = np.split(heads, [config.num_heads, config.num_heads + groups], axis=1)
    attended = np.zeros((length, config.num_heads, width))
    for head in range(config.num_heads):
        group = head // (config.num_heads // groups)
        turned = [_turned(config, _normed_head(config, weights, "k_norm", keys[j, group]), j) for j in range(length)]
        for i in range(length):
            query = _turned(config, _normed_head(config, weights, "q_norm", queries[i, head]), i)
            shares = _softmax(np.array([query @ turned[j] / width**0.5 for j in range(i + 1)]))
            attended[i, head] = sum(share * values[j, group] for j, share in enumerate(shares))
    x = x + attended.reshape(length, -1) @ weights["out"].T + weights.get("out_bias", 0.0)
    normed = np.stack([_norm(row, weights["mlp_norm"], config.norm_eps) for row in x])
    gate, up = np.split(normed @ weights["gate_up"].T, 2, axis=1)
    return x + (gate / (1 + np.exp(-gate)) * up) @ weights["down"].T


def _normed_head(config: ModelConfig, weights: dict, name: str, head: np.ndarray) -> np.ndarray:
    return _norm(head, weights[name], config.norm_eps) if name in weights else head


def _turned(config: ModelConfig, head: np.ndarray, position: int) -> np.ndarray:
    half = config.head_dim // 2
    angles = position * config.rope_theta ** (-np.arange(half) / half)
    turned = (head[:half] + 1j * head[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def _norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2) + eps) * scale


def _softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max())
    return exponentials / exponentials.sum()
