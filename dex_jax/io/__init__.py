"""Checkpoints, tokenizers and where they come from."""

from dex_jax.lazy import names

__getattr__, __dir__, __all__ = names(__name__, __file__)
