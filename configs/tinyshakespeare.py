"""A small model from scratch on the text of tiny Shakespeare, by the LayerSkip recipe or (recipe=None) without it.

Measured: about 20 minutes on one CPU core, with the recipe or without.
"""

from dex_jax.config import ModelConfig
from dex_jax.training.config import TrainConfig
from dex_jax.training.layerskip import LayerSkip
from dex_jax.training.whole_model import WholeModelConfig

config = WholeModelConfig(
    # 1.8 million parameters.
    model=ModelConfig(
        family="llama",
        vocab_size=512,
        num_layers=8,
        width=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        mlp_width=384,
        context=256,
        tied=True,
    ),
    data="../shared/data/tinyshakespeare/input.txt",
    window=128,
    recipe="layerskip",
    layerskip=LayerSkip(dropout=0.1, exit_scale=0.2, curriculum="rotational", period=4),
    explorers=(2, 3, 4, 8),
    # 700 steps of 4,096 tokens, at 1.4 seconds of one core each: 2.9 million tokens, the text six times.
    train=TrainConfig(
        steps=700,
        batch=32,
        learning_rate=2e-3,
        warmup_steps=50,
        weight_decay=0.1,
        clip_norm=1.0,
        checkpoint_every=100,
        eval_every=100,
    ),
)
