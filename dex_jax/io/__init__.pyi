from dex_jax.io.checkpoint import Checkpoint
from dex_jax.io.opening import ALIASES, open_checkpoint
from dex_jax.io.stream import TextStream
from dex_jax.io.tokenizer import Tokenizer

__all__ = ["ALIASES", "Checkpoint", "TextStream", "Tokenizer", "open_checkpoint"]
